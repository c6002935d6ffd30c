//! How much memory a running VM has. More is there before this returns, or the VM has what it had; less is what the
//! guest can do without.
//!
//! What the guest says of its memory decides nothing but how long it is waited for: the VMM counts what it has.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use brig_agent_protocol::agent::{Empty, MemoryFigures, ResizeMemoryRequest};
use slog::{Logger, info, warn};
use ttrpc::context;

use super::Vm;
use super::size::BLOCK;
use crate::asked::config::MIB;
use crate::error::{Error, Kind, Result};

/// What is left to the guest as free or easy to free, in bytes, when memory is taken.
const LEFT: u64 = 32 * MIB;
/// In bytes.
const GIB: u64 = 1024 * MIB;

/// What becomes of a growth that the guest does not take all of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The guest has what it had: somebody is told that there is no more.
    Undone,
    /// The guest keeps what it has taken: somebody goes on with what there is.
    Kept,
}

/// What a guest has that was asked to have something else.
struct Settled {
    bytes: u64,
    /// It was still getting nearer when its time was over.
    unfinished: bool,
}

impl Vm {
    /// Whether it has as much as this, once nobody changes its size any more.
    pub async fn has(&self, memory: u64, cpus: u8) -> bool {
        let _memory = self.memory.changing.lock().await;
        let _cpus = self.cpus.changing.lock().await;
        memory <= self.memory() && cpus <= self.cpus()
    }

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
        self.grow_by(bytes, Part::Undone, logger).await
    }

    /// As [`Self::grow`], and what the guest has taken of it stays.
    ///
    /// # Errors
    /// As of [`Self::grow`].
    pub async fn grow_as_far_as_it_takes(&self, bytes: u64, logger: &Logger) -> Result<()> {
        self.grow_by(bytes, Part::Kept, logger).await
    }

    async fn grow_by(&self, bytes: u64, part: Part, logger: &Logger) -> Result<()> {
        let bytes = whole(bytes);
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
        let asked = self.ask(had, bytes).await;
        let has = match (&asked, part) {
            (Ok(settled), _) if settled.bytes >= bytes => bytes,
            (Ok(settled), Part::Kept) => (settled.bytes / BLOCK * BLOCK).max(had),
            _ => had,
        };
        if has < bytes {
            // Else its driver would go on trying. What was never given needs no taking.
            let _ = self.ask(bytes, has).await;
        }
        if has > had {
            self.memory.now.store(has, Ordering::Relaxed);
            info!(logger, "the VM has more memory"; "memory_mib" => has / MIB, "before_mib" => had / MIB);
        }
        let settled = asked?;
        if has >= bytes {
            return Ok(());
        }
        Err(Error::state(format!(
            "the guest has taken {} MiB of the {} MiB of memory that it was given{}; it has {} MiB{}",
            settled.bytes.saturating_sub(had) / MIB,
            (bytes - had) / MIB,
            if settled.unfinished {
                ", and its time was over"
            } else {
                ""
            },
            has / MIB,
            if has == had { " as before" } else { "" },
        )))
    }

    /// Takes memory from the guest, down to `bytes` if it can do without the rest; what cannot be had is logged.
    pub async fn shrink(&self, bytes: impl FnOnce() -> u64, logger: &Logger) {
        let _changing = self.memory.changing.lock().await;
        let had = self.memory();
        let wanted = whole(bytes()).max(self.memory.built);
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
        let settled = match self.ask(had, possible).await {
            Ok(settled) => settled,
            Err(error) => {
                // Else its driver would give back what is not known to be gone.
                let _ = self.ask(possible, had).await;
                return Err(error);
            }
        };
        let has = settled.bytes.clamp(possible, had);
        if has > possible {
            // Else its driver would try again every minute, for ever.
            self.ask(possible, has).await?;
        }
        Ok((has, settled.why_more_than(possible)))
    }

    /// Has the guest, of which `from` was wanted, asked to have `bytes`, and waits; what it has then.
    async fn ask(&self, from: u64, bytes: u64) -> Result<Settled> {
        let (function, has) = match self.control.memory(bytes).await {
            Ok(answer) => answer,
            Err(error) => return Err(self.explain(error).await),
        };
        let Some(function) = function.filter(|_| has != bytes) else {
            return Ok(Settled {
                bytes: has,
                unfinished: false,
            });
        };
        let more = time_for(from.abs_diff(bytes), self.timeouts.stop);
        let wait = self.timeouts.stop.saturating_add(more);
        let request = ResizeMemoryRequest {
            function: function.into(),
            added: bytes.saturating_sub(self.memory.built),
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            ..ResizeMemoryRequest::default()
        };
        // The agent looks for the device of a growth.
        let _looks = self.bus.read().await;
        let begun = Instant::now();
        let answer = self
            .agent
            .resize_memory(context::Context::default(), &request);
        let limit = self.timeouts.call.saturating_add(more);
        let answer = self.call_within(limit, "ResizeMemory", answer);
        let MemoryFigures { added, .. } = answer.await?;
        Ok(Settled {
            bytes: self.memory.built.saturating_add(added),
            // One that gets no nearer answers before.
            unfinished: begun.elapsed() >= wait,
        })
    }
}

impl Settled {
    /// Of a guest that was asked to have as little as this.
    fn why_more_than(&self, wanted: u64) -> &'static str {
        if self.bytes <= wanted {
            "the guest uses it"
        } else if self.unfinished {
            "the guest was still freeing it when its time was over; the next change of a limit goes on"
        } else {
            "the guest's kernel cannot free it"
        }
    }
}

/// In whole blocks, as far as the number goes.
fn whole(bytes: u64) -> u64 {
    let up = bytes.checked_next_multiple_of(BLOCK);
    up.unwrap_or(u64::MAX / BLOCK * BLOCK)
}

/// What a guest may take for so many bytes beyond `least`, which it has for any: a tenth of that for each GiB, a second for
/// ten.
fn time_for(bytes: u64, least: Duration) -> Duration {
    let gib = u32::try_from(bytes.div_ceil(GIB)).unwrap_or(u32::MAX);
    (least / 10).saturating_mul(gib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_size_has_whole_blocks() {
        assert_eq!(whole(1), BLOCK);
        assert_eq!(whole(BLOCK), BLOCK);
        assert_eq!(whole(u64::MAX) % BLOCK, 0);
        assert!(whole(u64::MAX) > u64::MAX - BLOCK);
    }

    #[test]
    fn much_memory_has_more_time_and_what_was_still_coming_is_not_called_impossible() {
        let least = Duration::from_secs(10);
        assert_eq!(time_for(100 * MIB, least), Duration::from_secs(1));
        assert_eq!(time_for(64 * GIB, least), Duration::from_secs(64));
        let why = |bytes, unfinished| Settled { bytes, unfinished }.why_more_than(GIB);
        assert_eq!(why(GIB, true), "the guest uses it");
        assert!(why(2 * GIB, true).contains("still freeing it"));
        assert!(why(2 * GIB, false).contains("cannot free it"));
    }
}
