//! What kubelet has assigned to a pod's containers before its sandbox is made (`v1.PodResourcesLister` on a socket of the
//! node), so that devices can be in the VM when its guest boots.
//!
//! One call of gRPC, without parameters: everything that kubelet has assigned on the node comes back, and the pod's part of
//! it is taken out. Kubelet is trusted; the answer is bounded all the same.

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

use crate::asked::pod_name::PodName;
use crate::asked::wire::{Value, each_field, text};

/// The method, as a path.
const LIST: &str = "http://localhost/v1.PodResourcesLister/List";
/// A message of nothing: uncompressed, no bytes.
const NOTHING: [u8; 5] = [0; 5];
/// kubelet's own bound of a message in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// A device that kubelet has assigned to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    /// The container's name in the pod.
    pub container: String,
    /// What was assigned: a device of a device plugin, as `resource=id`, which is its CDI name where it has one, or a CDI name
    /// of a DRA driver.
    pub name: String,
}

impl Assigned {
    /// What a device plugin calls the device, of one that it has assigned.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.name.split_once('=').map(|(_, id)| id)
    }
}

/// kubelet could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum PodResourcesError {
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
    /// kubelet refuses.
    #[error("kubelet answers with gRPC status {status} {message:?}")]
    Status {
        /// A number of gRPC's.
        status: String,
        /// And its words.
        message: String,
    },
    /// The answer is none.
    #[error("kubelet's answer is not understood: {0}")]
    Answer(String),
    /// No answer.
    #[error("no answer within {0:?}")]
    Late(Duration),
}

/// What kubelet has assigned to the containers of `pod`.
///
/// # Errors
/// [`PodResourcesError`].
pub async fn of_pod(
    socket: &Path,
    pod: &PodName,
    patience: Duration,
) -> Result<Vec<Assigned>, PodResourcesError> {
    let asked = timeout(patience, list(socket)).await;
    let answer = asked.unwrap_or(Err(PodResourcesError::Late(patience)))?;
    part_of(&answer, pod).map_err(|error| PodResourcesError::Answer(error.to_string()))
}

/// kubelet's answer, without its frame.
async fn list(socket: &Path) -> Result<Bytes, PodResourcesError> {
    let stream = TokioIo::new(UnixStream::connect(socket).await?);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await?;
    let asked = async {
        let request = Request::builder()
            .method(Method::POST)
            .uri(LIST)
            .header(CONTENT_TYPE, "application/grpc")
            .header(TE, "trailers")
            .body(Full::new(Bytes::from_static(&NOTHING)))?;
        let response = sender.send_request(request).await?;
        let (head, body) = response.into_parts();
        // A refusal may have no body, and its status at once.
        refused(&head.headers)?;
        let body = Limited::new(body, MAX_ANSWER);
        let body = body.collect().await.map_err(PodResourcesError::Body)?;
        match body.trailers() {
            Some(trailers) => refused(trailers)?,
            None => return Err(PodResourcesError::Answer("it has no status".to_owned())),
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

fn refused(headers: &HeaderMap) -> Result<(), PodResourcesError> {
    let value = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let status = value("grpc-status");
    if status.is_empty() || status == "0" {
        return Ok(());
    }
    let message = value("grpc-message");
    Err(PodResourcesError::Status { status, message })
}

/// The one message of a body.
pub(crate) fn unframed(mut body: Bytes) -> Result<Bytes, PodResourcesError> {
    let wrong = |what: &str| PodResourcesError::Answer(what.to_owned());
    let head: [u8; 5] = body
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

/// `v1.ListPodResourcesResponse`: the devices of one pod.
pub(crate) fn part_of(answer: &[u8], pod: &PodName) -> protobuf::Result<Vec<Assigned>> {
    let mut assigned = Vec::new();
    each_field(answer, |number, value| {
        if let (1, Value::Bytes(resources)) = (number, value) {
            let (mut name, mut namespace, mut containers) =
                (String::new(), String::new(), Vec::new());
            each_field(resources, |number, value| {
                match (number, value) {
                    (1, Value::Bytes(bytes)) => name = text(bytes)?,
                    (2, Value::Bytes(bytes)) => namespace = text(bytes)?,
                    (3, Value::Bytes(bytes)) => containers.push(bytes.to_vec()),
                    _ => {}
                }
                Ok(())
            })?;
            if name == pod.name && namespace == pod.namespace {
                for container in containers {
                    of_container(&container, &mut assigned)?;
                }
            }
        }
        Ok(())
    })?;
    Ok(assigned)
}

/// `v1.ContainerResources`.
fn of_container(bytes: &[u8], assigned: &mut Vec<Assigned>) -> protobuf::Result<()> {
    let (mut container, mut names) = (String::new(), Vec::new());
    each_field(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(bytes)) => container = text(bytes)?,
            (2, Value::Bytes(devices)) => of_plugin(devices, &mut names)?,
            (5, Value::Bytes(claim)) => of_claim(claim, &mut names)?,
            _ => {}
        }
        Ok(())
    })?;
    assigned.extend(names.into_iter().map(|name| Assigned {
        container: container.clone(),
        name,
    }));
    Ok(())
}

/// `v1.ContainerDevices`.
fn of_plugin(bytes: &[u8], names: &mut Vec<String>) -> protobuf::Result<()> {
    let (mut resource, mut ids) = (String::new(), Vec::new());
    each_field(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(bytes)) => resource = text(bytes)?,
            (2, Value::Bytes(bytes)) => ids.push(text(bytes)?),
            _ => {}
        }
        Ok(())
    })?;
    names.extend(ids.into_iter().map(|id| format!("{resource}={id}")));
    Ok(())
}

