//! Admin commands: identify, features, log pages, asynchronous events, abort.

use nvme_emulator::{ControllerConfig, Mode, NamespaceConfig, WriteCache};
use nvme_emulator::{ControllerError, Reliability};
use nvme_spec::command::GetLogPage;
use nvme_spec::event::AsyncEventCode;
use nvme_spec::feature::{
    FeatureCapabilities, FeatureId, FeatureSelect, HostBehavior, NumberOfQueues, Timestamp,
};
use nvme_spec::identify::{Cns, IdentifyController, IdentifyNamespace, NamespaceList, Vwc};
use nvme_spec::log::{
    AsyncEvent, CommandEffectsLog, ErrorEntry, FirmwareSlotLog, LogPageId, SmartLog, SupportedLogPages,
};
use nvme_spec::registers::Doorbell;
use nvme_spec::{AdminOpcode, CommandId, NamespaceId, NvmOpcode, QueueId, StatusCode, SubmissionEntry};
use zerocopy::{FromBytes, IntoBytes};

use crate::initiator::{Buffer, Host, NS1, PAGE, memory_config, pattern, threaded};

fn two_namespaces() -> ControllerConfig {
    ControllerConfig {
        namespaces: vec![
            NamespaceConfig::memory(1 << 20).with_nsid(5).with_lba_size(512),
            NamespaceConfig::memory(8 << 20).with_nsid(2),
        ],
        ..ControllerConfig::default()
    }
}

fn log(lid: LogPageId, bytes: u32) -> SubmissionEntry {
    let page = GetLogPage { lid, dwords_z: bytes / 4 - 1, offset: 0, retain_event: false };
    SubmissionEntry::get_log_page(NamespaceId::BROADCAST, page)
}

#[test]
fn identify_controller_says_what_was_configured() {
    let mut host = Host::new(ControllerConfig {
        serial: "S1".into(),
        model: "M".into(),
        mdts: 5,
        aerl_z: 7,
        ..two_namespaces()
    });
    let data = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
    let data = IdentifyController::read_from_bytes(&data).unwrap();
    assert_eq!(&data.sn, b"S1                  ");
    assert_eq!(data.mn[..2], *b"M ");
    assert_eq!((data.mdts, data.aerl_z, data.nn.get(), data.sqes, data.cqes), (5, 7, 5, 0x66, 0x44));
    assert_eq!(data.ver.get(), 0x1_0400);
    assert_eq!(data.tnvmcap.get(), 9 << 20);
    assert!(data.vwc().contains(Vwc::PRESENT));
    let mut host = Host::new(ControllerConfig { write_cache: WriteCache::Absent, ..two_namespaces() });
    let data = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
    assert!(!IdentifyController::read_from_bytes(&data).unwrap().vwc().contains(Vwc::PRESENT));
}

#[test]
fn identify_namespace_knows_active_inactive_and_invalid() {
    let mut host = Host::new(two_namespaces());
    let identify = |nsid| SubmissionEntry::identify(Cns::NAMESPACE, NamespaceId::new(nsid));
    let data = IdentifyNamespace::read_from_bytes(&host.admin_data(identify(5))).unwrap();
    assert_eq!((data.nsze.get(), data.ncap.get(), data.nuse.get()), (2048, 2048, 0));
    assert_eq!((data.lbaf[data.format_index()].lbads, data.dlfeat & 7), (9, 1));
    let other = IdentifyNamespace::read_from_bytes(&host.admin_data(identify(2))).unwrap();
    assert_eq!((other.nsze.get(), other.lbaf[other.format_index()].lbads), (2048, 12));
    assert_ne!(data.nguid, other.nguid);
    assert!(host.admin_data(identify(3)).iter().all(|b| *b == 0));
    let page = host.map(4096);
    for nsid in [0, 6, u32::MAX] {
        let mut command = identify(nsid);
        command.prp1.set(page.iova());
        assert_eq!(host.admin.status(command), StatusCode::INVALID_NAMESPACE_OR_FORMAT, "{nsid}");
    }
}

