//! `pollux scrub`: verifies every checksum of a mounted volume while it is in use.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Daemon, print_json};
use crate::control::client::ask_and_watch;
use crate::control::protocol::{Command, Progress};
use crate::failure::{Exit, Failure};
use crate::output::outln;
use crate::quantity::show_size;

/// Bytes of a block.
pub(super) const BLOCK: u64 = 4096;

/// Where there is no terminal, a line this often.
const LINE_PERIOD: Duration = Duration::from_secs(10);

/// Verify every checksum of a mounted volume: tree nodes and data
#[derive(Args)]
#[command(after_help = "\
The volume stays in use; Ctrl-C ends the scrub. Superblocks and bitmaps are verified by every mount, what items say of
each other by `pollux fsck`.

Exit codes: 0 nothing wrong, 3 damage found, 1 could not run

Example:
  pollux scrub ./pollux-mnt")]
pub(super) struct Scrub {
    #[command(flatten)]
    daemon: Daemon,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Scrub {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let mut shown = Shown::new("verified");
        let started = Instant::now();
        let socket = self.daemon.socket()?;
        let result = ask_and_watch(&socket, Command::Scrub, &mut |progress| shown.update(progress));
        shown.bar.finish_and_clear();
        let result = result?;
        let damage: Vec<&str> =
            result["damage"].as_array().into_iter().flatten().filter_map(|one| one.as_str()).collect();
        if self.json {
            print_json(&result)?;
        } else {
            damage.iter().for_each(|one| outln!("damage: {one}"));
            let bytes = result["blocks"].as_u64().unwrap_or(0).saturating_mul(BLOCK);
            outln!("{} verified in {:.1} s", show_size(bytes), started.elapsed().as_secs_f64());
        }
        if damage.is_empty() {
            return Ok(());
        }
        Err(Failure::new(format!("{} blocks are damaged", damage.len()))
            .remedy("restore the files named from a copy: find MOUNT -inum N tells their names")
            .exit(Exit::DamageFound))
    }
}

/// Progress on standard error: a bar on a terminal, a line now and then elsewhere.
pub(super) struct Shown {
    pub(super) bar: ProgressBar,
    /// What happens to bytes.
    word: &'static str,
    terminal: bool,
    last: Instant,
}

impl Shown {
    pub(super) fn new(word: &'static str) -> Self {
        let style = ProgressStyle::with_template(
            "{bar:40} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        );
        let bar = ProgressBar::new(0);
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self { bar, word, terminal: std::io::stderr().is_terminal(), last: Instant::now() }
    }

    pub(super) fn update(&mut self, progress: Progress) {
        let (done, total) = (progress.done.saturating_mul(BLOCK), progress.total.saturating_mul(BLOCK));
        if self.terminal {
            self.bar.set_length(total);
            self.bar.set_position(done);
        } else if self.last.elapsed() >= LINE_PERIOD {
            self.last = Instant::now();
            eprintln!("{} of {} {}", show_size(done), show_size(total), self.word);
        }
    }
}
