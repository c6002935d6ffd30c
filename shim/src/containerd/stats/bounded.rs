//! The agent's lists, as much of them as is passed on.

use brig_agent_protocol::agent::stats_response;

/// Block devices that are told of.
const MAX_DEVICES: usize = 256;
/// Sizes of huge pages that are told of, and the length of one's name in bytes.
const MAX_PAGE_SIZES: usize = 16;

/// The first block devices.
pub(super) fn devices(io: &[stats_response::Io]) -> impl Iterator<Item = &stats_response::Io> {
    io.iter().take(MAX_DEVICES)
}

/// The first sizes of huge pages, those with sound names.
pub(super) fn page_sizes(
    hugetlb: Vec<stats_response::HugeTlb>,
) -> impl Iterator<Item = stats_response::HugeTlb> {
    let sizes = hugetlb.into_iter().take(MAX_PAGE_SIZES);
    sizes.filter(|page| page.page_size.len() <= MAX_PAGE_SIZES)
}
