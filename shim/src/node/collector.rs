//! The OpenTelemetry collector that containerd's own tracing sends to, as the environment that the shim has from
//! containerd names it (OTLP 1.x exporter specification). Spoken to once a pod: OTLP over HTTP with JSON, which every
//! collector takes. Trusts the operator's environment; what a collector answers is looked at for its status alone.

use std::fmt;
use std::io;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// All that a collector may take, if the environment says nothing else.
const PATIENCE: Duration = Duration::from_secs(10);
/// The port of OTLP over HTTP.
const PORT: u16 = 4318;

/// Spans cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum CollectorError {
    /// The environment asks for what Brig does not speak.
    #[error("{variable}={value}: {why}")]
    Environment {
        /// Which variable.
        variable: String,
        /// What it says.
        value: String,
        /// Why not, and what would do.
        why: &'static str,
    },
    /// Nobody answers there.
    #[error("connecting: {0}")]
    Connect(#[from] io::Error),
    /// It is no HTTP, or ended.
    #[error("HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// The request cannot be said.
    #[error("HTTP request: {0}")]
    Request(#[from] hyper::http::Error),
    /// It did not want them.
    #[error("the collector answers {0}")]
    Refused(hyper::StatusCode),
    /// It took too long.
    #[error("no answer in {} s", .0.as_secs())]
    Late(Duration),
}

/// Where spans go.
#[derive(Clone)]
pub struct Collector {
    uri: Uri,
    /// What the operator wants said besides, such as a token: never shown.
    headers: Vec<(HeaderName, HeaderValue)>,
    patience: Duration,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector")
            .field("uri", &place(&self.uri))
            .finish_non_exhaustive()
    }
}

impl Collector {
    /// The one that an environment names; none if it names none, or has tracing switched off.
    ///
    /// # Errors
    /// [`CollectorError::Environment`].
    pub fn of(
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, CollectorError> {
        // Of traces first, then of all signals.
        let find = |what: &str| {
            let names = [
                format!("OTEL_EXPORTER_OTLP_TRACES_{what}"),
                format!("OTEL_EXPORTER_OTLP_{what}"),
            ];
            let found = names.into_iter().enumerate();
            found
                .filter_map(|(at, name)| Some((at == 0, environment(&name)?, name)))
                .find(|(_, value, _)| !value.trim().is_empty())
        };
        let is = |name: &str, value: &str| {
            environment(name).is_some_and(|has| has.trim().eq_ignore_ascii_case(value))
        };
        let off = is("OTEL_SDK_DISABLED", "true")
            || is("OTEL_TRACES_EXPORTER", "none")
            || is("OTEL_TRACES_SAMPLER", "always_off");
        let Some((whole, endpoint, variable)) = find("ENDPOINT").filter(|_| !off) else {
            return Ok(None);
        };
        let unfit = |variable: String, value: String, why| CollectorError::Environment {
            variable,
            value,
            why,
        };
        if let Some((_, protocol, variable)) = find("PROTOCOL")
            && !protocol.trim().starts_with("http/")
        {
            let why = "Brig sends spans by HTTP alone: http/protobuf, and the collector's port for it (4318)";
            return Err(unfit(variable, protocol, why));
        }
        let mut text = endpoint.trim().to_owned();
        if !whole {
            // The base of all signals; of traces alone it is the whole address.
            text = format!("{}/v1/traces", text.trim_end_matches('/'));
        }
        let uri: Option<Uri> = text.parse().ok();
        let uri = uri.filter(|uri| uri.scheme_str() == Some("http") && uri.host().is_some());
        let uri = uri.ok_or_else(|| {
            let shown = endpoint.trim().parse().map_or_else(|_| "(not an address)".to_owned(), |uri| place(&uri));
            unfit(variable, shown, "Brig sends spans to an address as http://127.0.0.1:4318 alone, of a collector on the node")
        })?;
        let patience = find("TIMEOUT").and_then(|(_, millis, _)| millis.trim().parse().ok());
        Ok(Some(Self {
            uri,
            headers: find("HEADERS").map_or_else(Vec::new, |(_, list, _)| headers(&list)),
            patience: patience.map_or(PATIENCE, Duration::from_millis),
        }))
    }

    /// Sends a document of OTLP.
    ///
    /// # Errors
    /// See [`CollectorError`].
    pub async fn send(&self, document: Vec<u8>) -> Result<(), CollectorError> {
        let sent = timeout(self.patience, self.post(document)).await;
        sent.unwrap_or(Err(CollectorError::Late(self.patience)))
    }

    async fn post(&self, document: Vec<u8>) -> Result<(), CollectorError> {
        let host = self.uri.host().unwrap_or_default();
        // A literal address of version 6 is in brackets.
        let address = host.trim_start_matches('[').trim_end_matches(']');
        let named = match self.uri.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        };
        let stream = TcpStream::connect((address, self.uri.port_u16().unwrap_or(PORT))).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(self.uri.path_and_query().map_or("/", |path| path.as_str()))
            .header(HOST, named)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(document)))?;
        request.headers_mut().extend(self.headers.iter().cloned());
        let answered = async {
            let answer = sender.send_request(request).await?;
            // Nothing else is asked on this connection.
            drop(sender);
            Ok::<_, hyper::Error>(answer.status())
        };
        let (status, _) = tokio::join!(answered, connection);
        let status = status?;
        status
            .is_success()
            .then_some(())
            .ok_or(CollectorError::Refused(status))
    }
}

