//! What was set stays set through resets, and a format keeps nobody waiting: the driver against the embedded controller.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::sync::Arc;
use std::thread;

use nvme::transport::SystemTiming;
use nvme::transport::embedded::EmbeddedTransport;
use nvme::{
    CommandError, Controller, ControllerEvent, ControllerOptions, Feature, FormatError, FormatOptions,
    Persistence, QueueError, QueueOptions,
};
use nvme_emulator::{
    CommandMatch, ControllerConfig, Effect, EmulatedController, FaultRule, HeldAbort, Mode, NamespaceConfig,
    Times, When,
};
use nvme_spec::feature::{
    Arbitration, AsyncEventConfiguration, FeatureId, FeatureSelect, TemperatureSelect, ThresholdSelect,
    Timestamp, VolatileWriteCache,
};
use nvme_spec::{AdminOpcode, NamespaceId, Status, StatusCode};

struct Bench {
    device: Arc<EmulatedController>,
    controller: Arc<Controller>,
}

impl Bench {
    fn new() -> Self {
        let mut second = NamespaceConfig::memory(1 << 20);
        second.nsid = 2;
        let mut config = ControllerConfig {
            mode: Mode::Inline,
            ..ControllerConfig::with_namespace(NamespaceConfig::memory(1 << 20))
        };
        config.namespaces.push(second);
        let device = EmulatedController::new(config).unwrap();
        let transport = Arc::new(EmbeddedTransport::new(Arc::clone(&device), "emu:test"));
        let timing = Arc::new(SystemTiming::default());
        let controller = Controller::bring_up(transport, timing, &ControllerOptions::default()).unwrap();
        Self { device, controller }
    }

    /// A fatal error that the driver finds, and the reset that cures it.
    fn reset(&self) {
        let before = self.controller.resets();
        let log = CommandMatch::admin(AdminOpcode::GET_LOG_PAGE);
        self.device.faults().add(FaultRule::new(log, Effect::FatalStatus).times(Times::N(1)));
        assert!(self.controller.smart_log().is_err());
        // Waits for the reset.
        self.controller.smart_log().unwrap();
        assert_eq!(self.controller.resets(), before + 1);
    }
}

fn small(nsid: u32) -> QueueOptions {
    QueueOptions {
        namespace: Some(NamespaceId::new(nsid)),
        depth: 4,
        pool_bytes: 1 << 20,
        ..QueueOptions::default()
    }
}

/// A reset used to put every feature back to its default, silently: a write cache that had been switched off was on again.
#[test]
fn what_was_set_is_set_again_after_a_reset() {
    let bench = Bench::new();
    let controller = &bench.controller;
    let (sensor, over) = (TemperatureSelect::COMPOSITE, ThresholdSelect::OVER);
    let events = AsyncEventConfiguration::new().with_smart(2);
    controller.set_write_cache(VolatileWriteCache::new()).unwrap();
    controller.set_arbitration(Arbitration::new().with_ab(3)).unwrap();
    controller.set_temperature_threshold(sensor, over, 350).unwrap();
    controller.set_temperature_threshold(sensor, ThresholdSelect::UNDER, 250).unwrap();
    controller.set_temperature_threshold(sensor, over, 360).unwrap();
    controller.set_event_configuration(events).unwrap();
    controller.set_timestamp(Timestamp::from_millis(1_000_000)).unwrap();
    for _ in 0..2 {
        bench.reset();
        assert!(!controller.write_cache().unwrap().wce());
        assert_eq!(controller.arbitration().unwrap().ab(), 3);
        assert_eq!(controller.temperature_threshold(sensor, over).unwrap(), 360);
        assert_eq!(controller.temperature_threshold(sensor, ThresholdSelect::UNDER).unwrap(), 250);
        assert_eq!(controller.event_configuration().unwrap(), events, "set after the driver's own choice");
        assert!(controller.timestamp().unwrap().as_millis() >= 1_000_000, "a clock goes on");
    }
    assert!(
        !controller.take_events().iter().any(|event| matches!(event, ControllerEvent::SettingLost { .. }))
    );
}

