//! Admin commands: features, log pages, events, refusals.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nvme::{ControllerEvent, Feature, Persistence};
use nvme_spec::NamespaceId;
use nvme_spec::feature::{
    AsyncEventConfiguration, FeatureId, FeatureSelect, TemperatureSelect, ThresholdSelect, VolatileWriteCache,
};
use nvme_spec::identify::Cns;

use super::device::{Device, block_bytes, flush, pattern, read, same, write};
use super::{Case, Subject, Verdict};

const SUITE: &str = "admin";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "features_that_are_set_are_read_back", run: features },
    Case { suite: SUITE, name: "data_survives_a_switched_off_write_cache", run: write_cache },
    Case { suite: SUITE, name: "a_refused_command_is_an_error_and_is_logged", run: refusals },
    Case { suite: SUITE, name: "the_health_log_counts_what_was_done", run: health },
    Case { suite: SUITE, name: "a_temperature_above_its_threshold_is_an_event", run: event },
    Case { suite: SUITE, name: "admin_commands_and_io_do_not_disturb_each_other", run: both },
];

/// How long a device may take to tell of an event.
const EVENT: Duration = Duration::from_secs(20);

fn features(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let controller = &device.controller;
    let (sensor, over) = (TemperatureSelect::COMPOSITE, ThresholdSelect::OVER);
    let before = controller.temperature_threshold(sensor, over).context("temperature threshold")?;
    controller.set_temperature_threshold(sensor, over, before - 1)?;
    let found = controller.temperature_threshold(sensor, over)?;
    controller.set_temperature_threshold(sensor, over, before)?;
    ensure!(found == before - 1, "a threshold of {} K was set, {found} K read back", before - 1);

    let before = controller.event_configuration().context("event configuration")?;
    let other = AsyncEventConfiguration::new().with_smart(before.smart() ^ 2);
    controller.set_event_configuration(other)?;
    let found = controller.event_configuration()?;
    controller.set_event_configuration(before)?;
    ensure!(
        found.smart() == other.smart(),
        "events {:#x} were set, {:#x} read",
        other.smart(),
        found.smart()
    );
    device.close()?;
    Ok(Verdict::Passed)
}

