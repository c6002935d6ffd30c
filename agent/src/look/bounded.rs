//! No answer is longer than the host takes.
use brig_agent_protocol::MAX_LOOK;

/// Its beginning, if there is more than may be answered.
pub(super) fn bounded(text: String) -> Vec<u8> {
    let mut bytes = text.into_bytes();
    if bytes.len() > MAX_LOOK {
        bytes.truncate(MAX_LOOK - CUT.len());
        bytes.extend_from_slice(CUT);
    }
    bytes
}

/// The end of what was cut.
pub(super) const CUT: &[u8] = b"\n[cut here]\n";
