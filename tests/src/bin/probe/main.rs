//! `brig-probe`: one static program that a container runs to say what it sees and to do, on request,
//! what a test needs done.
//!
//! Facts go to stdout as one JSON object; a failed action is one line on stderr and exit 2. It
//! trusts nothing and is trusted by nobody: the suite compares what it says with what was asked for.

mod actions;
mod commands;
mod commits;
mod facts;
mod files;
mod init;
mod memory;
mod operations;
mod privileges;
mod rates;
mod sequence;
mod terminal;
mod vsock;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "usage: brig-probe COMMAND
  facts                      everything below as one JSON object
  exit N                     exit with N
  echo TEXT [N]              print TEXT, exit with N
  die SIGNAL                 end by a signal
  sleep [SECONDS]            wait; SIGTERM ends it by its default action (exit 143 as PID 1)
  trap SIGNAL N              print 'ready', wait for the signal, print it, exit with N
  await-trap SIGNAL          return once PID 1 traps it
  flood BYTES [stderr]       write the pattern and exit at once
  sum | cat                  checksum or copy stdin
  tty                        terminal facts, then each SIGWINCH; SIGINT exits 130
  spawn-background N         leave N sleeping children and wait
  fork-bomb N                children that could be made, of N
  eat MIB                    allocate and touch that much
  huge PATH PAGES            make a file of huge pages and touch them
  touch-free MIB             touch; at a line on stdin free; at the next exit
  burn MILLISECONDS          CPU time got in that wall time
  longest-gap                until SIGTERM; the longest time it did not run
  random                     a random number, boot id
  write-fsync PATH BYTES     write the pattern, fsync, print its checksum, wait
  read PATH | write PATH TEXT | stat PATH | list PATH
  operations SEED N PATH     N file operations drawn from SEED in a new directory, with what came of each
  commits PATH               commit and print numbers until killed; check what is there first
  commits-check PATH N       how many commits there are, at least N
  commands                   run each line of stdin, a JSON list, and answer by a line
  metadata STEP PATH N       create, stat, readdir or unlink N files, and the time that took
  echo-bytes PORT            give back what comes, byte by byte
  ping IP:PORT N             a byte to and fro N times, and the time that took
  many STEP PATH N           make, write, stat, remove or list N files
  file-facts PATH            ACLs, dots, unnamed files, flags in a new directory there
  watch PATH NAME            print 'ready', then changes of the directory until NAME is renamed in it
  dial PATH                  connect to a Unix socket, send a line, print the answer
  privileges PATH            facts as seen by the program at PATH (setuid, setcap)
  vsock-dial CID:PORT...     try to connect to each
  serve PORT TEXT            answer each TCP connection with TEXT
  serve-udp PORT TEXT        answer each datagram with TEXT, IPv4 and IPv6
  connect IP:PORT            dial TCP, send a line, print the answer
  sequence-numbers           the first ones of three TCP connections to itself
  sysrq LETTER               write to /proc/sysrq-trigger";

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("brig-probe: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<u8> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    if std::env::args().next().as_deref() == Some("/init") {
        // Booted in the place of the agent, which it does not answer for.
        return init::run();
    }
    match words.as_slice() {
        ["facts"] => print(&facts::all()),
        ["exit", code] => Ok(number(code)?),
        ["echo", text] => {
            println!("{text}");
            Ok(0)
        }
        ["echo", text, code] => {
            println!("{text}");
            Ok(number(code)?)
        }
        ["die", signal] => actions::die(signal),
        ["sleep"] => actions::sleep(None),
        ["sleep", seconds] => actions::sleep(Some(number(seconds)?)),
        ["trap", signal, code] => actions::trap(signal, number(code)?),
        ["await-trap", signal] => actions::await_trap(signal),
        ["flood", bytes] => actions::flood(number(bytes)?, false),
        ["flood", bytes, "stderr"] => actions::flood(number(bytes)?, true),
        ["sum"] => print(&actions::sum()?),
        ["cat"] => actions::cat(),
        ["tty"] => terminal::watch(),
        ["spawn-background", count] => actions::spawn_background(number(count)?),
        ["fork-bomb", count] => print(&actions::fork_bomb(number(count)?)),
        ["eat", mib] => memory::eat(number(mib)?),
        ["huge", path, pages] => memory::huge(path, number(pages)?),
        ["touch-free", mib] => memory::touch_free(number(mib)?),
        ["burn", millis] => print(&actions::burn(number(millis)?)?),
        ["longest-gap"] => actions::longest_gap(),
        ["random"] => print(&facts::random()?),
        ["write-fsync", path, bytes] => files::write_fsync(path, number(bytes)?),
        ["read", path] => files::read(path),
        ["write", path, text] => files::write(path, text),
        ["stat", path] => print(&files::stat(path)?),
        ["list", path] => print(&files::list(path)?),
        ["operations", seed, count, path] => operations::run(number(seed)?, number(count)?, path),
        ["commits", path] => commits::run(path),
        ["commits-check", path, said] => {
            println!("{}", commits::check(path, number(said)?)?);
            Ok(0)
        }
        ["commands"] => commands::serve(std::io::stdin(), std::io::stdout()),
        ["metadata", step, path, count] => print(&rates::metadata(step, path, number(count)?)?),
        ["echo-bytes", port] => rates::echo_bytes(number(port)?),
        ["ping", target, rounds] => print(&rates::ping(target, number(rounds)?)?),
        ["many", step, path, count] => files::many(step, path, number(count)?),
        ["file-facts", path] => print(&operations::facts::all(path)?),
        ["watch", path, name] => files::watch(path, name),
        ["dial", path] => files::connect(path),
        ["privileges", path] => privileges::exec_facts(path),
        ["vsock-dial", targets @ ..] => print(&vsock::dial_all(targets)),
        ["serve", port, text] => actions::serve(number(port)?, text),
        ["serve-udp", port, text] => actions::serve_udp(number(port)?, text),
        ["connect", target] => actions::connect(target),
        ["sequence-numbers"] => print(&sequence::numbers()?),
        ["sysrq", letter] => files::write("/proc/sysrq-trigger", letter),
        [] => {
            println!("{USAGE}");
            Ok(0)
        }
        _ => bail!("unknown command {words:?}\n{USAGE}"),
    }
}

fn print(value: &serde_json::Value) -> Result<u8> {
    println!("{value}");
    Ok(0)
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse()
        .with_context(|| format!("'{text}' is not a number in range"))
}
