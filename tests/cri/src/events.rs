//! containerd's stream of container events, which kubelet reads in place of asking each second.

use anyhow::{Context, Result};
use brig_tests::node::clock;
use k8s_cri::v1::{ContainerEventResponse, GetEventsRequest};
use tonic::Streaming;

use crate::client::Cri;

/// The stream, from its opening on.
pub struct Events(Streaming<ContainerEventResponse>);

impl Events {
    /// Begins to listen.
    ///
    /// # Errors
    /// With containerd's answer.
    pub fn open(cri: &Cri) -> Result<Self> {
        let stream = cri.call("GetContainerEvents", |mut client| async move {
            client.get_container_events(GetEventsRequest {}).await
        })?;
        Ok(Self(stream))
    }

    /// The next event of any container.
    ///
    /// # Errors
    /// If none comes in time.
    pub fn next(&mut self, cri: &Cri) -> Result<ContainerEventResponse> {
        cri.wait_for("the next event", clock::seconds(4), self.0.message())?
            .context("the stream of events ended")
    }
}
