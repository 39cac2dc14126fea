//! `cargo xtask planted`: does the net catch fish? Bugs are planted one at a time, and the tests that should notice have to.
//!
//! Owns: the [`Trial`]s that make up each [`Net`], the one build with the feature `planted` that all of them run from, and the
//! verdict. A bug is caught by the first trial that fails with it, or that takes far longer than it does without.
//!
//! Invariants:
//! - each trial in use passes without a bug first, from the same build: a net that catches everything catches nothing;
//! - some bugs of the driver are also planted under whole tiers of the hardware tests ([`tiers`]), each of which has to notice by itself;
//! - no trial was written for a planted bug, and those that plant bugs themselves are left out;
//! - a bug whose net cannot be built or run here counts as missed.
//!
//! Excludes: the bugs (crate `planted`) and the code with them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ::planted::{Bug, Net, VARIABLE};
use anyhow::{Context, bail};
use clap::Args;
use serde::Deserialize;

use crate::steps::{Steps, cargo};
use crate::{hw_tests, models};

/// What is planted.
#[derive(Args, Default)]
pub(crate) struct PlantedOptions {
    /// Print the bugs and stop
    #[arg(long)]
    list: bool,
    /// Only the bugs of these names
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
}

/// A test program and what it is told.
struct Trial {
    /// For messages.
    name: &'static str,
    build: Build,
    /// Package and target.
    program: (&'static str, &'static str),
    arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
}

/// Which build a program comes from.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Build {
    Tests,
    /// Tests, with `--cfg loom`.
    Models,
    /// The programs of the hardware tests, and those that they test.
    Programs,
}

impl Build {
    const ALL: [Self; 3] = [Self::Tests, Self::Models, Self::Programs];
}

/// Time that a trial is given with a bug: this much, and as many times what it takes without.
const PATIENCE: (Duration, u32) = (Duration::from_secs(30), 10);
/// Pause between two looks at a running trial.
const LOOK: Duration = Duration::from_millis(100);

const FAULTS: Trial = Trial {
    name: "fault table",
    build: Build::Tests,
    program: ("nvme", "faults"),
    arguments: &[],
    environment: &[],
};

const fn driver(name: &'static str, target: &'static str) -> Trial {
    Trial { name, program: ("nvme", target), ..FAULTS }
}

