//! The control protocol before a VM runs; the rest needs KVM and is tested in the node.

use std::thread::JoinHandle;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use slog::{Discard, o};

use super::*;

struct Shim {
    control: OwnedFd,
    server: JoinHandle<i32>,
}

fn shim() -> Shim {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let log = Logger::root(Discard, o!());
    let server =
        std::thread::spawn(move || serve(theirs, Clock::start(), vec![(mark::VMM_MAIN, 1)], log));
    Shim {
        control: ours,
        server,
    }
}

impl Shim {
    fn ask(&self, id: u64, body: RequestBody) -> Reply {
        control::send(self.control.as_fd(), &Request { id, body }, &[]).unwrap();
        self.reply()
    }

    fn reply(&self) -> Reply {
        match control::receive::<FromVmm>(self.control.as_fd()) {
            Ok(Some((FromVmm::Reply(reply), _))) => reply,
            other => panic!("expected a reply, got {other:?}"),
        }
    }
}

fn start(vcpus: u8) -> RequestBody {
    RequestBody::Start(Box::new(VmConfig {
        vcpus,
        max_vcpus: 0,
        memory_bytes: 128 << 20,
        max_memory_bytes: 0,
        kvm: 0,
        kernel: 1,
        initramfs: 2,
        cmdline: String::new(),
        template: None,
        capture: None,
        agent: 3,
        nets: Vec::new(),
        disks: Vec::new(),
        share_tag: None,
        debug_console: false,
        debugger: false,
        allow_slow_kvm: true,
        passthrough: false,
        vhost: false,
        devices: Vec::new(),
    }))
}

#[test]
fn the_process_ends_when_the_control_socket_closes() {
    let Shim { control, server } = shim();
    drop(control);
    assert_eq!(server.join().unwrap(), exit::STOPPED);
}

#[test]
fn stop_is_answered_before_the_end() {
    let shim = shim();
    let reply = shim.ask(7, RequestBody::Stop);
    assert_eq!(reply.id, 7);
    assert!(reply.result.is_ok());
    match control::receive::<FromVmm>(shim.control.as_fd()) {
        Ok(Some((FromVmm::Event(Event::Ended { code, reason }), _))) => {
            assert_eq!(code, exit::STOPPED);
            assert!(reason.contains("stopped"));
        }
        other => panic!("expected the end, got {other:?}"),
    }
    assert_eq!(shim.server.join().unwrap(), exit::STOPPED);
}

#[test]
fn requests_for_a_vm_are_refused_before_start_but_marks_are_told() {
    let shim = shim();
    let error = shim
        .ask(1, RequestBody::CloseStream { stream: 1 })
        .result
        .unwrap_err();
    assert_eq!(error.kind, ErrorKind::State);
    match shim.ask(2, RequestBody::Counters).result {
        Ok(ReplyBody::Counters(counters)) => {
            assert_eq!(counters.marks, [(mark::VMM_MAIN, 1)]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_malformed_message_is_answered_and_the_process_goes_on() {
    let shim = shim();
    nix::unistd::write(&shim.control, b"{\"id\":1").unwrap();
    let reply = shim.reply();
    assert_eq!(reply.id, 0);
    assert_eq!(reply.result.unwrap_err().kind, ErrorKind::Invalid);
    assert!(shim.ask(2, RequestBody::Stop).result.is_ok());
}

#[test]
fn a_wrong_configuration_is_refused_in_a_sentence_and_ends_the_process() {
    let shim = shim();
    let error = shim.ask(1, start(0)).result.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Invalid);
    assert!(error.message.contains("vCPUs"), "{}", error.message);
    assert_eq!(shim.server.join().unwrap(), exit::INTERNAL);
}

#[test]
fn a_start_without_its_descriptors_names_the_missing_one() {
    let shim = shim();
    let error = shim.ask(1, start(1)).result.unwrap_err();
    assert!(error.message.contains("kvm"), "{}", error.message);
}