#[test]
fn a_setting_that_is_refused_after_a_reset_is_reported_and_nothing_else_is_lost() {
    let bench = Bench::new();
    let controller = &bench.controller;
    controller.set_arbitration(Arbitration::new().with_ab(3)).unwrap();
    controller.set_write_cache(VolatileWriteCache::new()).unwrap();
    let arbitration = CommandMatch::admin(AdminOpcode::SET_FEATURES).selecting(FeatureId::ARBITRATION.0);
    let refusal =
        Effect::Status { status: Status::from_code(StatusCode::INVALID_FIELD), when: When::BeforeExecution };
    bench.device.faults().add(FaultRule::new(arbitration, refusal));
    bench.reset();
    let lost: Vec<_> = controller
        .take_events()
        .into_iter()
        .filter_map(|event| match event {
            ControllerEvent::SettingLost { feature } => Some(feature.id),
            _ => None,
        })
        .collect();
    assert_eq!(lost, [FeatureId::ARBITRATION]);
    assert!(!controller.write_cache().unwrap().wce());
}

#[test]
fn settings_are_counted_once_each_and_limited() {
    let bench = Bench::new();
    let arbitration = Feature::of_controller(FeatureId::ARBITRATION);
    for burst in 0..2 * nvme::MAX_SETTINGS as u32 {
        let feature = arbitration.with_dword_11(burst % 8);
        bench.controller.set_feature(feature, Persistence::UntilReset, &[]).unwrap();
    }
    bench.reset();
    let last = (2 * nvme::MAX_SETTINGS as u32 - 1) % 8;
    assert_eq!(bench.controller.get_feature(arbitration, FeatureSelect::CURRENT).unwrap(), last);
}

/// A format of an hour used to hold the admin queue for that hour: no queue could be opened, and nothing be recovered.
#[test]
fn while_a_namespace_is_formatted_everybody_else_goes_on() {
    let bench = Bench::new();
    let controller = &bench.controller;
    let format = CommandMatch::admin(AdminOpcode::FORMAT_NVM);
    let rule = bench.device.faults().add(FaultRule::new(format, Effect::Hold { abort: HeldAbort::Obeyed }));
    let (one, options) = (NamespaceId::new(1), FormatOptions::default());
    thread::scope(|scope| {
        let formatting = scope.spawn(|| controller.format_nvm(one, &options));
        while bench.device.faults().fired(rule) == 0 {
            thread::yield_now();
        }
        controller.smart_log().unwrap();
        drop(controller.create_queue(&small(2)).unwrap());
        let refused = controller.create_queue(&small(1)).map(drop);
        assert!(matches!(refused, Err(QueueError::Formatting { nsid: 1, .. })), "{refused:?}");
        assert_eq!(controller.format_nvm(NamespaceId::new(2), &options), Err(FormatError::Formatting(1)));
        bench.device.report_firmware_activation();
        while !controller.take_events().contains(&ControllerEvent::FirmwareActivation) {
            thread::yield_now();
        }
        assert!(!formatting.is_finished());
        bench.device.faults().release(rule);
        assert_eq!(formatting.join().unwrap(), Ok(()));
    });
    drop(controller.create_queue(&small(1)).unwrap());
    assert_eq!(controller.resets(), 0);
}

#[test]
fn a_reset_in_the_middle_of_a_format_ends_it_with_an_error_and_nothing_is_reset_twice() {
    let bench = Bench::new();
    let controller = &bench.controller;
    let format = CommandMatch::admin(AdminOpcode::FORMAT_NVM);
    let rule = bench.device.faults().add(FaultRule::new(format, Effect::Drop));
    let (one, options) = (NamespaceId::new(1), FormatOptions::default());
    thread::scope(|scope| {
        let formatting = scope.spawn(|| controller.format_nvm(one, &options));
        while bench.device.faults().fired(rule) == 0 {
            thread::yield_now();
        }
        bench.reset();
        let ended = formatting.join().unwrap();
        assert!(matches!(ended, Err(FormatError::Command(CommandError::Admin(_)))), "{ended:?}");
    });
    assert_eq!(controller.resets(), 1);
    bench.device.faults().remove(rule);
    assert_eq!(controller.format_nvm(one, &options), Ok(()));
}
