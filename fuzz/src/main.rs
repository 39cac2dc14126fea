//! Runs a target for a time, or one saved input: `cargo xtask fuzz`.
//!
//! Owns: the loop, the printed rate, and where inputs that fail are kept (`target/fuzz`).

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use pollux_fuzz::campaign::{Campaign, load_corpus};
use pollux_fuzz::{TARGETS, target};

/// Memory that a run may come to.
const MEMORY_LIMIT: u64 = 512 << 20;
/// Runs between two looks at the clock.
const BATCH: u64 = 256;

/// Runs a fuzz target.
#[derive(Parser)]
struct Arguments {
    /// Which
    target: String,
    /// How long
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where randomness begins
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Number of the first input
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Runs this input and nothing else
    #[arg(long)]
    replay: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Some(target) = target(&arguments.target) else {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("no target {}; there are {}", arguments.target, names.join(", "));
        return ExitCode::from(2);
    };
    if let Some(path) = &arguments.replay {
        return match std::fs::read(path) {
            Ok(input) => {
                (target.run)(&input);
                println!("{}: no failure", path.display());
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("cannot read {}: {error}", path.display());
                ExitCode::from(2)
            }
        };
    }
    keep_what_fails();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let campaign = Campaign::new(arguments.seed, load_corpus(&root.join("corpus").join(target.name)));
    let start = Instant::now();
    let mut number = arguments.first;
    while start.elapsed() < Duration::from_secs(arguments.seconds) {
        for _ in 0..BATCH {
            let input = campaign.input(number);
            *current() = (format!("{}-{}-{number}", target.name, arguments.seed), input);
            let input = current().1.clone();
            if std::panic::catch_unwind(|| (target.run)(&input)).is_err() {
                return ExitCode::FAILURE;
            }
            number += 1;
        }
        if resident() > MEMORY_LIMIT {
            eprintln!("{}: more than {MEMORY_LIMIT} bytes in use after input {number}", target.name);
            return ExitCode::FAILURE;
        }
    }
    let (count, taken) = (number - arguments.first, start.elapsed().as_secs_f64());
    let rate = count as f64 / taken;
    println!(
        "{}: {count} inputs in {taken:.1} s, {rate:.0} a second, none failed (seed {})",
        target.name, arguments.seed
    );
    ExitCode::SUCCESS
}

/// Name and bytes of the input that runs.
fn current() -> MutexGuard<'static, (String, Vec<u8>)> {
    static CURRENT: Mutex<(String, Vec<u8>)> = Mutex::new((String::new(), Vec::new()));
    CURRENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the input that fails, before anything is unwound: a second panic on the way out would end the process.
fn keep_what_fails() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let (name, input) = &*current();
        let folder = Path::new("target/fuzz");
        let path = folder.join(name);
        match std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, input)) {
            Ok(()) => eprintln!("failed: {}; run it alone with --replay {}", name, path.display()),
            Err(error) => eprintln!("failed: {name}, which cannot be kept: {error}"),
        }
        usual(panic);
    }));
}

/// Bytes of memory in use.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}