/// `v1.DynamicResource`: the CDI names in its claims.
fn of_claim(bytes: &[u8], names: &mut Vec<String>) -> protobuf::Result<()> {
    each_field(bytes, |number, value| {
        if let (4, Value::Bytes(claim)) = (number, value) {
            each_field(claim, |number, value| {
                if let (1, Value::Bytes(device)) = (number, value) {
                    each_field(device, |number, value| {
                        if let (1, Value::Bytes(name)) = (number, value) {
                            names.push(text(name)?);
                        }
                        Ok(())
                    })?;
                }
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use http_body_util::StreamBody;
    use hyper::Response;
    use hyper::body::Frame;
    use hyper::service::service_fn;
    use proptest::prelude::*;
    use tokio::net::UnixListener;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        let mut made = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
        made.extend(bytes);
        made
    }

    /// An answer with two pods, of which `shop/web` has a plugin's devices and a claim.
    pub(crate) fn answer() -> Vec<u8> {
        let devices = [field(1, b"v.com/gpu"), field(2, b"0"), field(2, b"1")].concat();
        let claim = field(4, &field(1, &field(1, b"d.com/nic=a")));
        let main = [
            field(1, b"main"),
            field(2, &devices),
            vec![3 << 3, 7],
            field(5, &claim),
        ]
        .concat();
        let web = [field(1, b"web"), field(2, b"shop"), field(3, &main)].concat();
        let other = [field(1, b"web"), field(2, b"elsewhere"), field(3, &main)].concat();
        [field(1, &other), field(1, &web)].concat()
    }

    fn pod() -> PodName {
        PodName::of_metadata("shop", "web", "u").unwrap()
    }

    #[test]
    fn a_pods_devices_are_those_of_its_name_and_namespace_by_plugins_and_claims() {
        let assigned = part_of(&answer(), &pod()).unwrap();
        let names: Vec<_> = assigned.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["v.com/gpu=0", "v.com/gpu=1", "d.com/nic=a"]);
        assert!(assigned.iter().all(|one| one.container == "main"));
        assert_eq!(assigned[1].id(), Some("1"));
        let none = PodName::of_metadata("shop", "other", "u").unwrap();
        assert_eq!(part_of(&answer(), &none).unwrap(), []);
    }

    /// A kubelet that answers once with `message` and `status`.
    fn kubelet(socket: &Path, message: Vec<u8>, status: &'static str) {
        let listener = UnixListener::bind(socket).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let message = message.clone();
                async move {
                    assert_eq!(request.uri().path(), "/v1.PodResourcesLister/List");
                    assert_eq!(request.headers()[CONTENT_TYPE], "application/grpc");
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    assert_eq!(body.as_ref(), NOTHING);
                    let mut framed = vec![0];
                    framed.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
                    framed.extend(message);
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", status.parse().unwrap());
                    trailers.insert("grpc-message", "words".parse().unwrap());
                    let frames = [Frame::data(Bytes::from(framed)), Frame::trailers(trailers)];
                    let frames = futures::stream::iter(frames.map(Ok::<_, io::Error>));
                    Response::builder().body(StreamBody::new(frames))
                }
            });
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
    }

    #[tokio::test]
    async fn kubelet_is_asked_once_and_its_refusals_and_silence_are_told() {
        let root = tempfile::tempdir().unwrap();
        let wait = Duration::from_secs(20);
        let socket = root.path().join("good");
        kubelet(&socket, answer(), "0");
        assert_eq!(of_pod(&socket, &pod(), wait).await.unwrap().len(), 3);
        let socket = root.path().join("refuses");
        kubelet(&socket, Vec::new(), "12");
        let said = of_pod(&socket, &pod(), wait).await.unwrap_err().to_string();
        assert!(
            said.contains("status 12") && said.contains("words"),
            "{said}"
        );
        let socket = root.path().join("silent");
        let _listener = UnixListener::bind(&socket).unwrap();
        let said = of_pod(&socket, &pod(), Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(matches!(said, PodResourcesError::Late(_)), "{said}");
        let said = of_pod(&root.path().join("none"), &pod(), wait)
            .await
            .unwrap_err();
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

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..80) {
            let _ = part_of(&bytes, &pod());
            let mut mixed = answer();
            let end = mixed.len();
            mixed.splice(at.min(end)..(at + 3).min(end), bytes.into_iter().take(3));
            let _ = part_of(&mixed, &pod());
        }
    }
}
