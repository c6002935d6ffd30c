//! Finding the program and the home directory, in the container, with the words users know from
//! other runtimes.
use std::{
    collections::HashSet,
    ffi::{CString, OsString},
    fmt,
    fs::File,
    io::Read as _,
    os::unix::{ffi::OsStringExt as _, fs::OpenOptionsExt as _},
};

use nix::{
    errno::Errno,
    sys::stat::{FileStat, SFlag, fstat, stat},
    unistd::{AccessFlags, access},
};

use crate::spec::Process;

/// Longest /etc/passwd that is read.
const MAX_PASSWD: u64 = 1 << 20;
/// What a shell would search without PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that cannot be executed.
#[derive(Debug)]
pub struct NotFound(String);

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unable to start container process: {}", self.0)
    }
}

impl NotFound {
    /// What is wrong, without whose start it is that fails.
    pub fn reason(&self) -> &str {
        &self.0
    }
}

/// The failure of execve itself.
pub fn exec_failure(program: &str, reason: &str) -> NotFound {
    NotFound(format!("exec {program}: {reason}"))
}

/// The environment: of several entries of one name the last, with HOME from the container's passwd file if there
/// is none. containerd writes what the image has and what the pod has one after the other, and most programs that
/// find both read the first.
pub fn environment(process: &Process) -> Vec<String> {
    let mut env = last_of_each(&process.env);
    if !env
        .iter()
        .any(|v| v.strip_prefix("HOME=").is_some_and(|home| !home.is_empty()))
    {
        env.retain(|v| !v.starts_with("HOME="));
        let home = open_passwd("/etc/passwd").and_then(|f| {
            let mut passwd = Vec::new();
            f.take(MAX_PASSWD).read_to_end(&mut passwd).ok()?;
            home_of(&passwd, process.user.uid)
        });
        env.push(format!("HOME={}", home.unwrap_or_else(|| "/".into())));
    }
    env
}

fn last_of_each(env: &[String]) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut kept: Vec<String> = env
        .iter()
        .rev()
        .filter(|entry| seen.insert(entry.split('=').next()))
        .cloned()
        .collect();
    kept.reverse();
    kept
}

/// The image may have anything there: a FIFO would hold the helper up, and a device is better not opened.
fn open_passwd(path: &str) -> Option<File> {
    // The library's own metadata have the time of birth, which no file system on the share has in its cache: a request each time.
    let is_file = |found: FileStat| file_type(&found) == SFlag::S_IFREG;
    if !stat(path).is_ok_and(is_file) {
        return None;
    }
    // Another process of the container may have put something else there meanwhile.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path);
    file.ok().filter(|file| fstat(file).is_ok_and(is_file))
}

fn file_type(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT
}

/// The home of the first line of this user, as it is there. The file is the image's: its lines are bytes in no
/// particular encoding.
fn home_of(passwd: &[u8], uid: u32) -> Option<String> {
    let mut lines = passwd.split(|byte| *byte == b'\n');
    let home = lines.find_map(|line| {
        let mut fields = line.trim_ascii().split(|byte| *byte == b':');
        let same = str::from_utf8(fields.nth(2)?).ok()?.parse() == Ok(uid);
        let home = fields.nth(2)?;
        same.then_some(home)
    })?;
    // An empty one counts as none, as in the environment.
    let home = str::from_utf8(home).ok()?;
    (!home.is_empty()).then(|| home.to_owned())
}