const fn campaign(name: &'static str, arguments: &'static [&'static str]) -> Trial {
    // As many seeds and pairs as the rarest of these bugs needs.
    let environment = &[("POLLUX_SEEDS", "4"), ("POLLUX_PAIRS", "24")];
    Trial { name, program: ("fs-core", "fs_core"), arguments, environment, ..FAULTS }
}

/// Many seeds, each of which takes no time: that relocation meets the one moment of a clone that counts is rare.
const fn clone_loop() -> Trial {
    let loops = campaign("clone loop", &["volume::tests::clone_loop"]);
    Trial { environment: &[("POLLUX_SEEDS", "100")], ..loops }
}

const fn of_models(name: &'static str, package: &'static str) -> Trial {
    let arguments = &["loom_", "--skip", "caught"];
    Trial { name, build: Build::Models, program: (package, package), arguments, ..FAULTS }
}

/// The trials of a net, those that take least first.
fn trials(net: Net) -> Vec<Trial> {
    match net {
        Net::Driver => vec![
            driver("embedded controller", "embedded"),
            driver("every command", "commands"),
            driver("vfio-user", "vfio_user"),
            FAULTS,
        ],
        Net::Filesystem => vec![
            campaign("crashes", &["volume::tests::crash"]),
            clone_loop(),
            campaign("simulation", &["volume::tests::simulate"]),
            campaign("faults", &["volume::tests::faults"]),
        ],
        Net::Readers => vec![campaign("reads during clones", &["volume::tests::clone::reads_of_the_source"])],
        Net::NvmeModels => vec![of_models("models of nvme", "nvme")],
        Net::ReactorModels => vec![of_models("models of reactor", "reactor")],
    }
}

/// A run of the hardware tests on a tier's devices.
const fn tier(name: &'static str, arguments: &'static [&'static str]) -> Trial {
    // A third of the images that an ordinary run looks at.
    let environment = &[("POLLUX_CUTS", "70")];
    Trial { name, build: Build::Programs, program: ("hw-tests", "hw-tests"), arguments, environment }
}

/// Runs of a tier, and the bugs that each has to notice.
fn tiers() -> Vec<(Trial, &'static [Bug])> {
    let completions = tier("tier qtest, completions", &["--tier", "qtest", "--filter", "qemu/a_completion"]);
    let cuts = tier("tier qtest, power cuts", &["--tier", "qtest", "--filter", "power-cut/"]);
    vec![
        (completions, &[Bug::PhaseUnchecked, Bug::CidUnchecked, Bug::QueueUnchecked]),
        (cuts, &[Bug::FlushDropped]),
    ]
}

/// Plants what was asked for.
pub(crate) fn run(steps: &mut Steps, options: &PlantedOptions) {
    if options.list {
        for bug in Bug::ALL {
            println!("{:<32}{}", bug.name(), bug.about().trim());
        }
        return;
    }
    let mut bugs = if options.only.is_empty() { Bug::ALL.to_vec() } else { Vec::new() };
    for name in &options.only {
        let Some(bug) = Bug::named(name) else {
            steps.fail("planted bugs", &format!("there is no bug `{name}`; --list shows them"));
            return;
        };
        bugs.push(bug);
    }
    steps.check("planted bugs", |root| {
        let mut missed = Vec::new();
        let verdict = plant(root, &bugs, &mut missed);
        println!("planted {}, caught {}", bugs.len(), bugs.len() - missed.len().min(bugs.len()));
        verdict.map(|()| missed)
    });
}

/// Everything, one bug after the other; what was not caught goes to `missed`.
fn plant(root: &Path, bugs: &[Bug], missed: &mut Vec<String>) -> anyhow::Result<()> {
    missed.extend(bugs.iter().map(|bug| format!("{} was not planted", bug.name())));
    let logs = root.join("target/planted");
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    let nets: Vec<Net> = [Net::Driver, Net::Filesystem, Net::Readers, Net::NvmeModels, Net::ReactorModels]
        .into_iter()
        .filter(|net| bugs.iter().any(|bug| bug.net() == *net))
        .collect();
    let tiers: Vec<(Trial, Vec<Bug>)> = tiers()
        .into_iter()
        .map(|(trial, of)| (trial, of.iter().copied().filter(|bug| bugs.contains(bug)).collect()))
        .filter(|(_, of): &(Trial, Vec<Bug>)| !of.is_empty())
        .collect();
    let of_nets: Vec<Trial> = nets.iter().flat_map(|net| trials(*net)).collect();
    let all: Vec<&Trial> = tiers.iter().map(|(trial, _)| trial).chain(&of_nets).collect();
    if !tiers.is_empty() {
        hw_tests::install(hw_tests::Tier::Qtest);
    }
    let mut programs = Programs::default();
    for build in Build::ALL {
        let mut packages: Vec<&str> =
            all.iter().filter(|trial| trial.build == build).map(|trial| trial.program.0).collect();
        packages.sort_unstable();
        packages.dedup();
        if !packages.is_empty() {
            programs.build(root, build, &packages)?;
        }
    }
    let mut ready = Vec::new();
    for net in nets {
        for trial in trials(net) {
            let log = logs.join(format!("unplanted-{}.log", trial.name.replace(' ', "-")));
            let program = programs.find(&trial)?;
            let Ended { passed, took, .. } = run_trial(root, &trial, program, None, None, &log)?;
            if !passed {
                bail!("{} fails without a bug: see {}", trial.name, log.display());
            }
            println!("{:<32}passes without a bug, {:.1} s", trial.name, took.as_secs_f32());
            ready.push((net, trial, program.to_path_buf(), took));
        }
    }
    missed.clear();
    for &bug in bugs {
        let mut caught = None;
        for (_, trial, program, usual) in ready.iter().filter(|(net, ..)| *net == bug.net()) {
            let log = logs.join(format!("{}-{}.log", bug.name(), trial.name.replace(' ', "-")));
            let limit = PATIENCE.0 + *usual * PATIENCE.1;
            let ended = run_trial(root, trial, program, Some(bug), Some(limit), &log)?;
            if !ended.passed {
                caught = Some((trial.name, ended));
                break;
            }
        }
        match caught {
            Some((by, ended)) => {
                let how = if ended.hung { "does not end" } else { "fails" };
                println!("{:<32}caught: {by} {how}, {:.1} s", bug.name(), ended.took.as_secs_f32());
            }
            None => {
                println!("{:<32}NOT CAUGHT", bug.name());
                missed.push(format!("{} is not caught: {}", bug.name(), bug.about().trim()));
            }
        }
    }
    for (trial, bugs) in &tiers {
        plant_under_tier(root, trial, bugs, programs.find(trial)?, missed)?;
    }
    Ok(())
}

/// Each of `bugs` has to make the tier fail, which passes without.
fn plant_under_tier(
    root: &Path,
    trial: &Trial,
    bugs: &[Bug],
    program: &Path,
    missed: &mut Vec<String>,
) -> anyhow::Result<()> {
    let log = |what: &str| {
        root.join("target/planted").join(format!("{what}-{}.log", trial.name.replace([' ', ','], "-")))
    };
    let usual = run_trial(root, trial, program, None, None, &log("unplanted"))?;
    if !usual.passed {
        bail!("{} fails without a bug, or cannot run: see {}", trial.name, log("unplanted").display());
    }
    println!("{:<32}passes without a bug, {:.1} s", trial.name, usual.took.as_secs_f32());
    for &bug in bugs {
        let limit = PATIENCE.0 + usual.took * PATIENCE.1;
        let ended = run_trial(root, trial, program, Some(bug), Some(limit), &log(bug.name()))?;
        if ended.passed {
            println!("{:<32}NOT CAUGHT by {}", bug.name(), trial.name);
            missed.push(format!("{} is not caught by {}", bug.name(), trial.name));
        } else {
            println!("{:<32}caught: {} fails, {:.1} s", bug.name(), trial.name, ended.took.as_secs_f32());
        }
    }
    Ok(())
}

/// The programs that were built, by build, package and target.
#[derive(Default)]
struct Programs(BTreeMap<(Build, String, String), PathBuf>);

/// What cargo says of one thing that it built.
#[derive(Deserialize)]
struct Artifact {
    package_id: String,
    target: Target,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

impl Programs {
    fn build(&mut self, root: &Path, build: Build, packages: &[&str]) -> anyhow::Result<()> {
        let mut command = cargo(root);
        command.args(["test", "--no-run", "--quiet", "--locked", "--message-format", "json"]);
        match build {
            Build::Tests => {
                command.args(["--lib", "--tests"]);
                for package in packages {
                    command.args(["--package", package, "--features", &format!("{package}/planted")]);
                }
            }
            Build::Models => models::choose(&mut command, root),
            Build::Programs => {
                command = cargo(root);
                // They replace the ordinary programs, as the next ordinary build does them.
                command.args(["build", "--quiet", "--locked", "--message-format", "json", "--bins"]);
                for package in packages.iter().copied().chain(["pollux-tools"]) {
                    command.args(["--package", package, "--features", &format!("{package}/planted")]);
                }
            }
        }
        let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
        anyhow::ensure!(output.status.success(), "the build with the feature `planted` fails");
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Ok(artifact) = serde_json::from_str::<Artifact>(line) else { continue };
            let wanted = artifact.profile.is_some_and(|it| it.test) || build == Build::Programs;
            if let Some(path) = artifact.executable.filter(|_| wanted) {
                let package = package_name(&artifact.package_id).to_owned();
                self.0.insert((build, package, artifact.target.name), path);
            }
        }
        Ok(())
    }

    fn find(&self, trial: &Trial) -> anyhow::Result<&Path> {
        let (package, target) = trial.program;
        let key = (trial.build, package.to_owned(), target.to_owned());
        let path = self.0.get(&key);
        path.map(PathBuf::as_path).with_context(|| format!("{package} has no program {target}"))
    }
}

/// The name in a package id such as `path+file:///home/p/nvme#0.1.0` or `path+file:///home/p/tools#pollux-tools@0.1.0`.
fn package_name(id: &str) -> &str {
    let (path, fragment) = id.rsplit_once('#').unwrap_or((id, ""));
    match fragment.split_once('@') {
        Some((name, _)) => name,
        None => path.rsplit('/').next().unwrap_or(path),
    }
}

/// How a trial ended.
struct Ended {
    passed: bool,
    /// It was ended, because it took too long.
    hung: bool,
    took: Duration,
}

fn run_trial(
    root: &Path,
    trial: &Trial,
    program: &Path,
    bug: Option<Bug>,
    limit: Option<Duration>,
    log: &Path,
) -> anyhow::Result<Ended> {
    let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let mut command = Command::new(program);
    // As cargo does: the package's folder.
    command.current_dir(root.join(trial.program.0));
    command.args(trial.arguments).envs(trial.environment.iter().copied()).env_remove(VARIABLE);
    if let Some(bug) = bug {
        command.env(VARIABLE, bug.name());
    }
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let started = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a trial")? {
            return Ok(Ended { passed: status.success(), hung: false, took: started.elapsed() });
        }
        let failed = has_failed(log)?;
        let hung = limit.is_some_and(|limit| started.elapsed() > limit);
        if failed || hung {
            child.kill().context("cannot end a trial")?;
            child.wait().context("cannot wait for a trial")?;
            return Ok(Ended { passed: false, hung: !failed, took: started.elapsed() });
        }
        std::thread::sleep(LOOK);
    }
}

