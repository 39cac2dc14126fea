//! The controller goes: pulled, unplugged, or with all of QEMU.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reactor::block::{IoError, Request};

use super::device::{drain, execute, open, queue, read, submit, write, writes};
use crate::qemu::{Configuration, Layer, Machine};
use crate::suite::{Environment, MachineCase, Verdict};

pub(super) const CASES: &[MachineCase] = &[
    MachineCase { suite: "qemu", name: "a_pulled_controller_fails_what_is_in_flight", run: pulled },
    MachineCase { suite: "qemu", name: "an_unplugged_controller_fails_what_is_in_flight", run: unplugged },
    MachineCase { suite: "qemu", name: "a_killed_qemu_fails_what_is_in_flight", run: killed },
];

fn pulled(_: &Environment) -> Result<Verdict> {
    removed(Machine::pull)
}

fn unplugged(_: &Environment) -> Result<Verdict> {
    removed(Machine::unplug)
}

fn killed(_: &Environment) -> Result<Verdict> {
    removed(|machine| {
        machine.kill();
        Ok(())
    })
}

/// Removes the controller idle, and with a queue full of requests.
fn removed(remove: fn(&Machine) -> Result<()>) -> Result<Verdict> {
    for in_flight in [0, 1, 64] {
        let slow = Layer::Null(200_000_000);
        let machine = Machine::start(&Configuration::new("removal").hot_plug().layer(slow))?;
        let controller = open(&machine)?;
        let mut queue = queue(&controller)?;
        writes(&mut queue, 0, 512, 1)?;
        for index in 0..in_flight {
            let request =
                if index % 2 == 0 { read(&queue, index, 512)? } else { write(&queue, index, 512, 2)? };
            submit(&mut queue, index, request)?;
        }
        remove(&machine)?;
        let done = drain(&mut queue)?;
        ensure!(done.len() as u64 == in_flight, "{} answers to {in_flight} requests", done.len());
        // What is submitted later fails at once or is answered as an error; at some moment the removal is known.
        let start = std::time::Instant::now();
        loop {
            match execute(&mut queue, Request::Flush)? {
                Err(IoError::DeviceFailed { detail }) => {
                    ensure!(!detail.is_empty(), "the failure has no words");
                    break;
                }
                Ok(_) | Err(_) => {
                    ensure!(start.elapsed() < super::device::BOUND, "the removal was never noticed");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        let fault = controller.fault().context("a controller that has gone has no fault")?;
        ensure!(!fault.to_string().is_empty(), "the fault has no words");
        drop(queue);
        // Must come back, whatever it says.
        let _already_gone = controller.shutdown();
    }
    Ok(Verdict::Passed)
}
