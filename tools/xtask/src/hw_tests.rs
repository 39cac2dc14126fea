//! `cargo xtask hw-tests`: the suites on every device, from the embedded controller to a real drive.
//!
//! Owns: what each tier needs from Debian, building the programs under test and the programs that test them, and the step's name.
//!
//! Invariants: a tier that cannot run is reported by `hw-tests` as skipped, with what to install; an installation that fails does not hide
//! the tiers that need none. The programs under test are release builds, those that test them are not.
//!
//! Excludes: running and counting cases (the program `hw-tests`).

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, ValueEnum};

use crate::packages;
use crate::steps::Steps;
use crate::test::target_folder;

/// What the suites run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// The embedded controller, in memory, on a file, and behind a vfio-user socket
    Emu,
    /// QEMU's controller without a guest
    Qtest,
    /// A guest under QEMU, with VFIO and an IOMMU
    Guest,
    /// All of them
    All,
}

impl Tier {
    fn name(self) -> &'static str {
        match self {
            Tier::Emu => "emu",
            Tier::Qtest => "qtest",
            Tier::Guest => "guest",
            Tier::All => "all",
        }
    }

    /// Programs that the tier runs. The guest's kernel is fetched and unpacked by the tier itself, and not installed.
    fn programs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Tier::Emu => &[],
            Tier::Qtest => &[("qemu-system-x86_64", "qemu-system-x86")],
            Tier::Guest | Tier::All => &[
                ("qemu-system-x86_64", "qemu-system-x86"),
                ("busybox", "busybox-static"),
                ("dmsetup", "dmsetup"),
            ],
        }
    }
}

/// Which tiers and cases run.
#[derive(Args)]
#[command(after_help = "\
As root on Debian, what is missing is installed. A real drive needs --destroy-data and the marker of `pollux mkscratch`.

Example:
  cargo xtask hw-tests --tier emu
  cargo xtask hw-tests --device pci:0000:01:00.0 --destroy-data")]
pub(crate) struct HwTestsOptions {
    /// What the suites run on
    #[arg(long, value_enum, default_value = "all")]
    tier: Tier,

    /// Run the suite on this device instead
    #[arg(long, value_name = "SPEC")]
    device: Option<String>,

    /// Only cases whose SUITE/NAME contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,

    /// Allow the contents of the device to be lost
    #[arg(long)]
    destroy_data: bool,
}

impl Default for HwTestsOptions {
    fn default() -> Self {
        Self { tier: Tier::All, device: None, filter: None, destroy_data: false }
    }
}

/// Builds, installs and runs.
pub(crate) fn run(steps: &mut Steps, options: &HwTestsOptions) {
    let tools = ["build", "--quiet", "--locked", "--release", "--package", "pollux-tools", "--bins"];
    let tests = ["build", "--quiet", "--locked", "--package", "hw-tests", "--bins"];
    steps.cargo("hw-tests: programs under test", &tools);
    steps.cargo("hw-tests: programs that test", &tests);
    if options.device.is_none() {
        install(options.tier);
    }
    let target = target_folder(steps);
    let programs = match gather(&target) {
        Ok(programs) => programs,
        Err(reason) => return steps.fail("hw-tests", &reason),
    };
    let mut command = Command::new(programs.join("hw-tests"));
    command.current_dir(steps.root()).env("POLLUX_BIN_DIR", &programs);
    match &options.device {
        Some(device) => command.args(["--device", device]),
        None => command.args(["--tier", options.tier.name()]),
    };
    command.args(options.filter.iter().flat_map(|filter| ["--filter", filter]));
    command.args(options.destroy_data.then_some("--destroy-data"));
    steps.command("hw-tests", &mut command);
}

/// Installs what is missing, if it can; what that leaves out, the program reports.
pub(crate) fn install(tier: Tier) {
    let missing = packages::missing_of(tier.programs());
    if missing.is_empty() {
        return;
    }
    println!("\ninstalling {} for the hw-tests", missing.join(", "));
    if let Err(reason) = packages::install(&missing) {
        println!("{reason}");
    }
}

/// One directory with all programs: release builds of those under test, the others beside them.
fn gather(target: &Path) -> Result<PathBuf, String> {
    let directory = target.join("hw-tests");
    std::fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let under_test = ["pollux", "polluxd"].map(|name| target.join("release").join(name));
    let tests = ["hw-suite", "hw-tests", "hw-probe"].map(|name| target.join("debug").join(name));
    for program in under_test.iter().chain(&tests) {
        let Some(name) = program.file_name() else { continue };
        let link = directory.join(name);
        // Absent in a fresh tree.
        let _absent = std::fs::remove_file(&link);
        std::fs::hard_link(program, &link)
            .or_else(|_| std::fs::copy(program, &link).map(drop))
            .map_err(|error| format!("{}: {error}; it was not built", program.display()))?;
    }
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_both_builds_end_up_in_one_directory_and_a_missing_one_is_named() {
        let target = std::env::temp_dir().join(format!("xtask-gather-{}", std::process::id()));
        for (build, names) in [("release", &["pollux", "polluxd"][..]), ("debug", &["hw-suite", "hw-tests"])]
        {
            std::fs::create_dir_all(target.join(build)).unwrap();
            names.iter().for_each(|name| std::fs::write(target.join(build).join(name), build).unwrap());
        }
        assert!(gather(&target).unwrap_err().contains("hw-probe"));
        std::fs::write(target.join("debug/hw-probe"), "debug").unwrap();
        // Twice: the second time, the links are there.
        for _ in 0..2 {
            let directory = gather(&target).unwrap();
            assert_eq!(std::fs::read(directory.join("polluxd")).unwrap(), b"release");
            assert_eq!(std::fs::read(directory.join("hw-suite")).unwrap(), b"debug");
        }
        std::fs::remove_dir_all(&target).unwrap();
    }
}
