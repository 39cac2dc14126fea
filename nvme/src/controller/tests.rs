//! Bring-up, shutdown and failure against a controller that misbehaves.

use super::*;
use crate::fault::Fault;
use crate::identity::IdentityError;
use crate::transport::fake::{Fake, Script};
use nvme_spec::identify::{Cns, CommandSet};
use nvme_spec::registers::Cap;
use nvme_spec::{AdminOpcode, StatusCode};
use reactor::clock::Instant;
use std::time::Duration;

mod locks;

fn polled() -> ControllerOptions {
    ControllerOptions { keeper: Keeper::Polled, ..ControllerOptions::default() }
}

fn bring_up(fake: &Arc<Fake>) -> Result<Arc<Controller>, BringUpError> {
    let (transport, timing) = (Arc::clone(fake), Arc::clone(&fake.timing));
    Controller::bring_up(transport, timing, &polled())
}

fn refused(spoil: impl FnOnce(&mut Script)) -> BringUpError {
    let mut script = Script::default();
    spoil(&mut script);
    let fake = Fake::new(script);
    let error = bring_up(&fake).map(|_| ()).unwrap_err();
    // Whatever went wrong, nothing is left behind and time was bounded.
    assert_eq!(fake.regions_alive(), 0, "{error}");
    assert!(fake.timing.now() < Instant::ZERO + Duration::from_secs(120), "{error}");
    error
}

