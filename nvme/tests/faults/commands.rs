//! Rows about a single command: slow, lost, late, forged, spoiled.

use std::time::Duration;

use nvme_emulator::{CidFault, Effect, HeldAbort, Times};

use crate::bench::World;
use crate::case::{COMMANDS, End, Error, Expect, IO_COMMANDS, Row, everywhere, everywhere_in};

use Expect::{Ends, Fails, Garbled, Recovers, Unnoticed};

fn table(name: &str, rows: &[Row]) {
    let cases: usize = rows.iter().map(|row| everywhere(row, &COMMANDS)).sum();
    println!("{name}: {cases} cases");
}

fn for_ever(mut row: Row) -> Row {
    row.times = Times::Forever;
    row
}

fn with_dma_faults(mut row: Row) -> Row {
    row.dma_faults = true;
    row
}

#[test]
fn slow_commands_are_waited_for() {
    table("slow", &[Row::new(Effect::Delay(Duration::from_millis(100)), Recovers, Recovers)]);
}

#[test]
fn late_commands_are_aborted_and_repeated() {
    let late = Effect::Delay(Duration::from_secs(50));
    table("late", &[Row::new(late, Recovers, Fails(Error::Reset))]);
}

#[test]
fn lost_commands_are_repeated() {
    table(
        "lost",
        &[
            Row::new(Effect::Drop, Recovers, Fails(Error::Reset)),
            Row::new(Effect::LoseCompletion, Recovers, Fails(Error::Reset)),
        ],
    );
}

#[test]
fn commands_lost_again_and_again_time_out() {
    let rows = [Effect::Drop, Effect::LoseCompletion, Effect::Hold { abort: HeldAbort::Obeyed }];
    let row = |effect| for_ever(Row::new(effect, Fails(Error::Timeout), Fails(Error::Reset)));
    let rows: Vec<Row> = rows.into_iter().map(row).collect();
    // Every command of the kind is met, so where there are several, each is a victim.
    crate::case::only_victims("lost for ever", &rows, &IO_COMMANDS);
}

#[test]
fn held_commands_are_aborted_or_lose_their_queue() {
    table(
        "held",
        &[
            Row::new(Effect::Hold { abort: HeldAbort::Obeyed }, Recovers, Fails(Error::Reset)),
            Row::new(Effect::Hold { abort: HeldAbort::Ignored }, Recovers, Fails(Error::Reset)),
        ],
    );
}

#[test]
fn stale_phases_hide_completions_only() {
    table("stale phase", &[Row::new(Effect::StalePhase, Recovers, Fails(Error::Reset))]);
}

#[test]
fn forged_completions_end_the_controller() {
    let forged = [
        Effect::CompletionCid(CidFault::OutOfRange),
        Effect::CompletionCid(CidFault::NotInFlight),
        Effect::CompletionCid(CidFault::Stale),
        Effect::CompletionSqId(9),
        Effect::CompletionSqHead(0xffff),
        Effect::CompletionSqHead(40),
    ];
    let rows: Vec<Row> =
        forged.into_iter().map(|effect| Row::new(effect, Ends(End::Protocol), Ends(End::Protocol))).collect();
    table("forged completions", &rows);
}

#[test]
fn completions_too_many_end_the_controller() {
    let extra = [Effect::Duplicate, Effect::Extra(1), Effect::Extra(5)];
    let row = |effect| Row::new(effect, Ends(End::Protocol), Ends(End::Protocol));
    let rows: Vec<Row> = extra.into_iter().map(row).collect();
    table("extra completions", &rows);
}

/// Some hide others, by overwriting them with the phase of the next lap: then nothing seems to complete.
#[test]
fn completions_that_overrun_the_queue_end_the_controller_or_cost_it_the_queue() {
    let extra = [Effect::Extra(12), Effect::Extra(13), Effect::Extra(50), Effect::Extra(1000)];
    let row = |effect| Row::new(effect, Expect::Bounded, Expect::Bounded);
    let rows: Vec<Row> = extra.into_iter().map(row).collect();
    table("overruns", &rows);
}

#[test]
fn fatal_status_costs_a_reset() {
    table("fatal status", &[Row::new(Effect::FatalStatus, Recovers, Fails(Error::Reset))]);
}

#[test]
fn removal_ends_everything() {
    table("removal", &[Row::new(Effect::Remove, Ends(End::Removed), Ends(End::Removed))]);
}

#[test]
fn transfers_that_fall_short_go_unnoticed() {
    table(
        "short transfers",
        &[
            Row::new(Effect::ShortTransfer { bytes: 100 }, Unnoticed, Unnoticed),
            Row::new(Effect::ShortTransfer { bytes: 4096 }, Unnoticed, Unnoticed),
            Row::new(Effect::NoTransfer, Unnoticed, Unnoticed),
            Row::new(Effect::CorruptData { byte: 3, bit: 2 }, Unnoticed, Unnoticed),
            Row::new(Effect::PatchData { offset: 0, bytes: vec![0xff; 4] }, Unnoticed, Unnoticed),
        ],
    );
}

#[test]
fn transfers_that_go_astray_go_unnoticed() {
    table(
        "stray transfers",
        &[
            with_dma_faults(Row::new(Effect::OutsideMapping, Unnoticed, Unnoticed)),
            with_dma_faults(Row::new(
                Effect::MisplacedTransfer { iova_delta: 1 << 44 },
                Unnoticed,
                Unnoticed,
            )),
            with_dma_faults(Row::new(
                Effect::MisplacedTransfer { iova_delta: -(1 << 44) },
                Unnoticed,
                Unnoticed,
            )),
            with_dma_faults(Row::new(Effect::MisplacedTransfer { iova_delta: 4096 }, Garbled, Garbled)),
        ],
    );
}

#[test]
fn writes_that_lie_go_unnoticed() {
    table(
        "lying writes",
        &[
            Row::new(Effect::LoseWrite, Unnoticed, Unnoticed),
            Row::new(Effect::TearWrite { sectors: 3 }, Unnoticed, Unnoticed),
            Row::new(Effect::MisdirectWrite { lba_delta: 5 }, Garbled, Unnoticed),
            for_ever(Row::new(Effect::StaleRead, Unnoticed, Unnoticed)),
            Row::new(Effect::LyingFlush, Unnoticed, Unnoticed),
        ],
    );
}

/// A reset takes the doorbells in memory away: they are offered again, and begin anew.
#[test]
fn doorbells_in_memory_survive_what_registers_do() {
    let rows = [
        Row::new(Effect::Drop, Recovers, Fails(Error::Reset)),
        Row::new(Effect::StalePhase, Recovers, Fails(Error::Reset)),
        Row::new(Effect::FatalStatus, Recovers, Fails(Error::Reset)),
        Row::new(Effect::Hold { abort: HeldAbort::Ignored }, Recovers, Fails(Error::Reset)),
        Row::new(Effect::Duplicate, Ends(End::Protocol), Ends(End::Protocol)),
        Row::new(Effect::Remove, Ends(End::Removed), Ends(End::Removed)),
    ];
    let worlds = [World::Shadowed];
    let cases: usize = rows.iter().map(|row| everywhere_in(&worlds, row, &COMMANDS)).sum();
    println!("shadow doorbells: {cases} cases");
}
