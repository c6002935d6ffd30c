//! Boots one VM as the shim would, and prints what it says: the component test driver `boot`.
//!
//! ```text
//! boot --vmm PATH --kernel PATH --initramfs PATH [--memory MIB] [--vcpus N] [--cmdline TEXT]
//!      [--debug] [--share] [--disk PATH] [--tap NAME] [--counters] [--seconds N] [--stream PORT] [--log PATH]
//! ```
//!
//! Exits with the VMM's own exit code; 124 when `--seconds` are over first. `--counters` asks for
//! exit counters at each boot mark and when the agent connects. `--stream PORT` opens a stream with
//! the bytes `hello\n` as header when the agent has connected, and prints what it receives.
//! `--tap` makes a tap of that name, up, with MTU 1500.
//! A development tool: it trusts its arguments.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use brig_hypervisor::control::{
    self, DiskConfig, DiskPiece, Event, FromVmm, NetConfig, ReplyBody, Request, RequestBody,
    StreamConfig, VmConfig,
};
use brig_hypervisor::launch::{LaunchOptions, VmmExit, launch};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

struct Options {
    vmm: String,
    kernel: String,
    initramfs: String,
    memory: u64,
    vcpus: u8,
    cmdline: String,
    debug: bool,
    share: bool,
    disk: Option<String>,
    tap: Option<String>,
    counters: bool,
    seconds: u64,
    stream: Option<u32>,
    log: Option<String>,
}

fn options() -> Options {
    let mut options = Options {
        vmm: "/host/bin/brig-vmm".into(),
        kernel: "/host/assets/kernel/vmlinux".into(),
        initramfs: String::new(),
        memory: 256,
        vcpus: 1,
        cmdline: String::new(),
        debug: false,
        share: false,
        disk: None,
        tap: None,
        counters: false,
        seconds: 120,
        stream: None,
        log: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().expect("a value");
        match argument.as_str() {
            "--vmm" => options.vmm = value(),
            "--kernel" => options.kernel = value(),
            "--initramfs" => options.initramfs = value(),
            "--memory" => options.memory = value().parse().expect("MiB"),
            "--vcpus" => options.vcpus = value().parse().expect("a number"),
            "--cmdline" => options.cmdline = value(),
            "--debug" => options.debug = true,
            "--share" => options.share = true,
            "--disk" => options.disk = Some(value()),
            "--tap" => options.tap = Some(value()),
            "--counters" => options.counters = true,
            "--seconds" => options.seconds = value().parse().expect("seconds"),
            "--stream" => options.stream = Some(value().parse().expect("a port")),
            "--log" => options.log = Some(value()),
            other => panic!("unknown argument {other}"),
        }
    }
    options
}

fn open_tap(name: &str) -> File {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request[16..18].copy_from_slice(&u16::try_from(flags).expect("flags").to_le_bytes());
    // SAFETY: the request reads and writes a `struct ifreq`, which is 40 bytes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    std::process::Command::new("ip")
        .args(["link", "set", name, "up"])
        .status()
        .expect("ip");
    file
}

struct Driver {
    control: OwnedFd,
    next: u64,
    start: Instant,
}

impl Driver {
    fn say(&self, text: &str) {
        println!("{:8.3} {text}", self.start.elapsed().as_secs_f64());
    }

