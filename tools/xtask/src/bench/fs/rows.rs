//! The rows of the table: what runs, and what it has to reach.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use serde_json::Value;

use super::place::{Kind, Place, What};
use super::{FsOptions, Report, Row, Tools};
use crate::bench::median;
use crate::packages;

/// The modelled drive.
const MODELLED: &str = "emu:mem,size=2GiB,latency=80us,iops=400000";
/// Requests at once on it: four times what 80 µs at 400,000/s need.
const MODELLED_DEPTH: &str = "128";
/// Requests of the shorter of two counted runs.
const COUNTED: u64 = 8192;
/// Bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;

pub(super) fn measure(
    row: Row,
    tools: &Tools,
    vs: &[Kind],
    options: &FsOptions,
    report: &mut Report,
) -> anyhow::Result<()> {
    match row {
        Row::Clone => clone(tools, vs, options, report),
        Row::CloneCore => clone_core(tools, options, report),
        Row::CloneReaders => clone_readers(tools, options, report),
        Row::Modelled => modelled(tools, options, report),
        Row::Instructions => instructions(tools, report),
        Row::WriteFsync => {
            against_kernel(tools, vs, options, report, "write-fsync", "4 KiB write + fsync", 3.0)
        }
        Row::CreateUnlink => {
            let words = "create + write + unlink of 100 B files";
            against_kernel(tools, vs, options, report, "create-unlink", words, 5.0)
        }
        Row::Mount => mount(tools, options, report),
        Row::TwoReactors => two_reactors(tools, options, report),
        Row::MountAfterCrash => mount_after_crash(tools, report),
        Row::InodeMemory => inode_memory(tools, report),
    }
}

/// Runs `fs-bench` and returns what it prints.
fn bench(tools: &Tools, arguments: &[&str]) -> anyhow::Result<Value> {
    let mut command = Command::new(&tools.bench);
    command.args(arguments);
    json_of(&mut command)
}

fn json_of(command: &mut Command) -> anyhow::Result<Value> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, errors.trim());
    serde_json::from_slice(&output.stdout).with_context(|| format!("{command:?} gives no JSON"))
}

/// The number at `path` in `value`.
fn number(value: &Value, path: &str) -> anyhow::Result<f64> {
    value.pointer(path).and_then(Value::as_f64).with_context(|| format!("no number {path} in {value}"))
}

fn files(tools: &Tools, dir: &Path, row: &str, options: &FsOptions) -> anyhow::Result<Value> {
    let (dir, seconds) = (dir.to_string_lossy(), options.seconds.to_string());
    bench(tools, &["files", "--dir", &dir, "--row", row, "--seconds", &seconds])
}

fn library(tools: &Tools, row: &str, cores: &str, options: &FsOptions) -> anyhow::Result<Value> {
    let seconds = options.seconds.to_string();
    bench(
        tools,
        &["library", "--row", row, "--device", "emu:mem,size=2GiB", "--cores", cores, "--seconds", &seconds],
    )
}

fn clone(tools: &Tools, vs: &[Kind], options: &FsOptions, report: &mut Report) -> anyhow::Result<()> {
    let others = vs.iter().filter(|kind| kind.clones()).map(|kind| What::Kernel(*kind));
    let mut places = Vec::new();
    for what in std::iter::once(What::Pollux).chain(others) {
        let place = Place::mount(tools, what)?;
        files(tools, &place.dir, "prepare", options)?;
        places.push((place, Vec::new(), Vec::new()));
    }
    for _ in 0..options.rounds {
        for (place, clones, syncs) in &mut places {
            let took = files(tools, &place.dir, "clone", options)?;
            clones.push(number(&took, "/clone_ns")?);
            syncs.push(number(&took, "/fsync_ns")?);
        }
    }
    let mut medians =
        places.into_iter().map(|(place, clones, syncs)| (place.what, median(clones), median(syncs)));
    let (_, clone, sync) = medians.next().context("Pollux is the first")?;
    for (what, their_clone, their_sync) in medians {
        let (clone_goal, sync_goal) =
            if what == What::Kernel(Kind::Btrfs) { (20.0, Some(10.0)) } else { (100.0, None) };
        let words = format!(
            "clone of 262,144 extents by copy_file_range on the mount, times faster than {}",
            what.name()
        );
        note_ratio(report, &words, their_clone / clone, Some(clone_goal), &ms(their_clone, clone));
        let words = format!("the fsync after it, times faster than {}", what.name());
        note_ratio(report, &words, their_sync / sync, sync_goal, &ms(their_sync, sync));
    }
    Ok(())
}