#[test]
fn active_list_is_ascending_and_starts_after_the_identifier_given() {
    let mut host = Host::new(two_namespaces());
    for (after, expected) in [(0, [2, 5, 0]), (2, [5, 0, 0]), (4, [5, 0, 0]), (5, [0; 3])] {
        let command = SubmissionEntry::identify(Cns::ACTIVE_NAMESPACES, NamespaceId::new(after));
        let list = NamespaceList::read_from_bytes(&host.admin_data(command)).unwrap();
        assert_eq!([list.ids[0].get(), list.ids[1].get(), list.ids[2].get()], expected);
    }
    let bad = SubmissionEntry::identify(Cns::ACTIVE_NAMESPACES, NamespaceId::new(u32::MAX - 1));
    assert_eq!(host.admin.status(bad), StatusCode::INVALID_NAMESPACE_OR_FORMAT);
}

#[test]
fn namespace_descriptors_carry_the_identify_identifiers() {
    let mut host = Host::new(two_namespaces());
    let nsid = NamespaceId::new(5);
    let namespace = host.admin_data(SubmissionEntry::identify(Cns::NAMESPACE, nsid));
    let namespace = IdentifyNamespace::read_from_bytes(&namespace).unwrap();
    let list = host.admin_data(SubmissionEntry::identify(Cns::NAMESPACE_DESCRIPTORS, nsid));
    assert_eq!(list[..4], [1, 8, 0, 0]);
    assert_eq!(list[4..12], namespace.eui64);
    assert_eq!(list[12..16], [2, 16, 0, 0]);
    assert_eq!(list[16..32], namespace.nguid);
    assert!(list[32..].iter().all(|b| *b == 0));
    let inactive = SubmissionEntry::identify(Cns::NAMESPACE_DESCRIPTORS, NamespaceId::new(3));
    assert_eq!(host.admin.status(inactive), StatusCode::INVALID_NAMESPACE_OR_FORMAT);
}

#[test]
fn identify_of_other_structures_and_to_bad_memory_is_refused() {
    let mut host = Host::new(two_namespaces());
    for cns in [0x04, 0x05, 0x06, 0x10, 0x13, 0xff] {
        let command = SubmissionEntry::identify(Cns(cns), NamespaceId::NONE);
        assert_eq!(host.admin.status(command), StatusCode::INVALID_FIELD, "{cns:#x}");
    }
    let nowhere = SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE);
    assert_eq!(host.admin.status(nowhere), StatusCode::DATA_TRANSFER_ERROR);
    assert_eq!(host.ctrl.memory().fault_count(), 1);
}

#[test]
fn identify_crosses_a_page_boundary_with_the_second_prp() {
    let mut host = Host::new(two_namespaces());
    let expected = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
    let region = host.map(2 * PAGE as usize);
    let mut command = SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE);
    command.prp1.set(region.iova() + 1000);
    command.prp2.set(region.iova() + PAGE);
    host.admin.ok(command);
    assert!(crate::initiator::bytes(region.slice())[1000..][..4096] == expected);
}

#[test]
fn number_of_queues_is_granted_once_and_limits_the_identifiers() {
    let mut host = Host::new(ControllerConfig { io_queues: 4, ..memory_config(1 << 20, 512) });
    let ask = |sq_z, cq_z| {
        let wish = NumberOfQueues::new().with_submission_z(sq_z).with_completion_z(cq_z);
        SubmissionEntry::set_features(FeatureId::NUMBER_OF_QUEUES, wish.into())
    };
    assert_eq!(host.admin.ok(ask(99, 99)), 0x3_0003);
    assert_eq!(host.admin.ok(ask(1, 1)), 0x1_0001);
    assert_eq!(host.admin.status(ask(0xffff, 0)), StatusCode::INVALID_FIELD);
    assert_eq!(host.admin.status(ask(0, 0xffff)), StatusCode::INVALID_FIELD);
    let current = SubmissionEntry::get_features(FeatureId::NUMBER_OF_QUEUES, FeatureSelect::CURRENT);
    assert_eq!(host.admin.ok(current), 0x1_0001);
    host.io_pair(2, 8);
    assert_eq!(host.admin.status(ask(3, 3)), StatusCode::COMMAND_SEQUENCE_ERROR);
    let page = host.map(4096);
    let polled = nvme_spec::command::QueueInterrupt::Disabled;
    let mut third = SubmissionEntry::create_io_cq(QueueId::new(3), 7, polled);
    third.prp1.set(page.iova());
    assert_eq!(host.admin.status(third), StatusCode::INVALID_QUEUE_ID);
}