/// Whether a test in it has failed already: the others need not be waited for, and may wait for ever.
fn has_failed(log: &Path) -> anyhow::Result<bool> {
    let text = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let failed = |line: &str| line.starts_with("test ") && line.ends_with(" FAILED");
    Ok(String::from_utf8_lossy(&text).lines().any(failed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_known_by_both_forms_of_their_id() {
        assert_eq!(package_name("path+file:///home/p/nvme#0.1.0"), "nvme");
        assert_eq!(package_name("path+file:///home/p/tools#pollux-tools@0.1.0"), "pollux-tools");
    }

    #[test]
    fn every_bug_has_trials_and_none_of_them_plants_bugs_itself() {
        for bug in Bug::ALL {
            let trials = trials(bug.net());
            assert!(!trials.is_empty(), "{}", bug.name());
            assert!(trials.iter().all(|trial| !trial.arguments.iter().any(|it| it.contains("planted"))));
        }
    }

    #[test]
    fn a_trial_is_over_once_a_test_in_it_has_failed() {
        let arguments = &["-c", "echo 'test one ... ok'; echo 'test two ... FAILED'; exec sleep 60"];
        let trial = Trial { program: ("tools", "sh"), arguments, ..FAULTS };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let log = std::env::temp_dir().join(format!("pollux-failing-trial-{}", std::process::id()));
        let ended = run_trial(&root, &trial, Path::new("sh"), None, None, &log).unwrap();
        fs::remove_file(&log).unwrap();
        assert!(!ended.hung && !ended.passed);
    }

    #[test]
    fn a_trial_that_does_not_end_is_ended_and_counts_as_failed() {
        let trial = Trial { program: ("tools", "sleep"), arguments: &["60"], ..FAULTS };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let log = std::env::temp_dir().join(format!("pollux-trial-{}", std::process::id()));
        let limit = Some(Duration::from_millis(50));
        let ended = run_trial(&root, &trial, Path::new("sleep"), None, limit, &log).unwrap();
        fs::remove_file(&log).unwrap();
        assert!(ended.hung && !ended.passed);
    }
}
