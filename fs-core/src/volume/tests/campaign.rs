//! Campaigns: many seeds, or many workloads, on all cores (`cargo xtask sim`, `cargo xtask crash`).
//!
//! Owns: the parameters that xtask hands over in the environment, the threads, the closing figures, and what is said of a
//! failure: why, and the command that repeats it.
//!
//! Invariants: what a seed does follows from the seed and its size alone; time is looked at between seeds only, and decides
//! how many of them run, never what they find.

use std::cell::RefCell;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::client::Rng;
use super::clone_loop::clone_loop;
use super::crash::{Tally, crash_one, crash_random_into, from_environment, pairs, short_beginning, singles};
use super::history::History;
use super::mixed::{Size, State, beginning, mixed};
use super::stats::{self, Counts};

/// One seed in so many is run twice and has to come to the same state.
const TWICE: u64 = 8;

/// Runs of a failing seed in search of a smaller one that fails.
const SHRINKING_RUNS: usize = 60;

thread_local! {
    static LAST_PANIC: RefCell<String> = const { RefCell::new(String::new()) };
    static HISTORY: RefCell<Option<Rc<RefCell<History>>>> = const { RefCell::new(None) };
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Keeps what a panic says for the report.
fn keep_panics() {
    std::panic::set_hook(Box::new(|panic| LAST_PANIC.set(panic.to_string())));
}

/// What several threads share.
struct Work {
    next: AtomicU64,
    done: AtomicU64,
    ended: AtomicBool,
    counts: Mutex<Counts>,
    failure: Mutex<Option<String>>,
    began: Instant,
    seconds: Option<u64>,
}

impl Work {
    /// Runs `job` with the numbers below `count` until one fails, time is up, or `job` says that it is enough. Returns
    /// how many were run, and the failure.
    fn run(count: u64, job: impl Fn(u64) -> Result<Enough, String> + Sync) -> (Self, Option<String>) {
        let work = Self {
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            counts: Mutex::default(),
            failure: Mutex::default(),
            began: Instant::now(),
            seconds: number("POLLUX_SECONDS"),
        };
        let threads = from_environment("POLLUX_JOBS", 1);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| work.thread(count, &job));
            }
        });
        let failure = work.failure.lock().unwrap().take();
        (work, failure)
    }

    fn thread(&self, count: u64, job: &impl Fn(u64) -> Result<Enough, String>) {
        loop {
            let late = self.seconds.is_some_and(|seconds| self.began.elapsed().as_secs() >= seconds);
            if late || self.ended.load(Ordering::Relaxed) {
                return;
            }
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            match job(index) {
                Ok(Enough::No) => {}
                Ok(Enough::Yes) => self.ended.store(true, Ordering::Relaxed),
                Err(why) => {
                    self.failure.lock().unwrap().get_or_insert(why);
                    self.ended.store(true, Ordering::Relaxed);
                    return;
                }
            }
            self.done.fetch_add(1, Ordering::Relaxed);
            let mut counts = self.counts.lock().unwrap();
            for (key, number) in stats::take() {
                *counts.entry(key).or_default() += number;
            }
        }
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }
}

/// Whether a campaign has seen enough.
enum Enough {
    Yes,
    No,
}

/// Runs `run`; a panic is a failure like others.
fn caught<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(LAST_PANIC.take()))
}

fn size_asked() -> Size {
    let Ok(text) = std::env::var("POLLUX_SIZE") else { return Size::FULL };
    let parts: Vec<u64> = text.split(',').filter_map(|part| part.parse().ok()).collect();
    let [clients, ops, sessions, tasks] = parts[..] else {
        panic!("POLLUX_SIZE={text} is not CLIENTS,OPERATIONS,SESSIONS,TASKS")
    };
    assert!(clients > 0, "POLLUX_SIZE={text} has no clients");
    Size { clients: clients as usize, ops: ops as usize, sessions, tasks: tasks as u32 }
}

