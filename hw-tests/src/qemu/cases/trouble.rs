//! Errors of the medium, refused devices, and completions that the controller did not write.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use reactor::block::{BlockDevice, IoError, Request};

use super::device::{drain, execute, open, queue, read, reads_back, submit, write, writes};
use crate::qemu::configuration::fails;
use crate::qemu::{Configuration, Layer, Machine, Runs, matrix};
use crate::suite::{Environment, MachineCase, Verdict};

pub(super) const CASES: &[MachineCase] = &[
    MachineCase {
        suite: "qemu",
        name: "what_the_driver_cannot_use_is_refused_with_the_reason",
        run: refusals,
    },
    MachineCase {
        suite: "qemu",
        name: "a_medium_error_names_its_block_and_spares_the_neighbours",
        run: medium,
    },
    MachineCase {
        suite: "qemu",
        name: "a_flush_that_keeps_failing_is_an_error_and_nothing_else_is",
        run: flush,
    },
    MachineCase { suite: "qemu", name: "a_held_request_holds_up_no_other", run: held },
    MachineCase {
        suite: "qemu",
        name: "a_completion_nobody_owes_ends_the_controller_and_answers_each_request_once",
        run: forged,
    },
];

fn refusals(_: &Environment) -> Result<Verdict> {
    for configuration in matrix() {
        let Runs::Refused(words) = configuration.runs else { continue };
        let machine = Machine::start(&configuration)?;
        let controller = open(&machine)?;
        let refused = match controller.default_namespace() {
            Ok(_) => bail!("{}: the namespace is taken as usable", configuration.name),
            Err(error) => error.to_string(),
        };
        ensure!(refused.to_lowercase().contains(words), "{}: {refused}", configuration.name);
        controller.shutdown()?;
    }
    Ok(Verdict::Passed)
}

const BLOCK: usize = 512;

fn medium(_: &Environment) -> Result<Verdict> {
    const UNREADABLE: u64 = 1003;
    const UNWRITABLE: u64 = 2005;
    let rules = vec![fails("read", UNREADABLE, 5), fails("write", UNWRITABLE, 5)];
    let machine = Machine::start(&Configuration::new("medium errors").layer(Layer::Debug(rules)))?;
    let controller = open(&machine)?;
    let mut queue = queue(&controller)?;
    for (lba, byte) in [(UNREADABLE - 3, 1), (UNREADABLE + 1, 2), (UNWRITABLE - 5, 3), (UNWRITABLE + 1, 4)] {
        writes(&mut queue, lba, 3 * BLOCK, byte)?;
        reads_back(&mut queue, lba, 3 * BLOCK, byte)?;
    }
    for _ in 0..20 {
        let request = read(&queue, UNREADABLE, BLOCK)?;
        insist_on_medium(&execute(&mut queue, request)?, UNREADABLE, "0x281")?;
        let request = read(&queue, UNREADABLE - 3, 8 * BLOCK)?;
        insist_on_medium(&execute(&mut queue, request)?, UNREADABLE - 3, "0x281")?;
        let request = write(&queue, UNWRITABLE, BLOCK, 9)?;
        insist_on_medium(&execute(&mut queue, request)?, UNWRITABLE, "0x280")?;
    }
    // In the middle of others, in flight at once.
    for index in 0..32 {
        let request = read(&queue, UNREADABLE - 16 + index, BLOCK)?;
        submit(&mut queue, index, request)?;
    }
    for done in drain(&mut queue)? {
        ensure!(done.result.is_err() == (done.tag.0 == 16), "block {}: {:?}", done.tag.0, done.result);
    }
    reads_back(&mut queue, UNREADABLE + 1, 3 * BLOCK, 2)?;
    reads_back(&mut queue, UNWRITABLE + 1, 3 * BLOCK, 4)?;
    ensure!(controller.resets() == 0, "an error of the medium is no reason for a reset");
    ensure!(controller.fault().is_none(), "the controller was given up: {:?}", controller.fault());
    Ok(Verdict::Passed)
}

