//! Terminals of containers and execs: their sizes, their ends and what hangs them up.
mod guest;

use std::time::Duration;

use brig_agent_protocol::agent::*;
use guest::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::test]
async fn a_terminal_has_its_size_and_ends_with_its_process() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let (mut stdio, mut ends) = guest.stdio(true, true).await;
    (stdio.rows, stdio.columns) = (30, 100);
    let mut with_terminal =
        spec("stty size; tty; ls -l /dev/console | cut -c1; read line; stty size; echo got $line");
    with_terminal["process"]["terminal"] = true.into();
    guest.create("c1", &with_terminal, stdio).await.unwrap();
    guest.run("c1", "").await.unwrap();
    let stdout = ends.stdout.as_mut().unwrap();
    let mut seen = String::new();
    while !seen.contains("c\r\n") {
        let mut bytes = [0; 256];
        let n = tokio::time::timeout(PATIENCE, stdout.read(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        assert_ne!(n, 0, "{seen}");
        seen.push_str(std::str::from_utf8(&bytes[..n]).unwrap());
    }
    assert_eq!(seen, "30 100\r\n/dev/pts/0\r\nc\r\n");
    let size = ResizePtyRequest {
        id: "c1".into(),
        rows: 50,
        columns: 132,
        ..Default::default()
    };
    guest.client.resize_pty(ctx(), &size).await.unwrap();
    ends.stdin
        .as_mut()
        .unwrap()
        .write_all(b"hello\n")
        .await
        .unwrap();
    let stdin = ends.stdin.take();
    let (rest, _) = ends.read_all().await;
    assert_eq!(rest, "hello\r\n50 132\r\ngot hello\r\n");
    drop(stdin);
    assert_eq!(guest.exit_of("c1", "").await.status, 0);
    guest.stop().await;
}

#[tokio::test]
async fn a_terminal_is_as_large_as_the_specification_says_unless_the_streams_do() {
    let mut guest = Guest::start().await;
    let sized = |process: &mut serde_json::Value| {
        process["terminal"] = true.into();
        process["consoleSize"] = serde_json::json!({"height": 31, "width": 101});
    };
    guest.rootfs("c1");
    let mut init = spec("stty size; sleep 1000");
    sized(&mut init["process"]);
    let (stdio, mut ends) = guest.stdio(false, true).await;
    guest.create("c1", &init, stdio).await.unwrap();
    guest.run("c1", "").await.unwrap();
    ends.said("31 101\r\n").await;
    let mut process = shell("stty size");
    sized(&mut process);
    for (id, asked, told) in [("e1", (0, 0), "31 101\r\n"), ("e2", (20, 70), "20 70\r\n")] {
        let (mut stdio, ends) = guest.stdio(false, true).await;
        (stdio.rows, stdio.columns) = asked;
        guest.started_exec("c1", id, &process, stdio).await;
        assert_eq!(guest.outcome("c1", id, ends).await.stdout, told);
    }
    guest.stop().await;
}

#[tokio::test]
async fn a_terminal_is_hung_up_when_its_input_was_closed_and_has_ended() {
    let mut guest = Guest::start().await;
    guest
        .started("c1", &spec("sleep 1000"), Stdio::default())
        .await;
    let (stdio, mut ends) = guest.stdio(true, true).await;
    let mut process = shell("exec cat");
    process["terminal"] = true.into();
    guest.started_exec("c1", "e1", &process, stdio).await;
    let mut stdin = ends.stdin.take().unwrap();
    stdin.write_all(b"first\n").await.unwrap();
    // Its echo, and what cat says.
    ends.said("first\r\nfirst\r\n").await;
    // Neither of the two alone.
    guest
        .client
        .close_stdin(ctx(), &reference("c1", "e1"))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    stdin.write_all(b"second\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    let outcome = guest.outcome("c1", "e1", ends).await;
    assert_eq!(outcome.stdout, "second\r\nsecond\r\n");
    assert_eq!(outcome.status, 128 + 1);
    let (stdio, mut ends) = guest.stdio(true, true).await;
    guest.started_exec("c1", "e2", &process, stdio).await;
    ends.stdin.take().unwrap().shutdown().await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let size = ResizePtyRequest {
        id: "c1".into(),
        exec_id: "e2".into(),
        rows: 50,
        columns: 132,
        ..Default::default()
    };
    guest.client.resize_pty(ctx(), &size).await.unwrap();
    guest.kill("c1", "e2", libc::SIGTERM, false).await.unwrap();
    assert_eq!(guest.exit_of("c1", "e2").await.status, 128 + 15);
    guest.stop().await;
}

#[tokio::test]
async fn an_exec_may_have_a_terminal_too() {
    let mut guest = Guest::start().await;
    guest
        .started("c1", &spec("sleep 1000"), Stdio::default())
        .await;
    let (stdio, ends) = guest.stdio(true, true).await;
    let mut process = shell("tty; id -u; ls -ln $(tty) | awk '{print $3}'");
    process["terminal"] = true.into();
    process["user"] = serde_json::json!({"uid": 33, "gid": 33});
    guest.started_exec("c1", "e1", &process, stdio).await;
    assert_eq!(guest.exit_of("c1", "e1").await.status, 0);
    let Ends { stdout, .. } = ends;
    let (text, _) = Ends {
        stdout,
        ..Ends::default()
    }
    .read_all()
    .await;
    assert_eq!(text, "/dev/pts/0\r\n33\r\n33\r\n");
    guest.stop().await;
}
