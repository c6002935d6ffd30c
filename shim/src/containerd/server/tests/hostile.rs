//! The whole shim but the node against agents that break the rules, from silence to floods: what containerd asks is
//! answered in time, memory and the thread stay free, and the pod can be killed and removed.

use std::time::Instant;

use brig_agent_protocol::{MAX_EVENT, MAX_REPLY};
use containerd_shim_protos::api::{PidsRequest, StatsRequest, Status};
use protobuf::Message as _;
use tokio::time::{sleep, timeout};
use ttrpc::Code;
use ttrpc::proto::{MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader};

use super::super::*;
use super::LONG;
use super::harness::{Harness, code, ctx};
use crate::guest::fakes::Behaviour;
use crate::guest::fakes::raw::{Bytes, RawAgent, answer, exit, frame, oom, unknown_fields};

/// What containerd may be kept waiting with the harness's time scale, and what a busy machine may add.
const WORD: Duration = Duration::from_millis(100);
const SLACK: Duration = Duration::from_millis(900);
/// What an attack may cost, in bytes; some of it is the attacker's own.
const GROWTH: u64 = 24 << 20;

async fn started(raw: RawAgent) -> Harness {
    let harness = Harness::new(Behaviour {
        raw: Some(raw),
        ..Behaviour::default()
    })
    .await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    harness
}

async fn stats(harness: &Harness) -> ttrpc::Result<()> {
    let request = StatsRequest {
        id: "c".into(),
        ..StatsRequest::default()
    };
    harness.client.stats(ctx(), &request).await.map(drop)
}

async fn pids(harness: &Harness) -> ttrpc::Result<()> {
    let request = PidsRequest {
        id: "c".into(),
        ..PidsRequest::default()
    };
    harness.client.pids(ctx(), &request).await.map(drop)
}

/// Kills the container by whatever it takes and removes it, as containerd would.
async fn removed(harness: Harness) -> Vec<String> {
    let before = Instant::now();
    // One that has ended by now cannot be killed.
    let killed = harness.kill("", 9).await;
    assert!(
        before.elapsed() < WORD + SLACK,
        "kill: {:?}",
        before.elapsed()
    );
    if let Err(error) = killed {
        assert_eq!(code::<()>(Err(error)).0, Code::NOT_FOUND);
    }
    assert_eq!(harness.wait("").await.unwrap(), 137);
    assert_eq!(harness.status("").await.unwrap(), Status::STOPPED);
    assert_eq!(harness.delete("").await.unwrap(), 137);
    harness.end().await
}

/// Resident memory of the tests' process, in bytes.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// How late the thread is at most while `work` runs, and how much memory is added.
async fn watched<T>(work: impl Future<Output = T>) -> (T, Duration, u64) {
    const TICK: Duration = Duration::from_millis(5);
    let before = resident();
    let (mut late, mut most) = (Duration::ZERO, before);
    tokio::pin!(work);
    loop {
        let begun = Instant::now();
        tokio::select! {
            done = &mut work => return (done, late, most.saturating_sub(before)),
            () = sleep(TICK) => {
                late = late.max(begun.elapsed().saturating_sub(TICK));
                most = most.max(resident());
            }
        }
    }
}

#[tokio::test]
async fn an_agent_that_answers_no_question_is_waited_for_once() {
    let harness = started(RawAgent {
        silent: &["Stats", "ListProcesses", "SignalProcess", "DeleteProcess"],
        ..RawAgent::default()
    })
    .await;
    let before = Instant::now();
    for _ in 0..20 {
        assert_eq!(code(stats(&harness).await).0, Code::DEADLINE_EXCEEDED);
        assert_eq!(code(pids(&harness).await).0, Code::DEADLINE_EXCEEDED);
        // SIGTERM is on its way.
        harness.kill("", 15).await.unwrap();
        assert_eq!(harness.status("").await.unwrap(), Status::RUNNING);
    }
    let took = before.elapsed();
    assert!(took < 2 * WORD + SLACK, "{took:?}");
    let asked = harness.record.all();
    let times = |what: &str| asked.iter().filter(|seen| *seen == what).count();
    assert_eq!(times("raw Stats"), 1, "one call at a time: {asked:?}");
    assert_eq!(times("raw ListProcesses"), 1);
    removed(harness).await;
}

