//! Commands that change the controller itself: QEMU offers them, and no other device under test should be put through them.
//!
//! Excludes: what every device is put through (`suite::commands`, `suite::admin`).

use anyhow::{Context, Result, ensure};
use nvme::{FormatError, FormatOptions};
use nvme_spec::NamespaceId;
use nvme_spec::identify::Oacs;
use reactor::block::BlockDevice;

use super::device::{drain, open, queue, read, reads_back, submit, writes};
use crate::qemu::{Configuration, Machine};
use crate::suite::{Environment, MachineCase, Verdict};

pub(super) const CASES: &[MachineCase] = &[
    MachineCase { suite: "qemu", name: "a_format_changes_the_blocks_and_empties_them", run: formats },
    MachineCase { suite: "qemu", name: "shadow_doorbells_take_most_register_writes_away", run: shadow },
    MachineCase { suite: "qemu", name: "every_log_page_is_read_or_refused_in_words", run: logs },
];

/// Index of the format of blocks of 2^`shift` bytes without metadata, if the namespace has one.
fn format_of(raw: &nvme_spec::identify::IdentifyNamespace, shift: u8) -> Option<u8> {
    let found = raw.formats().iter().position(|format| format.lbads == shift && format.ms.get() == 0)?;
    u8::try_from(found).ok()
}

fn formats(_: &Environment) -> Result<Verdict> {
    let machine = Machine::start(&Configuration::new("formatted"))?;
    let controller = open(&machine)?;
    ensure!(controller.info().raw.oacs().contains(Oacs::FORMAT), "QEMU does not offer Format NVM");
    let nsid = controller.default_namespace()?.nsid;
    let raw = controller.namespaces()[0].raw.clone();
    let mut used = queue(&controller)?;
    writes(&mut used, 0, 8192, 7)?;
    let large = format_of(&raw, 12).context("QEMU shows no format of 4,096-byte blocks")?;
    let small = format_of(&raw, 9).context("QEMU shows no format of 512-byte blocks")?;
    let options = |lba_format| FormatOptions { lba_format, ..FormatOptions::default() };
    // Somebody uses it.
    let refused = controller.format_nvm(nsid, &options(large));
    ensure!(matches!(refused, Err(FormatError::InUse(_))), "formatted under a queue: {refused:?}");
    reads_back(&mut used, 0, 8192, 7)?;
    drop(used);
    let foreign = NamespaceId::new(77);
    let refused = controller.format_nvm(foreign, &options(large));
    ensure!(matches!(refused, Err(FormatError::NoSuchNamespace(77))), "{refused:?}");
    let refused = controller.format_nvm(nsid, &options(63));
    ensure!(matches!(refused, Err(FormatError::NoSuchFormat { .. })), "{refused:?}");
    for (format, bytes) in [(large, 4096), (small, 512)] {
        controller.format_nvm(nsid, &options(format)).with_context(|| format!("format {format}"))?;
        let mut queue = queue(&controller)?;
        ensure!(queue.geometry().lba_size == bytes, "blocks of {} bytes", queue.geometry().lba_size);
        reads_back(&mut queue, 0, 8192, 0).context("after a format")?;
        writes(&mut queue, 3, 8192, 9)?;
        reads_back(&mut queue, 3, 8192, 9)?;
    }
    controller.shutdown()?;
    drop(controller);
    // Another user finds what this one left.
    let again = open(&machine)?;
    reads_back(&mut queue(&again)?, 3, 8192, 9)?;
    again.shutdown()?;
    Ok(Verdict::Passed)
}

fn shadow(_: &Environment) -> Result<Verdict> {
    const ROUNDS: u64 = 40;
    const DEPTH: u64 = 32;
    let machine = Machine::start(&Configuration::new("shadow doorbells"))?;
    let controller = open(&machine)?;
    ensure!(
        controller.info().raw.oacs().contains(Oacs::DOORBELL_BUFFER),
        "QEMU does not offer shadow doorbells"
    );
    let mut queue = queue(&controller)?;
    // Each command rung for by itself: without the buffer each is a register write, and so is each batch of completions.
    for round in 0..ROUNDS {
        for index in 0..DEPTH {
            let request = read(&queue, round * DEPTH + index, 512)?;
            submit(&mut queue, index, request)?;
        }
        ensure!(drain(&mut queue)?.iter().all(|done| done.result.is_ok()), "round {round}");
    }
    let counts = queue.counters().read();
    ensure!(counts.commands == ROUNDS * DEPTH, "{counts:?}");
    ensure!(counts.doorbells < counts.commands, "the buffer saves nothing: {counts:?}");
    ensure!(counts.timeouts == 0 && controller.resets() == 0, "a doorbell was left out: {counts:?}");
    Ok(Verdict::Passed)
}

fn logs(_: &Environment) -> Result<Verdict> {
    let machine = Machine::start(&Configuration::new("log pages"))?;
    let controller = open(&machine)?;
    let nsid = controller.default_namespace()?.nsid;
    let told = |what: &str, outcome: Result<(), String>| match outcome {
        Ok(()) => Ok(()),
        Err(words) if !words.is_empty() && controller.fault().is_none() => Ok(()),
        Err(words) => Err(anyhow::anyhow!("{what}: {words:?}, fault {:?}", controller.fault())),
    };
    controller.smart_log().context("health")?;
    controller.error_log().context("errors")?;
    controller.firmware_log().context("firmware slots")?;
    let effects = controller.command_effects().context("effects of commands")?;
    ensure!(effects.io[2].get() & 1 == 1, "the effects say that there is no Read");
    // Features that not every version of QEMU has.
    told("changed namespaces", controller.changed_namespaces().map(drop).map_err(|error| error.to_string()))?;
    told("health by namespace", controller.namespace_smart_log(nsid).map(drop).map_err(|e| e.to_string()))?;
    controller.smart_log().context("health, after pages that were refused")?;
    controller.shutdown()?;
    Ok(Verdict::Passed)
}
