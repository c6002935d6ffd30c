//! Life of containers and processes through the agent's protocol, with real containers.
mod guest;

use std::time::{Duration, Instant};

use brig_agent_protocol::agent::*;
use guest::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::Code;

#[tokio::test]
async fn a_container_runs_and_its_output_and_status_are_exact() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let outcome = guest
        .whole("c1", &spec("echo out; echo err >&2; exit 42"))
        .await;
    assert_eq!(
        (
            outcome.stdout.as_str(),
            outcome.stderr.as_str(),
            outcome.status
        ),
        ("out\n", "err\n", 42)
    );
    // The id is free again.
    guest
        .create("c1", &spec("exit 3"), Stdio::default())
        .await
        .unwrap();
    guest.rootfs("c2");
    let outcome = guest
        .whole("c2", &spec("sh -c 'kill -11 $$'; exit $?"))
        .await;
    assert_eq!(outcome.status, 139);
    guest.stop().await;
}

#[tokio::test]
async fn large_output_is_complete_and_stdin_reaches_the_process() {
    let mut guest = Guest::start().await;
    let (stdio, mut ends) = guest.stdio(true, false).await;
    guest
        .started(
            "c1",
            &spec("cat; head -c 3000000 /dev/zero | tr '\\0' x"),
            stdio,
        )
        .await;
    let mut stdin = ends.stdin.take().unwrap();
    stdin.write_all(b"from the host\n").await.unwrap();
    stdin.shutdown().await.unwrap();
    let (stdout, _) = ends.read_all().await;
    assert!(stdout.starts_with("from the host\n"));
    assert_eq!(stdout.len(), 14 + 3_000_000);
    assert_eq!(guest.exit_of("c1", "").await.status, 0);
    guest.stop().await;
}

#[tokio::test]
async fn close_stdin_ends_a_reader() {
    let mut guest = Guest::start().await;
    let (stdio, mut ends) = guest.stdio(true, false).await;
    guest.started("c1", &spec("cat; echo done"), stdio).await;
    ends.stdin
        .as_mut()
        .unwrap()
        .write_all(b"x\n")
        .await
        .unwrap();
    guest
        .client
        .close_stdin(ctx(), &reference("c1", ""))
        .await
        .unwrap();
    let mut text = String::new();
    ends.stdout
        .as_mut()
        .unwrap()
        .read_to_string(&mut text)
        .await
        .unwrap();
    assert_eq!(text, "x\ndone\n");
    guest.stop().await;
}

#[tokio::test]
async fn states_are_enforced_with_their_codes() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    refused(guest.run("nope", "").await, Code::NOT_FOUND);
    let (stdio, _ends) = guest.stdio(false, false).await;
    guest
        .create("c1", &spec("sleep 1000"), stdio)
        .await
        .unwrap();
    let again = guest.create("c1", &spec("true"), Stdio::default()).await;
    refused(again, Code::ALREADY_EXISTS);
    // Not running yet: no pause.
    let pause = guest.client.pause_container(ctx(), &container("c1")).await;
    refused(pause, Code::FAILED_PRECONDITION);
    guest.run("c1", "").await.unwrap();
    refused(guest.run("c1", "").await, Code::FAILED_PRECONDITION);
    refused(guest.delete("c1", "").await, Code::FAILED_PRECONDITION);
    refused(guest.delete("c1", "e9").await, Code::NOT_FOUND);
    refused(
        guest.kill("c1", "", 99, false).await,
        Code::INVALID_ARGUMENT,
    );
    guest.kill("c1", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.exit_of("c1", "").await.status, 137);
    refused(
        guest.kill("c1", "", libc::SIGTERM, false).await,
        Code::NOT_FOUND,
    );
    assert_eq!(guest.delete("c1", "").await.unwrap().status, 137);
    refused(guest.delete("c1", "").await, Code::NOT_FOUND);
    let twice = guest
        .client
        .start_sandbox(ctx(), &StartSandboxRequest::default())
        .await;
    refused(twice, Code::FAILED_PRECONDITION);
    guest.client.ping(ctx(), &Empty::new()).await.unwrap();
    guest.stop().await;
}