fn insist_on_medium<T>(found: &Result<T, IoError>, block: u64, status: &str) -> Result<()> {
    match found {
        Err(error @ IoError::Medium { lba, detail }) => {
            ensure!(*lba == block, "the error names block {lba}, not {block}: {error}");
            let status = status.trim_start_matches("0x");
            ensure!(detail.contains(status), "the error does not tell status {status}: {detail}");
            Ok(())
        }
        Err(other) => bail!("block {block}: {other}"),
        Ok(_) => bail!("block {block}: success where blkdebug fails it"),
    }
}

fn flush(_: &Environment) -> Result<Verdict> {
    let always = serde_json::json!({ "event": "none", "iotype": "flush", "errno": 5 });
    let machine = Machine::start(&Configuration::new("failing flush").layer(Layer::Debug(vec![always])))?;
    let controller = open(&machine)?;
    let mut queue = queue(&controller)?;
    for round in 1..4 {
        writes(&mut queue, 0, BLOCK, round)?;
        let flushed = execute(&mut queue, Request::Flush)?;
        ensure!(flushed.is_err(), "a flush that blkdebug failed has succeeded");
        reads_back(&mut queue, 0, BLOCK, round)?;
    }
    ensure!(controller.fault().is_none(), "the controller was given up: {:?}", controller.fault());
    Ok(Verdict::Passed)
}

fn held(_: &Environment) -> Result<Verdict> {
    let machine = Machine::start(&Configuration::new("held").layer(Layer::Debug(Vec::new())))?;
    let controller = open(&machine)?;
    let mut queue = queue(&controller)?;
    for lba in 0..16 {
        writes(&mut queue, lba, BLOCK, lba as u8)?;
    }
    machine.monitor().block("d0", "break read_aio held")?;
    let request = read(&queue, 3, BLOCK)?;
    submit(&mut queue, 99, request)?;
    let mut done = Vec::new();
    for lba in 4..12 {
        let request = read(&queue, lba, BLOCK)?;
        submit(&mut queue, lba, request)?;
        while queue.in_flight() > 1 {
            queue.process_completions(8, &mut |completion| done.push(completion.tag.0));
        }
    }
    ensure!(done == (4..12).collect::<Vec<_>>(), "answered while one was held: {done:?}");
    machine.monitor().block("d0", "resume held")?;
    let last = drain(&mut queue)?;
    ensure!(last.len() == 1 && last[0].tag.0 == 99 && last[0].result.is_ok(), "the one that was held");
    Ok(Verdict::Passed)
}

/// QEMU's registers, as its monitor reads them: BAR0 is where the transport puts the first BAR.
const REGISTERS: u64 = 0xe000_0000;
const ASQ: u64 = 0x28;

/// A queue's entry in the memory that the controller sees.
struct Rings {
    ram: std::fs::File,
    submissions: u64,
    completions: u64,
}

impl Rings {
    /// Finds I/O queue 1 by the admin commands that made it.
    fn find(machine: &Machine) -> Result<Self> {
        let printed = machine.monitor().human(&format!("xp /1gx {:#x}", REGISTERS + ASQ))?;
        let admin = printed.trim().rsplit(' ').next().and_then(|word| word.strip_prefix("0x"));
        let admin = admin.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let admin = admin.with_context(|| format!("no address in `{printed}`"))?;
        let ram = OpenOptions::new().read(true).write(true).open(machine.path().join("ram"))?;
        let (mut submissions, mut completions) = (None, None);
        for slot in 0..32 {
            let mut entry = [0; 64];
            ram.read_exact_at(&mut entry, admin + slot * 64)?;
            let address = u64::from_le_bytes(entry[24..32].try_into()?);
            match (entry[0], entry[40]) {
                (1, 1) => submissions = Some(address),
                (5, 1) => completions = Some(address),
                _ => {}
            }
        }
        let missing = "the admin queue does not show how I/O queue 1 was made";
        Ok(Self {
            ram,
            submissions: submissions.context(missing)?,
            completions: completions.context(missing)?,
        })
    }

