//! What changes the process itself: session, limits, user, privileges, working directory, program.
use std::{
    ffi::{CString, OsStr},
    fs,
    io::{self, Write as _},
    os::unix::ffi::OsStrExt as _,
};

use brig_agent_protocol::identity;
use rustix::process::{Resource, setrlimit};

use super::{
    agent::Agent,
    caps,
    failure::{Context as _, Failure, Result, error_text},
    filter::Filter,
    lookup,
    place::Last,
    root::{Missing, Root},
    seccomp,
};
use crate::spec::{Process, Rlimit, Seccomp, User};

/// Refuses a process that can never be run.
///
/// # Errors
/// A sentence naming the field.
pub fn check(process: &Process) -> std::result::Result<(), String> {
    if process.args.is_empty() {
        return Err("process.args is empty: there is no program to run".into());
    }
    if !process.cwd.starts_with('/') {
        return Err(format!(
            "process.cwd {:?} is not an absolute path",
            process.cwd
        ));
    }
    if !process.command_line.is_empty() || !process.user.username.is_empty() {
        return Err("process.commandLine and process.user.username are for Windows".into());
    }
    if process.args.iter().any(|arg| arg.contains('\0')) {
        return Err("process.args: an argument contains a NUL byte".into());
    }
    check_user(&process.user)?;
    check_environment(&process.env)?;
    if let Some(limit) = process
        .rlimits
        .iter()
        .find(|limit| resource(&limit.kind).is_none())
    {
        return Err(format!(
            "process.rlimits: {:?} is not a resource limit",
            limit.kind
        ));
    }
    super::sched::check(process)
}

fn check_user(user: &User) -> std::result::Result<(), String> {
    identity::check("process.user.uid", user.uid)?;
    identity::check("process.user.gid", user.gid)?;
    for (index, gid) in user.additional_gids.iter().enumerate() {
        identity::check(&format!("process.user.additionalGids[{index}]"), *gid)?;
    }
    Ok(())
}

/// Values may be secrets: an entry is told by its place and its name.
fn check_environment(env: &[String]) -> std::result::Result<(), String> {
    for (index, entry) in env.iter().enumerate() {
        let why = match entry.split_once('=') {
            None => "has no \"=\"".to_owned(),
            Some(("", _)) => "has no name before its \"=\"".to_owned(),
            Some((name, _)) if entry.contains('\0') => format!("({name:?}) contains a NUL byte"),
            Some(_) => continue,
        };
        return Err(format!("process.env[{index}] {why}"));
    }
    Ok(())
}

/// A session and a keyring of its own.
pub fn start_session(name: &str) -> Result<()> {
    rustix::process::setsid().during("setsid")?;
    let name = CString::new(format!("_ses.{name}")).unwrap_or_default();
    // SAFETY: KEYCTL_JOIN_SESSION_KEYRING reads a C string. A kernel without keys or without quota
    // left leaves the sandbox's keyring, which holds nothing.
    unsafe { libc::syscall(libc::SYS_keyctl, 1, name.as_ptr()) };
    Ok(())
}

/// The agent is exempt from the OOM killer; its children must not be.
pub fn set_oom_score_adj(value: i32) -> Result<()> {
    fs::write("/proc/self/oom_score_adj", value.to_string()).during("process.oomScoreAdj")
}

/// Makes the working directory, as other runtimes do: through links of the image, but not where a link leads
/// to nothing.
pub fn make_cwd(root: &Root, process: &Process) -> Result<()> {
    if process.cwd == "/" {
        return Ok(());
    }
    let named = |failure| Failure(format!("process.cwd {failure}"));
    let place = root.place(&process.cwd, Last::Followed).map_err(named)?;
    if place.dangling {
        return Err(named(Failure(format!(
            "{}: does not exist{}",
            process.cwd,
            place.why()
        ))));
    }
    let made = root.open_or_make(&process.cwd, Missing::Directory);
    made.map(drop).map_err(named)
}

/// Who hears of a program that the kernel refuses to execute.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The agent: the start of an exec fails.
    ToldAgent,
    /// Whoever reads the output: an init process has been started by then, as with runc, and ends with this in
    /// its log.
    ToldOutput,
}

/// The exit status of an init process whose program cannot be executed, as with runc.
const NOT_EXECUTED: i32 = 255;

