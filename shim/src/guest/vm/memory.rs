//! How much memory a running VM has. More is there before this returns, or the VM has what it had; less is what the
//! guest can do without.
//!
//! What the guest says of its memory decides nothing but how long it is waited for: the VMM counts what it has.

use std::sync::atomic::Ordering;

use brig_agent_protocol::agent::{Empty, MemoryFigures, ResizeMemoryRequest};
use slog::{Logger, info, warn};
use ttrpc::context;

use super::Vm;
use super::size::BLOCK;
use crate::asked::config::MIB;
use crate::error::{Error, Kind, Result};

/// What is left to the guest as free or easy to free, in bytes, when memory is taken.
const LEFT: u64 = 32 * MIB;
impl Vm {
    /// Bytes of memory that it has.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.memory.now.load(Ordering::Relaxed)
    }

    /// Bytes of memory that it was started with.
    #[must_use]
    pub fn first_memory(&self) -> u64 {
        self.memory.built
    }

    /// Bytes of memory that it may have.
    #[must_use]
    pub fn most_memory(&self) -> u64 {
        self.memory.most
    }

    /// Gives the guest more memory, if it has less than `bytes`.
    ///
    /// # Errors
    /// With the numbers: `ResourceExhausted` beyond what it may have, `FailedPrecondition` while a device of the node
    /// holds its memory, and when the guest does not take it. Its memory is as before then.
    pub async fn grow(&self, bytes: u64, logger: &Logger) -> Result<()> {
        let bytes = bytes.next_multiple_of(BLOCK);
        let _changing = self.memory.changing.lock().await;
        let had = self.memory();
        if bytes <= had {
            return Ok(());
        }
        let most = self.memory.most;
        if bytes > most {
            return Err(Error::new(
                Kind::ResourceExhausted,
                format!(
                    "the pod's VM needs {} MiB of memory for that and may have {} MiB: the handler's max_memory, or \
                     what the node has; it has {} MiB",
                    bytes.div_ceil(MIB),
                    most / MIB,
                    had / MIB
                ),
            ));
        }
        let has = match self.ask(bytes).await {
            Ok(has) if has >= bytes => {
                self.memory.now.store(bytes, Ordering::Relaxed);
                info!(logger, "the VM has more memory"; "memory_mib" => bytes / MIB, "before_mib" => had / MIB);
                return Ok(());
            }
            Ok(has) => Ok(has),
            Err(error) => Err(error),
        };
        // Back to what it was: half of it helps nobody, and what was never given needs no taking.
        let _ = self.ask(had).await;
        Err(match has {
            Err(error) => error,
            Ok(has) => Error::state(format!(
                "the guest has taken {} MiB of the {} MiB of memory that it was given; it has {} MiB as before",
                has.saturating_sub(had) / MIB,
                (bytes - had) / MIB,
                had / MIB
            )),
        })
    }

    /// Takes memory from the guest, down to `bytes` if it can do without the rest; what cannot be had is logged.
    pub async fn shrink(&self, bytes: impl FnOnce() -> u64, logger: &Logger) {
        let _changing = self.memory.changing.lock().await;
        let had = self.memory();
        let wanted = bytes().next_multiple_of(BLOCK).max(self.memory.built);
        if wanted >= had {
            return;
        }
        match self.take(wanted, had).await {
            Ok((has, reason)) => {
                self.memory.now.store(has, Ordering::Relaxed);
                info!(logger, "the VM has less memory"; "memory_mib" => has / MIB, "before_mib" => had / MIB);
                if has > wanted {
                    warn!(logger, "not all of the memory could be taken from the guest"; "wanted_mib" => wanted / MIB,
                        "memory_mib" => has / MIB, "reason" => reason);
                }
            }
            Err(error) => {
                warn!(logger, "no memory could be taken from the guest"; "wanted_mib" => wanted / MIB,
                    "memory_mib" => had / MIB, "reason" => error.message);
            }
        }
    }

    /// What the guest has when it was asked to give all beyond `wanted` back, and why that is more.
    async fn take(&self, wanted: u64, had: u64) -> Result<(u64, &'static str)> {
        let nothing = Empty::new();
        let figures = self.agent.memory(context::Context::default(), &nothing);
        let free = self.call("Memory", figures).await?.available;
        let spare = free.saturating_sub(LEFT) / BLOCK * BLOCK;
        let possible = wanted.max(had.saturating_sub(spare));
        if possible >= had {
            return Ok((had, "the guest uses it"));
        }
        let has = self.ask(possible).await?.clamp(possible, had);
        if has > possible {
            // Else its driver would try again every minute, for ever.
            self.ask(has).await?;
            return Ok((has, "the guest's kernel cannot free it"));
        }
        Ok((has, "the guest uses it"))
    }

    /// Has the guest asked to have `bytes`, and waits; what it has then.
    async fn ask(&self, bytes: u64) -> Result<u64> {
        let (function, has) = match self.control.memory(bytes).await {
            Ok(answer) => answer,
            Err(error) => return Err(self.explain(error).await),
        };
        let Some(function) = function.filter(|_| has != bytes) else {
            return Ok(has);
        };
        let wait = self.timeouts.stop;
        let request = ResizeMemoryRequest {
            function: function.into(),
            added: bytes.saturating_sub(self.memory.built),
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            ..ResizeMemoryRequest::default()
        };
        let answer = self
            .agent
            .resize_memory(context::Context::default(), &request);
        let MemoryFigures { added, .. } = self.call("ResizeMemory", answer).await?;
        Ok(self.memory.built.saturating_add(added))
    }
}