/// What of an address may be shown: there can be a password before the host, and a key behind it.
fn place(uri: &Uri) -> String {
    let scheme = uri.scheme_str().map(|scheme| format!("{scheme}://"));
    let host = uri.host().unwrap_or_default();
    let port = uri.port().map(|port| format!(":{port}"));
    let (scheme, port) = (scheme.unwrap_or_default(), port.unwrap_or_default());
    format!("{scheme}{host}{port}")
}

/// `name=value,name=value`, each percent-encoded; what is no header is left out.
fn headers(list: &str) -> Vec<(HeaderName, HeaderValue)> {
    let pairs = list.split(',').filter_map(|pair| pair.split_once('='));
    pairs
        .filter_map(|(name, value)| {
            let mut value = HeaderValue::from_bytes(&decoded(value.trim())).ok()?;
            value.set_sensitive(true);
            Some((name.trim().parse().ok()?, value))
        })
        .collect()
}

/// Text with `%2C` and the like as the bytes they mean.
fn decoded(text: &str) -> Vec<u8> {
    let mut bytes = text.bytes();
    let mut plain = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let mut ahead = bytes.clone();
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let code = match (byte, digit(ahead.next()), digit(ahead.next())) {
            (b'%', Some(high), Some(low)) => u8::try_from(high << 4 | low).ok(),
            _ => None,
        };
        plain.push(code.unwrap_or(byte));
        if code.is_some() {
            bytes = ahead;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Collector>, CollectorError> {
        Collector::of(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";

    #[test]
    fn the_environment_of_containerd_says_where() {
        let uri = |variables: &[(&str, &str)]| {
            of(variables)
                .unwrap()
                .map(|collector| collector.uri.to_string())
        };
        assert_eq!(uri(&[]), None);
        assert_eq!(uri(&[(ENDPOINT, " ")]), None);
        let base = (ENDPOINT, "http://localhost:4318/");
        assert_eq!(
            uri(&[base]).as_deref(),
            Some("http://localhost:4318/v1/traces")
        );
        let own = (TRACES_ENDPOINT, "http://[::1]/x?y");
        assert_eq!(uri(&[base, own]).as_deref(), Some("http://[::1]/x?y"));
        for off in [
            ("OTEL_SDK_DISABLED", "TRUE"),
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_TRACES_SAMPLER", "always_off"),
        ] {
            assert_eq!(uri(&[base, off]), None, "{off:?}");
        }
    }

    #[test]
    fn what_is_not_spoken_is_refused_by_name() {
        let protocol = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        for (variables, name) in [
            (
                &[(ENDPOINT, "http://localhost:4317"), protocol][..],
                "OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
            ),
            (
                &[(ENDPOINT, "https://example.org")],
                "OTEL_EXPORTER_OTLP_ENDPOINT=https://example.org",
            ),
            (
                &[(TRACES_ENDPOINT, "localhost:4318")],
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=localhost:4318",
            ),
            (
                &[(ENDPOINT, "https://user:s3cret@example.org:4318/?key=s3cret")],
                "OTEL_EXPORTER_OTLP_ENDPOINT=https://example.org:4318: ",
            ),
        ] {
            let error = of(variables).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn headers_are_decoded_and_never_shown() {
        let list = " authorization=Bearer%20s3cret , x=%zz%4, broken, b\u{e4}d=1,y=";
        let collector = of(&[
            (ENDPOINT, "http://u:s3cret@h"),
            ("OTEL_EXPORTER_OTLP_HEADERS", list),
        ]);
        let collector = collector.unwrap().unwrap();
        let shown = format!("{collector:?}");
        assert!(!shown.contains("s3cret"), "{shown}");
        let headers: Vec<(&str, &[u8])> = collector
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_bytes()))
            .collect();
        assert_eq!(
            headers,
            [
                ("authorization", &b"Bearer s3cret"[..]),
                ("x", b"%zz%4"),
                ("y", b"")
            ]
        );
    }

    /// A collector that answers `answer` once, with what it was told.
    async fn serve(answer: &'static str) -> (Collector, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let collector = of(&[
            (ENDPOINT, &endpoint),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-token=7"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000"),
        ]);
        let told = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut told = Vec::new();
            while !told.ends_with(b"{\"a\":1}") {
                assert!(client.read_buf(&mut told).await.unwrap() > 0);
            }
            client.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(told).unwrap()
        });
        (collector.unwrap().unwrap(), told)
    }

    #[tokio::test]
    async fn a_document_is_posted_with_the_headers_that_were_wanted() {
        let (collector, told) = serve("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await;
        collector.send(b"{\"a\":1}".to_vec()).await.unwrap();
        let told = told.await.unwrap();
        assert!(told.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{told}");
        for part in [
            "content-type: application/json\r\n",
            "x-token: 7\r\n",
            "host: 127.0.0.1:",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
    }

    #[tokio::test]
    async fn a_collector_that_refuses_or_never_answers_is_an_error_in_time() {
        let (collector, _told) = serve("HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n").await;
        let error = collector.send(b"{\"a\":1}".to_vec()).await.unwrap_err();
        assert!(
            matches!(error, CollectorError::Refused(status) if status == 503),
            "{error}"
        );
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let collector = of(&[(ENDPOINT, &endpoint), ("OTEL_EXPORTER_OTLP_TIMEOUT", "50")]);
        let error = collector
            .unwrap()
            .unwrap()
            .send(Vec::new())
            .await
            .unwrap_err();
        assert!(matches!(error, CollectorError::Late(_)), "{error}");
        drop(silent);
    }

    proptest! {
        #[test]
        fn no_environment_is_too_odd(endpoint in any::<String>(), headers in any::<String>()) {
            let _ = of(&[(ENDPOINT, &endpoint), ("OTEL_EXPORTER_OTLP_HEADERS", &headers)]);
        }
    }
}