fn write_cache(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    if !device.controller.info().volatile_write_cache {
        return Verdict::skipped("the device has no volatile write cache");
    }
    let before = device.controller.write_cache()?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    let data = pattern(1, 0, 32 * block, block);
    write(&mut queue, 0, &data[..16 * block])?;
    let switched = device.controller.set_write_cache(VolatileWriteCache::new().with_wce(!before.wce()));
    let found = device.controller.write_cache()?;
    write(&mut queue, 16, &data[16 * block..])?;
    device
        .controller
        .set_write_cache(before)
        .or_else(|error| switched.is_err().then_some(()).ok_or(error))?;
    if let Err(error) = switched {
        return Verdict::skipped(format!("the device refuses to switch its write cache: {error}"));
    }
    ensure!(found.wce() != before.wce(), "the write cache was switched and reads as before");
    flush(&mut queue)?;
    same(&read(&mut queue, 0, data.len())?, &data, "written with the cache on and off")?;
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn refusals(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let controller = &device.controller;
    let before = controller.error_log().context("error log")?;
    let count = before.first().map_or(0, |entry| entry.error_count.get());
    let unknown = Feature::of_controller(FeatureId(0x7f));
    ensure!(controller.get_feature(unknown, FeatureSelect::CURRENT).is_err(), "feature 0x7f exists");
    ensure!(controller.set_feature(unknown, Persistence::UntilReset, &[]).is_err(), "feature 0x7f was set");
    ensure!(controller.identify(Cns(0xee), NamespaceId::NONE).is_err(), "identify 0xee was answered");
    ensure!(controller.fault().is_none(), "the controller was given up: {:?}", controller.fault());
    controller.smart_log().context("an admin command after three refused ones")?;
    let after = controller.error_log()?;
    device.close()?;
    let Some(newest) = after.first() else {
        return Verdict::skipped("refusals are errors; the device keeps no error log of them");
    };
    ensure!(newest.error_count.get() > count, "three errors and error count still {count}");
    ensure!(!newest.status().is_success(), "an entry of the error log says success");
    Ok(Verdict::Passed)
}

fn health(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let before = device.controller.smart_log()?;
    let mut queue = device.queue()?;
    let block = block_bytes(&queue);
    // Three thousand sectors and more: units are a thousand.
    let data = pattern(1, 0, 1 << 20, block);
    for _ in 0..3 {
        write(&mut queue, 0, &data)?;
        read(&mut queue, 0, data.len())?;
    }
    let after = device.controller.smart_log()?;
    ensure!(
        after.host_reads.get() >= before.host_reads.get() + 3,
        "reads: {} then {}",
        before.host_reads,
        after.host_reads
    );
    ensure!(
        after.host_writes.get() >= before.host_writes.get() + 3,
        "writes: {} then {}",
        before.host_writes,
        after.host_writes
    );
    ensure!(after.data_units_read.get() > before.data_units_read.get(), "3 MiB read and no data unit");
    ensure!(
        after.data_units_written.get() > before.data_units_written.get(),
        "3 MiB written and no data unit"
    );
    ensure!((200..400).contains(&after.temperature.get()), "{} K", after.temperature);
    ensure!(after.available_spare <= 100, "{} % of spare", after.available_spare);
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn event(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let controller = &device.controller;
    let configured = controller.event_configuration()?;
    let (sensor, over) = (TemperatureSelect::COMPOSITE, ThresholdSelect::OVER);
    let threshold = controller.temperature_threshold(sensor, over)?;
    let now_k = controller.smart_log()?.temperature.get();
    if now_k < 10 {
        return Verdict::skipped("the device reports no temperature");
    }
    controller.set_event_configuration(configured.with_smart(configured.smart() | 2))?;
    controller.take_events();
    controller.set_temperature_threshold(sensor, over, now_k - 5)?;
    let start = Instant::now();
    let told = loop {
        let events = controller.take_events();
        if let Some(event) = events.into_iter().find(|event| matches!(event, ControllerEvent::Health { .. }))
        {
            break Some(event);
        }
        if start.elapsed() > EVENT {
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let warned = controller.smart_log()?.critical_warning & 2 != 0;
    controller.set_temperature_threshold(sensor, over, threshold)?;
    controller.set_event_configuration(configured)?;
    let Some(event) = told else {
        ensure!(!warned, "the health log warns of the temperature, and no event came in {EVENT:?}");
        return Verdict::skipped("the device does not look at its temperature when the threshold changes");
    };
    let ControllerEvent::Health { temperature_k, .. } = &event else { return Ok(Verdict::Passed) };
    ensure!(temperature_k.abs_diff(now_k) < 30, "{event:?}, before {now_k} K");
    device.close()?;
    Ok(Verdict::Passed)
}

fn both(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    std::thread::scope(|scope| -> Result<()> {
        let admin = scope.spawn(|| -> Result<()> {
            for _ in 0..25 {
                device.controller.smart_log()?;
                device.controller.identify(Cns::CONTROLLER, NamespaceId::NONE)?;
            }
            Ok(())
        });
        let mut queue = device.queue()?;
        let block = block_bytes(&queue);
        for round in 0..60 {
            let data = pattern(round, 5, 4 * block, block);
            write(&mut queue, 5, &data)?;
            same(&read(&mut queue, 5, data.len())?, &data, &format!("round {round}"))?;
        }
        drop(queue);
        admin.join().map_err(|_| anyhow::anyhow!("the thread of the admin commands panicked"))?
    })?;
    device.close()?;
    Ok(Verdict::Passed)
}
