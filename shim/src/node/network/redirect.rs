//! Redirection of everything that an interface receives: an ingress qdisc with one filter whose action sends
//! the frame out of another interface. tc-mirred(8), tc-u32(8).
//!
//! One thing is the node's too: answers of a DHCP server. A pod's lease is renewed by CNI's `dhcp` daemon, which listens in
//! the pod's namespace with a socket that is asked after ingress. So two filters before that one send a copy of them to the guest
//! and let the packet go on.
//!
//! Filters are told from those of others by their priorities. u32 rather than matchall, because every kernel with
//! traffic control has it.

use std::io;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::error::{NetworkError, failed};
use super::netlink::Netlink;

/// The priority by which our filter is known; late, so that filters of the node come first.
const PRIORITY: u16 = 46_361;
/// Those of the filters before it, which must differ where protocols do.
const DHCP_PRIORITY: u16 = 46_360;
const DHCPV6_PRIORITY: u16 = 46_359;
const OURS: std::ops::RangeInclusive<u16> = DHCPV6_PRIORITY..=PRIORITY;
/// The parent of an ingress filter; `ingress` and `clsact` qdiscs both take it.
const INGRESS_SIDE: TcHandle = TcHandle {
    major: TcHandle::CLSACT.major,
    minor: TcHandle::MIN_INGRESS,
};

/// Sends what interface `link` receives out of `tap` and the other way round. Nothing of ours is on either.
pub fn join(netlink: &mut Netlink, link: u32, tap: u32) -> Result<(), NetworkError> {
    for (from, to) in [(link, tap), (tap, link)] {
        let qdisc = ingress_qdisc(from)?;
        let message = RouteNetlinkMessage::NewQueueDiscipline(qdisc);
        match netlink.change(message, NLM_F_CREATE | NLM_F_EXCL) {
            // The node's own; ours joins its filters.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            result => result.map_err(|error| refused("add an ingress qdisc", error))?,
        }
        add(netlink, everything(from, to)?)?;
    }
    for filter in dhcp_answers(link, tap)? {
        add(netlink, filter)?;
    }
    Ok(())
}

fn add(netlink: &mut Netlink, filter: TcMessage) -> Result<(), NetworkError> {
    let message = RouteNetlinkMessage::NewTrafficFilter(filter);
    netlink
        .change(message, NLM_F_CREATE | NLM_F_EXCL)
        .map_err(|error| refused("add a filter", error))
}

/// Takes our redirection off an interface, if it is there, and the qdisc if nobody else uses it.
pub fn remove(netlink: &mut Netlink, index: u32) -> Result<(), NetworkError> {
    match Redirection::find(netlink, index)? {
        Some(found) => found.remove(netlink),
        None => Ok(()),
    }
}

/// As [`remove`], unless the redirection is one to an interface that lives, of a VM that runs: then its number is returned.
pub fn remove_dead(netlink: &mut Netlink, index: u32) -> Result<Option<u32>, NetworkError> {
    match Redirection::find(netlink, index)? {
        Some(Redirection {
            target: Some(target),
            ..
        }) => Ok(Some(target)),
        Some(found) => found.remove(netlink).map(|()| None),
        None => Ok(None),
    }
}

/// What of ours is on an interface.
struct Redirection {
    index: u32,
    /// Priority and protocol of each filter.
    filters: Vec<u32>,
    /// Where it leads to; the kernel forgets an interface that is gone.
    target: Option<u32>,
    /// The qdisc is there for its sake alone.
    whole_qdisc: bool,
}

impl Redirection {
    fn find(netlink: &mut Netlink, index: u32) -> Result<Option<Self>, NetworkError> {
        let Some(kind) = qdisc_kind(netlink, index)? else {
            return Ok(None);
        };
        let message = RouteNetlinkMessage::GetTrafficFilter(on_ingress(index)?);
        let listed = match netlink.list(&message) {
            Err(error) if is_gone(&error) => return Ok(None),
            result => result.map_err(|error| failed("list filters", error))?,
        };
        let mut found = Self {
            index,
            filters: Vec::new(),
            target: None,
            whole_qdisc: kind == "ingress",
        };
        for filter in listed {
            let RouteNetlinkMessage::NewTrafficFilter(filter) = filter else {
                continue;
            };
            // The dump is of one interface only if the kernel understood the header.
            if filter.header.index != signed(index)? {
                continue;
            }
            let priority = u16::try_from(filter.header.info >> 16).unwrap_or_default();
            if !OURS.contains(&priority) {
                found.whole_qdisc = false;
                continue;
            }
            found.target = found.target.or_else(|| target(&filter));
            if !found.filters.contains(&filter.header.info) {
                found.filters.push(filter.header.info);
            }
        }
        Ok((!found.filters.is_empty()).then_some(found))
    }

    fn remove(&self, netlink: &mut Netlink) -> Result<(), NetworkError> {
        let removed = |result: io::Result<()>| match result {
            Err(error) if !is_gone(&error) => Err(failed("remove the redirection", error)),
            _ => Ok(()),
        };
        if self.whole_qdisc {
            let message = RouteNetlinkMessage::DelQueueDiscipline(ingress_qdisc(self.index)?);
            return removed(netlink.change(message, 0));
        }
        for info in &self.filters {
            let mut message = on_ingress(self.index)?;
            message.header.info = *info;
            removed(netlink.change(RouteNetlinkMessage::DelTrafficFilter(message), 0))?;
        }
        Ok(())
    }
}

