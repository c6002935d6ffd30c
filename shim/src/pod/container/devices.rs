//! Devices of the node that a container asks for in its specification, as device plugins and DRA drivers put them there.

use brig_agent_protocol::agent::GivenDevice;

use super::context::Context;
use super::creation::Creation;
use crate::asked::spec::Device;
use crate::error::{Error, Result};
use crate::guest::vm::Vm;
use crate::node::vfio::{Named, Node};

/// Gives them to the VM; what the agent is to show of them. They are taken back by [`Vm::take_groups`], also when this
/// fails.
///
/// # Errors
/// One sentence with the fix.
pub(super) async fn give(
    context: &Context,
    vm: &Vm,
    creation: &Creation,
) -> Result<Vec<GivenDevice>> {
    let asked = creation.spec.devices();
    // Most containers ask for none, and then nothing is looked at.
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let asked = asked.to_vec();
    let named = tokio::task::spawn_blocking(move || named(&Node::new(), &asked));
    let named = named
        .await
        .map_err(|error| Error::internal(format!("a worker has ended: {error}")))?;
    let mut given = Vec::new();
    for (path, named) in named? {
        let functions = match named {
            Named::Container => Vec::new(),
            Named::Group(number) => vm.give_group(number, &creation.id, &context.logger).await?,
        };
        given.push(GivenDevice {
            path,
            functions: functions.into_iter().map(u32::from).collect(),
            ..GivenDevice::default()
        });
    }
    Ok(given)
}

/// Those of the entries that are VFIO's; a group that is named twice, as a device and as a group, counts once.
fn named(node: &Node, asked: &[Device]) -> Result<Vec<(String, Named)>> {
    let mut found: Vec<(String, Named)> = Vec::new();
    for device in asked {
        let Some(numbers) = device.character() else {
            continue;
        };
        let Some(named) = node.named(numbers)? else {
            continue;
        };
        let again = found.iter().any(|(_, other)| *other == named);
        let named = if again { Named::Container } else { named };
        found.push((device.path.clone(), named));
    }
    Ok(found)
}
