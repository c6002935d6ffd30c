//! A volume that hangs before the pod has looked at it even once.

use anyhow::{Result, anyhow};
use brig_tests::node::check::{equal, that};
use brig_tests::node::clock;
use brig_tests::node::hanging::{CONTENT, Hanging, file};

use super::life::sandbox_pid;
use crate::node::{self, Directory};
use crate::suite::{Case, SLEEP, Suite, case, not_here};

pub const CASES: &[Case] = &[case(
    "volumes",
    "a volume whose server has gone before the pod first looks at it holds up who mounts it alone",
    first_look,
)];

const ROUNDS: usize = 3;
/// What has to work in another container meanwhile.
const WORK: &str = "ls -l / /fast /etc > /dev/null && cat /fast/file && echo new > /fast/new && sync /fast/new && \
                    rm /fast/new && echo own > /own && sync /own && cat /own && rm /own";

fn first_look(suite: &mut Suite) -> Result<()> {
    if !suite.is_brig() {
        return not_here("a container of runc's has no file server");
    }
    let directory = Directory::new("first-look")?;
    let fast = directory.directory("fast")?;
    std::fs::write(fast.join("file"), "fast\n")?;
    let place = directory.path.join("slow");
    let hanging = Hanging::mount(&place)?;
    let pod = suite.run("first-look")?;
    let beside = pod.container("beside", SLEEP).mount(&fast, "/fast");
    let beside = beside.start()?;
    // Whoever prepares the mount on the node gets answers, the pod gets none.
    hanging.be_silent_to(sandbox_pid(&pod)?);
    let slow = pod.container("slow", SLEEP).mount(&place, "/slow");
    let (worked, started) = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let worked = while_it_hangs(&hanging, &beside.id);
            // Whoever waits for it cannot be ended before.
            hanging.let_go();
            worked
        });
        let started = slow.start();
        (work.join(), started)
    });
    let worked = worked.map_err(|_| anyhow!("the thread died"))??;
    equal("while it hangs", "fast\nown\n".repeat(ROUNDS), worked)?;
    let read = started?.sh(&format!("cat /slow/{}", file(0)))?;
    equal("at last", CONTENT.trim_end(), read.trim_end())
}

/// What another container prints while somebody waits for the first look.
fn while_it_hangs(hanging: &Hanging, container: &str) -> Result<String> {
    hanging.wait_for(1, clock::seconds(20))?;
    let mut printed = String::new();
    for round in 0..ROUNDS {
        let id = format!("round-{round}");
        let exec = ["-n", "k8s.io", "tasks", "exec", "--exec-id", &id, container];
        printed += &node::run("ctr", &[&exec[..], &["sh", "-c", WORK]].concat())?;
    }
    that("the first look still waits", hanging.held() > 0)?;
    Ok(printed)
}
