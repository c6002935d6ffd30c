//! What a container has of the driver bundle for the devices of the node that it was given.
mod apply;
mod numbers;

use std::{fs, io};

use brig_agent_protocol::agent::GivenDevice;

use crate::{
    bundle::{
        Bundle,
        cdi::{Edits, Function},
    },
    control::MountSource,
    error::{Error, Result},
    given::Given,
    pci,
    spec::Spec,
};

/// Functions of the guest's only bus.
const DEVICES: &str = "/sys/bus/pci/devices";

/// Adds to a specification, and to what the container was `given`, what the bundle has for these devices: variables, mounts,
/// nodes and groups. The answer is what those mounts show, by index into `spec.mounts`.
///
/// # Errors
/// `FailedPrecondition` naming what of the bundle cannot be had.
pub async fn apply(
    spec: &mut Spec,
    given: &mut Given,
    devices: &[GivenDevice],
) -> Result<Vec<(u32, MountSource)>> {
    let functions: Vec<u32> = devices
        .iter()
        .flat_map(|device| device.functions.iter().copied())
        .collect();
    if functions.is_empty() {
        return Ok(Vec::new());
    }
    let edits = tokio::task::spawn_blocking(move || edits(&functions)).await;
    let edits = edits
        .map_err(|error| Error::Internal(error.to_string()))?
        .map_err(Error::FailedPrecondition)?;
    apply::apply(spec, given, &edits).map_err(Error::FailedPrecondition)
}

fn edits(functions: &[u32]) -> std::result::Result<Vec<Edits>, String> {
    let Some(bundle) = Bundle::open()? else {
        return Ok(Vec::new());
    };
    let all = present().map_err(|error| format!("the guest's PCI bus: {error}"))?;
    bundle.edits(functions, &all)
}

/// The functions of bus 0, in their order; a port counts as what is behind it.
fn present() -> io::Result<Vec<Function>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(DEVICES)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(pci::number);
        let place = pci::device_at(entry.path());
        let modalias = fs::read_to_string(place.join("modalias"));
        // One that goes meanwhile is not there.
        if let (Some(number), Ok(modalias)) = (number, modalias) {
            all.push(Function {
                number,
                modalias: modalias.trim().to_owned(),
            });
        }
    }
    all.sort_unstable_by_key(|function| function.number);
    Ok(all)
}
