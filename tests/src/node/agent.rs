//! A guest's agent, called without a shim: of a [`super::machine::Machine`] that boots the installed guest.

use std::os::fd::IntoRawFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use brig_agent_protocol::agent::{
    DeviceRef, Empty, FindDeviceRequest, FoundDevice, LookRequest, LookResponse,
};
use protobuf::Message;
use ttrpc::proto::Request;

use super::clock;

/// The connection.
pub struct Agent {
    client: ttrpc::Client,
}

impl Agent {
    /// Over the stream that the agent has opened.
    ///
    /// # Errors
    /// If there can be no client.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let client = ttrpc::Client::new(stream.into_raw_fd()).context("ttrpc client")?;
        Ok(Self { client })
    }

    /// Waits for the device of a function and its driver.
    ///
    /// # Errors
    /// What the agent answers.
    pub fn find_device(&self, function: u8, wait: Duration) -> Result<FoundDevice> {
        let request = FindDeviceRequest {
            function: function.into(),
            wait_ms: u32::try_from(wait.as_millis())?,
            ..FindDeviceRequest::default()
        };
        self.call("FindDevice", &request)
    }

    /// Takes the device of a function off the guest's bus.
    ///
    /// # Errors
    /// What the agent answers.
    pub fn remove_device(&self, function: u8) -> Result<()> {
        let request = DeviceRef {
            function: function.into(),
            ..DeviceRef::default()
        };
        self.call::<Empty>("RemoveDevice", &request).map(drop)
    }

    /// Looks into the guest (`brig exec`); the first piece of the answer.
    ///
    /// # Errors
    /// What the agent answers.
    pub fn look(&self, words: &[&str]) -> Result<String> {
        let request = LookRequest {
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            ..LookRequest::default()
        };
        let answer: LookResponse = self.call("Look", &request)?;
        Ok(String::from_utf8_lossy(&answer.content).into_owned())
    }

    /// Whether it answers.
    ///
    /// # Errors
    /// If it does not.
    pub fn ping(&self) -> Result<()> {
        self.call::<Empty>("Ping", &Empty::new()).map(drop)
    }

    fn call<T: Message>(&self, method: &str, request: &impl Message) -> Result<T> {
        let request = Request {
            service: "brig.agent.Agent".to_owned(),
            method: method.to_owned(),
            payload: request.write_to_bytes()?,
            timeout_nano: i64::try_from(clock::seconds(20).as_nanos())?,
            ..Request::default()
        };
        let answer = self
            .client
            .request(request)
            .with_context(|| method.to_owned())?;
        Ok(T::parse_from_bytes(&answer.payload)?)
    }
}
