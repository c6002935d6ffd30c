//! The variables by which device plugins name a container's devices: the addresses in them are the guest's.

use anyhow::Result;
use brig_tests::node::check::{contains, equal};
use brig_tests::node::given::{DISPLAY, Given, NVME};

use super::passthrough::{only_brig, with};
use crate::suite::{Case, SLEEP, Suite, case};

pub const CASES: &[Case] = &[case(
    "passthrough",
    "variables with PCI addresses lead a container and its execs to its devices in the guest",
    addresses,
)];

/// For each address of a list, what the guest has there: vendor and device.
const FOUND: &str = "for at in $(echo $PCIDEVICE_BRIG_IO_BOTH | tr , ' '); do \
    cat /sys/bus/pci/devices/$at/vendor /sys/bus/pci/devices/$at/device; done | xargs";

fn addresses(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    // One on the guest's first bus, and one behind a root port.
    let (disk, display) = (Given::take(NVME)?, Given::nth(DISPLAY, 2)?);
    let pod = suite.run("addresses")?;
    let list = format!("{},{}", disk.address, display.address);
    let info = format!(
        r#"{{"{0}":{{"generic":{{"deviceID":"{0}"}}}}}}"#,
        display.address
    );
    let script = format!("{FOUND}; echo $PCIDEVICE_BRIG_IO_BOTH_INFO; sleep 1000");
    let spec = pod
        .container("main", &["sh", "-c", &script])
        .env("PCIDEVICE_BRIG_IO_BOTH", &list)
        .env("PCIDEVICE_BRIG_IO_BOTH_INFO", &info)
        .env("OTHER", &list);
    let container = with(spec, &[&disk, &display]).start()?;
    let both = "0x1b36 0x0010 0x1234 0x1111";
    container.wait_line(both)?;
    equal("an exec's devices", both, container.sh(FOUND)?)?;
    equal(
        "a variable of the user's",
        list.as_str(),
        container.sh("echo $OTHER")?,
    )?;
    let told = container.sh("echo $PCIDEVICE_BRIG_IO_BOTH_INFO")?;
    contains("behind the port", ":00.0\":{\"generic\"", &told)?;
    // A container that has none of them is told nothing of the guest's.
    let beside = pod
        .container("beside", SLEEP)
        .env("PCIDEVICE_BRIG_IO_BOTH", &list)
        .start()?;
    equal(
        "a neighbour's variable",
        list.as_str(),
        beside.sh("echo $PCIDEVICE_BRIG_IO_BOTH")?,
    )
}