/// The path of `args[0]`, searched in PATH of the process's own environment.
pub fn program(process: &Process, env: &[String]) -> Result<CString, NotFound> {
    let name = process.args.first().map_or("", String::as_str);
    let bad = |why: &str| NotFound(format!("exec: {name:?}: {why}"));
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => c_path(name).ok_or_else(|| bad("invalid name")),
            Err(Errno::ENOENT) => Err(bad(&format!("stat {name}: no such file or directory"))),
            Err(Errno::EISDIR) => Err(bad("is a directory")),
            Err(error) => Err(bad(&error.desc().to_lowercase())),
        };
    }
    let path = env
        .iter()
        .find_map(|v| v.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let mut denied = false;
    for dir in path.split(':').filter(|_| !name.is_empty()) {
        let candidate = format!("{}/{name}", if dir.is_empty() { "." } else { dir });
        match executable(&candidate) {
            Ok(()) => return c_path(&candidate).ok_or_else(|| bad("invalid name")),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    Err(bad(if denied {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    }))
}

fn c_path(path: &str) -> Option<CString> {
    CString::new(OsString::from(path).into_vec()).ok()
}

fn executable(path: &str) -> Result<(), Errno> {
    if file_type(&stat(path)?) == SFlag::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    access(path, AccessFlags::X_OK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(args: &[&str], path: &str) -> String {
        let process = Process {
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            ..Process::default()
        };
        program(&process, &[format!("PATH={path}")])
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_cannot_be_executed_reads_as_with_runc() {
        let prefix = "unable to start container process: exec: ";
        assert_eq!(
            message(&["nope"], "/bin"),
            format!("{prefix}\"nope\": executable file not found in $PATH")
        );
        assert_eq!(
            message(&["/no/pe"], ""),
            format!("{prefix}\"/no/pe\": stat /no/pe: no such file or directory")
        );
        assert_eq!(
            message(&["/etc"], ""),
            format!("{prefix}\"/etc\": is a directory")
        );
        assert_eq!(
            message(&["/etc/passwd"], ""),
            format!("{prefix}\"/etc/passwd\": permission denied")
        );
    }

    #[test]
    fn the_path_of_the_process_is_searched() {
        let process = Process {
            args: vec!["sh".into()],
            ..Process::default()
        };
        let found = program(&process, &["PATH=/nope:/bin".into()]).unwrap();
        assert_eq!(found.to_str(), Ok("/bin/sh"));
    }

    #[test]
    fn home_comes_from_passwd_by_uid() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbad\nweb:x:33:33::/var/www:/bin/false\n\
            rel:x:7:7::rel:/\nnone:x:8:8:::/\n web:x:33:33::/second:\n";
        assert_eq!(home_of(passwd, 33).as_deref(), Some("/var/www"));
        assert_eq!(home_of(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_of(passwd, 7).as_deref(), Some("rel"));
        assert_eq!(home_of(passwd, 8), None);
        assert_eq!(home_of(passwd, 5), None);
    }

    #[test]
    fn a_line_that_is_not_utf8_hides_no_user_behind_it() {
        let passwd = b"x:x:5:5:Jos\xe9:/x:\nweb:x:33:33::/var/www:\n";
        assert_eq!(home_of(passwd, 5).as_deref(), Some("/x"));
        assert_eq!(home_of(passwd, 33).as_deref(), Some("/var/www"));
    }

    #[test]
    fn of_several_entries_of_one_name_the_last_counts() {
        let of = |env: &[&str]| {
            environment(&Process {
                env: env.iter().map(|entry| (*entry).to_owned()).collect(),
                ..Process::default()
            })
        };
        assert_eq!(
            of(&["HOME=/h", "A=1", "B=2", "A=3"]),
            ["HOME=/h", "B=2", "A=3"]
        );
        assert_eq!(of(&["A=1", "HOME=/h", "A="]), ["HOME=/h", "A="]);
        // A name is not its beginning.
        assert_eq!(of(&["HOME=/h", "A=1", "AB=2"]), ["HOME=/h", "A=1", "AB=2"]);
        assert!(!of(&["HOME=/x", "HOME="]).contains(&"HOME=/x".to_owned()));
        let process = Process {
            args: vec!["sh".into()],
            ..Process::default()
        };
        assert!(program(&process, &of(&["PATH=/bin", "PATH=/nope"])).is_err());
        assert!(program(&process, &of(&["PATH=/nope", "PATH=/bin"])).is_ok());
    }

    #[test]
    fn a_passwd_that_is_no_file_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("passwd");
        let path = path.to_str().unwrap();
        assert!(open_passwd(path).is_none());
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open_passwd(path).is_none());
        assert!(open_passwd("/dev/zero").is_none());
        assert!(open_passwd("/etc").is_none());
        assert!(open_passwd("/etc/passwd").is_some());
    }

    #[test]
    fn an_empty_home_counts_as_absent() {
        let process = Process {
            env: vec!["HOME=".into(), "A=b".into()],
            ..Process::default()
        };
        let env = environment(&process);
        assert_eq!(env.iter().filter(|v| v.starts_with("HOME=")).count(), 1);
        assert!(env.iter().all(|v| v != "HOME="));
    }

    proptest! {
        #[test]
        fn a_hostile_passwd_never_panics(text in "(?s).{0,200}", uid: u32) {
            let _ = home_of(text.as_bytes(), uid);
        }
    }
}