#[tokio::test]
async fn a_created_container_can_be_deleted_without_a_start() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    guest
        .create("c1", &spec("true"), Stdio::default())
        .await
        .unwrap();
    assert_eq!(guest.delete("c1", "").await.unwrap().status, 137);
    guest
        .create("c1", &spec("true"), Stdio::default())
        .await
        .unwrap();
    guest.stop().await;
}

#[tokio::test]
async fn what_cannot_be_executed_is_told_as_other_runtimes_do() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    let mut bad = spec("");
    bad["process"]["args"] = serde_json::json!(["nope"]);
    let (code, text) = refusal(guest.create("c1", &bad, Stdio::default()).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        text.ends_with("exec: \"nope\": executable file not found in $PATH"),
        "{text}"
    );
    bad["process"]["args"] = serde_json::json!(["/no/such"]);
    let (_, text) = refusal(guest.create("c1", &bad, Stdio::default()).await);
    assert!(
        text.ends_with("exec: \"/no/such\": stat /no/such: no such file or directory"),
        "{text}"
    );
    // Nothing is left in the way of a good one.
    assert_eq!(guest.whole("c1", &spec("exit 3")).await.status, 3);
    guest.stop().await;
}

/// What can be found and cannot be executed: that shows only when the process runs already, and its log is where one looks.
#[tokio::test]
async fn a_program_that_the_kernel_refuses_ends_an_init_process_and_fails_the_start_of_an_exec() {
    let mut guest = Guest::start().await;
    for (name, text, reason) in [
        ("junk", "not a program", "exec format error"),
        ("script", "#!/no/such\n", "no such file or directory"),
    ] {
        for terminal in [false, true] {
            let id = format!("{name}-{terminal}");
            let path = guest.rootfs(&id).join("bin").join(name);
            std::fs::write(&path, text).unwrap();
            let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&path, executable).unwrap();
            let mut bad = spec("");
            bad["process"]["args"] = serde_json::json!([name]);
            bad["process"]["terminal"] = terminal.into();
            let (stdio, ends) = guest.stdio(false, terminal).await;
            guest.create(&id, &bad, stdio).await.unwrap();
            assert_ne!(guest.run(&id, "").await.unwrap(), 0);
            let outcome = guest.outcome(&id, "", ends).await;
            let line = format!("exec /bin/{name}: {reason}");
            let told = if terminal {
                (format!("{line}\r\n"), String::new())
            } else {
                (String::new(), format!("{line}\n"))
            };
            assert_eq!((outcome.stdout, outcome.stderr), told);
            assert_eq!(outcome.status, 255);
        }
    }
    guest
        .started("c1", &spec("sleep 1000"), Stdio::default())
        .await;
    let junk = guest.share().join("c1/rootfs/bin/junk");
    std::fs::copy(guest.share().join("junk-true/rootfs/bin/junk"), junk).unwrap();
    let mut bad = shell("");
    bad["args"] = serde_json::json!(["junk"]);
    guest
        .create_exec("c1", "e1", &bad, Stdio::default())
        .await
        .unwrap();
    let (code, text) = refusal(guest.run("c1", "e1").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        text.ends_with("unable to start container process: exec /bin/junk: exec format error"),
        "{text}"
    );
    guest.stop().await;
}

#[tokio::test]
async fn exec_joins_the_container_and_has_its_own_life() {
    let mut guest = Guest::start().await;
    let (stdio, _ends) = guest.stdio(false, false).await;
    guest
        .started("c1", &spec("echo kept > /tmp/f; exec sleep 1000"), stdio)
        .await;
    let outcome = guest
        .exec(
            "c1",
            "e1",
            &shell(
                "until read init </proc/1/comm && [ \"$init\" = sleep ]; do :; done; cat /tmp/f; echo $init; exit 7",
            ),
        )
        .await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.status),
        ("kept\nsleep\n", 7),
        "{}",
        outcome.stderr
    );
    // Same namespaces as init.
    let compare = "for n in mnt pid ipc uts net cgroup; do [ $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) ] || echo $n; done";
    assert_eq!(guest.exec("c1", "e2", &shell(compare)).await.stdout, "");
    assert_eq!(
        guest
            .exec("c1", "e3", &shell("grep ^0: /proc/self/cgroup"))
            .await
            .stdout,
        "0::/\n"
    );
    let mut bad = shell("");
    bad["args"] = serde_json::json!(["nope"]);
    let (_, text) = refusal(guest.create_exec("c1", "e4", &bad, Stdio::default()).await);
    assert!(
        text.ends_with("exec: \"nope\": executable file not found in $PATH"),
        "{text}"
    );
    // The id of a failed exec is free.
    assert_eq!(guest.exec("c1", "e4", &shell("exit 0")).await.status, 0);
    guest.stop().await;
}

