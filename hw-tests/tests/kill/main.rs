//! kill -9 of the daemon under load, over and over: what was acknowledged is there, nothing is torn or foreign, fsck is clean.
//!
//! Owns: the campaign. A round: a load begins in a directory of its own, on a volume that has the rounds before it; programs beside it remove
//! what is older, and `pollux relocate --all` moves everything in every other round; the daemon is killed at a random moment. Then
//! fsck, a mount without repair, the check of the load by what its journal says, and of the rounds before: they are what they were.
//! After [`VOLUME`] rounds the volume is a new one, in turn with a shard for each core and with one.
//!
//! | variable | means | else |
//! |---|---|---|
//! | `POLLUX_KILL_ROUNDS` | how many rounds | 20 |
//! | `POLLUX_KILL_SEED` | where randomness begins | 1 |
//! | `POLLUX_KILL_LOAD` | `postgres`, `names`, `fio` or `fsx` | all in turn |
//!
//! A failure keeps the image as the kill left it, the journals and what the daemon said below `target/kill`. The seed repeats loads and
//! moments, but not what threads make of them; the kept image repeats what it led to.
//!
//! Excludes: the loads and their checks (`hw_tests::kill`, `fio`, `fsx`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hw_tests::kill::{is_ready, names, pages};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, need, pollux, read_file, run, text};

mod fio;
mod fsx;

/// Rounds on one volume.
const VOLUME: u64 = 25;

/// Rounds whose files stay, and are looked at again.
const KEPT: usize = 3;

/// Latest moment of a kill after the load has begun.
const LATEST_MS: u64 = 500;

/// How long a load may take to begin, and to notice that the daemon is gone, on the slowest machine.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Postgres,
    Names,
    Fio,
    Fsx,
}

impl Load {
    const ALL: [Self; 4] = [Self::Postgres, Self::Names, Self::Fio, Self::Fsx];

    fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Names => "names",
            Self::Fio => "fio",
            Self::Fsx => "fsx",
        }
    }
}

/// The files of one round.
struct Round {
    number: u64,
    load: Load,
    seed: u64,
    /// On the mount.
    root: PathBuf,
    /// Off it: a file, or a directory of fio's or fsx's.
    journal: PathBuf,
    /// What was there after the kill: a file's name, and what its bytes come to.
    found: BTreeMap<PathBuf, u64>,
}

impl Round {
    fn start(&self) -> Result<Child> {
        fs::create_dir(&self.root)?;
        File::open(self.root.parent().context("a mount")?)?.sync_all()?;
        let mut command = match self.load {
            Load::Fio => fio::command(&self.journal, self.seed)?,
            Load::Fsx => fsx::command(&self.journal, self.seed)?,
            Load::Postgres | Load::Names => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_kill-load"));
                command.arg(self.load.name()).arg(&self.root).arg(&self.journal).arg(self.seed.to_string());
                command
            }
        };
        // fio and fsx work there, too: what they do after the daemon's end never goes to what is below the mount.
        command.current_dir(&self.root).stdin(Stdio::null());
        let said = File::create(self.said())?;
        command.stdout(said.try_clone()?).stderr(said).spawn().context("starting the load")
    }

    /// Where the load says why it has ended.
    fn said(&self) -> PathBuf {
        self.journal.with_extension("said")
    }

    fn has_begun(&self) -> bool {
        match self.load {
            Load::Fio => fio::has_begun(&self.root),
            Load::Fsx => fsx::has_begun(&self.root),
            Load::Postgres | Load::Names => is_ready(&self.journal),
        }
    }

    /// How many acknowledgements were kept.
    fn check(&self) -> Result<u64> {
        match self.load {
            Load::Postgres => pages::check(&self.root, &self.journal, self.seed),
            Load::Names => names::check(&self.root, &self.journal, self.seed),
            Load::Fio => fio::check(&self.root, &self.journal),
            Load::Fsx => fsx::check(&self.root, &self.said(), self.seed),
        }
    }
}

