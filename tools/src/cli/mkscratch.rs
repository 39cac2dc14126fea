//! `pollux mkscratch`: a drive is marked as free for destructive tests, or no longer so.
//!
//! Owns: the question. Invariant: nothing is written unless the serial number of the very drive was given, on the command line or,
//! if standard input is a terminal, there.
//!
//! Excludes: the marker ([`crate::scratch`]).

use std::io::{self, BufRead, IsTerminal, Write};

use clap::Args;
use fs_core::mkfs::Occupant;

use crate::device::{self, DeviceSpec};
use crate::failure::{During, Failure};
use crate::output::outln;
use crate::quantity::{show_size, show_utc};
use crate::scratch::{self, Marker, Survey};

/// Mark a drive as free for destructive tests: everything on it may be lost from then on
#[derive(Args)]
#[command(after_help = "\
Shows what the drive is and holds, and asks for its serial number. Without a terminal nothing is asked: --serial S has to be that of the
drive. A drive that holds a file system, a partition table, a RAID or LVM member, swap space or a Pollux volume is refused without
--force, which wipes its signature. Otherwise only the marker is written: 4 KiB at 60 KiB, and 64 KiB before the end.

The marker stays through `pollux mkfs`. It is worth nothing on another drive, nor once something else than a Pollux volume is found
beside it. Tests that destroy data need --destroy-data as well.

Exit codes: 0 marked (or, with --remove, not marked any more), 1 refused or failed, 2 the command line makes no sense, or there is nobody to ask.

Example:
  pollux mkscratch --device pci:0000:01:00.0
  pollux mkscratch --device pci:0000:01:00.0 --serial S5H9NX0N123456
  pollux mkscratch --device pci:0000:01:00.0 --remove")]
pub(super) struct Mkscratch {
    /// The drive
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// Serial number of the drive, instead of the question
    #[arg(long, value_name = "S", conflicts_with = "remove")]
    serial: Option<String>,

    /// Mark a drive that holds something: that is lost
    #[arg(long, conflicts_with = "remove")]
    force: bool,

    /// Take the marker away
    #[arg(long)]
    remove: bool,
}

impl Mkscratch {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let survey = scratch::survey(&self.device)?;
        self.describe(&survey);
        if self.remove {
            return self.unmark();
        }
        self.check(&survey)?;
        let serial = match &self.serial {
            Some(serial) => serial.clone(),
            None => self.ask(&survey)?,
        };
        let own = survey.drive.serial();
        if serial.trim() != own {
            return Err(Failure::new(format!(
                "{}: its serial number is `{own}`, not `{}`",
                self.device,
                serial.trim()
            ))
            .remedy("nothing was written; make sure that it is the right drive"));
        }
        if let Some(Occupant::Foreign(what)) = &survey.holds {
            scratch::wipe_foreign(&self.device)?;
            outln!("wiped: {what}");
        }
        scratch::write(&self.device, &Marker::new(&survey.drive))?;
        outln!("marked: tests that are given --destroy-data may overwrite everything on it");
        outln!("to take that back: pollux mkscratch --remove --device {}", self.device);
        Ok(())
    }

    fn describe(&self, survey: &Survey) {
        let drive = &survey.drive;
        outln!("{}", self.device);
        outln!("  model      {}", drive.model());
        outln!("  serial     {}", drive.serial());
        outln!("  firmware   {}", drive.firmware);
        outln!("  namespace  {} of {}", drive.nsid, show_size(drive.bytes));
        match &survey.holds {
            Some(what) => outln!("  holds      {what}"),
            None => outln!("  holds      nothing known"),
        }
        match &survey.marker {
            Some(marker) if marker.fits(drive) => {
                outln!("  marked as a scratch drive on {}", show_utc(marker.marked_at()));
            }
            Some(marker) => {
                outln!("  has the scratch marker of another drive: {}, {}", marker.model(), marker.serial());
            }
            None => {}
        }
    }

    /// Whether the drive may be marked at all.
    fn check(&self, survey: &Survey) -> Result<(), Failure> {
        if survey.drive.serial().is_empty() {
            return Err(Failure::new(format!("{}: it has no serial number", self.device))
                .remedy("a drive that cannot be told from others is not marked"));
        }
        match &survey.holds {
            // One that tests have made, on a drive that is theirs.
            Some(_) if survey.permission(&self.device).is_ok() => Ok(()),
            Some(what) if !self.force => Err(Failure::new(format!("{} holds {what}", self.device))
                .remedy("nothing was written; if that may be lost: pollux mkscratch --force")),
            _ => Ok(()),
        }
    }

    fn ask(&self, survey: &Survey) -> Result<String, Failure> {
        if !io::stdin().is_terminal() {
            return Err(Failure::usage(format!("{}: there is no terminal to ask on", self.device))
                .remedy(format!("if it is the right drive: --serial '{}'", survey.drive.serial())));
        }
        eprint!("Everything on this drive may be lost. Its serial number, to mark it: ");
        io::stderr().flush().during("cannot ask")?;
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).during("cannot read the answer")?;
        Ok(line)
    }

    fn unmark(&self) -> Result<(), Failure> {
        if scratch::remove(&self.device)? {
            outln!("the marker is gone: it is no scratch drive any more");
        } else {
            outln!("there is no marker on it: nothing to remove");
        }
        Ok(())
    }
}