fn handshake(error: BringUpError) -> HandshakeError {
    match error {
        BringUpError::Handshake { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[test]
fn a_sound_controller_comes_up_and_goes_down() {
    let fake = Fake::new(Script::default());
    let controller = bring_up(&fake).unwrap();
    assert_eq!(controller.max_queues(), 4);
    assert_eq!(controller.info().max_transfer, Some(128 << 10));
    assert_eq!(controller.default_namespace().unwrap().blocks, 1 << 20);
    drop(controller);
    let last = fake.configurations();
    assert_eq!(last[last.len() - 2].shn(), 1, "notified of the shutdown");
    assert!(!last[last.len() - 1].en(), "then disabled");
    assert_eq!(fake.regions_alive(), 0);
}

#[test]
fn a_controller_left_enabled_is_disabled_first() {
    let fake = Fake::new(Script::default());
    fake.leave_enabled(true);
    bring_up(&fake).unwrap();
    assert!(!fake.configurations()[0].en());
}

#[test]
fn a_controller_left_between_enable_and_ready_is_given_time_then_disabled() {
    let fake = Fake::new(Script::default());
    fake.leave_enabled(false);
    bring_up(&fake).unwrap();
    assert!(!fake.configurations()[0].en());
    assert!(fake.timing.now() >= Instant::ZERO + crate::handshake::READY_FLOOR);
}

#[test]
fn impossible_capabilities_are_refused() {
    assert!(matches!(
        handshake(refused(|script| script.cap_bits = Some(u64::MAX))),
        HandshakeError::Removed { register: "CAP" }
    ));
    for (spoil, says) in [
        ((|script: &mut Script| script.cap.set_css(0)) as fn(&mut Script), "NVM command set"),
        (|script| script.cap.set_mqes_z(0), "MQES"),
        (|script| script.cap.set_mpsmin(1), "MPSMAX"),
        (|script| script.cap = script.cap.with_mpsmin(5).with_mpsmax(5), "pages of 64 KiB"),
        (|script| script.cap.set_dstrd(15), "DSTRD"),
    ] {
        let error = refused(spoil).to_string();
        assert!(error.contains(says) && error.starts_with("fake: CAP is 0x"), "{error}");
    }
}

/// Zoned namespaces were taken for others, and their writes failed.
#[test]
fn a_namespace_of_another_command_set_is_listed_and_refused_and_its_neighbours_work() {
    let script = || Script {
        namespace_ids: vec![1, 2, 3],
        command_sets: [(1, CommandSet::ZONED), (3, CommandSet::KEY_VALUE)].into(),
        ..Script::default()
    };
    let several = Script { cap: script().cap.with_css(Cap::CSS_NVM | Cap::CSS_SEVERAL), ..script() };
    let controller = bring_up(&Fake::new(several)).unwrap();
    assert_eq!(controller.namespaces().len(), 3);
    assert_eq!(controller.default_namespace().unwrap().nsid, NamespaceId::new(2));
    for (nsid, set) in [(1, "zoned"), (3, "key value")] {
        let error = controller.namespace(NamespaceId::new(nsid)).unwrap_err().to_string();
        let says = format!("namespace {nsid} of fake cannot be used: it uses the {set} command set");
        assert!(error.starts_with(&says), "{error}");
    }
    let silent = Script {
        cap: script().cap.with_css(Cap::CSS_NVM | Cap::CSS_SEVERAL),
        namespace_ids: vec![1],
        refuse_cns: vec![Cns::NAMESPACE_DESCRIPTORS],
        ..Script::default()
    };
    assert!(bring_up(&Fake::new(silent)).unwrap().default_namespace().is_ok(), "nothing said: NVM");
}

#[test]
fn every_wait_of_bring_up_ends() {
    assert!(matches!(
        handshake(refused(|script| script.becomes_ready = false)),
        HandshakeError::Timeout { goal: "CSTS.RDY=1 after CC.EN=1", waited_ms: 5000, .. }
    ));
    assert!(matches!(
        handshake(refused(|script| {
            script.becomes_ready = false;
            script.cap.set_to(60);
        })),
        HandshakeError::Timeout { waited_ms: 30_000, .. }
    ));
    assert!(matches!(
        handshake(refused(|script| script.fatal_on_enable = true)),
        HandshakeError::FatalStatus { csts: 3, .. }
    ));
    assert!(matches!(
        handshake(refused(|script| script.vanishes_on_enable = true)),
        HandshakeError::Removed { register: "CSTS" }
    ));
    let fake = Fake::new(Script { stops: false, ..Script::default() });
    fake.leave_enabled(true);
    let error = bring_up(&fake).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("CSTS.RDY=0 after CC.EN=0") && error.contains("CSTS is 0x1"), "{error}");
}

#[test]
fn admin_commands_that_fail_or_never_end_fail_bring_up() {
    for opcode in [AdminOpcode::IDENTIFY, AdminOpcode::SET_FEATURES] {
        let error = refused(|script| script.swallow = vec![opcode]);
        let BringUpError::Admin { source: AdminError::Failed(fault), .. } = error else { panic!("{error}") };
        assert!(matches!(fault, Fault::CommandTimeout { timeout_ms: 30_000, .. }), "{fault}");
        let error = refused(|script| script.refuse = vec![opcode]);
        let BringUpError::Admin { source: AdminError::Status { opcode: refused, status }, .. } = error else {
            panic!("{error}")
        };
        assert_eq!((refused, status.code()), (opcode, StatusCode::INTERNAL_ERROR));
    }
}

#[test]
fn a_controller_that_will_not_stop_keeps_the_admin_queues_memory() {
    let fake = Fake::new(Script { stops: false, swallow: vec![AdminOpcode::IDENTIFY], ..Script::default() });
    assert!(bring_up(&fake).is_err());
    assert_eq!(fake.regions_alive(), 3);
    let fake = Fake::new(Script {
        stops: false,
        can_revoke: true,
        swallow: vec![AdminOpcode::IDENTIFY],
        ..Script::default()
    });
    assert!(bring_up(&fake).is_err());
    assert_eq!(fake.regions_alive(), 0);
}

#[test]
fn hostile_identify_data_is_an_error_or_an_unusable_namespace() {
    let identity = |spoil: fn(&mut Script)| match refused(spoil) {
        BringUpError::Identity { source, .. } => source,
        other => panic!("{other}"),
    };
    assert!(matches!(identity(|script| script.controller.sqes = 0xff), IdentityError::EntrySize { .. }));
    assert!(matches!(
        identity(|script| script.namespace_ids = vec![3, 2]),
        IdentityError::NamespaceList { .. }
    ));
    assert!(matches!(identity(|script| script.namespace_ids = vec![5]), IdentityError::NamespaceList { .. }));
    let many = |script: &mut Script| {
        script.controller.nn.set(u32::MAX);
        script.namespace_ids = (1..3000).collect();
    };
    assert_eq!(identity(many), IdentityError::TooManyNamespaces(MAX_NAMESPACES));

    let mut script = Script::default();
    script.namespace.lbaf[0].lbads = 63;
    let controller = bring_up(&Fake::new(script)).unwrap();
    let error = controller.default_namespace().unwrap_err().to_string();
    assert!(error.starts_with("namespace 1 of fake cannot be used: its blocks of 2^63"), "{error}");

    let controller = bring_up(&Fake::new(Script { namespace_ids: vec![], ..Script::default() })).unwrap();
    let error = controller.default_namespace().unwrap_err().to_string();
    assert_eq!(error, "fake has no active namespace 1 (active: none)");
}

#[test]
fn queues_are_limited_to_what_was_asked_granted_and_has_doorbells() {
    let queues = |granted: u32, bar_bytes: u64| {
        let fake = Fake::new(Script { granted, bar_bytes, ..Script::default() });
        bring_up(&fake).unwrap().max_queues()
    };
    assert_eq!(queues(u32::MAX, 1 << 20), DEFAULT_QUEUES);
    assert_eq!(queues(7 | 2 << 16, 1 << 20), 3);
    assert_eq!(queues(u32::MAX, 0x1000 + 8 * 5), 4);
    assert_eq!(queues(u32::MAX, 0x1000 + 8), 0);
}

#[test]
fn a_queue_that_cannot_be_created_gives_its_number_back() {
    let fake = Fake::new(Script { granted: 0, ..Script::default() });
    let controller = bring_up(&fake).unwrap();
    let before = fake.regions_alive();
    fake.script().refuse = vec![AdminOpcode::CREATE_IO_SQ];
    let error = controller.create_queue(&QueueOptions::default()).map(|_| ()).unwrap_err();
    assert!(matches!(error, QueueError::Admin(AdminError::Status { .. })), "{error}");
    assert_eq!(fake.regions_alive(), before);
    fake.script().refuse.clear();
    let queue = controller.create_queue(&QueueOptions::default()).unwrap();
    let error = controller.create_queue(&QueueOptions::default()).map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "fake: all 1 I/O queues are in use");
    drop(queue);
    controller.create_queue(&QueueOptions::default()).unwrap();
}

#[test]
fn shutting_down_twice_or_after_a_fault_does_nothing() {
    let fake = Fake::new(Script::default());
    let controller = bring_up(&fake).unwrap();
    controller.shutdown().unwrap();
    let writes = fake.configurations().len();
    controller.shutdown().unwrap();
    assert_eq!(fake.configurations().len(), writes);
    assert_eq!(controller.fault(), Some(&Fault::ShutDown));
    assert_eq!(controller.life(), Life::Quiet);
    assert!(matches!(controller.smart_log(), Err(AdminError::Failed(Fault::ShutDown))));
}

/// A target was seen to set CSTS.CFS beside SHST=2: the shutdown was complete, and reported as failed.
#[test]
fn a_shutdown_that_is_complete_is_complete_in_spite_of_a_fatal_status() {
    let fake = Fake::new(Script::default());
    let controller = bring_up(&fake).unwrap();
    fake.script().fatal = true;
    assert_eq!(controller.shutdown(), Ok(()));
}
