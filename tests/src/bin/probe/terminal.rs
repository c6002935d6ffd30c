//! What a process with a terminal sees: its size, changes of it, and Ctrl-C.

use std::io::{self, Write};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use serde_json::json;

nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);

/// Prints the terminal's facts, then each change of size; SIGINT ends it with 130.
pub fn watch() -> Result<u8> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGWINCH);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("cannot block signals")?;
    let is_terminal: Vec<bool> = (0..3)
        .map(|fd| {
            // SAFETY: isatty reads nothing but the descriptor's number.
            unsafe { libc::isatty(fd) == 1 }
        })
        .collect();
    let (rows, columns) = size();
    println!(
        "{}",
        json!({"isatty": is_terminal, "rows": rows, "columns": columns})
    );
    io::stdout().flush()?;
    loop {
        match signals.wait().context("cannot wait for signals")? {
            Signal::SIGWINCH => {
                let (rows, columns) = size();
                println!("{}", json!({"rows": rows, "columns": columns}));
                io::stdout().flush()?;
            }
            _ => {
                println!("interrupted");
                return Ok(130);
            }
        }
    }
}

fn size() -> (u16, u16) {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize, which outlives the call.
    let _ = unsafe { window_size(0, &raw mut size) };
    (size.ws_row, size.ws_col)
}
