//! The name by which Kubernetes knows a pod, as CRI notes it on the pod's sandbox. For people to read: nothing is
//! decided by it.

use serde::{Deserialize, Serialize};

/// The longest part of it in bytes: Kubernetes takes no longer ones.
const MAX_PART: usize = 253;

/// A pod's name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// Kubernetes' namespace, which is not containerd's.
    pub namespace: String,
    /// The name in it.
    pub name: String,
    /// Unlike a name never used again.
    pub uid: String,
}

impl PodName {
    /// From the annotations of a sandbox container; none if they do not name a pod.
    #[must_use]
    pub fn of_annotations<'a>(
        annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Option<Self> {
        let mut pod = Self::default();
        for (name, value) in annotations {
            match name {
                "io.kubernetes.cri.sandbox-name" => pod.name = cut(value),
                "io.kubernetes.cri.sandbox-namespace" => pod.namespace = cut(value),
                "io.kubernetes.cri.sandbox-uid" => pod.uid = cut(value),
                _ => {}
            }
        }
        (!pod.name.is_empty()).then_some(pod)
    }

    /// From the parts that the sandbox's metadata have; none without a name.
    #[must_use]
    pub fn of_metadata(namespace: &str, name: &str, uid: &str) -> Option<Self> {
        (!name.is_empty()).then(|| Self {
            namespace: cut(namespace),
            name: cut(name),
            uid: cut(uid),
        })
    }

    /// As kubectl takes it: `namespace/name`.
    #[must_use]
    pub fn full(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

fn cut(part: &str) -> String {
    let mut end = part.len().min(MAX_PART);
    while !part.is_char_boundary(end) {
        end -= 1;
    }
    part[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_named_by_the_annotations_of_cri_and_no_others() {
        let long = "é".repeat(300);
        let pod = PodName::of_annotations([
            ("io.kubernetes.cri.sandbox-name", "web-0"),
            ("io.kubernetes.cri.sandbox-namespace", "shop"),
            ("io.kubernetes.cri.sandbox-uid", long.as_str()),
            ("io.kubernetes.cri.sandbox-id", "abc"),
        ])
        .unwrap();
        assert_eq!(pod.full(), "shop/web-0");
        assert_eq!(pod.uid.len(), MAX_PART - 1);
        assert_eq!(PodName::of_annotations([("name", "x")]), None);
        assert_eq!(PodName::of_metadata("shop", "", "u"), None);
    }
}