    fn request(&mut self, body: RequestBody, fds: &[BorrowedFd<'_>]) {
        self.next += 1;
        let id = self.next;
        control::send(self.control.as_fd(), &Request { id, body }, fds).expect("send");
    }
}

fn main() {
    let options = options();
    let stderr = match &options.log {
        Some(path) => OwnedFd::from(File::create(path).expect("log")),
        None => std::io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .expect("stderr"),
    };
    let start = Instant::now();
    let mut process = launch(LaunchOptions {
        vmm: (&options.vmm).into(),
        netns: None,
        cgroup: None,
        stderr,
        max_files: 65536,
    })
    .expect("launch");
    let mut driver = Driver {
        control: process.take_control().expect("control"),
        next: 0,
        start,
    };
    process.wait_jailed().expect("jail");
    driver.say(&format!("jailed, pid {}", process.pid()));

    let (agent, vmm_end) = UnixStream::pair().expect("socketpair");
    let kvm = File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("/dev/kvm");
    let kernel = File::open(&options.kernel).expect("kernel");
    let initramfs = File::open(&options.initramfs).expect("initramfs");
    let disk = options.disk.as_ref().map(|path| {
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("disk")
    });
    let mut fds = vec![
        kvm.as_fd(),
        kernel.as_fd(),
        initramfs.as_fd(),
        vmm_end.as_fd(),
    ];
    fds.extend(disk.as_ref().map(AsFd::as_fd));
    let tap = options.tap.as_deref().map(open_tap);
    let tap_index = fds.len();
    fds.extend(tap.as_ref().map(AsFd::as_fd));
    driver.request(
        RequestBody::Start(Box::new(VmConfig {
            vcpus: options.vcpus,
            max_vcpus: 0,
            memory_bytes: options.memory << 20,
            max_memory_bytes: 0,
            kvm: 0,
            kernel: 1,
            initramfs: 2,
            cmdline: options.cmdline.clone(),
            template: None,
            capture: None,
            agent: 3,
            nets: tap
                .iter()
                .map(|_| NetConfig {
                    taps: vec![tap_index],
                    vhosts: Vec::new(),
                    mac: [2, 0, 0, 0, 0, 1],
                    mtu: 1500,
                })
                .collect(),
            disks: disk
                .iter()
                .map(|_| DiskConfig {
                    pieces: vec![DiskPiece::whole(4)],
                    readonly: false,
                    serial: "disk0".into(),
                    block_size: 512,
                })
                .collect(),
            share_tag: options.share.then(|| "brig".into()),
            debug_console: options.debug,
            debugger: false,
            allow_slow_kvm: false,
            passthrough: false,
            vhost: false,
            devices: Vec::new(),
        })),
        &fds,
    );
    drop(vmm_end);
    serve(&mut driver, &options, &agent);
    let code = match process.wait().expect("wait") {
        VmmExit::Code(code) => code,
        VmmExit::Signal(signal) => 128 + signal,
    };
    driver.say(&format!("brig-vmm exited with {code}"));
    std::process::exit(code);
}

fn serve(driver: &mut Driver, options: &Options, agent: &UnixStream) {
    let deadline = driver.start + Duration::from_secs(options.seconds);
    let mut agent_open = true;
    let mut stream: Option<UnixStream> = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            driver.say("time is over");
            std::process::exit(124);
        }
        let mut fds = vec![PollFd::new(driver.control.as_fd(), PollFlags::POLLIN)];
        if agent_open {
            fds.push(PollFd::new(agent.as_fd(), PollFlags::POLLIN));
        }
        if let Some(stream) = &stream {
            fds.push(PollFd::new(stream.as_fd(), PollFlags::POLLIN));
        }
        let timeout = PollTimeout::try_from(left.min(Duration::from_secs(60))).expect("timeout");
        poll(&mut fds, timeout).expect("poll");
        let ready: Vec<i32> = fds
            .iter()
            .filter(|fd| fd.revents().is_some_and(|events| !events.is_empty()))
            .map(|fd| fd.as_fd().as_raw_fd())
            .collect();
        if ready.contains(&agent.as_raw_fd()) {
            agent_open = print_bytes(driver, "agent", agent);
        }
        if let Some(open) = &stream
            && ready.contains(&open.as_raw_fd())
            && !print_bytes(driver, "stream", open)
        {
            stream = None;
        }
        if ready.contains(&driver.control.as_raw_fd()) && !event(driver, options, &mut stream) {
            return;
        }
    }
}

fn print_bytes(driver: &Driver, what: &str, mut from: &UnixStream) -> bool {
    let mut buffer = [0u8; 4096];
    let length = from.read(&mut buffer).unwrap_or(0);
    let text = String::from_utf8_lossy(&buffer[..length]);
    driver.say(&format!("{what}: {length} bytes {text:?}"));
    if what == "stream" && length > 0 {
        let _ = from.write_all(b"bye\n");
    }
    length > 0
}

/// Handles one message; false at the end.
fn event(driver: &mut Driver, options: &Options, stream: &mut Option<UnixStream>) -> bool {
    let message = match control::receive::<FromVmm>(driver.control.as_fd()) {
        Ok(Some((message, _))) => message,
        Ok(None) => return false,
        Err(error) => {
            driver.say(&format!("control: {error}"));
            return false;
        }
    };
    match message {
        FromVmm::Event(Event::Console { line }) => driver.say(&format!("| {line}")),
        FromVmm::Event(event) => {
            driver.say(&format!("{event:?}"));
            let connected = matches!(event, Event::AgentConnected { .. });
            if options.counters && (connected || matches!(event, Event::BootMark { .. })) {
                driver.request(RequestBody::Counters, &[]);
            }
            if let (true, Some(port)) = (connected, options.stream) {
                let (ours, theirs) = UnixStream::pair().expect("socketpair");
                let both = [theirs.as_fd(), theirs.as_fd()];
                driver.request(
                    RequestBody::OpenStream(StreamConfig {
                        stream: 17,
                        port,
                        header: b"hello\n".to_vec(),
                        input: Some(0),
                        output: Some(1),
                    }),
                    &both,
                );
                *stream = Some(ours);
            }
        }
        FromVmm::Reply(reply) => match reply.result {
            Ok(ReplyBody::Counters(counters)) => {
                let total: u64 = counters
                    .exits
                    .iter()
                    .filter(|(name, _)| !name.contains("port "))
                    .map(|(_, count)| count)
                    .sum();
                driver.say(&format!("exits {total}: {:?}", counters.exits));
                driver.say(&format!("marks {:x?}", counters.marks));
            }
            result => driver.say(&format!("reply {}: {result:?}", reply.id)),
        },
    }
    true
}