/// A load that runs; it is ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// What each file below `root` comes to.
fn fingerprints(root: &Path) -> Result<BTreeMap<PathBuf, u64>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.symlink_metadata()?.is_dir() {
                folders.push(path);
                continue;
            }
            let mut hasher = DefaultHasher::new();
            read_file(&path)?.hash(&mut hasher);
            found.insert(path, hasher.finish());
        }
    }
    Ok(found)
}

/// A volume, and the rounds that are on it.
struct Campaign {
    scratch: Scratch,
    daemon: Option<Daemon>,
    kept: Vec<Round>,
    /// Directories that are being removed; a kill may leave some of them.
    doomed: Vec<PathBuf>,
    acknowledged: u64,
}

impl Campaign {
    fn new(volume: u64) -> Result<Self> {
        let scratch = Scratch::new()?;
        let cores: &[&str] = if volume % 2 == 1 { &["--cores", "0"] } else { &[] };
        let daemon = Daemon::up(&scratch, &[&["--size", "512MiB"], cores].concat())?;
        Ok(Self { scratch, daemon: Some(daemon), kept: Vec::new(), doomed: Vec::new(), acknowledged: 0 })
    }

    /// The image as the kill has left it.
    fn evidence(&self) -> PathBuf {
        self.scratch.path().join("killed.img")
    }

    fn round(&mut self, number: u64, load: Load, random: &mut Random) -> Result<()> {
        let mut round = Round {
            number,
            load,
            seed: random.next_u64() >> 16,
            root: self.scratch.mount().join(format!("round{number}")),
            journal: self.scratch.path().join(format!("round{number}.journal")),
            found: BTreeMap::new(),
        };
        if self.kept.len() > KEPT {
            self.doomed.push(self.kept.remove(0).root);
        }
        let daemon = self.daemon.take().context("a daemon")?;
        self.kill_under(&round, daemon, random)?;
        let _dead_mount = nix::mount::umount2(&self.scratch.mount(), nix::mount::MntFlags::MNT_DETACH);
        run(Command::new("cp").arg("--sparse=always").arg(self.scratch.image()).arg(self.evidence()))?;
        fsck_clean(&self.scratch)?;
        self.daemon = Some(Daemon::up(&self.scratch, &[])?);
        self.acknowledged += round.check().with_context(|| format!("what {} left", load.name()))?;
        round.found = fingerprints(&round.root)?;
        for past in &self.kept {
            let before =
                || format!("round {} ({}), which was looked at before", past.number, past.load.name());
            past.check().with_context(before)?;
            let now = fingerprints(&past.root)?;
            let other = past.found.iter().find(|(path, print)| now.get(*path) != Some(*print));
            ensure!(other.is_none() && now.len() == past.found.len(), "{}: {other:?} has changed", before());
        }
        self.doomed.retain(|path| path.exists());
        self.kept.push(round);
        Ok(())
    }