fn ms(theirs: f64, ours: f64) -> String {
    format!("{:.2} ms to {:.2} ms", theirs / 1e6, ours / 1e6)
}

fn note_ratio(report: &mut Report, words: &str, ratio: f64, goal: Option<f64>, detail: &str) {
    let text = goal.map_or("none".to_owned(), |goal| format!("at least {goal}"));
    report.note(words, format!("{ratio:.2} ({detail})"), &text, goal.is_none_or(|goal| ratio >= goal));
}

fn clone_core(tools: &Tools, options: &FsOptions, report: &mut Report) -> anyhow::Result<()> {
    let mut found = [Vec::new(), Vec::new()];
    for _ in 0..options.rounds {
        let output = Command::new(&tools.clone).output().context("running the bench of clones")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "the bench of clones failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        for (place, begins) in found.iter_mut().zip(["within a shard: ", "to another shard: "]) {
            let line = text.lines().find_map(|line| line.strip_prefix(begins));
            let figure = line.and_then(|line| line.split(' ').next()).and_then(|word| word.parse().ok());
            place.push(figure.with_context(|| format!("no line {begins:?} in {text:?}"))?);
        }
    }
    let [within, across] = found.map(median);
    let words = "a clone in fs-core alone, µs an extent";
    report.note(format!("{words}, within a shard"), format!("{within:.3}"), "at most 0.3", within <= 0.3);
    report.note(format!("{words}, to another shard"), format!("{across:.3}"), "none", true);
    Ok(())
}

fn clone_readers(tools: &Tools, options: &FsOptions, report: &mut Report) -> anyhow::Result<()> {
    let place = Place::mount(tools, What::Pollux)?;
    files(tools, &place.dir, "prepare", options)?;
    let found = files(tools, &place.dir, "clone-readers", options)?;
    for mode in ["buffered", "direct"] {
        let figure = |when: &str, name: &str| number(&found, &format!("/{mode}/{when}/{name}"));
        let (quiet, during) = (figure("quiet", "p999_ns")?, figure("during", "p999_ns")?);
        let (quiet_worst, worst) = (figure("quiet", "worst_ns")?, figure("during", "worst_ns")?);
        let reads = figure("during", "count")?;
        report.note(
            format!("{mode} reads of the source during clones, p99.9 to quiet ({reads} reads)"),
            format!("{:.2} ({:.0} µs to {:.0} µs)", during / quiet, during / 1e3, quiet / 1e3),
            "at most 2",
            during <= 2.0 * quiet && reads >= 1000.0,
        );
        report.note(
            format!("{mode} reads of the source during clones, worst"),
            format!("{:.2} ms, quiet {:.2} ms", worst / 1e6, quiet_worst / 1e6),
            "at most quiet + 10 ms",
            worst <= quiet_worst + 10e6,
        );
    }
    Ok(())
}

fn modelled(tools: &Tools, options: &FsOptions, report: &mut Report) -> anyhow::Result<()> {
    let seconds = options.seconds.to_string();
    for (words, access, row, goal) in
        [("read", "randread", "random-read", 0.95), ("write", "randwrite", "random-write", 0.8)]
    {
        let (mut ours, mut raw) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let arguments = [
                ["library", "--row", row, "--device", MODELLED, "--cores"],
                ["0", "--seconds", &seconds, "--depth", MODELLED_DEPTH, "--blocks=131072"],
            ];
            let arguments = arguments.concat();
            ours.push(number(&bench(tools, &arguments)?, "/per_second")?);
            let mut perf = Command::new(&tools.pollux);
            perf.args(["perf", "--device", MODELLED, "--rw", access, "--bs", "4k", "--no-latency", "--json"]);
            perf.args(["--iodepth", MODELLED_DEPTH, "--cores", "0", "--runtime", &seconds]);
            raw.push(number(&json_of(&mut perf)?, "/iops")?);
        }
        let (ours, raw) = (median(ours), median(raw));
        report.note(
            format!("4 KiB random {words} in fs-core, cache off, of the raw driver's IOPS on a drive of 80 µs and 400 k IOPS"),
            format!("{:.1} % ({:.0} k to {:.0} k)", ours / raw * 100.0, ours / 1e3, raw / 1e3),
            &format!("at least {:.0} %", goal * 100.0),
            ours / raw >= goal,
        );
    }
    Ok(())
}

