//! The generic suite, on a controller behind VFIO.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{DRIVE, SERIAL, in_one_boot};
use crate::guest::Guest;
use crate::guest::machine::program;
use crate::suite::{Environment, Verdict};

/// What the whole suite may take, under emulation on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

/// Why the suite cannot run, if it cannot.
pub(super) fn absent(environment: &Environment) -> Option<String> {
    program(environment, "hw-suite").err().map(|error| format!("{error:#}: `cargo build -p hw-tests --bins`"))
}

/// The suite on a plain controller.
pub(super) fn passes(environment: &Environment) -> Result<Verdict> {
    match absent(environment) {
        Some(reason) => Ok(Verdict::Skipped(reason)),
        None => in_one_boot(environment, &[&[("the_generic_suite", plain)]]),
    }
}

fn plain(guest: &mut Guest) -> Result<()> {
    guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}");
    run(guest, &device, SERIAL, &[""])?;
    guest.unbind(DRIVE)?;
    guest.quiet_kernel()
}

/// Marks the drive and runs the cases that have one of `parts` in their name.
pub(super) fn run(guest: &mut Guest, device: &str, serial: &str, parts: &[&str]) -> Result<()> {
    let suite = format!("POLLUX_BIN_DIR=/bin hw-suite --device {device}");
    // What a drive with data on it is spared.
    guest.refused(&format!("{suite} --destroy-data"), &["mkscratch"])?;
    guest.refused(&format!("pollux mkscratch --force --device {device} --serial not-{serial}"), &[serial])?;
    guest.refused(&format!("{suite} --destroy-data"), &["mkscratch"])?;
    guest.ok(&format!("pollux mkscratch --force --device {device} --serial {serial}"))?;
    guest.refused(&suite, &["--destroy-data"])?;
    for part in parts {
        let told = guest.ok_for(LIMIT, &format!("{suite} --destroy-data --filter '{part}'"))?;
        let last = told.lines().last().unwrap_or_default();
        let counts = last.strip_prefix("hw-suite: ").with_context(|| format!("no summary in:\n{told}"))?;
        let passed = counts.split(' ').next().and_then(|count| count.parse::<u32>().ok()).unwrap_or(0);
        ensure!(passed > 0 && counts.contains(" 0 failed"), "{told}");
    }
    guest.ok(&format!("pollux mkscratch --remove --device {device}"))?;
    Ok(())
}
