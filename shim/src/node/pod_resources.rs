//! What kubelet has assigned to a pod's containers before its sandbox is made (`v1.PodResourcesLister` on a socket of the
//! node), so that devices can be in the VM when its guest boots.
//!
//! One call of gRPC, without parameters: everything that kubelet has assigned on the node comes back, and the pod's part of
//! it is taken out. Kubelet is trusted; the answer is bounded all the same.

use std::path::Path;
use std::time::Duration;

use crate::asked::pod_name::PodName;
use crate::asked::wire::{Value, each_field, text};
use crate::node::grpc::{self, GrpcError};

/// The method, as a path.
const LIST: &str = "/v1.PodResourcesLister/List";
/// kubelet's own bound of a message in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// A device that kubelet has assigned to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    /// The container's name in the pod.
    pub container: String,
    /// What was assigned: a device of a device plugin, as `resource=id`, which is its CDI name where it has one, or a CDI name
    /// of a DRA driver.
    pub name: String,
}

impl Assigned {
    /// What a device plugin calls the device, of one that it has assigned.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.name.split_once('=').map(|(_, id)| id)
    }
}

/// What kubelet has assigned to the containers of `pod`.
///
/// # Errors
/// [`GrpcError`].
pub async fn of_pod(
    socket: &Path,
    pod: &PodName,
    patience: Duration,
) -> Result<Vec<Assigned>, GrpcError> {
    let answer = grpc::call(socket, LIST, &[], MAX_ANSWER, patience).await?;
    part_of(&answer, pod).map_err(|error| GrpcError::Answer(error.to_string()))
}

/// `v1.ListPodResourcesResponse`: the devices of one pod.
pub(crate) fn part_of(answer: &[u8], pod: &PodName) -> protobuf::Result<Vec<Assigned>> {
    let mut assigned = Vec::new();
    each_field(answer, |number, value| {
        if let (1, Value::Bytes(resources)) = (number, value) {
            let (mut name, mut namespace, mut containers) =
                (String::new(), String::new(), Vec::new());
            each_field(resources, |number, value| {
                match (number, value) {
                    (1, Value::Bytes(bytes)) => name = text(bytes)?,
                    (2, Value::Bytes(bytes)) => namespace = text(bytes)?,
                    (3, Value::Bytes(bytes)) => containers.push(bytes.to_vec()),
                    _ => {}
                }
                Ok(())
            })?;
            if name == pod.name && namespace == pod.namespace {
                for container in containers {
                    of_container(&container, &mut assigned)?;
                }
            }
        }
        Ok(())
    })?;
    Ok(assigned)
}

/// `v1.ContainerResources`.
fn of_container(bytes: &[u8], assigned: &mut Vec<Assigned>) -> protobuf::Result<()> {
    let (mut container, mut names) = (String::new(), Vec::new());
    each_field(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(bytes)) => container = text(bytes)?,
            (2, Value::Bytes(devices)) => of_plugin(devices, &mut names)?,
            (5, Value::Bytes(claim)) => of_claim(claim, &mut names)?,
            _ => {}
        }
        Ok(())
    })?;
    assigned.extend(names.into_iter().map(|name| Assigned {
        container: container.clone(),
        name,
    }));
    Ok(())
}

/// `v1.ContainerDevices`.
fn of_plugin(bytes: &[u8], names: &mut Vec<String>) -> protobuf::Result<()> {
    let (mut resource, mut ids) = (String::new(), Vec::new());
    each_field(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(bytes)) => resource = text(bytes)?,
            (2, Value::Bytes(bytes)) => ids.push(text(bytes)?),
            _ => {}
        }
        Ok(())
    })?;
    names.extend(ids.into_iter().map(|id| format!("{resource}={id}")));
    Ok(())
}

/// `v1.DynamicResource`: the CDI names in its claims.
fn of_claim(bytes: &[u8], names: &mut Vec<String>) -> protobuf::Result<()> {
    each_field(bytes, |number, value| {
        if let (4, Value::Bytes(claim)) = (number, value) {
            each_field(claim, |number, value| {
                if let (1, Value::Bytes(device)) = (number, value) {
                    each_field(device, |number, value| {
                        if let (1, Value::Bytes(name)) = (number, value) {
                            names.push(text(name)?);
                        }
                        Ok(())
                    })?;
                }
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::node::grpc::testing::server;
    use proptest::prelude::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut made = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        made.extend(bytes);
        made
    }

    /// An answer with two pods, of which `shop/web` has a plugin's devices and a claim.
    pub(crate) fn answer() -> Vec<u8> {
        let devices = [field(1, b"v.com/gpu"), field(2, b"0"), field(2, b"1")].concat();
        let claim = field(4, &field(1, &field(1, b"d.com/nic=a")));
        let main = [
            field(1, b"main"),
            field(2, &devices),
            vec![3 << 3, 7],
            field(5, &claim),
        ]
        .concat();
        let web = [field(1, b"web"), field(2, b"shop"), field(3, &main)].concat();
        let other = [field(1, b"web"), field(2, b"elsewhere"), field(3, &main)].concat();
        [field(1, &other), field(1, &web)].concat()
    }

    fn pod() -> PodName {
        PodName::of_metadata("shop", "web", "u").unwrap()
    }

    #[test]
    fn a_pods_devices_are_those_of_its_name_and_namespace_by_plugins_and_claims() {
        let assigned = part_of(&answer(), &pod()).unwrap();
        let names: Vec<_> = assigned.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["v.com/gpu=0", "v.com/gpu=1", "d.com/nic=a"]);
        assert!(assigned.iter().all(|one| one.container == "main"));
        assert_eq!(assigned[1].id(), Some("1"));
        let none = PodName::of_metadata("shop", "other", "u").unwrap();
        assert_eq!(part_of(&answer(), &none).unwrap(), []);
    }

    #[tokio::test]
    async fn kubelet_is_asked_once_for_everything() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("kubelet.sock");
        server(&socket, LIST, Vec::new(), answer(), "0");
        let wait = Duration::from_secs(20);
        assert_eq!(of_pod(&socket, &pod(), wait).await.unwrap().len(), 3);
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..80) {
            let _ = part_of(&bytes, &pod());
            let mut mixed = answer();
            let end = mixed.len();
            mixed.splice(at.min(end)..(at + 3).min(end), bytes.into_iter().take(3));
            let _ = part_of(&mixed, &pod());
        }
    }
}
