//! What of a rule's expressions means something else in another kernel: numbers of interfaces, programs of the
//! node that a packet would be handed to, and what the kernel does not tell again (the protocol of a rule with
//! iptables matches).

use std::io;

use super::attributes::{self, Attribute};
use super::uapi;

/// Offset and length of the field that names the next protocol in an IPv4 and in an IPv6 header.
const V4_PROTOCOL: u32 = 9;
const V6_NEXT_HEADER: u32 = 6;
/// `NFPROTO_IPV6`.
const FAMILY_V6: u8 = 10;
/// Expressions that take what is in a register, in ways in which a number of an interface is not found again.
const READERS: [&str; 7] = [
    "lookup",
    "dynset",
    "range",
    "bitwise",
    "byteorder",
    "hash",
    "objref",
];

/// What was found in the expressions of one rule.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Where a number of an interface is, and the number.
    pub indexes: Vec<(usize, u32)>,
    /// The layer-4 protocol that the rule is of, and whether it is of all others instead.
    pub protocol: Option<(u8, bool)>,
    /// Matches and targets of iptables, by name.
    pub compat: Vec<String>,
    /// Why the rule cannot be had in a guest.
    pub refused: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loaded {
    Index,
    Protocol,
}

/// Looks through `NFTA_RULE_EXPRESSIONS`, whose value begins at `at` in the message's attributes.
///
/// # Errors
/// When it is no list of expressions.
pub fn look(family: u8, expressions: &[u8], at: usize) -> io::Result<Findings> {
    let mut walk = Walk {
        family,
        registers: Vec::new(),
        found: Findings::default(),
    };
    for element in attributes::parse(expressions)? {
        if element.kind != uapi::LIST_ELEMENT {
            continue;
        }
        let parts = attributes::parse(element.value)?;
        let name = attributes::text(&parts, uapi::EXPRESSION_NAME);
        let data = attributes::find(&parts, uapi::EXPRESSION_DATA);
        let base = data.map_or(0, |data| at + element.at + data.at);
        let data = attributes::parse(data.map_or(&[][..], |data| data.value))?;
        walk.expression(&name, &data, base)?;
    }
    Ok(walk.found)
}

struct Walk {
    family: u8,
    registers: Vec<(u32, Loaded)>,
    found: Findings,
}