/// The last part, in the container: checks that the program can be found, waits for the word, and
/// becomes the program. Returns only on failure (or, quietly, when the agent is gone).
pub fn become_program(
    agent: &Agent,
    process: &Process,
    profile: Option<&Seccomp>,
    refused: Refused,
) -> Result<()> {
    let environment = lookup::environment(process);
    let sets = caps::Sets::resolve(agent, process.capabilities.as_ref());
    let filter = profile
        .map(|profile| seccomp::compile(agent, profile))
        .transpose()?;
    let install = || filter.as_ref().map_or(Ok(()), Filter::install);
    sets.drop_bounding()?;
    // A directory that only the user may enter is entered later, one that only root may, now.
    let entered = enter_cwd(process).is_ok();
    set_user(&process.user)?;
    if !entered {
        enter_cwd(process)?;
    }
    check_cwd()?;
    let program = lookup::program(process, &environment)?;
    if !agent.wait_for_go() {
        return Ok(());
    }

    let mode = process.user.umask.unwrap_or(0o022);
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mode));
    reset_signals()?;
    let args = c_strings(process.args.iter().map(String::as_bytes))?;
    let env = c_strings(environment.iter().map(|v| v.as_bytes()))?;
    if process.no_new_privileges {
        sets.apply()?;
        rustix::thread::set_no_new_privs(true).during("process.noNewPrivileges")?;
        install()?;
    } else {
        // Without no_new_privs a filter needs CAP_SYS_ADMIN (seccomp(2)), which is given up after
        // it. So a profile must allow capset and prctl, as with other runtimes.
        caps::raise_effective()?;
        install()?;
        sets.apply()?;
    }
    let Err(error) = nix::unistd::execve(&program, &args, &env);
    let shown = OsStr::from_bytes(program.to_bytes()).display().to_string();
    let failure = lookup::exec_failure(&shown, &error_text(&error.into()));
    if refused == Refused::ToldAgent {
        return Err(Failure::from(failure));
    }
    // The container's own standard error by now. Nothing is told to the agent, to which the end of its socket
    // then means that the process was started.
    let line = format!("{}\n", failure.reason());
    let _ = io::stderr().write_all(line.as_bytes());
    std::process::exit(NOT_EXECUTED);
}

fn c_strings<'a>(strings: impl Iterator<Item = &'a [u8]>) -> Result<Vec<CString>> {
    strings
        .map(|s| {
            CString::new(s)
                .map_err(|_| Failure("an argument or variable contains a NUL byte".into()))
        })
        .collect()
}

fn enter_cwd(process: &Process) -> Result<()> {
    nix::unistd::chdir(process.cwd.as_str()).during(format_args!(
        "chdir to cwd ({:?}) set in config.json failed",
        process.cwd
    ))
}

/// The directory must lie in the container: an inherited descriptor behind a magic link could lead
/// out of it (CVE-2024-21626).
fn check_cwd() -> Result<()> {
    let inside = nix::unistd::getcwd().is_ok_and(|dir| dir.is_absolute());
    if inside {
        Ok(())
    } else {
        Err(Failure(
            "the working directory is outside the container".into(),
        ))
    }
}

fn set_user(user: &User) -> Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let groups: Vec<Gid> = user
        .additional_gids
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    setgroups(&groups).during("process.user.additionalGids")?;
    // Capabilities are settled afterwards, by the sets of the specification.
    nix::sys::prctl::set_keepcaps(true).during("keeping capabilities")?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    setresgid(gid, gid, gid).during("process.user.gid")?;
    setresuid(uid, uid, uid).during("process.user.uid")?;
    nix::sys::prctl::set_keepcaps(false).during("keeping capabilities")?;
    confirm_user(user)
}

/// Asks the kernel who this process is by now: that it took the numbers does not say that they hold.
fn confirm_user(user: &User) -> Result<()> {
    use nix::unistd::{getgroups, getresgid, getresuid};
    let uids = getresuid().during("process.user.uid")?;
    let gids = getresgid().during("process.user.gid")?;
    let mut groups: Vec<u32> = getgroups()
        .during("process.user.additionalGids")?
        .into_iter()
        .map(nix::unistd::Gid::as_raw)
        .collect();
    let mut wanted = user.additional_gids.clone();
    // The kernel keeps them in an order of its own.
    groups.sort_unstable();
    wanted.sort_unstable();
    let is = |id: u32, held: [u32; 3]| held.iter().all(|one| *one == id);
    let holds = [
        (
            "uid",
            is(
                user.uid,
                [uids.real, uids.effective, uids.saved].map(nix::unistd::Uid::as_raw),
            ),
        ),
        (
            "gid",
            is(
                user.gid,
                [gids.real, gids.effective, gids.saved].map(nix::unistd::Gid::as_raw),
            ),
        ),
        ("additionalGids", groups == wanted),
    ];
    match holds.iter().find(|(_, holds)| !holds) {
        Some((field, _)) => Err(Failure(format!(
            "process.user.{field} does not hold: the kernel has left the process what it was"
        ))),
        None => Ok(()),
    }
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return None,
    })
}