fn run_seed(seed: u64, size: &Size) -> Result<State, String> {
    caught(|| {
        let image = beginning(seed, size);
        let mut keep = |history: &Rc<RefCell<History>>| HISTORY.set(Some(Rc::clone(history)));
        let state = mixed(seed, size, &image, &mut keep).map_err(|why| why.0)?;
        if seed.is_multiple_of(TWICE) {
            let again = mixed(seed, size, &image, &mut keep).map_err(|why| why.0)?;
            stats::count("campaign", "seeds run twice");
            if again != state {
                return Err(format!("the same seed came to {again:x?} after {state:x?}"));
            }
        }
        Ok(state)
    })
}

/// The smallest size found with which a seed still fails, and why it does.
fn shrink(seed: u64, mut size: Size, mut why: String) -> (Size, String, usize) {
    let mut runs = 0;
    'smaller: loop {
        for candidate in size.smaller() {
            if runs == SHRINKING_RUNS {
                return (size, why, runs);
            }
            runs += 1;
            if let Err(still) = run_seed(seed, &candidate) {
                (size, why) = (candidate, still);
                continue 'smaller;
            }
        }
        return (size, why, runs);
    }
}

fn repeat(seed: u64, size: &Size) -> String {
    let Size { clients, ops, sessions, tasks } = size;
    format!("cargo xtask sim --seeds 1 --seed {seed} --size {clients},{ops},{sessions},{tasks}")
}

/// All that is said of a seed that failed.
fn describe(seed: u64, size: Size, why: &str) -> String {
    let mut text = format!("seed {seed}: {why}\nrepeat with: {}\n", repeat(seed, &size));
    let (smallest, why, runs) = shrink(seed, size, why.to_owned());
    // Once more, so that the history is that of the failure.
    let _known = run_seed(seed, &smallest);
    text += &format!("\nsmallest of {runs} more runs: {smallest:?}: {why}\n");
    let history = HISTORY.take();
    for client in history.iter().flat_map(|history| history.borrow().told()) {
        text += &client;
    }
    text + &format!("repeat with: {}\n", repeat(seed, &smallest))
}

#[test]
#[ignore = "a campaign: cargo xtask sim"]
fn simulation() {
    keep_panics();
    let (first, seeds) = (number("POLLUX_FIRST_SEED").unwrap_or(1), number("POLLUX_SEEDS").unwrap_or(1));
    let (size, verbose) = (size_asked(), number("POLLUX_VERBOSE").is_some());
    let (work, failure) = Work::run(seeds, |index| {
        let seed = first + index;
        let state = run_seed(seed, &size).map_err(|why| describe(seed, size.clone(), &why))?;
        if std::env::var_os("POLLUX_SIZE").is_none() {
            let looped = caught(|| Ok(clone_loop(seed)));
            let references = looped.map_err(|why| {
                format!("seed {seed} of the clone loop: {why}\nrepeat with: cargo xtask sim --seeds 1 --seed {seed}")
            })?;
            stats::count("clone loop", "seeds");
            stats::add("clone loop", "references relocated", references);
        }
        if verbose {
            println!("seed {seed}: state {:016x}", state.hash);
        }
        Ok(Enough::No)
    });
    stats::print(&work.counts.lock().unwrap());
    let (done, took) = (work.done(), work.began.elapsed().as_secs_f64());
    println!("simulated {done} of {seeds} seeds from {first} on in {took:.1} s");
    finish(failure);
}

/// Ends a campaign: with what failed, if anything did.
fn finish(failure: Option<String>) {
    let _ours = std::panic::take_hook();
    if let Some(why) = failure {
        println!("{why}");
        panic!("the campaign failed: see above");
    }
}

/// Which crashes are enumerated.
struct Enumeration {
    seed: u64,
    ops: u64,
    /// Every so many workloads from this one on.
    part: (u64, u64),
    only: Option<u64>,
    /// Distinct states after which it is enough, and without which it has failed.
    states: Option<u64>,
}

