//! Asks the shims of living pods. Each is trusted to answer truly, not to answer in time.

use std::path::{Path, PathBuf};
use std::time::Duration;

use brig_shim::containerd::server::{COUNTERS_METHOD, DEBUG_SERVICE};
use brig_shim::error::{Error, Result};
use serde_json::Value;
use ttrpc::asynchronous::Client;

/// Boot marks and VM exits of the pod whose shim listens on `socket`, as JSON.
///
/// # Errors
/// The shim's own, or that it does not answer within `patience`.
pub fn counters(socket: &Path, patience: Duration) -> Result<String> {
    let answer = runtime()?.block_on(ask(socket, patience))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The same of many, asked side by side; none for one that has no socket or does not answer.
///
/// # Errors
/// If no runtime is to be had.
pub fn counters_of_all(
    sockets: Vec<Option<PathBuf>>,
    patience: Duration,
) -> Result<Vec<Option<Value>>> {
    let asked = sockets.into_iter().map(|socket| async move {
        let answer = ask(&socket?, patience).await.ok()?;
        serde_json::from_slice(&answer).ok()
    });
    Ok(runtime()?.block_on(futures::future::join_all(asked)))
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.map_err(|error| Error::io("cannot ask the shim", &error))
}

async fn ask(socket: &Path, patience: Duration) -> Result<Vec<u8>> {
    let asked = async {
        let client = Client::connect(&format!("unix://{}", socket.display())).await?;
        let mut request = ttrpc::Request::new();
        request.service = DEBUG_SERVICE.to_owned();
        request.method = COUNTERS_METHOD.to_owned();
        // Later than ours, which says what is late.
        request.timeout_nano = i64::try_from(2 * patience.as_nanos()).unwrap_or(i64::MAX);
        client.request(request).await
    };
    let late = |_| {
        Error::state(format!(
            "the pod's shim has not answered within {patience:?}"
        ))
    };
    let answer = tokio::time::timeout(patience, asked).await.map_err(late)?;
    Ok(answer.map_err(Error::from_agent)?.payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_that_says_nothing_costs_no_more_than_the_patience() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let patience = Duration::from_millis(50);
        let error = counters(&socket, patience).unwrap_err();
        assert!(error.message.contains("50ms"), "{error}");
        let nobody = dir.path().join("nobody");
        let all = vec![Some(socket.clone()), None, Some(nobody), Some(socket)];
        assert_eq!(
            counters_of_all(all, patience).unwrap(),
            [None, None, None, None]
        );
    }
}
