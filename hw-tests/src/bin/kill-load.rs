//! `kill-load LOAD DIRECTORY JOURNAL SEED`: a load on a mount, until the daemon behind it is gone.
//!
//! Owns: its command line. Invariant: it goes into the directory first, so it never touches what is below the mount.
//! Excludes: the loads (`hw_tests::kill`).

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use hw_tests::kill::{Journal, names, pages};

fn main() -> ExitCode {
    let error = run().expect_err("a load ends with an error only");
    eprintln!("kill-load: {error:#}");
    ExitCode::FAILURE
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [load, directory, journal, seed] = &arguments[..] else {
        bail!("usage: kill-load postgres|names DIRECTORY JOURNAL SEED")
    };
    let seed = seed.parse().with_context(|| format!("seed {seed}"))?;
    let journal = Journal::create(journal.as_ref())?;
    std::env::set_current_dir(directory).with_context(|| directory.clone())?;
    match load.as_str() {
        "postgres" => pages::run(&journal, seed),
        "names" => names::run(&journal, seed),
        _ => bail!("no load {load}: there are postgres and names"),
    }
}
