//! `hw-suite`: the generic suite on one device.
//!
//! Owns: the command line, the permission to destroy data, the closing line. One line is printed for each case (see `report`).
//!
//! Exit codes: 0 none failed, 1 at least one failed, 2 it could not run.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use hw_tests::report::{Outcome, totals};
use hw_tests::runner::{Runner, die_with_parent, end_case};
use hw_tests::suite::{Case, DeviceKind, Subject, cases, keep_busy};
use pollux::scratch;

/// Run the cases that every NVMe device must pass, on one device
#[derive(Parser)]
#[command(after_help = "\
The programs `pollux` and `polluxd` are looked for in POLLUX_BIN_DIR, else beside this one.

A device that is not emu:mem loses its contents and needs --destroy-data; a drive on PCI also needs the marker of `pollux mkscratch`,
which is put back at the end.

Exit codes: 0 no case failed, 1 at least one failed, 2 it could not run.

Example:
  hw-suite --device emu:mem,size=256MiB
  hw-suite --device pci:0000:01:00.0 --destroy-data --filter io/")]
struct Arguments {
    /// The device under test
    #[arg(long, value_name = "SPEC")]
    device: Option<String>,

    /// Only cases whose SUITE/NAME contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,

    /// As --filter: both must fit (what a runner adds)
    #[arg(long, value_name = "TEXT", default_value = "", hide = true)]
    part: String,

    /// Print the names of the cases and run none
    #[arg(long)]
    list: bool,

    /// Allow the contents of the device to be lost
    #[arg(long)]
    destroy_data: bool,

    /// Seconds that a case may take
    #[arg(long, value_name = "S", default_value_t = 120)]
    deadline: u64,

    /// Run one case in this process (what the runner starts)
    #[arg(long, value_name = "SUITE/NAME", hide = true)]
    case: Option<String>,

    /// Keep the device busy until killed (what a case starts)
    #[arg(long, hide = true)]
    busy: bool,

    /// Directory for the case's files
    #[arg(long, value_name = "DIR", hide = true)]
    scratch: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(name) = &arguments.case {
        return end_case(run_here(&arguments, name));
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hw-suite: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run_here(arguments: &Arguments, name: &str) -> Result<hw_tests::suite::Verdict> {
    die_with_parent()?;
    let scratch = arguments.scratch.clone().context("--case needs --scratch")?;
    let subject = Subject::new(arguments.device()?, scratch)?;
    let case = cases().into_iter().find(|case| path(case) == name);
    (case.with_context(|| format!("there is no case {name}"))?.run)(&subject)
}

/// Whether no case failed.
fn run(arguments: &Arguments) -> Result<bool> {
    let chosen: Vec<Case> = cases().into_iter().filter(|case| arguments.chooses(&path(case))).collect();
    if arguments.list {
        chosen.iter().for_each(|case| println!("{}", path(case)));
        return Ok(true);
    }
    if arguments.busy {
        die_with_parent()?;
        return keep_busy(&Subject::new(arguments.device()?, std::env::temp_dir())?).map(|()| true);
    }
    let nothing = chosen.is_empty() && arguments.part.is_empty();
    ensure!(!nothing, "no case matches `{}`: --list names them", arguments.filter);
    let device = arguments.device()?;
    let marker = arguments.permission()?;
    // Before any other thread: it blocks signals.
    let mut runner = Runner::new(Duration::from_secs(arguments.deadline))?;
    let own = std::env::current_exe().context("finding this program")?;
    let mut lines = Vec::new();
    let mut outcome = Ok(());
    for case in &chosen {
        let mut command = Command::new(&own);
        command.args(["--device", device, "--case", &path(case)]);
        match runner.run(case.suite, case.name, command) {
            Ok(line) => {
                println!("{line}");
                lines.push(line);
            }
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    if let Some((spec, marker)) = marker {
        scratch::write(&spec, &marker)
            .map_err(|failure| anyhow::anyhow!("{failure}"))
            .context("putting the scratch marker back: run `pollux mkscratch` again")?;
    }
    outcome?;
    println!("hw-suite: {}", totals(&lines));
    Ok(lines.iter().all(|line| line.outcome != Outcome::Failed))
}

fn path(case: &Case) -> String {
    format!("{}/{}", case.suite, case.name)
}

impl Arguments {
    fn chooses(&self, name: &str) -> bool {
        name.contains(&self.filter) && name.contains(&self.part)
    }

    fn device(&self) -> Result<&str> {
        self.device.as_deref().context("which device? --device SPEC, for example emu:mem,size=256MiB")
    }

    /// Whether the device's contents may be lost; the marker of a drive, to be put back.
    fn permission(&self) -> Result<Option<(nvme::DeviceSpec, scratch::Marker)>> {
        let device = self.device()?;
        let kind = Subject::new(device, "")?.kind;
        if kind != DeviceKind::Memory && !self.destroy_data {
            bail!("{device} would lose its contents: give --destroy-data if they may be lost");
        }
        if kind != DeviceKind::Drive {
            return Ok(None);
        }
        let spec: nvme::DeviceSpec = device.parse()?;
        let marker = scratch::permit(&spec).map_err(|failure| anyhow::anyhow!("{failure}"))?;
        Ok(Some((spec, marker)))
    }
}
