//! Redirection of everything that an interface receives: an ingress qdisc with one filter whose action sends
//! the frame out of another interface. tc-mirred(8), tc-u32(8).
//!
//! The filter is told from those of others by its priority. u32 rather than matchall, because every kernel with
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
pub(super) const PRIORITY: u16 = 46_361;
/// The parent of an ingress filter; `ingress` and `clsact` qdiscs both take it.
const INGRESS_SIDE: TcHandle = TcHandle {
    major: TcHandle::CLSACT.major,
    minor: TcHandle::MIN_INGRESS,
};

/// Sends what interface `from` receives out of interface `to`, instead of what an earlier run did.
pub fn replace(netlink: &mut Netlink, from: u32, to: u32) -> Result<(), NetworkError> {
    remove(netlink, from)?;
    let qdisc = ingress_qdisc(from)?;
    let message = RouteNetlinkMessage::NewQueueDiscipline(qdisc);
    match netlink.change(message, NLM_F_CREATE | NLM_F_EXCL) {
        // The node's own; ours joins its filters.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        result => result.map_err(|error| refused("add an ingress qdisc", error))?,
    }
    let message = RouteNetlinkMessage::NewTrafficFilter(filter(from, to)?);
    netlink
        .change(message, NLM_F_CREATE | NLM_F_EXCL)
        .map_err(|error| refused("add a filter", error))
}

/// Takes our redirection off an interface, if it is there, and the qdisc if nobody else uses it.
pub fn remove(netlink: &mut Netlink, index: u32) -> Result<(), NetworkError> {
    let Some(kind) = qdisc_kind(netlink, index)? else {
        return Ok(());
    };
    let message = RouteNetlinkMessage::GetTrafficFilter(on_ingress(index)?);
    let filters = match netlink.list(&message) {
        Err(error) if is_gone(&error) => return Ok(()),
        result => result.map_err(|error| failed("list filters", error))?,
    };
    let mut ours = None;
    let mut others = false;
    for filter in filters {
        if let RouteNetlinkMessage::NewTrafficFilter(filter) = filter {
            // The dump is of one interface only if the kernel understood the header.
            if filter.header.index != signed(index)? {
                continue;
            }
            if filter.header.info >> 16 == u32::from(PRIORITY) {
                ours = Some(filter.header.info);
            } else {
                others = true;
            }
        }
    }
    let Some(info) = ours else {
        return Ok(());
    };
    let message = if others || kind != "ingress" {
        let mut message = on_ingress(index)?;
        message.header.info = info;
        RouteNetlinkMessage::DelTrafficFilter(message)
    } else {
        RouteNetlinkMessage::DelQueueDiscipline(ingress_qdisc(index)?)
    };
    match netlink.change(message, 0) {
        Err(error) if !is_gone(&error) => Err(failed("remove the redirection", error)),
        _ => Ok(()),
    }
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

/// The priority, and the protocol in network byte order: every one.
fn priority_and_protocol() -> u32 {
    let every_protocol = u16::try_from(libc::ETH_P_ALL).unwrap_or(3).to_be();
    u32::from(PRIORITY) << 16 | u32::from(every_protocol)
}

/// Everything is sent out of interface `to` and is gone for this one.
fn filter(from: u32, to: u32) -> Result<TcMessage, NetworkError> {
    let mut redirect = TcMirror::default();
    redirect.generic.action = TcActionType::Stolen;
    redirect.eaction = TcMirrorActionType::EgressRedir;
    redirect.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            redirect,
        ))]),
    ];
    // Four bytes, of which no bit matters: a selector without a key is not accepted by every kernel.
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    let mut message = on_ingress(from)?;
    message.header.info = priority_and_protocol();
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
        let info = priority_and_protocol();
        assert_eq!(info >> 16, u32::from(PRIORITY));
        // 00 03 in memory, as the kernel reads it.
        let [low, high, ..] = info.to_ne_bytes();
        assert_eq!([low, high], [0, 3]);
    }
}
