//! The part of kubelet that tells what it has assigned to pods (`v1.PodResourcesLister`), by gRPC on a socket.

use std::convert::Infallible;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixListener;
use tokio::runtime::{Builder, Runtime};

/// Kubernetes' namespace of all pods of the suite.
const NAMESPACE: &str = "brig-cri";

/// A device of a device plugin that a container has.
#[derive(Debug, Clone, Copy)]
pub struct Assignment<'a> {
    /// The pod's name.
    pub pod: &'a str,
    /// The container's.
    pub container: &'a str,
    /// What the device plugin offers.
    pub resource: &'a str,
    /// And what it calls the device.
    pub id: &'a str,
}

/// Answers as long as it lives.
pub struct Kubelet {
    _runtime: Runtime,
}

impl Kubelet {
    /// One that has assigned these.
    ///
    /// # Errors
    /// What the node says.
    pub fn start(socket: &Path, assigned: &[Assignment<'_>]) -> Result<Self> {
        let message: Vec<u8> = assigned.iter().flat_map(pod).collect();
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len())?.to_be_bytes());
        framed.extend(message);
        let answer = Bytes::from(framed);
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_io()
            .build()?;
        let _ = fs::remove_file(socket);
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(socket).with_context(|| socket.display().to_string())?
        };
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer = answer.clone();
                let service = service_fn(move |_: Request<Incoming>| {
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", HeaderValue::from_static("0"));
                    let body = Full::new(answer.clone())
                        .with_trailers(async { Some(Ok::<_, Infallible>(trailers)) });
                    let mut response = Response::new(body);
                    let kind = HeaderValue::from_static("application/grpc");
                    response.headers_mut().insert(CONTENT_TYPE, kind);
                    async move { Ok::<_, Infallible>(response) }
                });
                let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                tokio::spawn(async move {
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Ok(Self { _runtime: runtime })
    }
}

/// A field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut made = vec![number << 3 | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        made.push(u8::try_from(length & 0x7f).unwrap_or_default() | 0x80);
        length >>= 7;
    }
    made.push(u8::try_from(length).unwrap_or_default());
    made.extend(bytes);
    made
}

/// `v1.PodResources`, as a field of the list.
fn pod(assigned: &Assignment<'_>) -> Vec<u8> {
    let text = |number: u8, text: &str| field(number, text.as_bytes());
    let devices = [text(1, assigned.resource), text(2, assigned.id)].concat();
    let container = [text(1, assigned.container), field(2, &devices)].concat();
    let pod = [
        text(1, assigned.pod),
        text(2, NAMESPACE),
        field(3, &container),
    ]
    .concat();
    field(1, &pod)
}
