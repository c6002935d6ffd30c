//! What an operator of the node may look at in the guest, outside its containers: there is no shell and no program
//! here but the agent, so it answers by itself. Read only, bounded, one at a time.
//!
//! The words come from the host, which is trusted; what is read may be a container's doing (names of processes,
//! mounts), and the host treats it so.
mod bounded;
mod file;
mod file_systems;
mod interfaces;
mod kernel_log;
mod processes;

use std::sync::{Arc, Mutex};

use bounded::bounded;
use brig_agent_protocol::{LOOK_PIECE, LOOKS, agent::LookResponse};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};
use crate::places::Places;
use crate::sync::lock;

/// The answers, of which one is read in pieces.
#[derive(Clone)]
pub struct Looker {
    /// Where the agent keeps things.
    places: Arc<Places>,
    /// Held by the thread that reads, which a file may keep waiting for longer than the host waits.
    free: Arc<Semaphore>,
    /// What of the last answer has not been asked for yet.
    rest: Arc<Mutex<Vec<u8>>>,
}

impl Looker {
    /// Nothing has been asked yet.
    #[must_use]
    pub fn new(places: &Places) -> Self {
        Self {
            places: Arc::new(places.clone()),
            free: Arc::new(Semaphore::new(1)),
            rest: Arc::default(),
        }
    }

    /// The first piece of the answer to `words`, or the next one of the last if there are none.
    ///
    /// # Errors
    /// `InvalidArgument` for what there is not; `ResourceExhausted` while another answer is being made; what the
    /// kernel says of a file.
    pub async fn look(&self, words: Vec<String>) -> Result<LookResponse> {
        if !words.is_empty() {
            let permit = Arc::clone(&self.free).try_acquire_owned();
            let permit = permit.map_err(|_| {
                Error::ResourceExhausted(
                    "something else is being looked at in this guest: try again".into(),
                )
            })?;
            let places = Arc::clone(&self.places);
            let read = tokio::task::spawn_blocking(move || {
                let answer = answer(&words, &places);
                drop(permit);
                answer
            });
            let answer = read.await.map_err(|e| Error::Internal(e.to_string()))??;
            *self.rest() = answer;
        }
        let mut rest = self.rest();
        let length = rest.len().min(LOOK_PIECE);
        let after = rest.split_off(length);
        let content = std::mem::replace(&mut *rest, after);
        Ok(LookResponse {
            more: !rest.is_empty(),
            content,
            ..Default::default()
        })
    }

    fn rest(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        lock(&self.rest)
    }
}

fn answer(words: &[String], places: &Places) -> Result<Vec<u8>> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["cat", paths @ ..] if !paths.is_empty() => file::contents(paths),
        ["df"] => Ok(bounded(file_systems::list(places)?)),
        ["dmesg"] => kernel_log::read(),
        ["free"] => file::contents(&["/proc/meminfo"]),
        ["ip"] => Ok(bounded(interfaces::list()?)),
        ["ls"] => file::names("/"),
        ["ls", path] => file::names(path),
        ["mounts"] => file::contents(&["/proc/self/mountinfo"]),
        ["ps"] => Ok(bounded(processes::list()?)),
        _ => Err(Error::InvalidArgument(format!(
            "the guest has no program but its agent, which knows: {} (cat takes paths, ls one)",
            LOOKS.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::bounded::CUT;
    use super::*;
    use brig_agent_protocol::MAX_LOOK;

    fn looker() -> Looker {
        let none = std::path::PathBuf::from("/nonexistent");
        Looker::new(&Places {
            run: none.clone(),
            share: none.clone(),
            cgroup_root: none.clone(),
            cgroup_base: none,
            owns_machine: false,
        })
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[tokio::test]
    async fn a_long_answer_comes_in_pieces_and_ends_at_the_most() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("long");
        let long: Vec<u8> = (0..=255).cycle().take(MAX_LOOK + 5).collect();
        std::fs::write(&path, &long).unwrap();
        let looker = looker();
        let mut piece = looker
            .look(words(&["cat", path.to_str().unwrap()]))
            .await
            .unwrap();
        let mut whole = Vec::new();
        loop {
            assert!(piece.content.len() <= LOOK_PIECE);
            whole.extend_from_slice(&piece.content);
            if !piece.more {
                break;
            }
            piece = looker.look(Vec::new()).await.unwrap();
        }
        assert_eq!(whole.len(), MAX_LOOK);
        assert!(whole.ends_with(CUT));
        assert_eq!(whole[..1000], long[..1000]);
        let after = looker.look(Vec::new()).await.unwrap();
        assert!(after.content.is_empty() && !after.more);
    }

    #[tokio::test]
    async fn what_there_is_not_is_refused_with_what_there_is() {
        for unknown in [&["sh"][..], &["cat"], &["ps", "aux"], &["", "x"]] {
            let error = looker().look(words(unknown)).await.unwrap_err();
            assert!(error.to_string().contains("df, dmesg, free"), "{error}");
        }
    }

    #[tokio::test]
    async fn one_at_a_time() {
        let looker = looker();
        let _held = Arc::clone(&looker.free).try_acquire_owned().unwrap();
        let error = looker.look(words(&["free"])).await.unwrap_err();
        assert!(matches!(error, Error::ResourceExhausted(_)), "{error}");
    }

    #[tokio::test]
    async fn every_look_that_is_listed_exists() {
        for look in LOOKS {
            let asked = match look {
                "cat" => words(&["cat", "/proc/version"]),
                look => words(&[look]),
            };
            match looker().look(asked).await {
                Ok(answer) => assert!(!answer.content.is_empty(), "{look}"),
                // Of a machine that keeps its log from us.
                Err(error) => assert!(look == "dmesg", "{look}: {error}"),
            }
        }
    }
}
