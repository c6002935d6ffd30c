//! One call of gRPC on a Unix socket of the node, of a method that answers with one message: kubelet's and containerd's.
//!
//! Who listens there is trusted; an answer is bounded all the same, in bytes and in time.

use std::io;
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, TE};
use hyper::{HeaderMap, Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Bytes before each message: whether it is compressed, and its length.
const HEAD: usize = 5;

/// There is no answer.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The socket.
    #[error("{0}")]
    Socket(#[from] io::Error),
    /// The connection.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// The request.
    #[error("{0}")]
    Request(#[from] hyper::http::Error),
    /// The answer's body.
    #[error("{0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// A refusal.
    #[error("the answer is gRPC status {status} {message:?}")]
    Status {
        /// A number of gRPC's.
        status: String,
        /// And its words.
        message: String,
    },
    /// The answer is none.
    #[error("the answer is not understood: {0}")]
    Answer(String),
    /// No answer.
    #[error("no answer within {0:?}")]
    Late(Duration),
}

/// Sends `message` to a method (`/package.Service/Method`); the answer, of `most` bytes.
///
/// # Errors
/// [`GrpcError`].
pub async fn call(
    socket: &Path,
    method: &str,
    message: &[u8],
    most: usize,
    patience: Duration,
) -> Result<Bytes, GrpcError> {
    let called = timeout(patience, exchange(socket, method, message, most)).await;
    called.unwrap_or(Err(GrpcError::Late(patience)))
}

async fn exchange(
    socket: &Path,
    method: &str,
    message: &[u8],
    most: usize,
) -> Result<Bytes, GrpcError> {
    let stream = TokioIo::new(UnixStream::connect(socket).await?);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
    let asked = async {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("http://localhost{method}"))
            .header(CONTENT_TYPE, "application/grpc")
            .header(TE, "trailers")
            .body(Full::new(framed(message)?))?;
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        // A refusal may have no body, and its status at once.
        refused(&head.headers)?;
        let body = Limited::new(body, most.saturating_add(HEAD));
        let body = body.collect().await.map_err(GrpcError::Body)?;
        match body.trailers() {
            Some(trailers) => refused(trailers)?,
            None => return Err(GrpcError::Answer("it has no status".to_owned())),
        }
        unframed(body.to_bytes())
    };
    tokio::select! {
        answer = asked => answer,
        ended = connection => match ended {
            Ok(()) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Err(error) => Err(error.into()),
        },
    }
}

fn refused(headers: &HeaderMap) -> Result<(), GrpcError> {
    let value = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let status = value("grpc-status");
    if status.is_empty() || status == "0" {
        return Ok(());
    }
    let message = value("grpc-message");
    Err(GrpcError::Status { status, message })
}

/// A message as a body, uncompressed.
fn framed(message: &[u8]) -> Result<Bytes, GrpcError> {
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    let mut body = vec![0];
    body.extend(length.to_be_bytes());
    body.extend(message);
    Ok(body.into())
}

/// The one message of a body.
pub(crate) fn unframed(mut body: Bytes) -> Result<Bytes, GrpcError> {
    let wrong = |what: &str| GrpcError::Answer(what.to_owned());
    let head: [u8; HEAD] = body
        .first_chunk()
        .copied()
        .ok_or_else(|| wrong("it has no message"))?;
    let [compressed, length @ ..] = head;
    if compressed != 0 {
        return Err(wrong("it is compressed"));
    }
    let message = body.split_off(head.len());
    if u32::try_from(message.len()) != Ok(u32::from_be_bytes(length)) {
        return Err(wrong("its length is another one than it says"));
    }
    Ok(message)
}

/// Who answers in tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use http_body_util::StreamBody;
    use hyper::Response;
    use hyper::body::{Frame, Incoming};
    use hyper::service::service_fn;
    use tokio::net::UnixListener;

    /// A server that is called once, by `method` with `asked`, and answers with `message` and `status`.
    pub(crate) fn server(
        socket: &Path,
        method: &'static str,
        asked: Vec<u8>,
        message: Vec<u8>,
        status: &'static str,
    ) {
        let listener = UnixListener::bind(socket).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(move |request: Request<Incoming>| {
                let (asked, message) = (asked.clone(), message.clone());
                async move {
                    assert_eq!(request.uri().path(), method);
                    assert_eq!(request.headers()[CONTENT_TYPE], "application/grpc");
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    assert_eq!(unframed(body).unwrap(), asked);
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", status.parse().unwrap());
                    trailers.insert("grpc-message", "words".parse().unwrap());
                    let body = framed(&message).unwrap();
                    let frames = [Frame::data(body), Frame::trailers(trailers)];
                    let frames = futures::stream::iter(frames.map(Ok::<_, io::Error>));
                    Response::builder().body(StreamBody::new(frames))
                }
            });
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::testing::server;
    use super::*;
    use tokio::net::UnixListener;

    const METHOD: &str = "/a.Service/Ask";

    #[tokio::test]
    async fn an_answer_comes_whole_and_a_refusal_or_silence_is_told() {
        let root = tempfile::tempdir().unwrap();
        let wait = Duration::from_secs(20);
        let socket = root.path().join("good");
        server(&socket, METHOD, b"asked".to_vec(), vec![7; 1000], "0");
        let answer = call(&socket, METHOD, b"asked", 1000, wait).await.unwrap();
        assert_eq!(answer, vec![7; 1000]);
        let socket = root.path().join("large");
        server(&socket, METHOD, Vec::new(), vec![7; 1001], "0");
        let said = call(&socket, METHOD, &[], 1000, wait).await.unwrap_err();
        assert!(matches!(said, GrpcError::Body(_)), "{said}");
        let socket = root.path().join("refuses");
        server(&socket, METHOD, Vec::new(), Vec::new(), "12");
        let said = call(&socket, METHOD, &[], 1000, wait).await.unwrap_err();
        assert_eq!(said.to_string(), "the answer is gRPC status 12 \"words\"");
        let socket = root.path().join("silent");
        let _listener = UnixListener::bind(&socket).unwrap();
        let short = Duration::from_millis(50);
        let said = call(&socket, METHOD, &[], 1000, short).await.unwrap_err();
        assert!(matches!(said, GrpcError::Late(_)), "{said}");
        let none = root.path().join("none");
        let said = call(&none, METHOD, &[], 1000, wait).await.unwrap_err();
        assert!(said.to_string().contains("No such file"), "{said}");
    }

    #[test]
    fn a_frame_that_is_none_is_refused() {
        for bytes in [&[][..], &[0, 0, 0], &[1, 0, 0, 0, 0], &[0, 0, 0, 0, 2, 1]] {
            assert!(
                unframed(Bytes::copy_from_slice(bytes)).is_err(),
                "{bytes:?}"
            );
        }
        assert_eq!(
            unframed(Bytes::from_static(&[0, 0, 0, 0, 1, 9])).unwrap(),
            [9][..]
        );
    }
}
