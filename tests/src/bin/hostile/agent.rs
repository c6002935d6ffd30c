//! An agent that breaks the rules, in the place of Brig's: it speaks ttrpc frames itself over the one vsock stream
//! that a guest may open. It answers as an honest agent would, but for what its attack leaves out, and attacks once
//! a container has been started.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

use crate::port;

/// Where an initramfs names the attack.
pub const FILE: &str = "/agent-attack";

/// Host's context id and the port of the agent's connection.
const HOST: (u32, u32) = (2, 1024);
const HEADER: usize = 10;
/// ttrpc's types of frames.
const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// How an agent misbehaves.
struct Attack {
    name: &'static str,
    /// Methods that are never answered.
    silent: &'static [&'static str],
    /// What is sent after the start, by the numbers of the calls for events and of the start.
    bytes: fn(u32, u32) -> Vec<u8>,
    /// It is sent again and again.
    endless: bool,
    /// Nothing is read after the start.
    deaf: bool,
}

const QUIET: Attack = Attack {
    name: "obedient in words alone",
    silent: &[],
    bytes: |_, _| Vec::new(),
    endless: false,
    deaf: false,
};

const ATTACKS: &[Attack] = &[
    QUIET,
    Attack {
        name: "silent",
        silent: &["Stats", "ListProcesses", "SignalProcess", "DeleteProcess"],
        ..QUIET
    },
    Attack {
        name: "deaf",
        deaf: true,
        ..QUIET
    },
    Attack {
        name: "empty events",
        bytes: |events, _| frame(events, DATA, &[]).repeat(4096),
        endless: true,
        ..QUIET
    },
    Attack {
        name: "kills for memory",
        bytes: |events, _| frame(events, DATA, b"\x12\x07\x0a\x05agent").repeat(1024),
        endless: true,
        ..QUIET
    },
    Attack {
        name: "events of unknown fields",
        bytes: |events, _| frame(events, DATA, &unknown_fields(1000)).repeat(64),
        endless: true,
        ..QUIET
    },
    Attack {
        name: "giant events",
        bytes: |events, _| frame(events, DATA, &unknown_fields(4 << 20)),
        endless: true,
        ..QUIET
    },
    Attack {
        name: "giant answers",
        bytes: |events, _| frame(events, RESPONSE, &unknown_fields(4 << 20)),
        endless: true,
        ..QUIET
    },
    Attack {
        name: "answers to nobody",
        bytes: |_, start| frame(start + 1000, RESPONSE, &[]).repeat(4096),
        endless: true,
        ..QUIET
    },
    Attack {
        name: "a truncated frame",
        bytes: |events, _| frame(events, DATA, &[0; 100])[..50].to_vec(),
        ..QUIET
    },
    Attack {
        name: "bytes",
        bytes: |_, _| vec![0xa5; 1 << 16],
        endless: true,
        ..QUIET
    },
];

fn frame(number: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    bytes
}

/// So many bytes of fields that nobody knows, each with a number of its own.
fn unknown_fields(bytes: usize) -> Vec<u8> {
    let mut fields = Vec::with_capacity(bytes + 8);
    let mut number = 1000_u32;
    while fields.len() < bytes {
        let mut key = number << 3;
        while key >= 0x80 {
            fields.push(key.to_le_bytes()[0] | 0x80);
            key >>= 7;
        }
        fields.extend([key.to_le_bytes()[0], 1]);
        number += 1;
    }
    fields
}

/// The method that a request names: its second field, after the service.
fn method(request: &[u8]) -> Option<String> {
    let field = |bytes: &[u8], tag: u8| -> Option<(Vec<u8>, usize)> {
        let [first, length, rest @ ..] = bytes else {
            return None;
        };
        let length = usize::from(*length);
        (*first == tag).then_some(())?;
        Some((rest.get(..length)?.to_vec(), length + 2))
    };
    let (_, service) = field(request, 0x0a)?;
    let (method, _) = field(request.get(service..)?, 0x12)?;
    String::from_utf8(method).ok()
}

fn dial() -> Result<File> {
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::empty(),
        None,
    )?;
    let address = VsockAddr::new(HOST.0, HOST.1);
    for _ in 0..50 {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => return Ok(socket.into()),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
    bail!("the host does not answer")
}

/// Serves until the connection breaks; then it waits to be killed.
///
/// # Errors
/// When there is no such attack or no host.
pub fn run(wanted: &str) -> Result<()> {
    let attack = ATTACKS
        .iter()
        .find(|attack| attack.name == wanted.trim())
        .with_context(|| format!("no attack {wanted:?}"))?;
    let mut read = dial()?;
    let write = Arc::new(Mutex::new(read.try_clone()?));
    let send = |bytes: &[u8]| {
        let mut stream = write.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(bytes)
    };
    let mut events = 0;
    loop {
        let mut header = [0; HEADER];
        if read.read_exact(&mut header).is_err() {
            break;
        }
        let number = |at: usize| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_be_bytes(bytes)
        };
        let mut payload = vec![0; usize::try_from(number(0))?];
        read.read_exact(&mut payload)?;
        let (call, method) = (number(4), method(&payload).unwrap_or_default());
        if method == "Events" {
            events = call;
        } else if !attack.silent.contains(&method.as_str()) {
            // Without fields every answer is a good one.
            send(&frame(call, RESPONSE, &[]))?;
        }
        if method == "StartProcess" {
            let (bytes, write) = ((attack.bytes)(events, call), Arc::clone(&write));
            let endless = attack.endless;
            thread::spawn(move || {
                loop {
                    let mut stream = write.lock().unwrap_or_else(PoisonError::into_inner);
                    if stream.write_all(&bytes).is_err() || !endless {
                        return;
                    }
                }
            });
            if attack.deaf {
                break;
            }
        }
    }
    port::say("hostile: the agent waits");
    loop {
        nix::unistd::pause();
    }
}