/// Where a filter sends frames.
fn target(filter: &TcMessage) -> Option<u32> {
    let options = filter
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    let options = attributes.filter_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) if mirror.ifindex != 0 => {
            Some(mirror.ifindex)
        }
        _ => None,
    })
}

/// The kind of the qdisc that holds an interface's ingress filters.
fn qdisc_kind(netlink: &mut Netlink, index: u32) -> Result<Option<String>, NetworkError> {
    let message = RouteNetlinkMessage::GetQueueDiscipline(message(index)?);
    let qdiscs = netlink
        .list(&message)
        .map_err(|error| failed("list qdiscs", error))?;
    for qdisc in qdiscs {
        let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = qdisc else {
            continue;
        };
        if qdisc.header.index == signed(index)? && qdisc.header.parent == TcHandle::INGRESS {
            return Ok(qdisc
                .attributes
                .into_iter()
                .find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind),
                    _ => None,
                }));
        }
    }
    Ok(None)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
    )
}

/// What the kernel says when traffic control, or a part of it, is not there.
fn refused(what: &str, error: io::Error) -> NetworkError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::EOPNOTSUPP) => NetworkError::NoRedirect(error),
        _ => failed(what, error),
    }
}

fn signed(index: u32) -> Result<i32, NetworkError> {
    i32::try_from(index)
        .map_err(|_| failed("number an interface", io::ErrorKind::InvalidData.into()))
}

fn message(index: u32) -> Result<TcMessage, NetworkError> {
    Ok(TcMessage::with_index(signed(index)?))
}

fn ingress_qdisc(index: u32) -> Result<TcMessage, NetworkError> {
    let mut message = message(index)?;
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle {
        major: TcHandle::INGRESS.major,
        minor: 0,
    };
    message
        .attributes
        .push(TcAttribute::Kind("ingress".to_owned()));
    Ok(message)
}

fn on_ingress(index: u32) -> Result<TcMessage, NetworkError> {
    let mut message = message(index)?;
    message.header.parent = INGRESS_SIDE;
    Ok(message)
}

/// A priority, and the protocol in network byte order.
fn priority_and_protocol(priority: u16, protocol: i32) -> u32 {
    let protocol = u16::try_from(protocol).unwrap_or_default().to_be();
    u32::from(priority) << 16 | u32::from(protocol)
}

/// Everything is sent out of interface `to` and is gone for this one.
fn everything(from: u32, to: u32) -> Result<TcMessage, NetworkError> {
    let info = priority_and_protocol(PRIORITY, libc::ETH_P_ALL);
    // Four bytes, of which no bit matters: a selector without a key is not accepted by every kernel.
    let keys = vec![TcU32Key::default()];
    let kinds = (TcMirrorActionType::EgressRedir, TcActionType::Stolen);
    filter(from, info, keys, mirred(to, kinds))
}

/// UDP to the port of a DHCP client, of both versions: a copy is sent out of interface `to`, and this one has it too.
fn dhcp_answers(from: u32, to: u32) -> Result<[TcMessage; 2], NetworkError> {
    let udp = libc::IPPROTO_UDP.cast_unsigned();
    let v4 = vec![
        // What most packets are not comes first.
        key(8, 0x00ff_0000, udp << 16),
        key(20, 0x0000_ffff, 68),
        // Without options, so that the port is there; whole, or the first fragment.
        key(0, 0x0f00_0000, 0x0500_0000),
        key(4, 0x0000_1fff, 0),
    ];
    let v6 = vec![key(4, 0x0000_ff00, udp << 8), key(40, 0x0000_ffff, 546)];
    let of_version = |priority, protocol, keys| {
        let info = priority_and_protocol(priority, protocol);
        let kinds = (TcMirrorActionType::EgressMirror, TcActionType::Ok);
        filter(from, info, keys, mirred(to, kinds))
    };
    Ok([
        of_version(DHCP_PRIORITY, libc::ETH_P_IP, v4)?,
        of_version(DHCPV6_PRIORITY, libc::ETH_P_IPV6, v6)?,
    ])
}

/// Four bytes of a packet from its network header on.
fn key(offset: i32, mask: u32, value: u32) -> TcU32Key {
    let mut key = TcU32Key::default();
    key.off = offset;
    key.mask = mask;
    key.val = value;
    key
}

fn mirred(to: u32, (how, then): (TcMirrorActionType, TcActionType)) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = then;
    mirror.eaction = how;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    action
}

fn filter(
    from: u32,
    info: u32,
    keys: Vec<TcU32Key>,
    action: TcAction,
) -> Result<TcMessage, NetworkError> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = u8::try_from(keys.len()).unwrap_or(u8::MAX);
    selector.keys = keys;
    let mut message = on_ingress(from)?;
    message.header.info = info;
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ]),
    ];
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_takes_every_protocol_at_our_priority() {
        let info = priority_and_protocol(PRIORITY, libc::ETH_P_ALL);
        assert_eq!(info >> 16, u32::from(PRIORITY));
        // 00 03 in memory, as the kernel reads it.
        let [low, high, ..] = info.to_ne_bytes();
        assert_eq!([low, high], [0, 3]);
    }

    #[test]
    fn the_target_of_each_of_our_filters_is_found() {
        assert_eq!(target(&everything(3, 7).unwrap()), Some(7));
        for filter in dhcp_answers(3, 8).unwrap() {
            assert_eq!(target(&filter), Some(8));
        }
        assert_eq!(target(&everything(3, 0).unwrap()), None);
    }
}
