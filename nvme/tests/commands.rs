//! The driver's admin commands against the embedded controller.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::sync::Arc;

use nvme::transport::SystemTiming;
use nvme::transport::embedded::EmbeddedTransport;
use nvme::{CommandError, Controller, ControllerOptions, Feature, NamespaceUid, Persistence};
use nvme_emulator::{ControllerConfig, EmulatedController, Mode, NamespaceConfig};
use nvme_spec::NamespaceId;
use nvme_spec::feature::{
    Arbitration, AsyncEventConfiguration, FeatureId, FeatureSelect, TemperatureSelect, ThresholdSelect,
    VolatileWriteCache,
};
use nvme_spec::identify::{Cns, NamespaceList};
use zerocopy::FromBytes;

fn controller() -> Arc<Controller> {
    let config = ControllerConfig {
        mode: Mode::Inline,
        ..ControllerConfig::with_namespace(NamespaceConfig::memory(1 << 20))
    };
    let emulator = EmulatedController::new(config).unwrap();
    let transport = Arc::new(EmbeddedTransport::new(emulator, "emu:test"));
    Controller::bring_up(transport, Arc::new(SystemTiming::default()), &ControllerOptions::default()).unwrap()
}

#[test]
fn features_that_are_set_are_read_back() {
    let controller = controller();
    let (sensor, over) = (TemperatureSelect::COMPOSITE, ThresholdSelect::OVER);
    controller.set_temperature_threshold(sensor, over, 350).unwrap();
    assert_eq!(controller.temperature_threshold(sensor, over).unwrap(), 350);

    assert!(controller.write_cache().unwrap().wce());
    controller.set_write_cache(VolatileWriteCache::new()).unwrap();
    assert!(!controller.write_cache().unwrap().wce());
    let feature = Feature::of_controller(FeatureId::VOLATILE_WRITE_CACHE);
    assert_eq!(controller.get_feature(feature, FeatureSelect::DEFAULT).unwrap(), 1);

    let arbitration = Arbitration::new().with_ab(3);
    controller.set_arbitration(arbitration).unwrap();
    assert_eq!(controller.arbitration().unwrap().ab(), 3);

    let events = AsyncEventConfiguration::new().with_smart(2);
    controller.set_event_configuration(events).unwrap();
    assert_eq!(controller.event_configuration().unwrap(), events);
}

#[test]
fn refusals_are_errors_and_the_controller_goes_on() {
    let controller = controller();
    let unknown = Feature::of_controller(FeatureId(0xc0));
    let refused = controller.get_feature(unknown, FeatureSelect::CURRENT).unwrap_err();
    assert!(matches!(refused, CommandError::Admin(_)), "{refused}");
    assert!(controller.set_feature(unknown, Persistence::UntilReset, &[]).is_err());
    assert!(controller.identify(Cns(0xee), NamespaceId::NONE).is_err());
    assert!(controller.namespace_uids(NamespaceId::new(7)).is_err());
    controller.smart_log().unwrap();
}

#[test]
fn logs_and_identify_data_are_read() {
    let controller = controller();
    controller.error_log().unwrap();
    let firmware = controller.firmware_log().unwrap();
    assert_eq!(firmware.active_slot(), 1);
    assert_eq!(controller.changed_namespaces().unwrap().iter().count(), 0);

    let list = controller.identify(Cns::ACTIVE_NAMESPACES, NamespaceId::NONE).unwrap();
    let list = NamespaceList::read_from_bytes(&list[..]).unwrap();
    assert_eq!((list.ids[0].get(), list.ids[1].get()), (1, 0));
    let uids = controller.namespace_uids(NamespaceId::new(1)).unwrap();
    let raw = &controller.namespaces()[0].raw;
    assert!(
        uids.contains(&NamespaceUid::Nguid(raw.nguid)) || uids.contains(&NamespaceUid::Eui64(raw.eui64)),
        "{uids:?}"
    );
}

#[test]
fn an_error_that_a_command_met_is_in_the_error_log() {
    let controller = controller();
    let before = controller.error_log().unwrap().len();
    assert!(controller.identify(Cns(0xee), NamespaceId::NONE).is_err());
    let entries = controller.error_log().unwrap();
    assert_eq!(entries.len(), before + 1);
    assert!(!entries[0].status().is_success());
    assert_eq!(entries[0].queue_id().get(), 0);
}
