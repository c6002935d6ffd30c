//! The PCI addresses in a container's variables. Device plugins tell a container the node's, of the devices that they have
//! given it; in the guest the devices have others, and a container looks for what its variables say.

use serde_json::Value;

use crate::error::{Error, Result};

/// What the names of such variables begin with: those of the SR-IOV network device plugin (with `…_INFO` besides, which is JSON),
/// and those of plugins for virtual machines, for whole devices and mediated ones.
const PREFIXES: [&str; 3] = ["PCIDEVICE_", "PCI_RESOURCE_", "MDEV_PCI_RESOURCE_"];
/// Bytes of an address with its domain, and without.
const WHOLE: usize = "0000:00:00.0".len();
const SHORT: usize = "00:00.0".len();

/// A device's address on the node, and in the guest.
pub type Moved = (String, String);

/// A specification, or an exec's process, in whose variables the devices have the guest's addresses; none if it stays as it is.
///
/// # Errors
/// `InvalidArgument` for JSON that is none.
pub fn with_guest_addresses(json: &[u8], moved: &[Moved]) -> Result<Option<Vec<u8>>> {
    if moved.is_empty() || !PREFIXES.iter().any(|prefix| has(json, prefix.as_bytes())) {
        return Ok(None);
    }
    let mut whole: Value = serde_json::from_slice(json)
        .map_err(|error| Error::invalid(format!("the process is no JSON: {error}")))?;
    let process = if whole.get("process").is_some() {
        &mut whole["process"]
    } else {
        &mut whole
    };
    let list = process.get_mut("env").and_then(Value::as_array_mut);
    let mut changed = false;
    for variable in list.into_iter().flatten() {
        let Some(text) = variable.as_str() else {
            continue;
        };
        let Some((name, value)) = text.split_once('=') else {
            continue;
        };
        if !PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let new = format!("{name}={}", in_guest(value, moved));
        changed |= new != text;
        *variable = new.into();
    }
    let bytes = || serde_json::to_vec(&whole).map_err(|error| Error::internal(error.to_string()));
    changed.then(bytes).transpose()
}

fn has(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Each address that stands by itself in the guest's place, whatever is around it: a list, a key or a value of JSON. All
/// at once, as the guest's address of one device may be the node's of another.
fn in_guest(value: &str, moved: &[Moved]) -> String {
    let mut new = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(start) = rest.find(is_part) {
        let (before, from) = rest.split_at(start);
        let end = from.find(|letter| !is_part(letter)).unwrap_or(from.len());
        let (word, after) = from.split_at(end);
        new.push_str(before);
        new.push_str(&of_word(word, moved));
        rest = after;
    }
    new.push_str(rest);
    new
}

/// Of what an address could be, and what would be more than one.
fn is_part(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || matches!(letter, ':' | '.' | '-' | '_' | '/')
}

fn of_word(word: &str, moved: &[Moved]) -> String {
    let short = |address: &str| address.get(WHOLE - SHORT..).unwrap_or_default().to_owned();
    for (node, guest) in moved {
        if word.eq_ignore_ascii_case(node) {
            return guest.clone();
        }
        // Without a domain, the first is meant.
        if node.starts_with("0000:") && word.eq_ignore_ascii_case(&short(node)) {
            return short(guest);
        }
    }
    word.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn moved() -> Vec<Moved> {
        let pair = |node: &str, guest: &str| (node.to_owned(), guest.to_owned());
        vec![
            pair("0000:03:00.1", "0000:00:1f.0"),
            // The guest's address of the one is the node's of the other.
            pair("0000:00:1f.0", "0000:1e:00.0"),
            pair("0001:05:0a.3", "0000:00:1d.0"),
        ]
    }

    #[test]
    fn every_form_of_a_plugins_variables_has_the_guests_addresses() {
        let info = json!({"0000:03:00.1": {"generic": {"deviceID": "0000:03:00.1"},
            "vfio": {"dev-mount": "/dev/vfio/12"}}, "0000:00:1f.0": {"generic": {"deviceID": "0000:00:1f.0"}}});
        let spec = json!({"process": {"env": [
            "PCIDEVICE_INTEL_COM_SRIOV=0000:03:00.1,0000:00:1f.0,0001:05:0A.3",
            format!("PCIDEVICE_INTEL_COM_SRIOV_INFO={info}"),
            "PCI_RESOURCE_NVIDIA_COM_GPU=03:00.1",
            "MDEV_PCI_RESOURCE_X=none",
            // Nobody's business here: another device's, a part of something longer, a variable of the user's.
            "PCIDEVICE_OTHER=0000:09:00.0,0000:03:00.10,/sys/bus/pci/devices/0000:03:00.1",
            "ADDRESS=0000:03:00.1", "PCIDEVICE_", "PATH=/bin"]}, "new": [1.5]});
        let bytes = with_guest_addresses(spec.to_string().as_bytes(), &moved())
            .unwrap()
            .unwrap();
        let told: Value = serde_json::from_slice(&bytes).unwrap();
        let env: Vec<&str> = told["process"]["env"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one.as_str().unwrap())
            .collect();
        assert_eq!(
            env[0],
            "PCIDEVICE_INTEL_COM_SRIOV=0000:00:1f.0,0000:1e:00.0,0000:00:1d.0"
        );
        let info: Value = serde_json::from_str(env[1].split_once('=').unwrap().1).unwrap();
        assert_eq!(
            info,
            json!({"0000:00:1f.0": {"generic": {"deviceID": "0000:00:1f.0"},
            "vfio": {"dev-mount": "/dev/vfio/12"}}, "0000:1e:00.0": {"generic": {"deviceID": "0000:1e:00.0"}}})
        );
        assert_eq!(env[2], "PCI_RESOURCE_NVIDIA_COM_GPU=00:1f.0");
        let same: Vec<&str> = spec["process"]["env"].as_array().unwrap()[3..]
            .iter()
            .map(|one| one.as_str().unwrap())
            .collect();
        assert_eq!(env[3..], same);
        assert_eq!(told["new"], json!([1.5]));
    }

    #[test]
    fn an_execs_process_has_them_too_and_what_names_no_device_stays_as_it_is() {
        let process = br#"{"args":["a"],"env":["PCIDEVICE_A=0000:03:00.1"]}"#;
        let told = with_guest_addresses(process, &moved()).unwrap().unwrap();
        let told: Value = serde_json::from_slice(&told).unwrap();
        assert_eq!(told["env"][0], "PCIDEVICE_A=0000:00:1f.0");
        assert_eq!(with_guest_addresses(process, &[]).unwrap(), None);
        for none in [
            &br#"{"env":["A=0000:03:00.1"]}"#[..],
            b"no JSON",
            br#"{"env":["PCIDEVICE_A=x"]}"#,
        ] {
            assert_eq!(with_guest_addresses(none, &moved()).unwrap(), None);
        }
        assert!(with_guest_addresses(b"PCIDEVICE_", &moved()).is_err());
    }

    proptest! {
        #[test]
        fn any_value_is_read_and_only_addresses_change(value in "[0-9a-f:., {}\"é]{0,60}") {
            let new = in_guest(&value, &moved());
            if !moved().iter().any(|(node, _)| value.contains(&node[5..])) && !value.to_lowercase().contains("0a.3") {
                prop_assert_eq!(new, value);
            }
        }
    }
}