/// Whether there is a limit of this name.
pub fn is_resource(name: &str) -> bool {
    resource(name).is_some()
}

/// Before a user namespace is entered: raising a limit takes the guest's CAP_SYS_RESOURCE. What the process does not name is as `others` say.
pub fn set_rlimits(others: &[Rlimit], process: &Process) -> Result<()> {
    let value = |n: u64| (n != u64::MAX).then_some(n);
    let is_named = |other: &&Rlimit| process.rlimits.iter().any(|own| own.kind == other.kind);
    let others = others.iter().filter(|other| !is_named(other));
    for limit in others.chain(&process.rlimits) {
        let Some(resource) = resource(&limit.kind) else {
            continue;
        };
        let pair = rustix::process::Rlimit {
            current: value(limit.soft),
            maximum: value(limit.hard),
        };
        setrlimit(resource, pair).during(format_args!("process.rlimits {}", limit.kind))?;
    }
    Ok(())
}

/// Programs start with default dispositions and nothing blocked.
fn reset_signals() -> Result<()> {
    for signal in 1..=64 {
        if matches!(signal, libc::SIGKILL | libc::SIGSTOP | 32 | 33) {
            continue;
        }
        // SAFETY: SIG_DFL installs no handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    nix::sys::signal::SigSet::empty()
        .thread_set_mask()
        .during("signal mask")
}

impl From<lookup::NotFound> for Failure {
    fn from(error: lookup::NotFound) -> Self {
        Self(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(value: serde_json::Value) -> Process {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_process_that_cannot_run_is_refused_by_field() {
        for (value, field) in [
            (serde_json::json!({"cwd": "/"}), "args"),
            (serde_json::json!({"args": ["x"], "cwd": "rel"}), "cwd"),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}),
                "RLIMIT_X",
            ),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "user": {"username": "u"}}),
                "username",
            ),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "user": {"uid": u32::MAX}}),
                "process.user.uid",
            ),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "user": {"gid": u32::MAX}}),
                "process.user.gid",
            ),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "user": {"additionalGids": [1, u32::MAX]}}),
                "process.user.additionalGids[1]",
            ),
            (
                serde_json::json!({"args": ["x", "a\u{0}b"], "cwd": "/"}),
                "args",
            ),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "env": ["A=b", "FOO"]}),
                "process.env[1] has no \"=\"",
            ),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "env": ["=b"]}),
                "process.env[0] has no name",
            ),
            (
                serde_json::json!({"args": ["x"], "cwd": "/", "env": ["A=b\u{0}"]}),
                "process.env[0] (\"A\") contains a NUL",
            ),
        ] {
            assert!(check(&process(value)).unwrap_err().contains(field));
        }
        assert!(check(&process(serde_json::json!({"args": ["x"], "cwd": "/"}))).is_ok());
    }

    /// Whether a child of this process could become that user.
    fn becomes(user: &User) -> bool {
        use nix::{
            sys::wait::{WaitStatus, waitpid},
            unistd::{ForkResult, fork},
        };
        // SAFETY: the child makes only system calls and small allocations until it ends.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let code = i32::from(set_user(user).is_err());
                // SAFETY: _exit ends the child at once, without what the test's process would do.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                matches!(waitpid(child, None), Ok(WaitStatus::Exited(_, 0)))
            }
        }
    }

    #[test]
    fn who_would_stay_root_does_not_go_on() {
        if !brig_fixtures::needs::root() {
            return;
        }
        let user = |uid, gid, groups: &[u32]| User {
            uid,
            gid,
            additional_gids: groups.to_vec(),
            ..User::default()
        };
        assert!(becomes(&user(33, 34, &[7, 5, 5])));
        assert!(becomes(&user(0, 0, &[])));
        assert!(!becomes(&user(u32::MAX, 34, &[])));
        assert!(!becomes(&user(33, u32::MAX, &[])));
    }
}
