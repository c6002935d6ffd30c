//! What an operator of the node looks at in the guest. The agent's answer is not trusted: it is bounded, and whoever
//! shows it takes it for any bytes.

use brig_agent_protocol::agent::LookRequest;
use brig_agent_protocol::{LOOK_PIECE, MAX_LOOK};
use ttrpc::context;

use super::Vm;
use crate::error::{Error, Kind, Result};

/// The most pieces that an answer comes in.
const PIECES: usize = MAX_LOOK.div_ceil(LOOK_PIECE);

impl Vm {
    /// The agent's answer to `words`, which are as of a command line.
    ///
    /// # Errors
    /// The agent's, as of [`Vm::call`]; `ResourceExhausted` for an answer longer than it may be.
    pub async fn look(&self, words: Vec<String>) -> Result<Vec<u8>> {
        let mut request = LookRequest {
            words,
            ..LookRequest::default()
        };
        let mut whole = Vec::new();
        for _ in 0..PIECES {
            let answer = self.agent.look(context::Context::default(), &request);
            let piece = self.call("Look", answer).await?;
            whole.extend_from_slice(&piece.content);
            if whole.len() > MAX_LOOK {
                break;
            }
            if !piece.more {
                return Ok(whole);
            }
            request.words.clear();
        }
        Err(Error::new(
            Kind::ResourceExhausted,
            "the guest's agent answered more than it may",
        ))
    }
}