fn instructions(tools: &Tools, report: &mut Report) -> anyhow::Result<()> {
    packages::ensure("valgrind", "valgrind").map_err(anyhow::Error::msg)?;
    let each = |kind: &str| -> anyhow::Result<u64> {
        let (short, long) = (count(tools, kind, COUNTED)?, count(tools, kind, 2 * COUNTED)?);
        Ok((long - short).div_ceil(COUNTED))
    };
    let checksum = each("checksum")?;
    for kind in ["read", "write"] {
        let all = each(kind)?;
        report.note(
            format!("instructions per 4 KiB random {kind} in fs-core on a null device"),
            format!("{all}: {checksum} of the checksum, {} of the rest", all.saturating_sub(checksum)),
            "none",
            true,
        );
    }
    Ok(())
}

fn count(tools: &Tools, kind: &str, requests: u64) -> anyhow::Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        // Left out: what a drive does. In this order: the first option changes the second's default.
        .args(["--toggle-collect=*instructions*transfer*", "--collect-atstart=yes"])
        // Of a string instruction callgrind counts every byte; with vectors memory is filled and copied in true counts.
        .env(
            "GLIBC_TUNABLES",
            "glibc.cpu.x86_rep_stosb_threshold=1073741824:glibc.cpu.x86_rep_movsb_threshold=1073741824",
        )
        .arg(&tools.bench)
        .args(["instructions", "--kind", kind, "--requests", &requests.to_string()])
        .output()
        .context("cannot run valgrind")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "valgrind failed: {stderr}");
    let collected = stderr.lines().find_map(|line| line.split_once("Collected :")).map(|(_, n)| n.trim());
    collected.and_then(|n| n.parse().ok()).context("valgrind gives no count")
}

/// A load in the library against the best kernel filesystem, and the mount's figure beside it.
fn against_kernel(
    tools: &Tools,
    vs: &[Kind],
    options: &FsOptions,
    report: &mut Report,
    row: &str,
    words: &str,
    goal: f64,
) -> anyhow::Result<()> {
    let whats = vs.iter().map(|kind| What::Kernel(*kind)).chain([What::Pollux]);
    let mut places: Vec<(Place, Vec<f64>)> =
        whats.map(|what| Ok((Place::mount(tools, what)?, Vec::new()))).collect::<anyhow::Result<_>>()?;
    let mut ours = Vec::new();
    for _ in 0..options.rounds {
        ours.push(number(&library(tools, row, "0", options)?, "/ns")?);
        for (place, found) in &mut places {
            found.push(number(&files(tools, &place.dir, row, options)?, "/ns")?);
        }
    }
    let ours = median(ours);
    let figures: Vec<(What, f64)> =
        places.into_iter().map(|(place, found)| (place.what, median(found))).collect();
    let mut detail = format!("{:.2} µs in the library", ours / 1e3);
    for (what, ns) in &figures {
        detail.push_str(&format!(
            ", {:.2} µs {}",
            ns / 1e3,
            if *what == What::Pollux { "Pollux mounted" } else { what.name() }
        ));
    }
    let kernel = figures.iter().filter(|(what, _)| *what != What::Pollux);
    let best = kernel.map(|(_, ns)| *ns).fold(f64::INFINITY, f64::min);
    ensure!(best.is_finite(), "no filesystem to compare with");
    note_ratio(
        report,
        &format!("{words} in the library, times the best kernel filesystem"),
        best / ours,
        Some(goal),
        &detail,
    );
    Ok(())
}