#[tokio::test]
async fn a_sigkill_that_is_acknowledged_and_not_carried_out_ends_the_vm() {
    let harness = started(RawAgent::default()).await;
    let before = Instant::now();
    harness.kill("", 9).await.unwrap();
    assert_eq!(harness.wait("").await.unwrap(), 137);
    // The time-out of the harness's configuration.
    assert!(before.elapsed() >= Duration::from_secs(3));
    assert_eq!(harness.delete("").await.unwrap(), 137);
    harness.end().await;
}

#[tokio::test]
async fn an_agent_that_reads_nothing_delays_nobody() {
    let harness = started(RawAgent {
        deaf: true,
        ..RawAgent::default()
    })
    .await;
    let before = Instant::now();
    for _ in 0..5 {
        assert!(stats(&harness).await.is_err());
        assert!(pids(&harness).await.is_err());
    }
    assert!(
        before.elapsed() < 2 * WORD + SLACK,
        "{:?}",
        before.elapsed()
    );
    removed(harness).await;
}

/// Attacks that break a rule of the connection.
const BROKEN: &[(&str, Bytes)] = &[
    ("empty events", |events, _| {
        frame(events, MESSAGE_TYPE_DATA, b"").repeat(1 << 16)
    }),
    ("an event that is too large", |events, _| {
        frame(events, MESSAGE_TYPE_DATA, &vec![0; MAX_EVENT + 1])
    }),
    ("an event of unknown fields", |events, _| {
        frame(events, MESSAGE_TYPE_DATA, &unknown_fields(4 << 20))
    }),
    ("an event that is no message", |events, _| {
        frame(events, MESSAGE_TYPE_DATA, &[0xff; 9])
    }),
    ("an answer that is too large", |events, _| {
        frame(events, MESSAGE_TYPE_RESPONSE, &unknown_fields(4 << 20))
    }),
    ("a frame without an end", |events, _| {
        let header = MessageHeader::new_response(events, u32::MAX);
        [Vec::from(header), vec![0; 8 << 20]].concat()
    }),
    ("a second answer", |_, start| answer(start, Vec::new())),
    ("answers to nobody", |_, start| {
        answer(start + 1000, vec![0; 100]).repeat(1 << 10)
    }),
    ("events for a call of another kind", |_, start| {
        frame(start, MESSAGE_TYPE_DATA, b"x")
    }),
    ("a request", |events, _| {
        frame(events, MESSAGE_TYPE_REQUEST, b"")
    }),
    ("frames of no kind", |events, _| {
        frame(events, 0, b"").repeat(1 << 10)
    }),
    ("the end of events", |events, _| answer(events, Vec::new())),
    ("bytes", |_, _| [0xa5; 1 << 16].to_vec()),
];

