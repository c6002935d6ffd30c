//! What a container has of its pod.

use std::path::PathBuf;
use std::time::Duration;

use slog::Logger;
use tokio::sync::mpsc;

use crate::guest::vm::boot::News;
use crate::pod::doomed::Doomed;
use crate::pod::events::Events;
use crate::pod::node_limits::NodeLimits;
use crate::pod::size::PodSize;
use crate::pod::stdio::streaming::Streams;
use crate::pod::volume::Volumes;

/// What a container needs of its pod.
#[derive(Clone)]
pub struct Context {
    /// containerd namespace.
    pub namespace: String,
    /// Events to containerd.
    pub events: Events,
    /// The log.
    pub logger: Logger,
    /// The pod's volumes.
    pub volumes: Volumes,
    /// Moments for the timeline.
    pub news: mpsc::Sender<News>,
    /// Told when a container is gone for good.
    pub removed: mpsc::UnboundedSender<String>,
    /// How long output may take to be delivered after an exit.
    pub drain: Duration,
    /// The handler's image of drivers for devices of the node.
    pub driver_bundle: Option<PathBuf>,
    /// The handler takes volumes that storage drivers hand over as block devices.
    pub direct_volumes: bool,
    /// containerd's streams.
    pub streams: Streams,
    /// The pod's size.
    pub size: PodSize,
    /// Who of it was killed.
    pub doomed: Doomed,
    /// Its limits on the node.
    pub node_limits: NodeLimits,
}