    /// Runs the load and what is beside it, and kills the daemon.
    fn kill_under(&self, round: &Round, daemon: Daemon, random: &mut Random) -> Result<()> {
        let (killed, mount) = (AtomicBool::new(false), self.scratch.mount());
        let moment = Duration::from_millis(random.below(LATEST_MS));
        let relocates = random.below(2) == 0;
        let mut load = Running(round.start()?);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for doomed in &self.doomed {
                    // The kill may come first.
                    let _unfinished = fs::remove_dir_all(doomed);
                }
            });
            let moved = relocates.then(|| scope.spawn(|| keep_relocating(&mount, &killed)));
            let begun = wait_until(&mut load, round, || round.has_begun());
            if begun.is_ok() {
                std::thread::sleep(moment);
            }
            let ended = load.0.try_wait();
            killed.store(true, Ordering::SeqCst);
            daemon.kill()?;
            begun?;
            ensure!(
                ended?.is_none(),
                "the load ended before the kill: {}",
                fs::read_to_string(round.said())?
            );
            moved.map_or(Ok(()), |thread| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        let began = Instant::now();
        while load.0.try_wait()?.is_none() {
            ensure!(began.elapsed() < DEADLINE, "the load does not notice that the daemon is gone");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Puts aside what tells how a round has failed.
    fn keep(&self, number: u64, seed: u64) -> Result<PathBuf> {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kill");
        let folder = target.join(format!("seed-{seed}-round-{number}"));
        // From an earlier run with this seed.
        let _absent = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        for entry in fs::read_dir(self.scratch.path())? {
            let path = entry?.path();
            if path != self.scratch.mount() && path != self.scratch.image() {
                run(Command::new("cp").args(["-r", "--sparse=always"]).arg(path).arg(&folder))?;
            }
        }
        Ok(folder)
    }
}

/// Relocates everything until the daemon is gone.
fn keep_relocating(mount: &Path, killed: &AtomicBool) -> Result<()> {
    loop {
        let output = pollux(&["relocate".as_ref(), "--all".as_ref(), mount.as_os_str()])?;
        if killed.load(Ordering::SeqCst) {
            return Ok(());
        }
        // What is written while it is moved may stay.
        ensure!(
            matches!(output.status.code(), Some(0 | 1)),
            "relocate: {}: {}",
            output.status,
            text(&output)
        );
    }
}

/// Waits until the load has come somewhere.
fn wait_until(load: &mut Running, round: &Round, is_there: impl Fn() -> bool) -> Result<()> {
    let began = Instant::now();
    while !is_there() {
        if let Some(status) = load.0.try_wait()? {
            bail!("the load ended with {status}: {}", fs::read_to_string(round.said())?);
        }
        ensure!(began.elapsed() < DEADLINE, "the load {} does not begin", round.load.name());
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn asked_for(name: &str, otherwise: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text} is no number")),
        Err(_) => Ok(otherwise),
    }
}

fn loads() -> Result<Vec<Load>> {
    let Ok(name) = std::env::var("POLLUX_KILL_LOAD") else { return Ok(Load::ALL.to_vec()) };
    let load = Load::ALL.into_iter().find(|load| load.name() == name);
    Ok(vec![
        load.with_context(|| format!("POLLUX_KILL_LOAD={name}: there are postgres, names, fio and fsx"))?,
    ])
}

#[test]
fn what_was_acknowledged_survives_kill_nine() -> Result<()> {
    need("fio", "fio")?;
    let (rounds, seed) = (asked_for("POLLUX_KILL_ROUNDS", 20)?, asked_for("POLLUX_KILL_SEED", 1)?);
    let (loads, began) = (loads()?, Instant::now());
    let mut random = Random(seed);
    let (mut campaign, mut acknowledged) = (Campaign::new(0)?, 0);
    for number in 0..rounds {
        if number > 0 && number % VOLUME == 0 {
            acknowledged += campaign.acknowledged;
            campaign.daemon.take().context("a daemon")?.stop()?;
            campaign = Campaign::new(number / VOLUME)?;
        }
        let load = loads[(number % loads.len() as u64) as usize];
        if let Err(error) = campaign.round(number, load, &mut random) {
            let kept = campaign
                .keep(number, seed)
                .with_context(|| format!("putting aside what led to: {error:#}"))?;
            bail!(
                "round {number} ({}): {error:#}\nkept: {}\nagain: cargo xtask kill --seed {seed} --rounds {}",
                load.name(),
                kept.display(),
                number + 1
            );
        }
        if (number + 1) % 100 == 0 {
            println!("{} rounds, {:?} each", number + 1, began.elapsed() / u32::try_from(number + 1)?);
        }
    }
    acknowledged += campaign.acknowledged;
    campaign.daemon.take().context("a daemon")?.stop()?;
    fsck_clean(&campaign.scratch)?;
    println!("seed {seed}: {rounds} kills in {:?}, {acknowledged} acknowledgements kept", began.elapsed());
    ensure!(acknowledged > 0, "nothing was acknowledged in any round");
    Ok(())
}