    /// The identifier of the command in a slot.
    fn identifier(&self, slot: u64) -> Result<u16> {
        let mut word = [0; 2];
        self.ram.read_exact_at(&mut word, self.submissions + slot * 64 + 2)?;
        Ok(u16::from_le_bytes(word))
    }

    /// Writes a completion (NVMe 1.4 §4.6), its last word last.
    fn complete(&self, slot: u64, forged: Forged) -> Result<()> {
        let at = self.completions + slot * 16;
        self.ram.write_all_at(&[0; 8], at)?;
        self.ram
            .write_all_at(&(u32::from(forged.head) | u32::from(forged.queue) << 16).to_le_bytes(), at + 8)?;
        let last = u32::from(forged.identifier) | u32::from(forged.phase) << 16;
        self.ram.write_all_at(&last.to_le_bytes(), at + 12)?;
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Forged {
    queue: u16,
    head: u16,
    identifier: u16,
    phase: u16,
}

/// A command stays in flight for this long, so that something can be written meanwhile.
const SLOW: Layer = Layer::Null(1_500_000_000);

fn forged(_: &Environment) -> Result<Verdict> {
    type Change = fn(Forged) -> Forged;
    let kinds: [(&str, Option<&str>, Change); 5] = [
        ("of the earlier phase", None, |right| Forged { phase: 0, ..right }),
        ("of an unknown command", Some("not in flight"), |right| Forged {
            identifier: right.identifier ^ 0x15,
            ..right
        }),
        ("of a command out of range", Some("out of range"), |right| Forged { identifier: 0xffff, ..right }),
        ("of another queue", Some("submission queue 7"), |right| Forged { queue: 7, ..right }),
        ("with an impossible head", Some("impossible"), |right| Forged { head: 0xfff0, ..right }),
    ];
    for (what, words, change) in kinds {
        one_forged(words, change).with_context(|| format!("a completion {what}"))?;
    }
    Ok(Verdict::Passed)
}

/// Writes a completion while a read is in flight; with `words` it must end the controller, without them change nothing.
fn one_forged(words: Option<&str>, change: fn(Forged) -> Forged) -> Result<()> {
    let machine = Machine::start(&Configuration::new("forged").layer(SLOW))?;
    let controller = open(&machine)?;
    let mut queue = queue(&controller)?;
    let rings = Rings::find(&machine)?;
    let request = read(&queue, 5, BLOCK)?;
    submit(&mut queue, 1, request)?;
    let right = Forged { queue: 1, head: 1, identifier: rings.identifier(0)?, phase: 1 };
    rings.complete(0, change(right))?;
    let done = drain(&mut queue)?;
    ensure!(done.len() == 1, "{} answers to one request", done.len());
    match (words, &done[0].result) {
        (None, result) => {
            result.clone().context("the read")?;
            let buffer = done[0].buffer.as_ref().context("a read without its buffer")?;
            let mut data = [1; BLOCK];
            buffer.read_at(0, &mut data);
            ensure!(data == [0; BLOCK], "the read was answered before its data was there");
            reads_back(&mut queue, 9, BLOCK, 0)
        }
        (Some(words), Err(IoError::DeviceFailed { detail })) => {
            ensure!(detail.contains(words), "the failure does not say `{words}`: {detail}");
            drop(queue);
            drop(done);
            let _ended_before = controller.shutdown();
            drop(controller);
            // Somebody else finds it in order.
            let controller = open(&machine)?;
            reads_back(&mut self::queue(&controller)?, 9, BLOCK, 0)
        }
        (Some(_), other) => bail!("the read ended as {other:?}"),
    }
}
