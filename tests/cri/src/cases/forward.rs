//! Port-forward, as `kubectl port-forward` asks containerd for it: containerd dials the loopback
//! interface of the pod's network namespace on the node.

use std::time::Instant;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;

use crate::container::Container;
use crate::pod::Pod;
use crate::stream::Forwarded;
use crate::suite::{Case, Suite, case, smoke};

pub const CASES: &[Case] = &[
    smoke("forward", "a server that listens on 127.0.0.1 only", ipv4),
    smoke("forward", "a server that listens on ::1 only", ipv6),
    case("forward", "a server that listens everywhere", everywhere),
    case(
        "forward",
        "two connections at once, 2 MiB back whole",
        large,
    ),
    case("forward", "a port where nobody listens is an error", nobody),
];

/// Starts a web server in the container; it has the pod's host name as a page.
fn serve(container: &Container, address: &str) -> Result<()> {
    // It goes to the background once it listens.
    container
        .sh(&format!("httpd -p '{address}' -h /etc"))
        .map(drop)
}

fn page(pod: &Pod, port: u16) -> Result<()> {
    let mut stream = Forwarded::open(pod, port)?;
    stream.send(b"GET /hostname HTTP/1.0\r\n\r\n")?;
    let (answer, reason) = stream.finish()?;
    let answer = String::from_utf8_lossy(&answer);
    contains("the answer", "200 OK", &answer)
        .and_then(|()| contains("the page", "shared", &answer))
        .with_context(|| format!("reason given: '{reason}'"))
}

fn ipv4(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    serve(&shared.container, "127.0.0.1:8101")?;
    page(&shared.pod, 8101)
}

fn ipv6(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    serve(&shared.container, "[::1]:8102")?;
    page(&shared.pod, 8102)
}

fn everywhere(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    serve(&shared.container, "8103")?;
    page(&shared.pod, 8103)
}

fn large(suite: &mut Suite) -> Result<()> {
    const SIZE: usize = 2 << 20;
    let shared = suite.shared()?;
    let script = format!(
        "mkdir -p /www && head -c {SIZE} /dev/zero | tr '\\0' z > /www/big && httpd -p 127.0.0.1:8104 -h /www"
    );
    shared.container.sh(&script)?;
    let mut first = Forwarded::open(&shared.pod, 8104)?;
    let mut second = Forwarded::open(&shared.pod, 8104)?;
    for (name, stream) in [("the second", &mut second), ("the first", &mut first)] {
        stream
            .send(b"GET /big HTTP/1.0\r\n\r\n")
            .with_context(|| name.to_owned())?;
    }
    for (name, stream) in [("the first", first), ("the second", second)] {
        let (answer, _) = stream.finish().with_context(|| name.to_owned())?;
        let head = answer
            .windows(4)
            .position(|bytes| bytes == b"\r\n\r\n")
            .with_context(|| format!("{name}: no HTTP answer"))?;
        let body = &answer[head + 4..];
        equal(name, SIZE, body.len())?;
        that("each byte is right", body.iter().all(|byte| *byte == b'z'))?;
    }
    Ok(())
}

fn nobody(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let begin = Instant::now();
    let stream = Forwarded::open(&shared.pod, 8199)?;
    // An error if nothing comes, so what follows was said by an end of the stream.
    let (data, reason) = stream.finish()?;
    equal("bytes", 0, data.len())?;
    that("it was closed at once", begin.elapsed() < clock::seconds(2))?;
    if suite.is_brig() {
        // The node's end must accept before the guest can say no, and containerd passes a reset on as
        // an end without a reason.
        return Ok(());
    }
    contains("the reason", "refused", &reason)
}
