//! What `brig check` says of a device is what a pod then gets, word for word where it is refused.

use std::path::Path;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::given::{DISPLAY, E1000E, EDU, Given, NVME};
use serde_json::Value;

use super::checked::{findings, said};
use super::handlers::Own;
use super::passthrough::{only_brig, refusal, with};
use crate::pod::PodSpec;
use crate::suite::{Case, SLEEP, Suite, case};

/// What `tests/driver-bundle/build` makes, where it was asked to.
const BUNDLE: &str = "/host/bin/edu.erofs";

pub const CASES: &[Case] = &[case(
    "passthrough",
    "what brig check says of a device, of a handler's list and of the node is what a pod gets",
    checked,
)];

/// The one for a device: what is said, and what to do.
fn of(address: &str) -> Result<(String, String)> {
    let findings = findings()?.into_iter();
    let mut own = findings.filter(|finding| finding["device"]["address"] == address);
    let finding = own
        .next()
        .with_context(|| format!("nothing is said of {address}"))?;
    let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let parts = &finding["device"];
    let drivers = parts["guest_drivers"].as_array();
    let useful =
        parts["can_be_given"] == Value::Bool(true) && drivers.is_some_and(|all| !all.is_empty());
    equal(
        "its outcome",
        if useful { "ok" } else { "note" },
        text("outcome").as_str(),
    )?;
    Ok((text("detail"), text("fix")))
}

fn checked(suite: &mut Suite) -> Result<()> {
    only_brig(suite)?;
    let given = Given::nth(NVME, 0)?;
    let pod = suite.run("checked")?;
    {
        let (told, fix) = of(&given.address)?;
        contains(
            "a free one",
            &format!("can be given to a pod as {}", given.node()),
            &told,
        )?;
        contains("its driver", "; its driver in the guest: nvme", &told)?;
        that(&format!("nothing is to be done, not {fix}"), fix.is_empty())?;
        let container = with(pod.container("main", SLEEP), &[&given]).start()?;
        let (told, _) = of(&given.address)?;
        contains("one that a pod has", "in use by process", &told)?;
        container.remove()?;
        let (told, _) = of(&given.address)?;
        that(&format!("free again, not {told}"), !told.contains("in use"))?;
    }
    {
        let (edu, held) = Given::pair("uio_pci_generic")?;
        let (told, fix) = of(&edu.address)?;
        let refused = refusal(&pod, "not-whole", &[&edu])?;
        let sentence = told
            .split_once("): ")
            .map_or(told.as_str(), |(_, rest)| rest);
        contains(
            "a group that is not whole, by check",
            &held.address,
            sentence,
        )?;
        contains("and by the pod", &format!("{sentence}: {fix}"), &refused)?;
    }
    {
        let edu = Given::take(EDU)?;
        let (told, fix) = of(&edu.address)?;
        contains(
            "one that can be given in vain",
            "no driver of the guest takes it",
            &told,
        )?;
        contains("what to do", "driver_bundle", &fix)?;
        let refused = refusal(&pod, "no-driver", &[&edu])?;
        contains("and by the pod", "no driver of the guest", &refused)?;
    }
    {
        let wide = Given::nth(DISPLAY, 1)?;
        let (told, _) = of(&wide.address)?;
        let refused = refusal(&pod, "too-large", &[&wide])?;
        for sentence in [&told, &refused] {
            contains(
                "a BAR without a place",
                "a BAR of 0x20000000 bytes does not fit",
                sentence,
            )?;
        }
    }
    let address = Given::take(E1000E)?.address.clone();
    let (told, fix) = of(&address)?;
    contains(
        "one without a driver",
        "no driver has it (IOMMU group ",
        &told,
    )?;
    let mut text = format!("devices = [\"{address}\", \"0000:77:00.0\"]\n");
    let has_bundle = Path::new(BUNDLE).exists();
    if has_bundle {
        text += &format!("driver_bundle = \"{BUNDLE}\"\n");
    }
    let _own = Own::new(suite, &text, &[])?;
    if has_bundle {
        let edu = Given::take(EDU)?;
        let (told, _) = of(&edu.address)?;
        let driver = format!("its driver in the guest: brig_edu of {BUNDLE}");
        contains("one whose driver a handler's bundle has", &driver, &told)?;
    }
    let refused = match PodSpec::new(Own::HANDLER, "checked-list").run(&suite.cri) {
        Ok(_) => anyhow::bail!("a device that nobody has bound was given"),
        Err(error) => format!("{error:#}"),
    };
    contains("the pod's refusal", &fix, &refused)?;
    let lists = said("devices")?;
    for (wish, why) in [
        (address.as_str(), "no driver has it"),
        ("0000:77:00.0", "this node has no such device"),
    ] {
        that(
            &format!("the list of brig-own is told for {wish}: {lists:?}"),
            lists.iter().any(|line| {
                line.contains("handler brig-own (") && line.contains(wish) && line.contains(why)
            }),
        )?;
    }
    for (what, expected) in [
        ("iommu", " groups"),
        ("vfio", ""),
        ("locked memory", "without a limit"),
    ] {
        let told = said(what)?;
        that(
            &format!("{what}: {told:?}"),
            told.len() == 1 && told[0].contains(expected) && told[0].ends_with("null"),
        )?;
    }
    Ok(())
}