impl Walk {
    fn expression(&mut self, name: &str, data: &[Attribute<'_>], base: usize) -> io::Result<()> {
        let number = |kind| attributes::number(data, kind);
        let has_index = self
            .registers
            .iter()
            .any(|(_, what)| *what == Loaded::Index);
        if READERS.contains(&name) && has_index {
            self.refuse(
                "compares an interface's number with a set or range; use its name (iifname, oifname)",
            );
        }
        match name {
            "meta" => {
                let key = number(uapi::META_KEY);
                let what = match key {
                    Some(uapi::META_IIF | uapi::META_OIF | uapi::META_SDIF) => Some(Loaded::Index),
                    Some(uapi::META_L4PROTO) => Some(Loaded::Protocol),
                    Some(uapi::META_IIFKIND | uapi::META_OIFKIND) => {
                        self.refuse(
                            "matches the kind of an interface, which is another one in a VM",
                        );
                        None
                    }
                    _ => None,
                };
                self.load(number(uapi::META_DREG), what);
            }
            "fib" => {
                let index = number(uapi::FIB_RESULT) == Some(uapi::FIB_RESULT_OIF);
                self.load(number(uapi::FIB_DREG), index.then_some(Loaded::Index));
            }
            "payload" => {
                let field = if self.family == FAMILY_V6 {
                    V6_NEXT_HEADER
                } else {
                    V4_PROTOCOL
                };
                let protocol = number(uapi::PAYLOAD_BASE) == Some(uapi::PAYLOAD_NETWORK_HEADER)
                    && number(uapi::PAYLOAD_OFFSET) == Some(field)
                    && number(uapi::PAYLOAD_LEN) == Some(1);
                let what = protocol.then_some(Loaded::Protocol);
                self.load(number(uapi::PAYLOAD_DREG), what);
            }
            // Their first attribute is the register that they fill, if they fill one.
            "immediate" | "ct" | "rt" | "exthdr" | "numgen" | "osf" => self.load(number(1), None),
            "cmp" => self.compare(data, base)?,
            "match" | "target" => {
                let name = attributes::text(data, uapi::COMPAT_NAME);
                if name == "NFQUEUE" {
                    self.refuse("hands packets to a program on the node (NFQUEUE)");
                }
                self.found.compat.push(name);
            }
            "queue" => self.refuse("hands packets to a program on the node (queue)"),
            "fwd" => self.refuse("sends packets out of an interface by its number (fwd)"),
            "dup" if number(uapi::DUP_SREG_DEV).is_some() => {
                self.refuse("sends packets out of an interface by its number (dup)");
            }
            "socket" if number(uapi::SOCKET_KEY) == Some(uapi::SOCKET_CGROUPV2) => {
                self.refuse("matches a cgroup of the node (socket cgroupv2)");
            }
            _ => {}
        }
        Ok(())
    }

    fn load(&mut self, register: Option<u32>, what: Option<Loaded>) {
        let Some(register) = register else {
            return;
        };
        self.registers.retain(|(other, _)| *other != register);
        self.registers.extend(what.map(|what| (register, what)));
    }

    fn compare(&mut self, data: &[Attribute<'_>], base: usize) -> io::Result<()> {
        let register = attributes::number(data, uapi::CMP_SREG);
        let held = self.registers.iter().find(|(r, _)| Some(*r) == register);
        let Some(&(register, held)) = held else {
            return Ok(());
        };
        let operation = attributes::number(data, uapi::CMP_OP);
        let equality = matches!(operation, Some(uapi::CMP_EQ | uapi::CMP_NEQ));
        let outer = attributes::find(data, uapi::CMP_DATA);
        let inner = attributes::parse(outer.map_or(&[][..], |outer| outer.value))?;
        let value = attributes::find(&inner, uapi::DATA_VALUE);
        let (Some(outer), Some(value)) = (outer, value) else {
            return Ok(());
        };
        match held {
            Loaded::Index => {
                self.registers.retain(|(other, _)| *other != register);
                match <[u8; 4]>::try_from(value.value) {
                    Ok(index) if equality => {
                        let at = base + outer.at + value.at;
                        self.found.indexes.push((at, u32::from_ne_bytes(index)));
                    }
                    _ => self.refuse(
                        "compares an interface's number other than for equality; use its name",
                    ),
                }
            }
            Loaded::Protocol => {
                if let ([protocol], true) = (value.value, equality) {
                    let inverted = operation == Some(uapi::CMP_NEQ);
                    self.found.protocol = Some((*protocol, inverted));
                }
            }
        }
        Ok(())
    }

    /// The first reason is told.
    fn refuse(&mut self, why: &str) {
        self.found.refused.get_or_insert_with(|| why.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use super::attributes::{NESTED, push, push_text};

    /// An expression whose numbers are in network byte order.
    pub fn expression(name: &str, numbers: &[(u16, u32)], more: &[u8]) -> Vec<u8> {
        let mut data = Vec::new();
        for (kind, number) in numbers {
            push(&mut data, *kind, &number.to_be_bytes()).unwrap();
        }
        data.extend_from_slice(more);
        let mut parts = Vec::new();
        push_text(&mut parts, uapi::EXPRESSION_NAME, name.as_bytes()).unwrap();
        push(&mut parts, NESTED | uapi::EXPRESSION_DATA, &data).unwrap();
        let mut element = Vec::new();
        push(&mut element, NESTED | uapi::LIST_ELEMENT, &parts).unwrap();
        element
    }

    fn compare(register: u32, operation: u32, value: &[u8]) -> Vec<u8> {
        let (mut inner, mut data) = (Vec::new(), Vec::new());
        push(&mut inner, uapi::DATA_VALUE, value).unwrap();
        push(&mut data, NESTED | uapi::CMP_DATA, &inner).unwrap();
        let numbers = [(uapi::CMP_SREG, register), (uapi::CMP_OP, operation)];
        expression("cmp", &numbers, &data)
    }

    fn meta(key: u32) -> Vec<u8> {
        expression("meta", &[(uapi::META_KEY, key), (uapi::META_DREG, 1)], &[])
    }

    #[test]
    fn a_number_of_an_interface_is_found_where_it_is() {
        let rule = [meta(uapi::META_IIF), compare(1, 0, &7_u32.to_ne_bytes())].concat();
        let found = look(1, &rule, 100).unwrap();
        let [(at, 7)] = found.indexes[..] else {
            panic!("{found:?}")
        };
        assert_eq!(rule[at - 100..at - 96], 7_u32.to_ne_bytes());
        assert_eq!(found.refused, None);
        // What was in the register has been replaced.
        let port = expression("payload", &[(uapi::PAYLOAD_DREG, 1)], &[]);
        let rule = [meta(uapi::META_IIF), port, compare(1, 0, &[0, 80, 0, 0])].concat();
        assert_eq!(look(1, &rule, 0).unwrap(), Findings::default());
    }

    #[test]
    fn a_number_of_an_interface_in_a_set_is_refused_and_after_its_comparison_is_not() {
        let lookup = expression("lookup", &[(2, 1)], &[]);
        let rule = [meta(uapi::META_OIF), lookup.clone()].concat();
        let why = look(1, &rule, 0).unwrap().refused.unwrap();
        assert!(why.contains("oifname"), "{why}");
        let compared = compare(1, 1, &2_u32.to_ne_bytes());
        let rule = [meta(uapi::META_OIF), compared, lookup].concat();
        assert_eq!(look(1, &rule, 0).unwrap().refused, None);
        let less = [meta(uapi::META_OIF), compare(1, 2, &[0; 4])].concat();
        assert!(look(1, &less, 0).unwrap().refused.is_some());
    }

    #[test]
    fn the_protocol_of_a_rule_with_iptables_matches_is_recovered() {
        let header = |offset| {
            let numbers = [
                (uapi::PAYLOAD_DREG, 1),
                (uapi::PAYLOAD_BASE, uapi::PAYLOAD_NETWORK_HEADER),
                (uapi::PAYLOAD_OFFSET, offset),
                (uapi::PAYLOAD_LEN, 1),
            ];
            expression("payload", &numbers, &[])
        };
        for (family, load, operation, expected) in [
            (2, header(9), uapi::CMP_EQ, Some((6, false))),
            (2, header(9), uapi::CMP_NEQ, Some((6, true))),
            (2, header(6), uapi::CMP_EQ, None),
            (10, header(6), uapi::CMP_EQ, Some((6, false))),
            (10, meta(uapi::META_L4PROTO), uapi::CMP_EQ, Some((6, false))),
        ] {
            let rule = [load, compare(1, operation, &[6])].concat();
            assert_eq!(look(family, &rule, 0).unwrap().protocol, expected);
        }
    }

    #[test]
    fn what_needs_a_program_or_cgroup_of_the_node_is_refused_by_name() {
        let mut name = Vec::new();
        push_text(&mut name, uapi::COMPAT_NAME, b"NFQUEUE").unwrap();
        for (rule, expected) in [
            (expression("queue", &[], &[]), "queue"),
            (expression("target", &[], &name), "NFQUEUE"),
            (
                expression("socket", &[(uapi::SOCKET_KEY, 3)], &[]),
                "cgroup",
            ),
            (expression("fwd", &[], &[]), "fwd"),
            (expression("dup", &[(uapi::DUP_SREG_DEV, 2)], &[]), "dup"),
            (meta(uapi::META_IIFKIND), "kind"),
        ] {
            let why = look(2, &rule, 0).unwrap().refused.unwrap();
            assert!(why.contains(expected), "{why}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_walked_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = look(2, &bytes, 0);
        }

        #[test]
        fn a_number_of_an_interface_lies_within_the_rule(
            rule in proptest::collection::vec(0_usize..5, 0..8), index: u32,
        ) {
            let parts = [
                meta(uapi::META_IIF),
                meta(uapi::META_L4PROTO),
                compare(1, 0, &index.to_ne_bytes()),
                compare(1, 1, &[6]),
                expression("lookup", &[], &[]),
            ];
            let rule: Vec<u8> = rule.into_iter().flat_map(|part| parts[part].clone()).collect();
            for (at, found) in look(2, &rule, 0).unwrap().indexes {
                prop_assert_eq!(&rule[at..at + 4], &index.to_ne_bytes()[..]);
                prop_assert_eq!(found, index);
            }
        }
    }
}
