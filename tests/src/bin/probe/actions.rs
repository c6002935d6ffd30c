//! Things a test makes a container do: exit, wait, write, compute.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use brig_tests::pattern::{self, Checksum};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{ForkResult, Pid, fork, getpid};
use serde_json::{Value, json};

fn parse_signal(name: &str) -> Result<Signal> {
    if let Ok(number) = name.parse::<i32>() {
        return Signal::try_from(number).with_context(|| format!("no signal {number}"));
    }
    Signal::from_str(&format!("SIG{}", name.trim_start_matches("SIG")))
        .with_context(|| format!("no signal {name}"))
}

/// Ends by the signal's default action.
pub fn die(name: &str) -> Result<u8> {
    let chosen = parse_signal(name)?;
    if chosen != Signal::SIGKILL {
        // SAFETY: restores the default action; no handler code runs.
        unsafe { signal(chosen, SigHandler::SigDfl) }?;
    }
    kill(getpid(), chosen)?;
    // PID 1 of a namespace is spared by its own signals.
    anyhow::bail!("survived {chosen}")
}

/// Waits for the time, or for ever. SIGTERM ends it with 143 also as PID 1, for which the kernel
/// ignores signals that have no handler.
pub fn sleep(seconds: Option<u64>) -> Result<u8> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGALRM);
    signals.thread_block()?;
    if let Some(seconds) = seconds {
        nix::unistd::alarm::set(u32::try_from(seconds)?);
    }
    println!("sleeping");
    io::stdout().flush()?;
    Ok(match signals.wait()? {
        Signal::SIGTERM => 143,
        _ => 0,
    })
}

/// Says 'ready', waits for the signal, names it, exits with `code`.
pub fn trap(name: &str, code: u8) -> Result<u8> {
    let chosen = parse_signal(name)?;
    let mut signals = SigSet::empty();
    signals.add(chosen);
    signals.thread_block()?;
    println!("ready");
    io::stdout().flush()?;
    // Not sigwait: while that waits, /proc shows the signal as not blocked (see await_trap).
    let received = SignalFd::new(&signals)?
        .read_signal()?
        .context("no signal")?;
    println!("{}", Signal::try_from(i32::try_from(received.ssi_signo)?)?);
    Ok(code)
}

/// Writes the pattern and exits at once.
pub fn flood(bytes: u64, to_stderr: bool) -> Result<u8> {
    // Not Rust's line-buffered handle: the writes are what a program that floods would do.
    let fd = if to_stderr {
        io::stderr().as_fd().try_clone_to_owned()
    } else {
        io::stdout().as_fd().try_clone_to_owned()
    }?;
    pattern::write(&mut File::from(fd), bytes)?;
    Ok(0)
}

/// Bytes and checksum of stdin.
pub fn sum() -> Result<Value> {
    let mut sum = Checksum::default();
    io::copy(&mut io::stdin().lock(), &mut sum)?;
    let bytes = sum.bytes;
    Ok(json!({"bytes": bytes, "sha256": sum.hex()}))
}

/// Copies stdin to stdout until its end.
pub fn cat() -> Result<u8> {
    let mut input = io::stdin().lock();
    let mut output = io::stdout().lock();
    let mut block = vec![0u8; 65536];
    loop {
        let length = input.read(&mut block)?;
        if length == 0 {
            output.flush()?;
            return Ok(0);
        }
        output.write_all(&block[..length])?;
        output.flush()?;
    }
}

/// Leaves sleeping children, then waits itself.
pub fn spawn_background(count: usize) -> Result<u8> {
    for _ in 0..count {
        // SAFETY: this process has one thread; the child only waits.
        if let ForkResult::Child = unsafe { fork() }? {
            loop {
                nix::unistd::pause();
            }
        }
    }
    println!("spawned {count}");
    io::stdout().flush()?;
    sleep(None)
}

