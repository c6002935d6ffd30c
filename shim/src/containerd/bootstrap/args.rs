//! The command line, as Go's `flag` package would read it, because containerd writes it for that.
//!
//! One or two dashes, `-flag value` or `-flag=value`, boolean flags without a value; the first word
//! that is no flag ends the flags and is the action.

use std::path::PathBuf;

/// What containerd wants of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// No action: serve the Task API.
    #[default]
    Serve,
    /// Start a server and print its address.
    Start,
    /// Clean up after a dead server and print a DeleteResponse.
    Delete,
    /// `-info`: print RuntimeInfo.
    Info,
    /// `-v`: print the version.
    Version,
}

/// The parsed command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args {
    /// The action.
    pub action: Action,
    /// containerd namespace.
    pub namespace: String,
    /// Container id.
    pub id: String,
    /// containerd's gRPC socket path.
    pub address: String,
    /// containerd's binary, for publishing by a process; unused, as events go over ttrpc.
    pub publish_binary: String,
    /// Bundle directory.
    pub bundle: PathBuf,
    /// The server's socket; set by `start` for its server.
    pub socket: String,
    /// Debug output.
    pub debug: bool,
}

/// A command line that cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgsError {
    /// A flag nobody knows.
    #[error("flag provided but not defined: -{0}")]
    UnknownFlag(String),
    /// A flag without its value.
    #[error("flag needs an argument: -{0}")]
    MissingValue(String),
    /// A boolean flag with a value that is none.
    #[error("invalid boolean value for -{0}")]
    NotBoolean(String),
    /// An action nobody knows.
    #[error("unknown action {0:?}; actions are start and delete")]
    UnknownAction(String),
    /// Something the action needs is missing.
    #[error("-{0} is required")]
    Required(&'static str),
}

/// Parses the arguments that follow the program's name.
///
/// # Errors
/// [`ArgsError`] names the flag.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Args, ArgsError> {
    let mut args = Args::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            args.action = match word.as_str() {
                "start" => Action::Start,
                "delete" => Action::Delete,
                _ => return Err(ArgsError::UnknownAction(word)),
            };
            break;
        };
        if flag.is_empty() {
            break;
        }
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        if matches!(name, "debug" | "info" | "v" | "version") {
            let on = match value.as_deref() {
                None | Some("true" | "1" | "t" | "T" | "TRUE" | "True") => true,
                Some("false" | "0" | "f" | "F" | "FALSE" | "False") => false,
                Some(_) => return Err(ArgsError::NotBoolean(name.to_owned())),
            };
            match name {
                "debug" => args.debug = on,
                "info" if on => args.action = Action::Info,
                _ if on => args.action = Action::Version,
                _ => {}
            }
            continue;
        }
        let known = [
            "namespace",
            "id",
            "address",
            "publish-binary",
            "bundle",
            "socket",
        ];
        if !known.contains(&name) {
            return Err(ArgsError::UnknownFlag(name.to_owned()));
        }
        let value = value
            .or_else(|| words.next())
            .ok_or_else(|| ArgsError::MissingValue(name.to_owned()))?;
        match name {
            "namespace" => args.namespace = value,
            "id" => args.id = value,
            "address" => args.address = value,
            "publish-binary" => args.publish_binary = value,
            "bundle" => args.bundle = value.into(),
            _ => args.socket = value,
        }
    }
    if matches!(args.action, Action::Serve | Action::Start | Action::Delete) {
        for (name, value) in [("namespace", &args.namespace), ("id", &args.id)] {
            if value.is_empty() {
                return Err(ArgsError::Required(name));
            }
        }
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Result<Args, ArgsError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn containerds_start_line_is_understood() {
        let args = words(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!(
            (args.namespace.as_str(), args.id.as_str()),
            ("k8s.io", "c1")
        );
        assert_eq!(args.address, "/run/containerd/containerd.sock");
        assert!(args.debug);
    }

    #[test]
    fn one_or_two_dashes_and_an_equals_sign_are_the_same() {
        let a = words("-namespace n -id=c --bundle=/b -debug=false delete").unwrap();
        let b = words("--namespace=n --id c -bundle /b delete").unwrap();
        assert_eq!(a, b);
        assert_eq!(a.action, Action::Delete);
    }

    #[test]
    fn info_and_version_need_nothing_else() {
        assert_eq!(words("-info").unwrap().action, Action::Info);
        assert_eq!(words("-v").unwrap().action, Action::Version);
        assert_eq!(words("--version").unwrap().action, Action::Version);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, expected) in [
            ("-nope x start", ArgsError::UnknownFlag("nope".into())),
            ("-namespace", ArgsError::MissingValue("namespace".into())),
            ("-debug=maybe", ArgsError::NotBoolean("debug".into())),
            (
                "-namespace n -id c stop",
                ArgsError::UnknownAction("stop".into()),
            ),
            ("-namespace n start", ArgsError::Required("id")),
        ] {
            assert_eq!(words(line).unwrap_err(), expected, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_words_are_parsed_or_refused(words in proptest::collection::vec(".*", 0..8)) {
            let _ = parse(words);
        }
    }
}
