//! Interfaces that stand on others of the same namespace. What such a one receives arrives, wrapped, at the lower one, where the
//! guest takes it before the namespace's kernel could unwrap it.

use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkMessage};

use super::links::{kind_of, name_of};
use crate::node::network::error::NetworkError;
use crate::node::network::interface::Link;

/// Refuses an interface that stands on another one: one of the guest's own, or a part of one of them.
pub(super) fn refuse(all: &[LinkMessage], links: &[Link]) -> Result<(), NetworkError> {
    for message in all {
        let own = message.header.index;
        let is_taken = |index: u32| links.iter().any(|link| link.index == index);
        let is_part = message
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::Controller(index) if *index != 0));
        if !message.header.flags.contains(LinkFlags::Up) || !(is_taken(own) || is_part) {
            continue;
        }
        let on = match standing(message) {
            Standing::Alone => continue,
            Standing::Somewhere if links.iter().all(|link| link.index == own) => continue,
            Standing::Somewhere => "is a tunnel that begins at the pod itself".to_owned(),
            Standing::On(index) => match all.iter().find(|other| other.header.index == index) {
                // What a part stands on counts if the guest takes it from there.
                Some(below) if !is_part || is_taken(index) => {
                    format!(
                        "is stacked on another interface of the pod, {}",
                        name_of(below)
                    )
                }
                _ => continue,
            },
        };
        return Err(NetworkError::Unsupported(format!(
            "interface {} {on}",
            name_of(message)
        )));
    }
    Ok(())
}

enum Standing {
    Alone,
    /// On whatever interface of this namespace a route leads to.
    Somewhere,
    On(u32),
}

fn standing(message: &LinkMessage) -> Standing {
    let kind = kind_of(message);
    // Their number is that of the other end.
    if matches!(kind, Some(InfoKind::Veth | InfoKind::Netkit)) {
        return Standing::Alone;
    }
    let mut below = None;
    for attribute in &message.attributes {
        match attribute {
            // What it stands on is another namespace's.
            LinkAttribute::LinkNetNsId(_) => return Standing::Alone,
            LinkAttribute::Link(index) if *index != 0 => below = Some(*index),
            _ => {}
        }
    }
    let tunnel = matches!(
        kind,
        Some(
            InfoKind::Vxlan
                | InfoKind::Geneve
                | InfoKind::GreTap
                | InfoKind::GreTap6
                | InfoKind::ErSpan
                | InfoKind::Ip6ErSpan
        )
    );
    match below {
        Some(index) if index != message.header.index => Standing::On(index),
        _ if tunnel => Standing::Somewhere,
        _ => Standing::Alone,
    }
}
