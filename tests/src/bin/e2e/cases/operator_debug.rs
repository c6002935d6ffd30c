//! A guest under a debugger: what gdb says to `brig debug ID --gdb` is said here, as there is no gdb in the node.

use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use brig_tests::node::check::{contains, equal, that};
use brig_tests::node::clock;
use brig_tests::node::process;

use crate::suite::{Case, PROBE, Suite, brig};

pub const CASES: &[Case] = &[brig(
    "operator",
    "a guest under a debugger stands still, shows registers and memory, makes a step and goes on",
    debugged,
)];

const DIR: &str = "/run/brig-e2e-debug";
/// Where the guest's kernel has its image, and where vmlinux has the beginning of that.
const TEXT: u64 = 0xffff_ffff_8100_0000;
const TEXT_IN_FILE: u64 = 0x20_0000;

/// gdb's end of its protocol.
struct Gdb {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Gdb {
    fn start(id: &str) -> Result<Self> {
        let mut child = Command::new("brig")
            .args(["debug", id, "--gdb"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let to = child.stdin.take().context("no input")?;
        let from = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, to, from })
    }

    fn ask(&mut self, packet: &str) -> Result<String> {
        self.say(packet)?;
        self.answer()
            .with_context(|| format!("the answer to {packet}"))
    }

    fn say(&mut self, packet: &str) -> Result<()> {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        write!(self.to, "${packet}#{sum:02x}")?;
        Ok(self.to.flush()?)
    }

    fn byte(&mut self) -> Result<u8> {
        let mut byte = [0];
        self.from.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    /// The next packet, its runs written out.
    fn answer(&mut self) -> Result<String> {
        while self.byte()? != b'$' {}
        let mut text = Vec::new();
        loop {
            match self.byte()? {
                b'#' => break,
                b'*' => {
                    let count = self.byte()?.saturating_sub(29);
                    let last = *text.last().context("a run of nothing")?;
                    text.extend(std::iter::repeat_n(last, count.into()));
                }
                byte => text.push(byte),
            }
        }
        let _sum = (self.byte()?, self.byte()?);
        self.to.write_all(b"+")?;
        self.to.flush()?;
        Ok(String::from_utf8(text)?)
    }

    /// The instruction pointer, which comes after sixteen registers.
    fn rip(&mut self) -> Result<u64> {
        let registers = self.ask("g")?;
        let rip = registers
            .get(16 * 16..17 * 16)
            .context("too few registers")?;
        Ok(u64::from_str_radix(rip, 16)?.swap_bytes())
    }

    fn end(mut self) -> Result<()> {
        drop(self.to);
        let status = self.child.wait()?;
        that("brig has ended well", status.success())
    }
}

fn debugged(suite: &mut Suite) -> Result<()> {
    let result = debug(suite);
    let _ = fs::remove_dir_all(DIR);
    result
}

fn debug(suite: &mut Suite) -> Result<()> {
    fs::create_dir_all(DIR)?;
    let config = format!("{DIR}/debug.toml");
    let scale = clock::scale();
    fs::write(
        &config,
        format!("time_scale = {scale}\nallow_slow_kvm = true\ndebug = true\n"),
    )?;
    let plain = suite.ctr.start(&suite.probe("plain", &["sleep"]))?;
    let mut command = Command::new("brig");
    command.args(["debug", &plain.id, "--symbols"]);
    let outcome = process::run(command, clock::seconds(20))?;
    that(
        "a pod of another handler is not debugged",
        outcome.code == 2,
    )?;
    contains("why not", "debug = true", &outcome.stderr)?;
    drop(plain);
    let open = suite
        .probe("open", &["sleep"])
        .with("--runtime-config-path", &config);
    let open = suite.ctr.start(&open)?;

    let mut command = Command::new("brig");
    command.args(["debug", &open.id, "--symbols"]);
    let symbols = process::run(command, clock::seconds(20))?.success()?.text();
    let elf = fs::read(symbols.trim())?;
    that("the symbols are an ELF file", elf.starts_with(b"\x7fELF"))?;

    let mut gdb = Gdb::start(&open.id)?;
    that("it stands", gdb.ask("?")?.starts_with(['S', 'T']))?;
    let stood = gdb.rip()?;
    that("it stands somewhere", stood != 0)?;
    let mut expected = [0; 32];
    fs::File::open("/host/bin/vmlinux")?.read_exact_at(&mut expected, TEXT_IN_FILE)?;
    let expected: String = expected.iter().map(|byte| format!("{byte:02x}")).collect();
    let memory = gdb.ask(&format!("m{TEXT:x},20"))?;
    equal("the beginning of the kernel's text", expected, memory)?;
    contains("memory that is not there", "E", &gdb.ask("m1234,8")?)?;
    contains(
        "memory is not written",
        "E",
        &gdb.ask(&format!("M{TEXT:x},1:90"))?,
    )?;

    // Nothing runs in it until it may go on, and then to the breakpoint.
    let mut exec = open.spawn("meanwhile", &[PROBE, "exit", "7"])?;
    std::thread::sleep(clock::seconds(2));
    that("it stands still", !exec.is_done())?;
    equal("where it stands", stood, gdb.rip()?)?;
    let breakpoint = format!("1,{TEXT:x},1");
    for what in ["Z", "z"] {
        let answer = gdb.ask(&format!("{what}{breakpoint}"))?;
        equal("a breakpoint that comes and goes", "OK", answer.as_str())?;
    }
    let stepped = gdb.ask("vCont;s:1")?;
    that("a step is made", stepped.starts_with('T'))?;
    let next = gdb.rip()?;
    that("it is elsewhere after it", next != stood)?;
    equal("leave", "OK", gdb.ask("D")?.as_str())?;
    gdb.end()?;
    let outcome = exec.finish(clock::seconds(60))?;
    equal("an exec that was begun meanwhile", 7, outcome.code)?;
    std::thread::sleep(Duration::from_millis(100));
    equal("another", 7, open.exec(&[PROBE, "exit", "7"])?.code)
}
