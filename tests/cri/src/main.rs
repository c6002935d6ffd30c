//! `brig-cri`: the end-to-end suite of pods. Runs inside the disposable node, as a kubelet would:
//! over containerd's CRI socket.
//!
//! Each case states a behaviour that a pod has in runc; it runs with each handler asked for, so that
//! Brig is compared with runc and not with an opinion. It trusts containerd and the node.

mod cases;
mod churn;
mod client;
mod container;
mod events;
mod growth;
mod kubelet;
mod log;
mod loops;
mod mounted;
mod node;
mod options;
mod pod;
mod results;
mod served;
mod soak;
mod stream;
mod suite;
mod table;
mod variant;

use std::process::ExitCode;

fn main() -> ExitCode {
    let options = options::parse(std::env::args().skip(1));
    brig_suite::run::exit(
        "brig-cri",
        options.and_then(|options| results::run_all(&options)),
    )
}
