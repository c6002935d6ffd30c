//! What the shim and the agent say to each other.
//!
//! Both sides trust this crate for names and numbers only: the shim distrusts the agent's replies
//! (sizes, ids, order) and the agent limits what the host may ask of it.

pub mod identity;
mod resumption;

pub use resumption::Resumption;

/// Messages of `agent.proto`.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The ttrpc client and server of `agent.proto`.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// vsock context id of the host (virtio 1.3 §5.10.4).
pub const HOST_CID: u32 = 2;

/// vsock context id of every guest. vsock in the VMM is not shared between VMs, so one value does.
pub const GUEST_CID: u32 = 3;

/// The host port the agent dials once, when it is ready: the ttrpc connection. It is the only
/// stream that a guest may ever open.
pub const AGENT_PORT: u32 = 1024;

/// The guest port on which the agent accepts streams, from [`HOST_CID`] alone. A stream begins
/// with its number as eight bytes, little endian ([`stream_header`]); the rest is payload.
pub const STREAM_PORT: u32 = 1025;

/// The most streams that a VM has at one time, the agent's own connection not counted: the VMM opens no more, and the agent
/// has room for all of them before it knows what they are for.
pub const MAX_STREAMS: usize = 1024;

/// The stream that carries the agent's own log, as JSON lines, to the shim. Process streams and
/// forwarded connections are numbered from [`FIRST_PROCESS_STREAM`].
pub const LOG_STREAM: u64 = 1;

/// The first number the shim gives to a process's stdio stream or a forwarded connection.
pub const FIRST_PROCESS_STREAM: u64 = 16;

/// The virtio-fs tag of the share that holds root file systems and volumes.
pub const SHARE_TAG: &str = "brig";
/// Tag of the device that serves what is the pod's own.
pub const OWN_TAG: &str = "brig-own";
/// The directory of the share in which that lies: root file systems of containers, emptyDirs. No container's id begins with
/// a dot.
pub const OWN_DIRECTORY: &str = ".own";

/// Path under the share of the image of the guest kernel's modules, a read-only erofs file; there is none on a node that has
/// no modules.
pub const MODULES_PATH: &str = ".modules";

/// Path under the share of the handler's driver bundle, a read-only erofs file; there is none where none is configured.
pub const BUNDLE_PATH: &str = ".bundle";

/// I/O port for boot marks: the guest writes one byte of [`BootMark`].
pub const BOOT_MARK_PORT: u16 = 0x80;

/// Moments of a boot that the guest reports by a one-byte port write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum BootMark {
    /// The agent's first instruction as PID 1.
    Init = 0xB1,
    /// The agent has dialled the host.
    AgentReady = 0xB2,
    /// Nothing is under way in the guest: here it is captured. What goes on from here is a clone, and is told a [`Resumption`].
    Still = 0xB3,
}

/// The name on the kernel's command line, and so in the agent's environment, that says that the guest is booted to be captured.
pub const CAPTURE: &str = "brig_capture";

/// The first bytes of a stream to [`STREAM_PORT`].
#[must_use]
pub fn stream_header(stream: u64) -> [u8; 8] {
    stream.to_le_bytes()
}

/// The most bytes of an answer to one call, with its envelope. The largest are of lists, which end at
/// [`MAX_LISTED`].
pub const MAX_REPLY: usize = 32 << 10;

/// The most bytes of one event: two ids and a few numbers.
pub const MAX_EVENT: usize = 1 << 10;

/// The longest sentence of an error in bytes.
pub const MAX_SENTENCE: usize = 2048;

/// The most processes that an answer lists.
pub const MAX_LISTED: usize = 4096;

/// The most block devices that statistics tell of.
pub const MAX_DEVICES: usize = 256;

/// What an operator may look at in the guest: the first word of a `LookRequest`.
pub const LOOKS: [&str; 8] = ["cat", "df", "dmesg", "free", "ip", "ls", "mounts", "ps"];

/// Those of [`LOOKS`] that tell of the machine alone and of nothing that containers brought: they need no debug
/// handler.
pub const OPEN_LOOKS: [&str; 4] = ["df", "dmesg", "free", "ip"];

/// The most bytes of what is looked at, all pieces together.
pub const MAX_LOOK: usize = 256 << 10;

/// The most bytes of one piece of it.
pub const LOOK_PIECE: usize = 24 << 10;

/// Cuts a sentence to [`MAX_SENTENCE`] bytes, at a character.
pub fn cut(sentence: &mut String) {
    let mut end = sentence.len().min(MAX_SENTENCE);
    while !sentence.is_char_boundary(end) {
        end -= 1;
    }
    sentence.truncate(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_sentence_is_cut_at_a_character() {
        let mut sentence = "é".repeat(MAX_SENTENCE);
        sentence.insert(0, 'x');
        cut(&mut sentence);
        assert_eq!(sentence.len(), MAX_SENTENCE - 1);
        let mut short = "é".to_owned();
        cut(&mut short);
        assert_eq!(short, "é");
    }
}
