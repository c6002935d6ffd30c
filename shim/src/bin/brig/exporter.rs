//! `brig metrics --listen`: the figures of this node's pods for Prometheus, over HTTP.
//!
//! Whoever reaches the address may ask; figures and names of pods are all there is to learn. One scrape is made at a
//! time, and a client that does not ask in time is hung up on.

use std::convert::Infallible;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use brig_shim::error::{Error, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::metrics;

/// What a client may take to ask, and for all that it wants. Those that say nothing keep no scrape waiting for long: it is
/// given up after ten seconds as a rule.
const PATIENCE: Duration = Duration::from_secs(2);
const CONVERSATION: Duration = Duration::from_secs(60);
/// Clients at a time.
const CLIENTS: usize = 8;
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The pods below a directory.
struct Exporter {
    base: PathBuf,
    /// Held for a scrape.
    scraping: Mutex<()>,
}

/// Serves until the process is ended: on `address`, or on the socket that systemd gives as standard input.
///
/// # Errors
/// If neither is to be had.
pub fn serve(base: &Path, address: Option<&str>) -> Result<()> {
    let failed = |error: std::io::Error| Error::io("cannot listen for scrapes", &error);
    let stdin = std::io::stdin().as_fd().try_clone_to_owned();
    let given = stdin.map(TcpListener::from).map_err(failed)?;
    let listener = match address {
        Some(address) => TcpListener::bind(address).map_err(|error| {
            Error::io(
                format_args!("cannot listen on {address} (an address is as 127.0.0.1:9736)"),
                &error,
            )
        })?,
        // Of what is no socket there is no address.
        None if given.local_addr().is_ok() => given,
        None => {
            return Err(Error::invalid(
                "no socket was given by systemd: say where to listen, as in --listen=127.0.0.1:9736",
            ));
        }
    };
    listener.set_nonblocking(true).map_err(failed)?;
    let exporter = Arc::new(Exporter {
        base: base.to_owned(),
        scraping: Mutex::default(),
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()
        .map_err(failed)?;
    runtime.block_on(accept(listener, exporter)).map_err(failed)
}

async fn accept(listener: TcpListener, exporter: Arc<Exporter>) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        let (client, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            // A client that is gone again, or no descriptor for it: there will be one.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let exporter = Arc::clone(&exporter);
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&exporter, request));
            let mut server = http1::Builder::new();
            server
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(16 << 10);
            let served = server.serve_connection(TokioIo::new(client), service);
            // However it ends: the next one is a new one.
            let _ = timeout(CONVERSATION, served).await;
            drop(place);
        });
    }
}

async fn answer(
    exporter: &Arc<Exporter>,
    request: Request<Incoming>,
) -> std::result::Result<Response<Full<Bytes>>, Infallible> {
    // Of an answer to HEAD hyper sends the head alone.
    let asks = [Method::GET, Method::HEAD].contains(request.method());
    let known = asks && request.uri().path() == "/metrics";
    if !known {
        return Ok(plain(
            StatusCode::NOT_FOUND,
            "there is GET /metrics\n".to_owned(),
        ));
    }
    let exporter = Arc::clone(exporter);
    let scraped = tokio::task::spawn_blocking(move || {
        let _alone = exporter
            .scraping
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        metrics::scrape(&exporter.base).map(|families| metrics::text(&families))
    });
    Ok(match scraped.await {
        Ok(Ok(text)) => {
            let mut response = plain(StatusCode::OK, text);
            let kind = HeaderValue::from_static(OPEN_METRICS);
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        Ok(Err(error)) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    })
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    fn get(address: &str, request: &str) -> String {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_scrape_is_answered_in_open_metrics_and_anything_else_is_not() {
        let base = tempfile::tempdir().unwrap();
        crate::pods::fake(base.path(), "default", "web");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let (path, at) = (base.path().to_owned(), address.clone());
        std::thread::spawn(move || serve(&path, Some(&at)));
        while TcpStream::connect(&address).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let end = "HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let answer = get(&address, &format!("GET /metrics {end}"));
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(
            answer
                .to_lowercase()
                .contains("content-type: application/openmetrics-text"),
            "{answer}"
        );
        assert!(
            answer.contains("brig_pods{state=\"starting\"} 1\n"),
            "{answer}"
        );
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        let answer = get(&address, &format!("HEAD /metrics {end}"));
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.ends_with("\r\n\r\n"), "{answer}");
        for other in ["GET /", "POST /metrics"] {
            let answer = get(&address, &format!("{other} {end}"));
            assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        }
    }
}