#[test]
fn features_have_current_default_and_saved_values_and_capabilities() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let cases = [
        (FeatureId::ARBITRATION, 7, 3),
        (FeatureId::VOLATILE_WRITE_CACHE, 1, 0),
        (FeatureId::TEMPERATURE_THRESHOLD, 0xffff, 350),
        (FeatureId::WRITE_ATOMICITY_NORMAL, 0, 1),
        (FeatureId::ASYNC_EVENT_CONFIGURATION, 0, 0x3ff),
        (FeatureId::POWER_MANAGEMENT, 0, 0),
    ];
    for (feature, default, other) in cases {
        let get = |select| SubmissionEntry::get_features(feature, select);
        assert_eq!(host.admin.ok(get(FeatureSelect::CURRENT)), default, "{feature}");
        host.admin.ok(SubmissionEntry::set_features(feature, other));
        assert_eq!(host.admin.ok(get(FeatureSelect::CURRENT)), other, "{feature}");
        assert_eq!(host.admin.ok(get(FeatureSelect::DEFAULT)), default, "{feature}");
        assert_eq!(host.admin.ok(get(FeatureSelect::SAVED)), default, "{feature}");
        let capabilities = FeatureCapabilities::new().with_changeable(true);
        assert_eq!(host.admin.ok(get(FeatureSelect::SUPPORTED_CAPABILITIES)), u32::from(capabilities));
        assert_eq!(host.admin.status(get(FeatureSelect(5))), StatusCode::INVALID_FIELD);
        let mut save = SubmissionEntry::set_features(feature, other);
        save.cdw10.set(save.cdw10.get() | 1 << 31);
        assert_eq!(host.admin.status(save), StatusCode::FEATURE_NOT_SAVEABLE);
        let mut of_namespace = SubmissionEntry::set_features(feature, other);
        of_namespace.nsid.set(1);
        assert_eq!(host.admin.status(of_namespace), StatusCode::FEATURE_NOT_NAMESPACE_SPECIFIC);
    }
}

#[test]
fn features_with_impossible_values_or_unknown_identifiers_are_refused() {
    let mut host = Host::new(ControllerConfig { write_cache: WriteCache::Absent, ..two_namespaces() });
    let bad = [
        (FeatureId::VOLATILE_WRITE_CACHE, 1), // there is none
        (FeatureId::POWER_MANAGEMENT, 1),
        (FeatureId::TEMPERATURE_THRESHOLD, 1 << 16 | 300), // no such sensor
        (FeatureId::TEMPERATURE_THRESHOLD, 2 << 20 | 300), // no such threshold
        (FeatureId::INTERRUPT_VECTOR_CONFIGURATION, 17),
        (FeatureId::ASYNC_EVENT_CONFIGURATION, 1 << 10), // not an event of this controller
        (FeatureId::HOST_MEMORY_BUFFER, 0),
        (FeatureId(0), 0),
        (FeatureId(0xff), 0),
    ];
    for (feature, value) in bad {
        let set = SubmissionEntry::set_features(feature, value);
        assert_eq!(host.admin.status(set), StatusCode::INVALID_FIELD, "{feature} {value:#x}");
    }
    let get = SubmissionEntry::get_features(FeatureId::VOLATILE_WRITE_CACHE, FeatureSelect::CURRENT);
    assert_eq!(host.admin.status(get), StatusCode::INVALID_FIELD);
}