/// The host opens the streams of an exec before it asks for the exec, of many before the agent has come to the first.
#[tokio::test]
async fn two_hundred_execs_at_once_have_their_streams() {
    const AT_ONCE: usize = 200;
    let mut guest = Guest::start().await;
    let (stdio, ends) = guest.stdio(true, false).await;
    guest.started("c", &spec("cat"), stdio).await;
    let mut waiting = Vec::new();
    for number in 0..AT_ONCE {
        let (stdio, own) = guest.stdio(false, false).await;
        let request = CreateExecRequest {
            id: "c".into(),
            exec_id: format!("e{number}"),
            process: serde_json::to_vec(&shell(&format!("echo {number}"))).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        waiting.push((request, own));
    }
    // An answer comes after what the agent had to do before: by then streams have come that nobody waits for.
    guest.client.ping(ctx(), &Empty::new()).await.unwrap();
    let mut execs = tokio::task::JoinSet::new();
    for (number, (request, own)) in waiting.into_iter().enumerate() {
        let client = guest.client.clone();
        execs.spawn(async move {
            client.create_exec(ctx(), &request).await.unwrap();
            let named = reference(&request.id, &request.exec_id);
            client.start_process(ctx(), &named).await.unwrap();
            assert_eq!(own.read_all().await.0, format!("{number}\n"));
        });
    }
    while let Some(done) = execs.join_next().await {
        done.unwrap();
    }
    drop(ends);
    guest.stop().await;
}

#[tokio::test]
async fn the_exits_of_execs_come_before_that_of_init() {
    let mut guest = Guest::start().await;
    guest
        .started("c1", &spec("sleep 1000"), Stdio::default())
        .await;
    for exec in ["e1", "e2", "e3"] {
        guest
            .started_exec("c1", exec, &shell("sleep 1000"), Stdio::default())
            .await;
    }
    let list = guest
        .client
        .list_processes(ctx(), &container("c1"))
        .await
        .unwrap();
    assert_eq!(list.pids.len(), 4, "{list:?}");
    guest.kill("c1", "", libc::SIGKILL, false).await.unwrap();
    guest.exit_of("c1", "").await;
    let exits = guest.exits();
    assert_eq!(exits.len(), 4, "{exits:?}");
    assert_eq!(exits[3], ("c1".into(), String::new()));
    guest.stop().await;
}

#[tokio::test]
async fn a_created_container_runs_execs_in_its_namespaces() {
    let mut guest = Guest::start().await;
    let root = guest.rootfs("c1");
    guest
        .create("c1", &spec("cat /tmp/f; exit 5"), Stdio::default())
        .await
        .unwrap();
    let script = "echo prepared > /tmp/f; readlink /proc/1/exe 2>/dev/null | wc -l; echo $$ | grep -vx 1 | wc -l";
    let outcome = guest.exec("c1", "e1", &shell(script)).await;
    // What waits there to become the program shows nothing of itself.
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("0\n1\n", 0));
    assert_eq!(
        std::fs::read_to_string(root.join("tmp/f")).unwrap(),
        "prepared\n"
    );
    guest.run("c1", "").await.unwrap();
    assert_eq!(guest.exit_of("c1", "").await.status, 5);
    let late = guest
        .create_exec("c1", "e2", &shell("true"), Stdio::default())
        .await;
    refused(late, Code::FAILED_PRECONDITION);
    guest.delete("c1", "").await.unwrap();
    // One that was never started is deleted with what runs in it.
    guest
        .create("c1", &spec("true"), Stdio::default())
        .await
        .unwrap();
    guest
        .started_exec("c1", "e1", &shell("sleep 1000"), Stdio::default())
        .await;
    assert_eq!(guest.delete("c1", "").await.unwrap().status, 137);
    guest.stop().await;
}

