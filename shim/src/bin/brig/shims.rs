//! Asks the shims of living pods. Each is trusted to answer truly, not to answer in time.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brig_shim::containerd::debug_service::{self, Method};
use brig_shim::error::{Error, Result};
use serde_json::Value;
use ttrpc::asynchronous::Client;

/// How long the shim of one pod may take, which a person waits for.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The answer of the shim that listens on `socket`.
///
/// # Errors
/// The shim's own, or that it does not answer within `patience`.
pub fn ask(socket: &Path, method: Method, request: &Value, patience: Duration) -> Result<Vec<u8>> {
    runtime()?.block_on(asked(socket, method, request, patience))
}

/// As [`ask`], of a shim that answers in JSON.
///
/// # Errors
/// As of [`ask`].
pub fn ask_json(socket: &Path, method: Method, request: &Value) -> Result<Value> {
    let answer = ask(socket, method, request, PATIENCE)?;
    serde_json::from_slice(&answer)
        .map_err(|error| Error::internal(format!("the shim's answer is no JSON: {error}")))
}

/// The same of many, asked side by side; none for one that has no socket or does not answer.
///
/// # Errors
/// If no runtime is to be had.
pub fn ask_all(
    sockets: Vec<Option<PathBuf>>,
    method: Method,
    request: &Value,
    patience: Duration,
) -> Result<Vec<Option<Vec<u8>>>> {
    let answers = sockets
        .into_iter()
        .map(|socket| async move { asked(&socket?, method, request, patience).await.ok() });
    Ok(runtime()?.block_on(futures::future::join_all(answers)))
}

/// As [`ask_all`], of shims that answer in JSON.
///
/// # Errors
/// As of [`ask_all`].
pub fn ask_all_json(
    sockets: Vec<Option<PathBuf>>,
    method: Method,
    patience: Duration,
) -> Result<Vec<Option<Value>>> {
    let answers = ask_all(sockets, method, &Value::Null, patience)?.into_iter();
    Ok(answers
        .map(|answer| serde_json::from_slice(&answer?).ok())
        .collect())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    single_threaded().map_err(|error| Error::io("cannot ask the shim", &error))
}

/// What a command that waits for others runs on.
///
/// # Errors
/// What the system says.
pub fn single_threaded() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
}

async fn asked(
    socket: &Path,
    method: Method,
    request: &Value,
    patience: Duration,
) -> Result<Vec<u8>> {
    let payload = request.to_string().into_bytes();
    let asked = async {
        let client = Client::connect(&format!("unix://{}", socket.display())).await?;
        let mut request = ttrpc::Request::new();
        request.service = debug_service::NAME.to_owned();
        request.method = method.name().to_owned();
        request.payload = payload;
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
        let error = ask(&socket, Method::Counters, &Value::Null, patience).unwrap_err();
        assert!(error.message.contains("50ms"), "{error}");
        let nobody = dir.path().join("nobody");
        let all = vec![Some(socket.clone()), None, Some(nobody), Some(socket)];
        assert_eq!(
            ask_all_json(all, Method::Inspect, patience).unwrap(),
            [None, None, None, None]
        );
    }
}