fn mount(tools: &Tools, options: &FsOptions, report: &mut Report) -> anyhow::Result<()> {
    packages::ensure("fio", "fio").map_err(anyhow::Error::msg)?;
    let pollux = Place::mount(tools, What::Pollux)?;
    let floor = Place::mount(tools, What::Responder)?;
    let mut pairs: Vec<(String, Vec<f64>, Vec<f64>)> = Vec::new();
    let loads = ["randread", "randwrite"].into_iter().flat_map(|access| [1, 32].map(|depth| (access, depth)));
    for (access, depth) in loads {
        let mut pair = (format!("{access}, depth {depth}"), Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            pair.1.push(fio(&pollux.dir, access, depth, options)?);
            pair.2.push(fio(&floor.dir, access, depth, options)?);
        }
        pairs.push(pair);
    }
    for row in ["write-fsync", "create-unlink"] {
        let mut pair = (row.replace('-', " + "), Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let per_second = |place: &Place| -> anyhow::Result<f64> {
                Ok(1e9 / number(&files(tools, &place.dir, row, options)?, "/ns")?)
            };
            pair.1.push(per_second(&pollux)?);
            pair.2.push(per_second(&floor)?);
        }
        pairs.push(pair);
    }
    for (words, ours, floor) in pairs {
        let (ours, floor) = (median(ours), median(floor));
        let detail = format!(
            "{:.1} k to {:.1} k a second, {:.1} µs to {:.1} µs",
            ours / 1e3,
            floor / 1e3,
            1e6 / ours,
            1e6 / floor
        );
        note_ratio(
            report,
            &format!("the mount, {words}, to a responder in memory"),
            ours / floor,
            Some(0.8),
            &detail,
        );
    }
    Ok(())
}

/// IOPS of 4 KiB requests past the kernel's cache.
fn fio(dir: &Path, access: &str, depth: u32, options: &FsOptions) -> anyhow::Result<f64> {
    let mut command = Command::new("fio");
    command
        .args([
            "--name=mount",
            "--filename=data",
            "--size=256m",
            "--bs=4k",
            "--direct=1",
            "--ioengine=libaio",
        ])
        .arg(format!("--directory={}", dir.display()))
        .arg(format!("--rw={access}"))
        .arg(format!("--iodepth={depth}"))
        .args(["--time_based", &format!("--runtime={}", options.seconds), "--output-format=json"]);
    let found = json_of(&mut command)?;
    let kind = if access == "randread" { "read" } else { "write" };
    number(&found, &format!("/jobs/0/{kind}/iops"))
}

fn two_reactors(tools: &Tools, options: &FsOptions, report: &mut Report) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if cores < 2 {
        report.missing.push("two reactors: there is one core".into());
        return Ok(());
    }
    for (row, words) in [("create-unlink", "create + write + unlink"), ("write-fsync", "4 KiB write + fsync")]
    {
        let (mut together, mut apart) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            together.push(number(&library(tools, row, "0,1", options)?, "/per_second")?);
            let sum = std::thread::scope(|scope| {
                let other = scope.spawn(|| library(tools, row, "1", options));
                let one = number(&library(tools, row, "0", options)?, "/per_second")?;
                let other = other.join().expect("the other process's thread does not panic")?;
                Ok::<f64, anyhow::Error>(one + number(&other, "/per_second")?)
            })?;
            apart.push(sum);
        }
        let (together, apart) = (median(together), median(apart));
        // Syncs of one volume share the log: no goal for what they do to each other.
        let goal = (row == "create-unlink").then_some(0.9);
        note_ratio(
            report,
            &format!("two reactors, independent directories, {words}, of two processes' sum"),
            together / apart,
            goal,
            &format!("{:.0} k of {:.0} k a second", together / 1e3, apart / 1e3),
        );
    }
    Ok(())
}

fn mount_after_crash(tools: &Tools, report: &mut Report) -> anyhow::Result<()> {
    let arguments =
        ["library", "--row", "mount-after-crash", "--device", "emu:mem,size=16GiB", "--cores", "0"];
    let found = bench(tools, &arguments)?;
    let (ns, extents) = (number(&found, "/mount_ns")?, number(&found, "/extents")?);
    report.note(
        format!("mount after a crash, {:.1} million extents made by clones, 1 million files", extents / 1e6),
        format!("{:.0} ms", ns / 1e6),
        "at most 1 s",
        ns <= 1e9,
    );
    Ok(())
}

fn inode_memory(tools: &Tools, report: &mut Report) -> anyhow::Result<()> {
    let arguments = ["library", "--row", "inode-memory", "--device", "emu:mem,size=8GiB", "--cores", "0"];
    let bytes = number(&bench(tools, &arguments)?, "/bytes")?;
    report.note(
        "memory for 1 million cached inodes, tree nodes included",
        format!("{:.2} GiB ({:.0} bytes an inode)", bytes / GIB, bytes / 1e6),
        "at most 1 GiB",
        bytes <= GIB,
    );
    Ok(())
}