#[tokio::test]
async fn signals_reach_one_process_or_all() {
    let mut guest = Guest::start().await;
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest
        .started(
            "c1",
            &spec("trap 'echo usr1; exit 5' USR1; echo ready; while :; do sleep 1; done"),
            stdio,
        )
        .await;
    ends.said("ready\n").await;
    guest
        .started_exec("c1", "e1", &shell("sleep 1000"), Stdio::default())
        .await;
    // A real-time signal, whose default action ends the process.
    guest.kill("c1", "e1", 40, false).await.unwrap();
    assert_eq!(guest.exit_of("c1", "e1").await.status, 128 + 40);
    guest.kill("c1", "", libc::SIGUSR1, true).await.unwrap();
    assert_eq!(guest.exit_of("c1", "").await.status, 5);
    assert_eq!(ends.read_all().await.0, "usr1\n");
    guest.stop().await;
}

#[tokio::test]
async fn a_paused_container_stands_still_and_dies_when_killed() {
    let mut guest = Guest::start().await;
    guest.rootfs("c1");
    guest
        .create("c1", &spec("sleep 1000"), Stdio::default())
        .await
        .unwrap();
    refused(
        guest.client.pause_container(ctx(), &container("c1")).await,
        Code::FAILED_PRECONDITION,
    );
    let pid = guest.run("c1", "").await.unwrap();
    assert_ne!(pid, 0);
    guest
        .client
        .pause_container(ctx(), &container("c1"))
        .await
        .unwrap();
    let exec = guest
        .create_exec("c1", "e1", &shell("true"), Stdio::default())
        .await;
    refused(exec, Code::FAILED_PRECONDITION);
    guest
        .client
        .resume_container(ctx(), &container("c1"))
        .await
        .unwrap();
    assert_eq!(guest.exec("c1", "e1", &shell("exit 4")).await.status, 4);
    guest
        .client
        .pause_container(ctx(), &container("c1"))
        .await
        .unwrap();
    guest.kill("c1", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.exit_of("c1", "").await.status, 137);
    guest.delete("c1", "").await.unwrap();
    guest.stop().await;
}

/// A file system that never answers: who asks it for something sleeps until killed.
#[tokio::test]
async fn a_process_that_cannot_be_frozen_holds_up_no_other_command() {
    let mut guest = Guest::start().await;
    let mut stuck = spec(
        "exec 3<>/dev/fuse; mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none /mnt
        ls /mnt & echo stuck; trap 'echo term' TERM; while :; do sleep 0.1; done",
    );
    let caps = serde_json::json!(["CAP_SYS_ADMIN", "CAP_KILL"]);
    stuck["process"]["capabilities"] =
        serde_json::json!({"bounding": caps, "effective": caps, "permitted": caps});
    stuck["linux"]["devices"] =
        serde_json::json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]);
    stuck["linux"]["resources"]["devices"] = serde_json::json!([{"allow": true, "access": "rwm"}]);
    std::fs::create_dir_all(guest.share().join("c1/rootfs/mnt")).unwrap();
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest.started("c1", &stuck, stdio).await;
    ends.said("stuck\n").await;
    tokio::time::sleep(Duration::from_millis(300)).await;

    // It is sent nevertheless, soon.
    let begun = Instant::now();
    guest.kill("c1", "", libc::SIGTERM, true).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    ends.said("term\n").await;

    // A pause fails, and meanwhile the container answers, and can be killed.
    let client = guest.client.clone();
    let pause = tokio::spawn(async move { client.pause_container(ctx(), &container("c1")).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    guest.client.stats(ctx(), &container("c1")).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2) && !pause.is_finished());
    guest.kill("c1", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.exit_of("c1", "").await.status, 137);
    let _ = pause.await.unwrap();
    guest.delete("c1", "").await.unwrap();
    guest.stop().await;
}

