//! Does the net catch fish? Bugs that are planted one at a time must be caught by the campaigns that the unplanted
//! build passes.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::clone_loop::clone_loop;
use super::crash::{crash_random, crash_short, pairs, singles};
use super::faults::flipped_bits;
use super::simulate::simulate;
use super::world::Trouble;
use crate::planted::{Bug, SPOT};
use ::planted::{Net, Planted};

/// Seeds that each campaign may need to catch a bug.
const SEEDS: u64 = 4;

/// Seeds of the clone loop, of which many take no time.
const LOOP_SEEDS: u64 = 100;

/// Pairs of operations that the short campaign may need.
const PAIRS: usize = 24;

/// Why a campaign failed, if it did.
fn failure(campaign: impl FnOnce() -> Result<(), Trouble>) -> Option<String> {
    match catch_unwind(AssertUnwindSafe(campaign)) {
        Ok(Ok(())) => None,
        Ok(Err(trouble)) => Some(trouble.to_string()),
        Err(panic) => Some(match panic.downcast_ref::<String>() {
            Some(text) => text.clone(),
            None => (*panic.downcast_ref::<&str>().unwrap_or(&"a panic without words")).to_owned(),
        }),
    }
}

/// Every campaign in turn, the cheapest first; tells which one failed, and why.
fn caught_by() -> Option<(&'static str, String)> {
    let named = |name: &'static str| move |why: String| (name, why);
    let single = || failure(|| crash_short(singles()).map(|_| ())).map(named("single operations"));
    let looped = |seed: u64| {
        let looped = || {
            clone_loop(seed);
            Ok(())
        };
        failure(looped).map(named("the clone loop"))
    };
    let of_seed = |seed: u64| {
        let simulated = || {
            simulate(seed);
            Ok(())
        };
        failure(simulated)
            .map(named("simulation"))
            .or_else(|| failure(|| crash_random(seed)).map(named("crashes of concurrent clients")))
            .or_else(|| failure(|| flipped_bits(seed)).map(named("wrong bits")))
            .or_else(|| failure(|| crash_short(pairs(seed, PAIRS)).map(|_| ())).map(named("pairs")))
    };
    single().or_else(|| (1..=LOOP_SEEDS).find_map(looped)).or_else(|| (1..=SEEDS).find_map(of_seed))
}

#[test]
fn every_planted_bug_is_caught() {
    let mut missed = Vec::new();
    for &bug in Bug::ALL.iter().filter(|bug| bug.net() == Net::Filesystem) {
        let planted = Planted::new(&SPOT, bug);
        let caught = caught_by();
        drop(planted);
        match caught {
            Some((campaign, why)) => println!("{bug:?}: caught by {campaign}: {why}"),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