#[test]
fn error_recovery_belongs_to_a_namespace() {
    let mut host = Host::new(two_namespaces());
    let with_nsid = |mut entry: SubmissionEntry, nsid: u32| {
        entry.nsid.set(nsid);
        entry
    };
    let set = |value| SubmissionEntry::set_features(FeatureId::ERROR_RECOVERY, value);
    let get = SubmissionEntry::get_features(FeatureId::ERROR_RECOVERY, FeatureSelect::CURRENT);
    host.admin.ok(with_nsid(set(5), 2));
    assert_eq!(host.admin.ok(with_nsid(get, 2)), 5);
    assert_eq!(host.admin.ok(with_nsid(get, 5)), 0);
    host.admin.ok(with_nsid(set(9), u32::MAX));
    assert_eq!(host.admin.ok(with_nsid(get, 5)), 9);
    assert_eq!(host.admin.status(with_nsid(set(1), 3)), StatusCode::INVALID_FIELD);
    assert_eq!(host.admin.status(with_nsid(set(1 << 16), 2)), StatusCode::INVALID_FIELD);
    assert_eq!(host.admin.status(with_nsid(set(1), 0)), StatusCode::INVALID_NAMESPACE_OR_FORMAT);
}

/// SPDK's compliance program reads it without a namespace. That has an answer as long as all namespaces have the same.
#[test]
fn error_recovery_of_no_namespace_is_what_all_of_them_have() {
    let mut host = Host::new(two_namespaces());
    let get = SubmissionEntry::get_features(FeatureId::ERROR_RECOVERY, FeatureSelect::CURRENT);
    let mut set = SubmissionEntry::set_features(FeatureId::ERROR_RECOVERY, 7);
    assert_eq!(host.admin.ok(get), 0);
    set.nsid.set(u32::MAX);
    host.admin.ok(set);
    assert_eq!(host.admin.ok(get), 7);
    set.nsid.set(2);
    set.cdw11.set(8);
    host.admin.ok(set);
    assert_eq!(host.admin.status(get), StatusCode::INVALID_NAMESPACE_OR_FORMAT);
}

#[test]
fn vector_configuration_is_kept_for_each_vector() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let feature = FeatureId::INTERRUPT_VECTOR_CONFIGURATION;
    host.admin.ok(SubmissionEntry::set_features(feature, 1 << 16 | 3));
    for (vector, expected) in [(3, 1 << 16 | 3), (4, 4)] {
        let mut get = SubmissionEntry::get_features(feature, FeatureSelect::CURRENT);
        get.cdw11.set(vector);
        assert_eq!(host.admin.ok(get), expected);
    }
}

#[test]
fn error_log_names_the_failed_command_newest_first() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let mut io = host.io_pair(3, 8);
    let done = io.run(SubmissionEntry::read(NS1, 0x1_0000_0001, 0));
    assert!(done.status().more() && done.status().dnr());
    host.admin.run(SubmissionEntry { opcode: 0xc1, ..SubmissionEntry::default() });
    let page = host.admin_data(log(LogPageId::ERROR, 64 * 4));
    let entries: Vec<_> =
        page.chunks_exact(64).map(|raw| ErrorEntry::read_from_bytes(raw).unwrap()).collect();
    assert_eq!((entries[0].error_count.get(), entries[0].sq_id.get()), (2, 0));
    assert_eq!((entries[1].error_count.get(), entries[1].sq_id.get()), (1, 3));
    assert_eq!(entries[1].cid, done.cid);
    assert_eq!((entries[1].lba.get(), entries[1].nsid.get()), (0x1_0000_0001, 1));
    assert_eq!(entries[1].status_phase.get() & !1, done.status_phase.get() & !1);
    assert_eq!(entries[2].error_count.get(), 0);
}

#[test]
fn smart_log_counts_data_and_power_cycles() {
    let mut host = Host::new(memory_config(16 << 20, 512));
    let mut io = host.io_pair(1, 8);
    let buffer = Buffer::filled(&host, &pattern(1, 512 * 600));
    for _ in 0..2 {
        io.ok(buffer.attach(SubmissionEntry::write(NS1, 0, 599, nvme_spec::command::ForceUnitAccess::No)));
    }
    io.ok(buffer.attach(SubmissionEntry::read(NS1, 0, 599)));
    let smart = SmartLog::read_from_bytes(&host.admin_data(log(LogPageId::SMART, 512))[..512]).unwrap();
    assert_eq!((smart.data_units_written.get(), smart.data_units_read.get()), (2, 1));
    assert_eq!((smart.host_writes.get(), smart.host_reads.get()), (2, 1));
    assert_eq!((smart.power_cycles.get(), smart.unsafe_shutdowns.get()), (1, 0));
    assert_eq!((smart.critical_warning, smart.temperature.get()), (0, 310));
}

