//! Interfaces as the kernel lists them, and what their messages say.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use super::super::error::{NetworkError, failed};
use super::super::netlink::Netlink;

pub(super) fn list_links(netlink: &mut Netlink) -> Result<Vec<LinkMessage>, NetworkError> {
    let found = netlink
        .list(&RouteNetlinkMessage::GetLink(LinkMessage::default()))
        .map_err(|error| failed("list interfaces", error))?;
    let links = found.into_iter().filter_map(|found| match found {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    Ok(links.collect())
}

pub(super) fn name_of(message: &LinkMessage) -> &str {
    let name = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
    name.unwrap_or("")
}

pub(super) fn kind_of(message: &LinkMessage) -> Option<&InfoKind> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(kind),
                _ => None,
            }),
            _ => None,
        })
}