#[tokio::test]
async fn an_exit_is_told_while_a_grandchild_keeps_the_output_open() {
    let mut guest = Guest::start().await;
    guest
        .started("c1", &spec("sleep 1000"), Stdio::default())
        .await;
    let (stdio, mut ends) = guest.stdio(false, false).await;
    let script =
        "(while [ ! -e /tmp/go ]; do sleep 0.1; done; echo late; exec sleep 1000) & echo early";
    guest.started_exec("c1", "e1", &shell(script), stdio).await;
    assert_eq!(guest.exit_of("c1", "e1").await.status, 0);
    std::fs::write(guest.share().join("c1/rootfs/tmp/go"), "").unwrap();
    ends.said("early\nlate\n").await;
    // As under runc the output of a process ends at the latest when it is deleted, whoever has it open.
    guest.delete("c1", "e1").await.unwrap();
    assert_eq!(ends.read_all().await.0, "");
    guest.stop().await;
}

#[tokio::test]
async fn the_agent_ends_with_its_connection_and_takes_the_containers_along() {
    let mut guest = Guest::start().await;
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest
        .started("c1", &spec("echo up; sleep 1000"), stdio)
        .await;
    ends.said("up\n").await;
    guest.stop().await;
    assert_eq!(ends.read_all().await.0, "");
}

#[tokio::test]
async fn a_shutdown_with_a_grace_lets_processes_end_and_kills_the_others_after_it() {
    let mut guest = Guest::start().await;
    let heeds = "trap 'sleep 0.3; echo going; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let (stdio, mut ends) = guest.stdio(false, false).await;
    guest.started("heeds", &spec(heeds), stdio).await;
    let (stdio, mut deaf) = guest.stdio(false, false).await;
    guest
        .started(
            "deaf",
            &spec("trap '' TERM; echo up; while :; do sleep 1; done"),
            stdio,
        )
        .await;
    // Both have set their traps.
    for ends in [&mut ends, &mut deaf] {
        ends.said("up\n").await;
    }
    let began = Instant::now();
    let request = ShutdownRequest {
        grace_ms: 2_000,
        ..ShutdownRequest::default()
    };
    guest.client.shutdown(ctx(), &request).await.unwrap();
    assert!(
        began.elapsed() >= Duration::from_secs(2),
        "the deaf one has its grace too"
    );
    assert_eq!(guest.exit_of("heeds", "").await.status, 5);
    assert_eq!(guest.exit_of("deaf", "").await.status, 137);
    assert_eq!(ends.read_all().await.0, "going\n");
    guest.ended().await;
}

#[tokio::test]
async fn a_shutdown_ends_as_soon_as_nothing_runs() {
    let mut guest = Guest::start().await;
    let (stdio, mut ends) = guest.stdio(false, false).await;
    let script = "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done";
    guest.started("heeds", &spec(script), stdio).await;
    ends.said("up\n").await;
    let began = Instant::now();
    let request = ShutdownRequest {
        grace_ms: 60_000,
        ..ShutdownRequest::default()
    };
    guest.client.shutdown(ctx(), &request).await.unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "it waited for its whole grace"
    );
    guest.ended().await;
}

#[tokio::test]
async fn a_shutdown_tells_every_end_and_then_that_there_are_no_more() {
    let mut guest = Guest::start().await;
    for id in ["one", "two"] {
        guest
            .started(id, &spec("while :; do sleep 1; done"), Stdio::default())
            .await;
    }
    let at_once = ShutdownRequest::new();
    guest.client.shutdown(ctx(), &at_once).await.unwrap();
    // A stream that the connection's end cuts off fails instead; it would have held the connection open, and so the
    // guest up, until the agent's patience is over.
    guest.last_events().await.unwrap();
    let mut exits = guest.exits();
    exits.sort();
    let both = ["one", "two"].map(|id| (id.to_owned(), String::new()));
    assert_eq!(exits, both);
    guest.ended().await;
}
