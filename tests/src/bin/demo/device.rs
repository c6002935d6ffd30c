//! A PCI device of the node in two containers, one after another, where the node has one to give: an NVMe disk, bound to
//! vfio-pci as a device plugin does it.

use anyhow::{Result, ensure};
use brig_suite::case::NotHere;
use brig_tests::node::clock;
use brig_tests::node::ctr::Ctr;
use brig_tests::node::given::{Given, NVME, interface};
use brig_tests::node::process;

use super::{IMAGE, heading, show};

/// Shows it; a node without one is told so.
///
/// # Errors
/// What does not work.
pub fn tour(ctr: &Ctr) -> Result<()> {
    heading("A disk of the node in a container, by VFIO");
    let given = match Given::take(NVME) {
        Err(error) if error.is::<NotHere>() => {
            println!("    ({error})");
            return Ok(());
        }
        given => given?,
    };
    println!("  \x1b[36m$ brig check\x1b[0m");
    let mut command = std::process::Command::new("brig");
    command.arg("check");
    // It fails where no pod could start, which is another part's to show.
    let checked = process::run(command, clock::seconds(6))?;
    for line in checked
        .text()
        .lines()
        .filter(|line| line.contains(&given.address))
    {
        println!("    {line}");
    }
    let text = format!("written by a container that had {}", given.address);
    let write = format!("ls /dev/nvme*; echo '{text}' > /dev/nvme0n1 && sync");
    run(ctr, &given, &write)?;
    let said = run(ctr, &given, "head -n 1 /dev/nvme0n1")?;
    ensure!(said.trim() == text, "the next container reads {said:?}");
    given.is_with("vfio-pci")?;
    println!("    and the disk is with vfio-pci again, for the next one");
    Ok(())
}

/// A container that has the device and goes.
fn run(ctr: &Ctr, given: &Given, script: &str) -> Result<String> {
    let node = given.node();
    let args = [
        "run",
        "--rm",
        "--runtime",
        &ctr.runtime,
        "--device",
        &node,
        "--device",
        interface(),
    ];
    let args = [&args[..], &[IMAGE, "demo-device", "sh", "-c", script]].concat();
    let (text, code) = show(ctr, &args)?;
    ensure!(code == 0, "the container ended with {code}");
    Ok(text)
}
