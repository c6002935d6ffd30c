//! Streams that stay open: attach, and exec with stdin or a terminal, as `kubectl attach`,
//! `kubectl exec -it` and `kubectl cp` use them.

use anyhow::Result;
use brig_tests::node::check::{contains, equal, that};

use crate::container::eventually;
use crate::stream::Session;
use crate::suite::{Case, Suite, case, smoke};
use brig_tests::node::clock;

pub const CASES: &[Case] = &[
    smoke(
        "attach",
        "exec -i: stdin, stdout, stderr, exit code",
        exec_stdin,
    ),
    smoke(
        "attach",
        "exec -it: a terminal, resized while it runs",
        exec_terminal,
    ),
    case(
        "attach",
        "exec: 1 MiB goes in and comes back whole (kubectl cp)",
        copy,
    ),
    case(
        "attach",
        "exec: the end of the client leaves the container alive",
        client_gone,
    ),
    smoke(
        "attach",
        "attach -i: stdin and stdout of the main process, twice",
        attach,
    ),
    case(
        "attach",
        "attach -it: a terminal, resized, logged too",
        attach_terminal,
    ),
    case(
        "attach",
        "stdinOnce: stdin ends with the first client",
        stdin_once,
    ),
];

fn exec_stdin(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script = "read line; echo \"got $line\"; echo oops >&2; exit 6";
    let mut session = Session::exec(&shared.container, &["sh", "-c", script], false)?;
    session.send(b"a line\n")?;
    let end = session.finish()?;
    equal("exit code", 6, end.code)?;
    equal(
        "stdout",
        "got a line\n",
        String::from_utf8_lossy(&end.stdout).as_ref(),
    )?;
    equal("stderr", "oops\n", end.stderr.as_str())
}

fn exec_terminal(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let mut session = Session::exec(&shared.container, &["sh"], true)?;
    session.resize(123, 45)?;
    // What is typed is echoed, so what is waited for must not be in it.
    session.send(
        b"tty; until test \"$(stty size)\" = '45 123'; do sleep 0.3; done; echo is-$((4500 + 0))\n",
    )?;
    session.wait_for("/dev/pts/")?;
    session.wait_for("is-4500")?;
    session.send(b"sleep 7777\n")?;
    // While the shell itself reads, ^C is a key and no signal.
    eventually("the command runs", clock::seconds(3), || {
        let all = shared.container.sh("ps -o args")?;
        Ok(all.contains("\nsleep 7777").then_some(()))
    })?;
    session.send(&[3])?;
    session.send(b"echo code-$?; exit 9\n")?;
    session.wait_for("code-130")?;
    equal("exit code", 9, session.finish()?.code)
}

fn copy(suite: &mut Suite) -> Result<()> {
    const SIZE: usize = 1 << 20;
    let shared = suite.shared()?;
    let data: Vec<u8> = (0..SIZE)
        .map(|at| u8::try_from(at % 251).unwrap_or(0))
        .collect();
    let script = format!("head -c {SIZE} > /copied && wc -c < /copied >&2 && cat /copied");
    let mut session = Session::exec(&shared.container, &["sh", "-c", &script], false)?;
    session.send(&data)?;
    let end = session.finish()?;
    equal("exit code", 0, end.code)?;
    equal(
        "bytes that went in",
        SIZE.to_string(),
        end.stderr.trim().to_owned(),
    )?;
    that("what came back is the same", end.stdout == data)
}

fn client_gone(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let mut session = Session::exec(&shared.container, &["sh"], true)?;
    session.send(b"echo up-$((1 + 1))\n")?;
    session.wait_for("up-2")?;
    drop(session);
    equal("exec works on", "on", shared.container.sh("echo on")?)
}

fn attach(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let script =
        "while read line; do echo \"heard $line\"; test \"$line\" = end && exit 3; done; exit 4";
    let container = shared
        .pod
        .container("attached", &["sh", "-c", script])
        .edit(|config| config.stdin = true)
        .start()?;
    let mut first = Session::attach(&container, false)?;
    first.send(b"one\n")?;
    first.wait_for("heard one")?;
    drop(first);
    // Without stdinOnce, stdin outlives its client.
    let mut second = Session::attach(&container, false)?;
    second.send(b"two\n")?;
    second.wait_for("heard two")?;
    second.send(b"end\n")?;
    equal("exit code", 3, container.wait()?.exit_code)?;
    for line in ["heard one", "heard two", "heard end"] {
        container.wait_line(line)?;
    }
    Ok(())
}

fn attach_terminal(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("attached-terminal", &["sh"])
        .edit(|config| {
            config.tty = true;
            config.stdin = true;
        })
        .start()?;
    let mut session = Session::attach(&container, true)?;
    session.resize(99, 33)?;
    session.send(
        b"until test \"$(stty size)\" = '33 99'; do sleep 0.3; done; echo is-$((9900 + 0))\n",
    )?;
    session.wait_for("is-9900")?;
    session.send(b"exit 5\n")?;
    equal("exit code", 5, container.wait()?.exit_code)?;
    let data = std::fs::read_to_string(&container.log)?;
    contains("its log", "is-9900", &data)
}

fn stdin_once(suite: &mut Suite) -> Result<()> {
    let shared = suite.shared()?;
    let container = shared
        .pod
        .container("stdin-once", &["sh", "-c", "cat; echo over"])
        .edit(|config| {
            config.stdin = true;
            config.stdin_once = true;
        })
        .start()?;
    let mut session = Session::attach(&container, false)?;
    session.send(b"some\n")?;
    session.wait_for("some")?;
    drop(session);
    let status = eventually("the container ends", clock::seconds(6), || {
        let status = container.status()?;
        Ok((status.finished_at > 0).then_some(status))
    })?;
    equal("exit code", 0, status.exit_code)?;
    container.wait_line("over")
}