#[test]
fn log_pages_can_be_read_in_parts_and_end_in_zeroes() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let whole = host.admin_data(log(LogPageId::FIRMWARE_SLOT, 512));
    let firmware = FirmwareSlotLog::read_from_bytes(&whole[..512]).unwrap();
    assert_eq!((firmware.afi, &firmware.revisions[0]), (1, b"1.0     "));
    let part = |offset, bytes: u32| {
        let page = GetLogPage {
            lid: LogPageId::FIRMWARE_SLOT,
            dwords_z: bytes / 4 - 1,
            offset,
            retain_event: false,
        };
        SubmissionEntry::get_log_page(NamespaceId::NONE, page)
    };
    let rest = host.admin_data(part(8, 1024));
    assert!(rest[..504] == whole[8..512] && rest[504..1024].iter().all(|b| *b == 0));
    for offset in [2, 516, u64::MAX - 3] {
        assert_eq!(host.admin.status(part(offset, 4)), StatusCode::INVALID_FIELD, "{offset}");
    }
    assert!(host.admin_data(log(LogPageId::CHANGED_NAMESPACES, 4096)).iter().all(|b| *b == 0));
    assert_eq!(host.admin.status(log(LogPageId(0x7f), 4)), StatusCode::INVALID_LOG_PAGE);
    let page = GetLogPage { lid: LogPageId::SMART, dwords_z: 3, offset: 0, retain_event: false };
    assert_eq!(host.admin.status(SubmissionEntry::get_log_page(NS1, page)), StatusCode::INVALID_FIELD);
}

fn ring_nowhere(host: &Host) {
    host.admin.doorbell(Doorbell::SubmissionTail, 9, 1);
}

fn event_of(done: &nvme_spec::CompletionEntry) -> (u8, u8, u8) {
    let event = AsyncEvent::from(done.dw0.get());
    (event.event_type(), event.information(), event.log_page())
}

#[test]
fn event_requests_are_held_until_something_happens_and_rearmed_by_the_log_page() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let first = host.admin.push(SubmissionEntry::async_event_request());
    let second = host.admin.push(SubmissionEntry::async_event_request());
    host.admin.ring();
    assert!(host.admin.peek().is_none());
    ring_nowhere(&host);
    let done = host.admin.wait();
    assert_eq!((done.cid.get(), event_of(&done)), (first, (0, 0, 1)));
    // The same type is masked until its page was read, whatever else happens.
    ring_nowhere(&host);
    host.admin.doorbell(Doorbell::SubmissionTail, 0, 999);
    assert!(host.admin.peek().is_none());
    let retained = GetLogPage { lid: LogPageId::ERROR, dwords_z: 15, offset: 0, retain_event: true };
    host.admin_data(SubmissionEntry::get_log_page(NamespaceId::NONE, retained));
    ring_nowhere(&host);
    assert!(host.admin.peek().is_none());
    host.admin_data(log(LogPageId::ERROR, 64));
    host.admin.doorbell(Doorbell::SubmissionTail, 0, 999);
    let done = host.admin.wait();
    assert_eq!((done.cid.get(), event_of(&done)), (second, (0, 1, 1)));
}

#[test]
fn event_that_finds_no_request_waits_for_one() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    ring_nowhere(&host);
    let cid = host.admin.push(SubmissionEntry::async_event_request());
    host.admin.ring();
    let done = host.admin.wait();
    assert_eq!((done.cid.get(), event_of(&done)), (cid, (0, 0, 1)));
}

