//! Real programs and unusual images.

use anyhow::Result;
use brig_tests::node::check::{contains, equal, field};
use brig_tests::node::ctr::Run;

use crate::suite::{Case, DEBIAN_IMAGE, PROBE, Suite, case};

pub const CASES: &[Case] = &[
    case("images", "Debian runs nginx and python3", debian),
    case(
        "images",
        "owners above 65535 are kept and respected",
        big_ids,
    ),
];

fn debian(suite: &mut Suite) -> Result<()> {
    suite.import(DEBIAN_IMAGE, "/host/assets/images/debian.tar")?;
    let run = Run::new("debian", DEBIAN_IMAGE, &["nginx", "-g", "daemon off;"]);
    let container = suite.ctr.start(&run)?;
    let python = container
        .exec(&[
            "python3",
            "-c",
            "import hashlib,os; print(hashlib.sha256(b'brig').hexdigest(), os.getpid() > 1)",
        ])?
        .success()?;
    equal(
        "python3 says",
        "01d99abaf25452d1888d43a13a1db54e083a70fcc0dd1ba98430db4cff2d2c94 True\n",
        python.text(),
    )?;
    // nginx may need a moment after its start; curl itself waits for it.
    let page = container
        .exec(&[
            "curl",
            "--silent",
            "--show-error",
            "--retry",
            "20",
            "--retry-connrefused",
            "--retry-delay",
            "1",
            "http://127.0.0.1/",
        ])?
        .success()?;
    contains("the page", "brig test page", &page.text())?;
    let listing = container.exec(&["sh", "-c", "ps ax | grep -c '[n]ginx: '"])?;
    equal(
        "a master and workers",
        true,
        listing.text().trim().parse::<u32>()? >= 2,
    )
}

fn big_ids(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let stat = shared.probe(&["stat", "/data/big"])?;
    field(&stat, "/uid", 200_000)?;
    field(&stat, "/gid", 200_000)?;
    field(&stat, "/mode", "640")?;
    let owner = shared.exec_with(&["--user", "200000:200000"], &[PROBE, "read", "/data/big"])?;
    equal("its owner reads", "big\n", owner.text())?;
    let other = shared.exec_with(&["--user", "1000:1000"], &[PROBE, "read", "/data/big"])?;
    equal("exit status of another user's read", 2, other.code)?;
    contains("error", "permission denied", &other.stderr)
}
