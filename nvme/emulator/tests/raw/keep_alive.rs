//! The keep alive timer: who promised to call and does not is given up.

use std::time::{Duration, Instant};

use nvme_emulator::{ControllerConfig, Mode};
use nvme_spec::feature::{FeatureId, FeatureSelect};
use nvme_spec::registers::{self, Csts};
use nvme_spec::{AdminOpcode, SubmissionEntry};

use crate::initiator::{Host, memory_config, threaded};

fn keep_alive() -> SubmissionEntry {
    SubmissionEntry { opcode: AdminOpcode::KEEP_ALIVE.0, ..SubmissionEntry::default() }
}

#[test]
fn host_that_promised_to_keep_alive_and_does_not_is_given_up() {
    for mode in [Mode::Inline, Mode::Stepped] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let ms = Duration::from_millis(1);
        let get = SubmissionEntry::get_features(FeatureId::KEEP_ALIVE_TIMER, FeatureSelect::CURRENT);
        assert_eq!(host.admin.ok(get), 0, "off unless it is asked for");
        host.ctrl.advance(1_000_000 * ms);
        host.admin.ok(SubmissionEntry::set_features(FeatureId::KEEP_ALIVE_TIMER, 950));
        assert_eq!(host.admin.ok(get), 1000);
        for _ in 0..5 {
            host.ctrl.advance(999 * ms);
            host.ctrl.step();
            host.admin.ok(keep_alive());
        }
        host.ctrl.advance(1000 * ms);
        host.ctrl.step();
        assert!(Csts::from(host.ctrl.read32(registers::CSTS)).cfs(), "{mode:?}");
        // A reset makes it as new, without a timer.
        host.ctrl.reset_function();
        assert!(!Csts::from(host.ctrl.read32(registers::CSTS)).cfs());
        host.ctrl.advance(1_000_000 * ms);
    }
}

#[test]
fn sleeping_controller_notices_that_its_host_is_gone() {
    let mut host = Host::new(ControllerConfig { mode: threaded(2), ..memory_config(1 << 20, 512) });
    host.admin.ok(SubmissionEntry::set_features(FeatureId::KEEP_ALIVE_TIMER, 100));
    let deadline = Instant::now() + Duration::from_secs(60);
    while !Csts::from(host.ctrl.read32(registers::CSTS)).cfs() {
        assert!(Instant::now() < deadline, "it sleeps on");
        std::thread::sleep(Duration::from_millis(5));
    }
}
