//! Numbers of `linux/netfilter/nf_tables.h`, `nf_tables_compat.h` and `nfnetlink.h` that libc lacks or has as
//! other types. Named as there, without the prefix.

/// `NFNL_SUBSYS_NFTABLES`.
pub const SUBSYSTEM: u16 = 10;

// `NFT_MSG_*`.
pub const NEW_TABLE: u16 = 0;
pub const GET_TABLE: u16 = 1;
pub const NEW_CHAIN: u16 = 3;
pub const GET_CHAIN: u16 = 4;
pub const NEW_RULE: u16 = 6;
pub const GET_RULE: u16 = 7;
pub const NEW_SET: u16 = 9;
pub const GET_SET: u16 = 10;
pub const NEW_ELEMENT: u16 = 12;
pub const GET_ELEMENT: u16 = 13;
pub const GET_GEN: u16 = 16;
pub const NEW_OBJECT: u16 = 18;
pub const GET_OBJECT: u16 = 19;
pub const NEW_FLOWTABLE: u16 = 22;
pub const GET_FLOWTABLE: u16 = 23;

/// `NFTA_GEN_ID`.
pub const GEN_ID: u16 = 1;

// `NFTA_TABLE_*`.
pub const TABLE_NAME: u16 = 1;
pub const TABLE_FLAGS: u16 = 2;
pub const TABLE_USERDATA: u16 = 6;
/// `NFT_TABLE_F_DORMANT`; the other flags tie a table to a process of the node.
pub const DORMANT: u32 = 1;

// `NFTA_CHAIN_*`.
pub const CHAIN_TABLE: u16 = 1;
pub const CHAIN_NAME: u16 = 3;
pub const CHAIN_HOOK: u16 = 4;
pub const CHAIN_POLICY: u16 = 5;
pub const CHAIN_TYPE: u16 = 7;
pub const CHAIN_COUNTERS: u16 = 8;
pub const CHAIN_USERDATA: u16 = 12;

// `NFTA_RULE_*`.
pub const RULE_TABLE: u16 = 1;
pub const RULE_CHAIN: u16 = 2;
pub const RULE_EXPRESSIONS: u16 = 4;
pub const RULE_COMPAT: u16 = 5;
pub const RULE_USERDATA: u16 = 7;
pub const COMPAT_PROTOCOL: u16 = 1;
pub const COMPAT_FLAGS: u16 = 2;
/// `NFT_RULE_COMPAT_F_INV`.
pub const COMPAT_INVERTED: u32 = 2;

// `NFTA_SET_*`.
pub const SET_TABLE: u16 = 1;
pub const SET_NAME: u16 = 2;
pub const SET_FLAGS: u16 = 3;
pub const SET_ID: u16 = 10;
pub const SET_PAD: u16 = 14;
pub const SET_HANDLE: u16 = 16;
/// The last one that is known here. What is newer describes a set and does not make it.
pub const SET_LAST: u16 = 18;
/// `NFT_SET_INTERVAL`.
pub const INTERVAL: u32 = 4;

// `NFTA_SET_ELEM_LIST_*` and `NFTA_SET_ELEM_*`.
pub const ELEMENTS_TABLE: u16 = 1;
pub const ELEMENTS_SET: u16 = 2;
pub const ELEMENTS: u16 = 3;
pub const ELEMENT_KEY: u16 = 1;
pub const ELEMENT_FLAGS: u16 = 3;
/// `NFT_SET_ELEM_INTERVAL_END`.
pub const INTERVAL_END: u32 = 1;

// `NFTA_OBJ_*`.
pub const OBJECT_TABLE: u16 = 1;
pub const OBJECT_NAME: u16 = 2;
pub const OBJECT_TYPE: u16 = 3;
pub const OBJECT_DATA: u16 = 4;
pub const OBJECT_USERDATA: u16 = 8;

// `NFTA_FLOWTABLE_*`.
pub const FLOWTABLE_TABLE: u16 = 1;
pub const FLOWTABLE_NAME: u16 = 2;
pub const FLOWTABLE_HOOK: u16 = 3;
pub const FLOWTABLE_FLAGS: u16 = 7;

/// `NFTA_LIST_ELEM`.
pub const LIST_ELEMENT: u16 = 1;
// `NFTA_EXPR_*`.
pub const EXPRESSION_NAME: u16 = 1;
pub const EXPRESSION_DATA: u16 = 2;
/// `NFTA_DATA_VALUE`.
pub const DATA_VALUE: u16 = 1;

// Attributes and values of expressions.
pub const META_DREG: u16 = 1;
pub const META_KEY: u16 = 2;
pub const META_IIF: u32 = 4;
pub const META_OIF: u32 = 5;
pub const META_L4PROTO: u32 = 16;
pub const META_IIFKIND: u32 = 26;
pub const META_OIFKIND: u32 = 27;
pub const META_SDIF: u32 = 33;
pub const FIB_DREG: u16 = 1;
pub const FIB_RESULT: u16 = 2;
pub const FIB_RESULT_OIF: u32 = 1;
pub const PAYLOAD_DREG: u16 = 1;
pub const PAYLOAD_BASE: u16 = 2;
pub const PAYLOAD_OFFSET: u16 = 3;
pub const PAYLOAD_LEN: u16 = 4;
pub const PAYLOAD_NETWORK_HEADER: u32 = 1;
pub const CMP_SREG: u16 = 1;
pub const CMP_OP: u16 = 2;
pub const CMP_DATA: u16 = 3;
pub const CMP_EQ: u32 = 0;
pub const CMP_NEQ: u32 = 1;
pub const SOCKET_KEY: u16 = 1;
pub const SOCKET_CGROUPV2: u32 = 3;
pub const DUP_SREG_DEV: u16 = 2;
pub const COMPAT_NAME: u16 = 1;
