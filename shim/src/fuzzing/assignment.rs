//! What a node says of devices before a pod has any: kubelet's answer, and the CDI files of its drivers.

use hyper::body::Bytes;

use crate::asked::pod_name::PodName;
use crate::node::cdi;
use crate::node::grpc::unframed;
use crate::node::pod_resources::{Assigned, part_of};

/// A body of kubelet's. What is read of it, written again as kubelet would, is read as the same; nothing of it is
/// another pod's.
pub fn kubelet_answer(data: &[u8]) {
    let Ok(message) = unframed(Bytes::copy_from_slice(data)) else {
        return;
    };
    assert_eq!(message, data[5..]);
    let pod = PodName::of_metadata("shop", "web", "u").unwrap();
    let Ok(assigned) = part_of(&message, &pod) else {
        return;
    };
    for one in &assigned {
        // It all comes out of the message.
        let mut parts = one.name.splitn(2, '=');
        assert!(parts.all(|part| holds(&message, part)), "{one:?}");
        assert!(holds(&message, &one.container), "{one:?}");
    }
    let again = answer("web", "shop", &assigned);
    assert_eq!(part_of(&again, &pod).unwrap(), assigned);
    let mut both = answer("web", "elsewhere", &assigned);
    both.extend(answer("other", "shop", &assigned));
    assert_eq!(part_of(&both, &pod).unwrap(), []);
}

fn holds(message: &[u8], text: &str) -> bool {
    text.is_empty()
        || message
            .windows(text.len())
            .any(|part| part == text.as_bytes())
}

/// An answer in which a pod has these, by claims.
fn answer(name: &str, namespace: &str, assigned: &[Assigned]) -> Vec<u8> {
    let mut pod = [field(1, name.as_bytes()), field(2, namespace.as_bytes())].concat();
    for one in assigned {
        let claim = field(4, &field(1, &field(1, one.name.as_bytes())));
        let container = [field(1, one.container.as_bytes()), field(5, &claim)];
        pod.extend(field(3, &container.concat()));
    }
    field(1, &pod)
}

/// A field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut made = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length > 0x7f {
        made.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
        length >>= 7;
    }
    made.push(u8::try_from(length).unwrap());
    made.extend(bytes);
    made
}

/// A CDI file, as YAML and as JSON. What is read of it is bounded by the file, and the same when it is
/// written as JSON again.
pub fn cdi_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for is_json in [true, false] {
        let Ok(document) = cdi::parse(text, is_json) else {
            continue;
        };
        assert!(depth(&document) <= 128);
        let Some(edits) = cdi::edits(&document, "v.com/c", "d") else {
            continue;
        };
        // Of two parts of a file at most.
        assert!(edits.others.len() <= 4, "{edits:?}");
        assert!(edits.nodes.len() + edits.env.len() <= data.len());
        let written = document.to_string();
        let again = cdi::parse(&written, true).unwrap();
        assert_eq!(cdi::edits(&again, "v.com/c", "d"), Some(edits));
    }
}

fn depth(value: &serde_json::Value) -> usize {
    let below = match value {
        serde_json::Value::Array(list) => list.iter().map(depth).max(),
        serde_json::Value::Object(map) => map.values().map(depth).max(),
        _ => None,
    };
    1 + below.unwrap_or(0)
}
