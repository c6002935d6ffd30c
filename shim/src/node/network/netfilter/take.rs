//! Makes of the kernel's lists what makes the same ruleset elsewhere.

use std::io;

use brig_agent_protocol::agent;

use super::attributes::{self, Attribute, NESTED};
use super::expressions;
use super::listed::{ListError, Listed, is_missing};
use super::ruleset::{Object, Ruleset};
use super::socket::Nftables;
use super::uapi;

/// How long the list of elements of one message may be; an attribute ends at 64 KiB.
const MAX_ELEMENTS: usize = 32 << 10;

/// The whole ruleset of the namespace.
///
/// # Errors
/// [`ListError`].
pub fn all(netlink: &mut Nftables, interfaces: &[(u32, &str)]) -> Result<Ruleset, ListError> {
    let mut take = Take {
        interfaces,
        ruleset: Ruleset::default(),
        sets: 0,
    };
    for table in netlink.list(uapi::GET_TABLE, 0, &[])? {
        take.table(&table)?;
    }
    if take.ruleset.objects.is_empty() {
        return Ok(take.ruleset);
    }
    for chain in netlink.list(uapi::GET_CHAIN, 0, &[])? {
        take.chain(&chain)?;
    }
    // A kernel without them has none.
    for object in optional(netlink.list(uapi::GET_OBJECT, 0, &[]))? {
        take.object(&object)?;
    }
    for flowtable in optional(netlink.list(uapi::GET_FLOWTABLE, 0, &[]))? {
        take.flowtable(&flowtable)?;
    }
    let sets = netlink.list(uapi::GET_SET, 0, &[])?;
    for set in &sets {
        take.set(set)?;
    }
    for set in &sets {
        let parsed = attributes::parse(&set.attributes)?;
        let of = elements_of(&parsed)?;
        let elements = netlink.list(uapi::GET_ELEMENT, set.family, &of)?;
        take.elements(set, &parsed, &elements)?;
    }
    let mut position = (Vec::new(), 0);
    for rule in netlink.list(uapi::GET_RULE, 0, &[])? {
        take.rule(&rule, &mut position)?;
    }
    Ok(take.ruleset)
}

fn optional(list: Result<Vec<Listed>, ListError>) -> Result<Vec<Listed>, ListError> {
    match list {
        Err(ListError::Io(error)) if is_missing(&error) => Ok(Vec::new()),
        list => list,
    }
}

/// The request for a set's elements.
fn elements_of(set: &[Attribute<'_>]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for (from, to) in [
        (uapi::SET_TABLE, uapi::ELEMENTS_TABLE),
        (uapi::SET_NAME, uapi::ELEMENTS_SET),
    ] {
        let name = attributes::value(set, from).unwrap_or_default();
        attributes::push(&mut bytes, to, name)?;
    }
    Ok(bytes)
}

/// What nft calls a family.
fn family_name(family: u8) -> &'static str {
    match family {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "unknown",
    }
}

/// A copy of the attributes of these types.
fn keep(from: &[Attribute<'_>], kinds: &[u16]) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for attribute in from.iter().filter(|a| kinds.contains(&a.kind)) {
        attributes::push(&mut bytes, attribute.kind, attribute.value)?;
    }
    Ok(bytes)
}

struct Take<'a> {
    interfaces: &'a [(u32, &'a str)],
    ruleset: Ruleset,
    sets: u32,
}