impl Enumeration {
    fn asked() -> Self {
        let part = (number("POLLUX_PART").unwrap_or(0), number("POLLUX_PARTS").unwrap_or(1));
        assert!(part.0 < part.1, "part {} of {} does not exist", part.0, part.1);
        Self {
            seed: number("POLLUX_FIRST_SEED").unwrap_or(1),
            ops: number("POLLUX_OPS").unwrap_or(1),
            part,
            only: number("POLLUX_WORKLOAD"),
            states: number("POLLUX_STATES"),
        }
    }

    /// Numbers of workloads, in the order in which they run.
    fn order(&self, scripted: u64) -> Vec<u64> {
        if let Some(only) = self.only {
            return vec![only];
        }
        let mut order: Vec<u64> = (0..scripted).collect();
        let mut rng = Rng::new(self.seed);
        for at in (1..order.len()).rev() {
            order.swap(at, rng.below(at as u64 + 1) as usize);
        }
        // Behind them, workloads of concurrent clients, until there are states enough.
        let concurrent = if self.states.is_some() { 10_000 } else { 0 };
        order.extend(scripted..scripted + concurrent);
        let (part, parts) = self.part;
        order.into_iter().filter(|number| number % parts == part).collect()
    }
}

#[test]
#[ignore = "a campaign: cargo xtask crash"]
fn crashes() {
    keep_panics();
    let asked = Enumeration::asked();
    let (short, seed) = (short_beginning(), asked.seed);
    let scripted =
        || singles().into_iter().chain(if asked.ops > 1 { pairs(seed, usize::MAX) } else { vec![] });
    let count = scripted().count() as u64;
    let order = asked.order(count);
    let (distinct, states, second) = (Mutex::new(HashSet::new()), AtomicU64::new(0), AtomicU64::new(0));
    let (work, failure) = Work::run(order.len() as u64, |index| {
        let workload = order[index as usize];
        let mut tally = Tally::default();
        let ran = caught(|| {
            let ran = match scripted().nth(workload as usize) {
                Some(ops) => crash_one(&short, ops, seed, &mut tally),
                None => crash_random_into(seed + (workload - count), &mut tally),
            };
            ran.map_err(|why| why.0)
        });
        ran.map_err(|why| {
            let ops = asked.ops;
            format!(
                "workload {workload}: {why}\nrepeat with: cargo xtask crash --ops {ops} --seed {seed} --workload {workload}{}",
                depth()
            )
        })?;
        states.fetch_add(tally.states, Ordering::Relaxed);
        second.fetch_add(tally.second, Ordering::Relaxed);
        let mut distinct = distinct.lock().unwrap();
        distinct.extend(tally.distinct);
        Ok(match asked.states {
            Some(states) if distinct.len() as u64 >= states => Enough::Yes,
            _ => Enough::No,
        })
    });
    stats::print(&work.counts.lock().unwrap());
    let distinct = distinct.lock().unwrap().len() as u64;
    let (states, second) = (states.into_inner(), second.into_inner());
    let (done, took) = (work.done(), work.began.elapsed().as_secs_f64());
    let rate = (states + second) as f64 / took;
    println!(
        "crashed {done} of {} workloads of seed {seed}, part {}/{}: {states} states, {distinct} distinct, {second} of second \
         crashes, in {took:.1} s: {rate:.0} states/s",
        order.len(),
        asked.part.0,
        asked.part.1,
    );
    let few = asked.states.filter(|least| distinct < *least && work.seconds.is_none());
    finish(failure.or_else(|| few.map(|least| format!("{distinct} distinct states are fewer than {least}"))));
}

/// The options that say how much is tried at each crash, as they were given.
fn depth() -> String {
    let option = |(name, variable)| std::env::var(variable).ok().map(|value| format!(" --{name} {value}"));
    let options =
        [("subsets", "POLLUX_SUBSETS"), ("random", "POLLUX_RANDOM"), ("structured", "POLLUX_STRUCTURED")];
    options.into_iter().filter_map(option).collect()
}
