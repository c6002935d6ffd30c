//! Churn: many pods come and go, and nothing of the node may grow with their number.

use anyhow::{Context, Result};
use brig_suite::results::Place;
use brig_suite::run::Totals;
use brig_tests::node::check::equal;

use crate::growth::Growth;
use crate::suite::{SLEEP, Suite};

/// Runs the pods with a handler; each count that may not grow is judged.
pub fn run(handler: &str, pods: u32, results: &Place, totals: &mut Totals) -> Result<()> {
    let suite = Suite::new(handler)?;
    let mut growth = Growth::default();
    for number in 0..pods {
        one(&suite, number).with_context(|| format!("pod {number} of {handler}"))?;
        growth.sample(true)?;
    }
    let title = format!("{handler} on {}: churn of {pods} pods", suite.containerd);
    let file = format!("churn-{handler}-{}.json", suite.containerd);
    growth.judge(&title, &file, serde_json::Map::new(), results, totals)
}

/// A pod with two containers, an exec and an exit code.
fn one(suite: &Suite, number: u32) -> Result<()> {
    let pod = suite.run("churn")?;
    let main = pod.container("main", SLEEP).start()?;
    equal("an exec", "alive", main.sh("echo alive")?)?;
    let script = format!("exit {}", number % 100);
    let (_job, status) = pod.container("job", &["sh", "-c", &script]).finish()?;
    equal("exit code", i32::try_from(number % 100)?, status.exit_code)
}