/// Runs a test of this file by itself, in a process whose memory is that of no other test.
async fn alone(name: &str) {
    let name = format!("{}::{name}", module_path!().split_once("::").unwrap().1);
    let output = tokio::task::spawn_blocking(move || {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--ignored", "--nocapture"])
            .output()
    });
    let output = output.await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn an_agent_that_breaks_a_rule_ends_its_pod_and_costs_no_more() {
    alone("broken_rules").await;
}

#[tokio::test]
async fn a_flood_within_the_rules_leaves_the_pod_responsive() {
    alone("lawful_floods").await;
}

#[tokio::test]
#[ignore = "run by itself, see above"]
async fn broken_rules() {
    for (what, attack) in BROKEN {
        let harness = started(RawAgent {
            attack: Some(*attack),
            endless: true,
            ..RawAgent::default()
        })
        .await;
        let (status, late, grown) = watched(harness.wait("")).await;
        assert_eq!(status.unwrap(), 137, "{what}");
        assert!(late < Duration::from_millis(500), "{what}: {late:?} late");
        println!("{what}: {late:?} late, {grown} bytes");
        assert!(grown < GROWTH, "{what}: {grown} bytes");
        let (_, why) = code(harness.exec("e").await.and(stats(&harness).await));
        assert!(
            why.contains("ended") || why.contains("not running"),
            "{what}: {why}"
        );
        removed(harness).await;
    }
}

/// Attacks within the rules.
const LAWFUL: &[(&str, Bytes)] = &[
    ("kills for memory", |events, _| oom(events, "c").repeat(100)),
    ("ends of strangers", |events, _| {
        exit(events, "stranger", "", 0).repeat(100)
    }),
    ("ends of unknown execs", |events, _| {
        exit(events, "c", "e", u32::MAX).repeat(100)
    }),
    ("events of unknown fields", |events, _| {
        frame(events, MESSAGE_TYPE_DATA, &unknown_fields(MAX_EVENT - 8)).repeat(10)
    }),
];

#[tokio::test]
#[ignore = "run by itself, see above"]
async fn lawful_floods() {
    for (what, attack) in LAWFUL {
        let harness = started(RawAgent {
            attack: Some(*attack),
            endless: true,
            ..RawAgent::default()
        })
        .await;
        let asking = async {
            let until = Instant::now() + Duration::from_secs(1);
            let mut longest = Duration::ZERO;
            while Instant::now() < until {
                let before = Instant::now();
                assert_eq!(harness.status("").await.unwrap(), Status::RUNNING, "{what}");
                // Its answer is behind the flood.
                let _ = stats(&harness).await;
                longest = longest.max(before.elapsed());
                sleep(Duration::from_millis(10)).await;
            }
            longest
        };
        let (longest, late, grown) = watched(asking).await;
        assert!(longest < WORD + SLACK, "{what}: {longest:?}");
        assert!(late < Duration::from_millis(500), "{what}: {late:?} late");
        println!("{what}: {longest:?}, {late:?} late, {grown} bytes");
        assert!(grown < GROWTH, "{what}: {grown} bytes");
        let topics = removed(harness).await;
        let ooms = topics.iter().filter(|topic| *topic == "/tasks/oom").count();
        assert!(ooms < 10, "{what}: {ooms} events to containerd");
    }
}

#[tokio::test]
async fn the_largest_answer_of_unknown_fields_is_decoded_in_little_time() {
    let fields = unknown_fields(MAX_REPLY - 64);
    let before = Instant::now();
    for _ in 0..10 {
        brig_agent_protocol::agent::StatsResponse::parse_from_bytes(&fields).unwrap();
    }
    let each = before.elapsed() / 10;
    // Of a debug build on a busy machine; an optimised one needs a twentieth.
    assert!(each < Duration::from_millis(500), "{each:?}");
}

#[tokio::test]
async fn an_end_counts_once_and_only_of_what_was_started() {
    let harness = started(RawAgent {
        attack: Some(|events, _| {
            [
                exit(events, "c", "", 259),
                exit(events, "c", "", 4),
                exit(events, "c", "", 5),
            ]
            .concat()
        }),
        ..RawAgent::default()
    })
    .await;
    // 259 is no status.
    assert_eq!(harness.wait("").await.unwrap(), 3);
    assert_eq!(harness.delete("").await.unwrap(), 3);
    let topics = harness.end().await;
    let exits = topics
        .iter()
        .filter(|topic| *topic == "/tasks/exit")
        .count();
    assert_eq!(exits, 1, "{topics:?}");
}

#[tokio::test]
async fn the_wish_to_end_at_once_cuts_the_grace_short() {
    let harness = Harness::new(Behaviour {
        stubborn: true,
        ..Behaviour::default()
    })
    .await;
    harness.create().await.unwrap();
    harness.start("").await.unwrap();
    let pod = harness.pod.clone();
    let gently = tokio::spawn(async move { pod.terminate().await });
    let record = harness.record.clone();
    let graced = async {
        while !record
            .all()
            .iter()
            .any(|seen| seen.starts_with("shutdown after"))
        {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(LONG, graced).await.expect("no grace");
    let before = Instant::now();
    assert!(
        timeout(LONG, harness.pod.shutdown(true))
            .await
            .expect("it goes on")
    );
    assert!(before.elapsed() < SLACK, "{:?}", before.elapsed());
    assert!(
        record.has("shutdown"),
        "the guest was not powered off in order"
    );
    gently.await.unwrap();
    harness.wait("").await.unwrap();
    harness.delete("").await.unwrap();
    harness.end().await;
}