impl Take<'_> {
    fn push(
        &mut self,
        kind: u16,
        family: u8,
        attributes: Vec<u8>,
        indexes: Vec<agent::InterfaceIndex>,
        name: String,
    ) {
        let message = agent::NetfilterObject {
            kind: kind.into(),
            family: family.into(),
            attributes,
            indexes,
            ..agent::NetfilterObject::default()
        };
        self.ruleset.objects.push(Object { message, name });
    }

    fn table(&mut self, listed: &Listed) -> io::Result<()> {
        let parsed = attributes::parse(&listed.attributes)?;
        let mut bytes = keep(&parsed, &[uapi::TABLE_NAME, uapi::TABLE_USERDATA])?;
        let flags = attributes::number(&parsed, uapi::TABLE_FLAGS).unwrap_or(0) & uapi::DORMANT;
        if flags != 0 {
            attributes::push(&mut bytes, uapi::TABLE_FLAGS, &flags.to_be_bytes())?;
        }
        let name = table_name(listed.family, &parsed, uapi::TABLE_NAME);
        self.push(uapi::NEW_TABLE, listed.family, bytes, Vec::new(), name);
        Ok(())
    }

    fn chain(&mut self, listed: &Listed) -> io::Result<()> {
        let parsed = attributes::parse(&listed.attributes)?;
        // Without its flags: a base chain is known by its hook, and hardware does not filter here.
        let bytes = keep(
            &parsed,
            &[
                uapi::CHAIN_TABLE,
                uapi::CHAIN_NAME,
                uapi::CHAIN_HOOK,
                uapi::CHAIN_POLICY,
                uapi::CHAIN_TYPE,
                uapi::CHAIN_COUNTERS,
                uapi::CHAIN_USERDATA,
            ],
        )?;
        let name = format!(
            "chain {} in {}",
            attributes::text(&parsed, uapi::CHAIN_NAME),
            table_name(listed.family, &parsed, uapi::CHAIN_TABLE)
        );
        self.push(uapi::NEW_CHAIN, listed.family, bytes, Vec::new(), name);
        Ok(())
    }

    fn object(&mut self, listed: &Listed) -> io::Result<()> {
        let parsed = attributes::parse(&listed.attributes)?;
        let bytes = keep(
            &parsed,
            &[
                uapi::OBJECT_TABLE,
                uapi::OBJECT_NAME,
                uapi::OBJECT_TYPE,
                uapi::OBJECT_DATA,
                uapi::OBJECT_USERDATA,
            ],
        )?;
        let name = format!(
            "object {} of type {} in {}",
            attributes::text(&parsed, uapi::OBJECT_NAME),
            attributes::number(&parsed, uapi::OBJECT_TYPE).unwrap_or(0),
            table_name(listed.family, &parsed, uapi::OBJECT_TABLE)
        );
        self.push(uapi::NEW_OBJECT, listed.family, bytes, Vec::new(), name);
        Ok(())
    }

    fn flowtable(&mut self, listed: &Listed) -> io::Result<()> {
        let parsed = attributes::parse(&listed.attributes)?;
        let bytes = keep(
            &parsed,
            &[
                uapi::FLOWTABLE_TABLE,
                uapi::FLOWTABLE_NAME,
                uapi::FLOWTABLE_HOOK,
                uapi::FLOWTABLE_FLAGS,
            ],
        )?;
        let name = format!(
            "flowtable {} in {}",
            attributes::text(&parsed, uapi::FLOWTABLE_NAME),
            table_name(listed.family, &parsed, uapi::FLOWTABLE_TABLE)
        );
        self.push(uapi::NEW_FLOWTABLE, listed.family, bytes, Vec::new(), name);
        Ok(())
    }

    fn set(&mut self, listed: &Listed) -> io::Result<()> {
        let parsed = attributes::parse(&listed.attributes)?;
        let kinds: Vec<u16> = (uapi::SET_TABLE..=uapi::SET_LAST)
            .filter(|kind| ![uapi::SET_ID, uapi::SET_PAD, uapi::SET_HANDLE].contains(kind))
            .collect();
        let mut bytes = keep(&parsed, &kinds)?;
        // A number within the transaction; rules name their sets.
        self.sets += 1;
        attributes::push(&mut bytes, uapi::SET_ID, &self.sets.to_be_bytes())?;
        let name = set_name(listed.family, &parsed);
        self.push(uapi::NEW_SET, listed.family, bytes, Vec::new(), name);
        Ok(())
    }

    fn elements(
        &mut self,
        set: &Listed,
        parsed: &[Attribute<'_>],
        lists: &[Listed],
    ) -> io::Result<()> {
        let mut elements = Vec::new();
        for list in lists {
            let parts = attributes::parse(&list.attributes)?;
            let list = attributes::value(&parts, uapi::ELEMENTS).unwrap_or_default();
            for element in attributes::parse(list)? {
                elements.push(element.value.to_vec());
            }
        }
        let flags = attributes::number(parsed, uapi::SET_FLAGS).unwrap_or(0);
        if flags & uapi::INTERVAL != 0 {
            elements.sort_by_cached_key(|element| interval_order(element));
        }
        let mut elements = elements.into_iter().peekable();
        while elements.peek().is_some() {
            let mut list = Vec::new();
            while let Some(element) = elements
                .next_if(|element| list.is_empty() || list.len() + element.len() < MAX_ELEMENTS)
            {
                attributes::push(&mut list, NESTED | uapi::LIST_ELEMENT, &element)?;
            }
            let mut bytes = elements_of(parsed)?;
            attributes::push(&mut bytes, NESTED | uapi::ELEMENTS, &list)?;
            let name = format!("elements of {}", set_name(set.family, parsed));
            self.push(uapi::NEW_ELEMENT, set.family, bytes, Vec::new(), name);
        }
        Ok(())
    }

    /// `last` is the chain of the rule before, and its number there.
    fn rule(&mut self, listed: &Listed, last: &mut (Vec<u8>, u32)) -> io::Result<()> {
        let parsed = attributes::parse(&listed.attributes)?;
        let mut bytes = keep(&parsed, &[uapi::RULE_TABLE, uapi::RULE_CHAIN])?;
        if bytes != last.0 {
            *last = (bytes.clone(), 0);
        }
        last.1 += 1;
        let expressions = attributes::value(&parsed, uapi::RULE_EXPRESSIONS).unwrap_or_default();
        let at = attributes::push(&mut bytes, NESTED | uapi::RULE_EXPRESSIONS, expressions)?;
        let found = expressions::look(listed.family, expressions, at)?;
        if let Some(userdata) = attributes::value(&parsed, uapi::RULE_USERDATA) {
            attributes::push(&mut bytes, uapi::RULE_USERDATA, userdata)?;
        }
        let mut name = format!(
            "rule {} of chain {} in {}",
            last.1,
            attributes::text(&parsed, uapi::RULE_CHAIN),
            table_name(listed.family, &parsed, uapi::RULE_TABLE)
        );
        if !found.compat.is_empty() {
            name = format!("{name} (iptables: {})", found.compat.join(", "));
            if let Some((protocol, inverted)) = found.protocol {
                attributes::push(
                    &mut bytes,
                    NESTED | uapi::RULE_COMPAT,
                    &compat(protocol, inverted)?,
                )?;
            }
        }
        let mut refused = found.refused;
        let mut indexes = Vec::new();
        for (offset, number) in found.indexes {
            // Zero is no interface, anywhere.
            if number == 0 {
                continue;
            }
            match self.interfaces.iter().find(|(index, _)| *index == number) {
                Some((_, interface)) => indexes.push(agent::InterfaceIndex {
                    offset: u32::try_from(offset).unwrap_or(u32::MAX),
                    interface: (*interface).to_owned(),
                    ..agent::InterfaceIndex::default()
                }),
                None => {
                    let why =
                        format!("matches interface number {number}, which the pod does not have");
                    refused.get_or_insert(why);
                }
            }
        }
        match refused {
            Some(why) => self.ruleset.refused.push(format!("{name} {why}")),
            None => self.push(uapi::NEW_RULE, listed.family, bytes, indexes, name),
        }
        Ok(())
    }
}

