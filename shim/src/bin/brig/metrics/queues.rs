//! What a pod's virtio devices have done, by device and queue, and the memory that its guest gave back, as its VMM counts
//! them.

use serde_json::Value;

use super::family::Family;

/// The families.
pub struct Queues {
    wakeups: Family,
    requests: Family,
    interrupts: Family,
    given_up: Family,
}

impl Queues {
    /// Without samples.
    #[must_use]
    pub fn new() -> Self {
        Self {
            wakeups: Family::new(
                "brig_pod_virtio_wakeups",
                "counter",
                "",
                "Events that woke a device's thread: kicks of the guest, frames for it, ends of I/O.",
            ),
            requests: Family::new(
                "brig_pod_virtio_requests",
                "counter",
                "",
                "Buffers of the guest that a device has taken from a queue and given back.",
            ),
            interrupts: Family::new(
                "brig_pod_virtio_interrupts",
                "counter",
                "",
                "Interrupts that the guest was given for a queue.",
            ),
            given_up: Family::new(
                "brig_pod_guest_memory_given_up_bytes",
                "counter",
                "bytes",
                "Memory that the guest did not need and that went back to the node: reported free, in the balloon, or unplugged.",
            ),
        }
    }

    /// Adds what the VMM of a pod with these labels counts. A queue that has carried nothing is left out.
    pub fn add(&mut self, pod: &[(&str, &str); 2], counters: &Value) {
        if let Some(bytes) = counters["given_up_bytes"].as_f64() {
            self.given_up.add(pod, bytes);
        }
        for device in counters["devices"].as_array().into_iter().flatten() {
            let (Some(kind), Some(function)) =
                (device["device"].as_str(), device["function"].as_u64())
            else {
                continue;
            };
            let function = format!("00:{:02x}.{}", function >> 3, function & 7);
            let labels = [pod[0], pod[1], ("device", kind), ("function", &*function)];
            if let Some(count) = device["wakeups"].as_f64() {
                self.wakeups.add(&labels, count);
            }
            let queues = device["queues"].as_array().into_iter().flatten();
            for (number, queue) in queues.enumerate() {
                let number = number.to_string();
                let labels = [
                    labels[0],
                    labels[1],
                    labels[2],
                    labels[3],
                    ("queue", &*number),
                ];
                let (Some(requests), Some(interrupts)) = (queue[0].as_f64(), queue[1].as_f64())
                else {
                    continue;
                };
                if requests > 0.0 {
                    self.requests.add(&labels, requests);
                    self.interrupts.add(&labels, interrupts);
                }
            }
        }
    }

    /// All of them.
    pub fn families(self) -> [Family; 4] {
        [self.wakeups, self.requests, self.interrupts, self.given_up]
    }
}

#[cfg(test)]
mod tests {
    use super::super::family::text;
    use super::*;
    use brig_hypervisor::control::{Counters, DeviceCounters};

    #[test]
    fn what_the_vmm_counts_is_told_by_device_and_queue() {
        let counters = Counters {
            devices: vec![DeviceCounters {
                device: "net".to_owned(),
                function: 0x29,
                wakeups: 7,
                queues: vec![(0, 0), (5, 2)],
            }],
            given_up_bytes: 4096,
            ..Counters::default()
        };
        let mut queues = Queues::new();
        let pod = [("namespace", "default"), ("id", "web")];
        queues.add(&pod, &serde_json::to_value(counters).unwrap());
        // One of a version that did not count them yet.
        queues.add(&pod, &serde_json::json!({ "exits": {} }));
        let told = text(&queues.families());
        let device = "namespace=\"default\",id=\"web\",device=\"net\",function=\"00:05.1\"";
        let samples: Vec<_> = told.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            samples,
            [
                format!("brig_pod_virtio_wakeups_total{{{device}}} 7"),
                format!("brig_pod_virtio_requests_total{{{device},queue=\"1\"}} 5"),
                format!("brig_pod_virtio_interrupts_total{{{device},queue=\"1\"}} 2"),
                "brig_pod_guest_memory_given_up_bytes_total{namespace=\"default\",id=\"web\"} 4096"
                    .to_owned(),
            ]
        );
    }
}
