//! Sends a pod's start as spans, once and beside everything else, where containerd's tracing is configured.

use rustix::rand::{GetRandomFlags, getrandom};
use slog::{Logger, warn};

use crate::node::collector::Collector;
use crate::pod::spans::{self, Named, TraceParent};
use crate::pod::timeline::Timeline;

/// What is known of the trace that a pod's start belongs to.
#[derive(Debug, Default)]
pub(super) struct Tracing {
    /// Nobody once the spans are on their way.
    collector: Option<Collector>,
    parent: Option<TraceParent>,
}

impl Tracing {
    pub(super) fn new(collector: Option<Collector>) -> Self {
        Self {
            collector,
            parent: None,
        }
    }

    /// A request of the start came as a part of this. The first one counts: the others ask for parts of what it began.
    pub(super) fn part_of(&mut self, parent: TraceParent) {
        self.parent.get_or_insert(parent);
    }

    /// The pod has a container that runs.
    pub(super) fn started(&mut self, timeline: &Timeline, named: &Named<'_>, logger: &Logger) {
        let Some(collector) = self.collector.take() else {
            return;
        };
        let spans = spans::of_start(timeline, self.parent.as_ref(), named, random);
        let Some(spans) = spans else {
            return;
        };
        let (document, logger) = (spans.to_string().into_bytes(), logger.clone());
        tokio::spawn(async move {
            if let Err(error) = collector.send(document).await {
                warn!(logger, "the spans of the pod's start are lost"; "reason" => %error);
            }
        });
    }
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // So few bytes come whole or not at all, and they need not be secret.
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}
