//! Two devices of a pod of which one works out of the other's memory (peer to peer).

use std::path::Path;

use anyhow::Result;
use brig_tests::node::check::{equal, that};
use brig_tests::node::given::{DISPLAY, Given, NVME, interface};

use super::handlers::Own;
use super::passthrough::{only_brig, with};
use crate::node::{self, TOOLS};
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[case(
    "passthrough",
    "two devices of a pod reach each other's memory where the node's kernel maps it, and work where it does not",
    peers,
)];

const SCRIPT: &str = include_str!("passthrough_peers.py");

/// Whether the node's kernel maps BARs for other devices: by groups always, by iommufd since 6.19.
fn maps() -> Result<bool> {
    let release = node::run("uname", &["-r"])?;
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|text| text.parse::<u32>().ok());
    let version = (numbers.next(), numbers.next());
    Ok(Path::new(interface()) == Path::new("/dev/vfio/vfio") || version >= (Some(6), Some(19)))
}

fn peers(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    suite.image(TOOLS)?;
    let (disk, display) = (Given::nth(NVME, 0)?, Given::nth(DISPLAY, 0)?);
    let text = format!(
        "devices = [\"{}\", \"{}\"]\nmemory = \"256MiB\"\n",
        disk.address, display.address
    );
    let _own = Own::new(suite, &text, &[])?;
    let pod = PodSpec::new(Own::HANDLER, "peers")
        .security(|security| security.privileged = true)
        .run(&suite.cri)?;
    let driver = pod
        .container("driver", SLEEP)
        .image(TOOLS.0)
        .security(|security| security.privileged = true)
        .start()?;
    let expected = if maps()? { "brig" } else { "unreached" };
    for _ in 0..2 {
        let told = driver.exec(&["python3", "-c", SCRIPT])?;
        equal(
            "what the NVMe has written into the display",
            expected,
            told.text().as_str(),
        )?;
        that("the pod lives", pod.is_ready()?)?;
    }
    drop(driver);
    drop(pod);
    // Each is alone again, and works.
    let next = suite.run("after-peers")?;
    let reader = with(next.container("main", SLEEP), &[&disk]).start()?;
    reader.sh("head -c 4096 $(ls /dev/nvme?n1) > /dev/null")?;
    for given in [&disk, &display] {
        given.is_with("vfio-pci")?;
    }
    Ok(())
}