#[test]
fn temperature_beyond_a_threshold_is_reported_if_wanted() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    host.admin.push(SubmissionEntry::async_event_request());
    host.admin.ring();
    host.admin.ok(SubmissionEntry::set_features(FeatureId::TEMPERATURE_THRESHOLD, 300));
    assert!(host.admin.peek().is_none());
    let smart = SmartLog::read_from_bytes(&host.admin_data(log(LogPageId::SMART, 512))[..512]).unwrap();
    assert_eq!(smart.critical_warning, 1 << 1);
    host.admin.push(SubmissionEntry::set_features(FeatureId::ASYNC_EVENT_CONFIGURATION, 1 << 1));
    host.admin.ring();
    let done = [host.admin.wait(), host.admin.wait()];
    assert!(done.iter().any(|d| event_of(d) == (1, 1, 2)), "{done:?}");
}

#[test]
fn event_requests_beyond_the_limit_are_refused() {
    let mut host = Host::new(ControllerConfig { aerl_z: 1, ..memory_config(1 << 20, 512) });
    for _ in 0..2 {
        host.admin.push(SubmissionEntry::async_event_request());
    }
    host.admin.ring();
    assert!(host.admin.peek().is_none());
    assert_eq!(host.admin.status(SubmissionEntry::async_event_request()), StatusCode::AER_LIMIT_EXCEEDED);
}

#[test]
fn event_requests_can_be_aborted() {
    for mode in [Mode::Inline, threaded(1)] {
        let mut host = Host::new(ControllerConfig { mode, ..memory_config(1 << 20, 512) });
        let cid = host.admin.push(SubmissionEntry::async_event_request());
        host.admin.push(SubmissionEntry::abort(QueueId::ADMIN, CommandId::new(cid)));
        host.admin.ring();
        let done = [host.admin.wait(), host.admin.wait()];
        let aborted = done.iter().find(|d| d.cid.get() == cid).unwrap();
        assert_eq!(aborted.status().code(), StatusCode::ABORT_REQUESTED);
        let abort = done.iter().find(|d| d.cid.get() != cid).unwrap();
        assert_eq!(abort.dw0.get() & 1, 0);
    }
}

#[test]
fn waiting_commands_can_be_aborted_and_others_cannot() {
    let mut host = Host::new(ControllerConfig { mode: Mode::Stepped, ..memory_config(1 << 20, 512) });
    let mut io = host.io_pair(1, 8);
    let first = io.push(SubmissionEntry::flush(NS1));
    let second = io.push(SubmissionEntry::flush(NS1));
    io.ring();
    let abort = |cid| SubmissionEntry::abort(QueueId::new(1), CommandId::new(cid));
    // Queue 0 comes first in a round, so the abort is executed before the commands it is about.
    let cid = host.admin.push(abort(second));
    host.admin.push(abort(0x7777));
    host.admin.push(SubmissionEntry::abort(QueueId::new(9), CommandId::new(second)));
    host.admin.push(SubmissionEntry::abort(QueueId::new(999), CommandId::new(second)));
    host.admin.ring();
    assert_eq!(host.ctrl.step(), 6);
    let done = host.admin.wait();
    assert_eq!((done.cid.get(), done.dw0.get() & 1), (cid, 0));
    for _ in 0..3 {
        assert_eq!(host.admin.wait().dw0.get() & 1, 1);
    }
    let done = io.wait();
    assert_eq!((done.cid.get(), done.status().code()), (first, StatusCode::SUCCESS));
    let done = io.wait();
    assert_eq!((done.cid.get(), done.status().code()), (second, StatusCode::ABORT_REQUESTED));
    assert!(!done.status().dnr());
    assert_eq!(host.admin.ok(abort(first)) & 1, 1, "completed commands cannot be aborted");
}

#[test]
fn unknown_admin_commands_and_malformed_ones_are_refused() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    for opcode in [0x03, 0x07, 0x0d, 0x10, 0x11, 0x14, 0x1c, 0x7c, 0x84, 0xc0, 0xff] {
        let entry = SubmissionEntry { opcode, ..SubmissionEntry::default() };
        assert_eq!(host.admin.status(entry), StatusCode::INVALID_OPCODE, "{opcode:#x}");
    }
    let mut sgl = SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE);
    sgl.flags.set_psdt(2);
    assert_eq!(host.admin.status(sgl), StatusCode::INVALID_FIELD);
}