/// `NFTA_RULE_COMPAT`.
fn compat(protocol: u8, inverted: bool) -> io::Result<Vec<u8>> {
    let flags = if inverted { uapi::COMPAT_INVERTED } else { 0 };
    let mut bytes = Vec::new();
    let protocol = u32::from(protocol).to_be_bytes();
    attributes::push(&mut bytes, uapi::COMPAT_PROTOCOL, &protocol)?;
    attributes::push(&mut bytes, uapi::COMPAT_FLAGS, &flags.to_be_bytes())?;
    Ok(bytes)
}

/// Elements of an interval set go by their keys; where one interval ends and the next begins, the end goes first.
fn interval_order(element: &[u8]) -> (Vec<u8>, bool) {
    let parts = attributes::parse(element).unwrap_or_default();
    let flags = attributes::number(&parts, uapi::ELEMENT_FLAGS).unwrap_or(0);
    let key = attributes::value(&parts, uapi::ELEMENT_KEY).unwrap_or_default();
    (key.to_vec(), flags & uapi::INTERVAL_END == 0)
}

fn table_name(family: u8, parsed: &[Attribute<'_>], kind: u16) -> String {
    let name = attributes::text(parsed, kind);
    format!("table {} {name}", family_name(family))
}

fn set_name(family: u8, parsed: &[Attribute<'_>]) -> String {
    format!(
        "set {} in {}",
        attributes::text(parsed, uapi::SET_NAME),
        table_name(family, parsed, uapi::SET_TABLE)
    )
}