/// How many of `count` children could be made at the same time.
pub fn fork_bomb(count: usize) -> Value {
    let mut children: Vec<Pid> = Vec::new();
    let mut error = None;
    for _ in 0..count {
        // SAFETY: this process has one thread; the child only waits.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => loop {
                nix::unistd::pause();
            },
            Ok(ForkResult::Parent { child }) => children.push(child),
            Err(errno) => {
                error = Some(format!("{errno:?}"));
                break;
            }
        }
    }
    let made = children.len();
    for child in children {
        let _ = kill(child, Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(child, None);
    }
    json!({"made": made, "error": error})
}

/// The CPU time this process got while it computed for `millis` of wall time.
pub fn burn(millis: u64) -> Result<Value> {
    let start = Instant::now();
    let end = Duration::from_millis(millis);
    let mut pattern = pattern::Pattern::default();
    let mut block = vec![0u8; 65536];
    let mut rounds = 0u64;
    while start.elapsed() < end {
        pattern.fill(&mut block);
        rounds += 1;
    }
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: nix::sys::time::TimeVal| {
        i128::from(time.tv_sec()) * 1_000_000 + i128::from(time.tv_usec())
    };
    let cpu = micros(usage.user_time()) + micros(usage.system_time());
    Ok(json!({
        "wall_ms": u64::try_from(start.elapsed().as_millis())?,
        "cpu_ms": u64::try_from(cpu / 1000)?,
        "rounds": rounds,
    }))
}

/// Dials TCP, sends a request line and prints the answer.
pub fn connect(target: &str) -> Result<u8> {
    let mut stream =
        TcpStream::connect(target).with_context(|| format!("cannot connect to {target}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    io::copy(&mut stream, &mut io::stdout().lock())?;
    Ok(0)
}

/// Notices how long it did not run: says 'ready', and at SIGTERM the longest gap between two looks
/// at the clock.
pub fn longest_gap() -> Result<u8> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    println!("ready");
    io::stdout().flush()?;
    let mut longest = Duration::ZERO;
    let mut last = Instant::now();
    loop {
        let pause = libc::timespec {
            tv_sec: 0,
            tv_nsec: 20_000_000,
        };
        // SAFETY: both pointers are to live values of the right type; no signal details are asked for.
        let received =
            unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), &raw const pause) };
        longest = longest.max(last.elapsed());
        last = Instant::now();
        if received == libc::SIGTERM {
            println!(
                "{}",
                json!({"longest_gap_ms": u64::try_from(longest.as_millis())?})
            );
            return Ok(0);
        }
    }
}

/// Returns once the container's init waits for the signal, so that it may be sent.
pub fn await_trap(name: &str) -> Result<u8> {
    let bit = 1u64 << (u32::try_from(parse_signal(name)? as i32)? - 1);
    loop {
        let status = std::fs::read_to_string("/proc/1/status")?;
        let blocked = status
            .lines()
            .find_map(|line| line.strip_prefix("SigBlk:"))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .context("/proc/1/status has no SigBlk")?;
        if blocked & bit != 0 {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Answers each datagram with the text, for ever, IPv4 and IPv6.
pub fn serve_udp(port: u16, text: &str) -> Result<u8> {
    let socket =
        UdpSocket::bind(("::", port)).with_context(|| format!("cannot listen on {port}"))?;
    println!("ready");
    loop {
        let (_, from) = socket.recv_from(&mut [0; 2048])?;
        // A client that leaves early is not our failure.
        let _ = socket.send_to(text.as_bytes(), from);
    }
}

/// Answers each TCP connection with the text, for ever.
pub fn serve(port: u16, text: &str) -> Result<u8> {
    let listener =
        TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("cannot listen on {port}"))?;
    for stream in listener.incoming() {
        // A client that leaves early is not our failure.
        let _ = stream.and_then(|mut stream| stream.write_all(text.as_bytes()));
    }
    Ok(0)
}