#[test]
fn coalescing_is_said_not_to_be_changeable() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let feature = FeatureId::INTERRUPT_COALESCING;
    let set = SubmissionEntry::set_features(feature, 5);
    assert_eq!(host.admin.status(set), StatusCode::FEATURE_NOT_CHANGEABLE);
    assert_eq!(host.admin.ok(SubmissionEntry::get_features(feature, FeatureSelect::CURRENT)), 0);
    let get = SubmissionEntry::get_features(feature, FeatureSelect::SUPPORTED_CAPABILITIES);
    assert_eq!(host.admin.ok(get), 0);
}

#[test]
fn timestamp_runs_on_from_what_the_host_set_until_a_reset() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let get = SubmissionEntry::get_features(FeatureId::TIMESTAMP, FeatureSelect::CURRENT);
    let read = |host: &mut Host| Timestamp::read_from_bytes(&host.admin_data(get)[..8]).unwrap();
    assert!(!read(&mut host).is_set_by_host());
    let base = 1_700_000_000_000;
    let value = Buffer::filled(&host, Timestamp::from_millis(base).as_bytes());
    host.admin.ok(value.attach(SubmissionEntry::set_features(FeatureId::TIMESTAMP, 0)));
    let now = read(&mut host);
    assert!(now.is_set_by_host() && (base..base + 3_600_000).contains(&now.as_millis()));
    host.ctrl.write32(nvme_spec::registers::CC, 0);
    let mut host = Host::enabled(host.ctrl);
    let now = read(&mut host);
    assert!(!now.is_set_by_host() && now.as_millis() < 3_600_000);
}

#[test]
fn host_behavior_is_kept_and_checked() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let feature = FeatureId::HOST_BEHAVIOR_SUPPORT;
    for (acre, status) in [(1, StatusCode::SUCCESS), (2, StatusCode::INVALID_FIELD)] {
        let mut value = vec![0; 512];
        value[0] = acre;
        let value = Buffer::filled(&host, &value);
        assert_eq!(host.admin.status(value.attach(SubmissionEntry::set_features(feature, 0))), status);
    }
    let read = |host: &mut Host, select| {
        let data = host.admin_data(SubmissionEntry::get_features(feature, select));
        HostBehavior::read_from_bytes(&data[..512]).unwrap().acre
    };
    assert_eq!(read(&mut host, FeatureSelect::CURRENT), 1);
    assert_eq!(read(&mut host, FeatureSelect::DEFAULT), 0);
}

#[test]
fn commands_and_pages_that_are_supported_are_those_that_are_served() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let effects = host.admin_data(log(LogPageId::COMMAND_EFFECTS, 4096));
    let effects = CommandEffectsLog::read_from_bytes(&effects).unwrap();
    assert!(effects.admin(AdminOpcode::FORMAT_NVM).namespace_capability_change());
    assert!(effects.io(NvmOpcode::WRITE).content_change() && !effects.io(NvmOpcode::READ).content_change());
    let pages = host.admin_data(log(LogPageId::SUPPORTED, 1024));
    let pages = SupportedLogPages::read_from_bytes(&pages[..1024]).unwrap();
    let mut io = host.io_pair(1, 8);
    for opcode in 0..=u8::MAX {
        let entry = SubmissionEntry { opcode, ..SubmissionEntry::default() };
        let served = io.status(entry) != StatusCode::INVALID_OPCODE;
        assert_eq!(effects.io(NvmOpcode(opcode)).supported(), served, "I/O {opcode:#x}");
        if opcode != AdminOpcode::ASYNC_EVENT_REQUEST.0 {
            let served = host.admin.status(entry) != StatusCode::INVALID_OPCODE;
            assert_eq!(effects.admin(AdminOpcode(opcode)).supported(), served, "admin {opcode:#x}");
        }
        let target = Buffer::new(&host, 4096);
        let status = host.admin.status(target.attach(log(LogPageId(opcode), 4)));
        assert_eq!(pages.contains(LogPageId(opcode)), status == StatusCode::SUCCESS, "page {opcode:#x}");
    }
}

/// Events in the order they come, with their log pages read in between.
fn next_event(host: &mut Host) -> AsyncEventCode {
    host.admin.push(SubmissionEntry::async_event_request());
    host.admin.ring();
    let event = AsyncEvent::from(host.admin.wait().dw0.get());
    host.admin_data(log(event.page(), 512));
    event.code()
}

#[test]
fn every_change_of_health_is_reported_if_wanted() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let ctrl = std::sync::Arc::clone(&host.ctrl);
    let smart = |host: &mut Host| {
        let log = host.admin_data(log(LogPageId::SMART, 512));
        SmartLog::read_from_bytes(&log[..512]).unwrap()
    };
    ctrl.set_spare(5);
    assert_eq!((smart(&mut host).available_spare, smart(&mut host).critical_warning), (5, 1));
    ctrl.set_spare(10);
    host.admin.ok(SubmissionEntry::set_features(FeatureId::ASYNC_EVENT_CONFIGURATION, 0xff));
    host.admin.ok(SubmissionEntry::set_features(FeatureId::TEMPERATURE_THRESHOLD, 350));
    host.admin.ok(SubmissionEntry::set_features(FeatureId::TEMPERATURE_THRESHOLD, 1 << 20 | 280));
    for kelvin in [350, 280] {
        ctrl.set_temperature(kelvin);
        assert_eq!(next_event(&mut host), AsyncEventCode::TEMPERATURE);
        assert_eq!((smart(&mut host).temperature.get(), smart(&mut host).critical_warning), (kelvin, 2));
    }
    ctrl.set_temperature(310);
    ctrl.set_spare(9);
    assert_eq!(next_event(&mut host), AsyncEventCode::SPARE);
    ctrl.set_spare(100);
    ctrl.set_reliability(Reliability::Degraded);
    assert_eq!(next_event(&mut host), AsyncEventCode::RELIABILITY);
    assert_eq!(smart(&mut host).critical_warning, 4);
    ctrl.set_reliability(Reliability::Normal);
    for (error, code) in [
        (ControllerError::Diagnostic, AsyncEventCode::DIAGNOSTIC_FAILURE),
        (ControllerError::Persistent, AsyncEventCode::PERSISTENT_INTERNAL_ERROR),
        (ControllerError::Transient, AsyncEventCode::TRANSIENT_INTERNAL_ERROR),
        (ControllerError::FirmwareLoad, AsyncEventCode::FIRMWARE_LOAD_ERROR),
    ] {
        ctrl.report_error(error);
        assert_eq!(next_event(&mut host), code);
    }
}

#[test]
fn notices_come_only_if_wanted_and_one_page_does_not_rearm_another() {
    let mut host = Host::new(memory_config(1 << 20, 512));
    let ctrl = std::sync::Arc::clone(&host.ctrl);
    host.admin.push(SubmissionEntry::async_event_request());
    host.admin.push(SubmissionEntry::async_event_request());
    host.admin.ring();
    ctrl.report_firmware_activation();
    ctrl.resize_namespace(1, 2 << 20).unwrap();
    assert!(host.admin.peek().is_none());
    host.admin.ok(SubmissionEntry::set_features(FeatureId::ASYNC_EVENT_CONFIGURATION, 0x300));
    ctrl.report_firmware_activation();
    let event = AsyncEvent::from(host.admin.wait().dw0.get());
    assert_eq!(event.code(), AsyncEventCode::FIRMWARE_ACTIVATION_STARTING);
    // Both are notices: the second waits until the first one's page was read.
    ctrl.resize_namespace(1, 1 << 20).unwrap();
    assert!(host.admin.peek().is_none());
    host.admin_data(log(LogPageId::SMART, 512));
    assert!(host.admin.peek().is_none());
    let page = Buffer::new(&host, 512);
    host.admin.push(page.attach(log(LogPageId::FIRMWARE_SLOT, 512)));
    host.admin.ring();
    let done = [host.admin.wait(), host.admin.wait()];
    let codes = done.map(|entry| AsyncEvent::from(entry.dw0.get()).code());
    assert!(codes.contains(&AsyncEventCode::NAMESPACE_ATTRIBUTE_CHANGED), "{done:?}");
}
