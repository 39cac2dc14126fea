//! Several namespaces, namespaces that come, go and change, and formatting.

use std::thread;

use nvme_emulator::{Backing, ControllerConfig, CreateMode, EmulatorError, Mode, NamespaceConfig};
use nvme_spec::command::{ForceUnitAccess, GetLogPage};
use nvme_spec::event::AsyncEventCode;
use nvme_spec::feature::{AsyncEventConfiguration, FeatureId};
use nvme_spec::format::{FormatDw10, SecureErase};
use nvme_spec::identify::{Cns, IdentifyController, IdentifyNamespace, NamespaceList, Oacs};
use nvme_spec::log::{AsyncEvent, ChangedNamespaces, LogPageId};
use nvme_spec::{NamespaceId, StatusCode, SubmissionEntry};
use zerocopy::FromBytes;

use crate::initiator::{Buffer, Host, Pair, memory_config, pattern, threaded};

const MIB: u64 = 1 << 20;

fn memory(nsid: u32, lba: u32) -> NamespaceConfig {
    NamespaceConfig::memory(MIB).with_nsid(nsid).with_lba_size(lba)
}

fn sparse() -> ControllerConfig {
    let namespaces = vec![memory(900, 512), memory(3, 4096), memory(17, 512)];
    ControllerConfig { namespaces, ..ControllerConfig::default() }
}

fn active(host: &mut Host) -> Vec<u32> {
    let list = host.admin_data(SubmissionEntry::identify(Cns::ACTIVE_NAMESPACES, NamespaceId::NONE));
    let list = NamespaceList::read_from_bytes(&list).unwrap();
    list.ids.iter().map(|id| id.get()).take_while(|id| *id != 0).collect()
}

fn identify(host: &mut Host, nsid: u32) -> IdentifyNamespace {
    let data = host.admin_data(SubmissionEntry::identify(Cns::NAMESPACE, NamespaceId::new(nsid)));
    IdentifyNamespace::read_from_bytes(&data).unwrap()
}

fn write(nsid: u32, slba: u64) -> SubmissionEntry {
    SubmissionEntry::write(NamespaceId::new(nsid), slba, 0, ForceUnitAccess::No)
}

fn read(nsid: u32, slba: u64) -> SubmissionEntry {
    SubmissionEntry::read(NamespaceId::new(nsid), slba, 0)
}

fn format(nsid: u32, index: u8) -> SubmissionEntry {
    let dw10 = FormatDw10::new().with_format_index(index);
    SubmissionEntry::format_nvm(NamespaceId::new(nsid), dw10)
}

fn want_notices(host: &mut Host) {
    let wanted = AsyncEventConfiguration::new().with_namespace_attributes(true);
    host.admin.ok(SubmissionEntry::set_features(FeatureId::ASYNC_EVENT_CONFIGURATION, wanted.into()));
    host.admin.push(SubmissionEntry::async_event_request());
    host.admin.push(SubmissionEntry::async_event_request());
    host.admin.ring();
}

fn changed(host: &mut Host) -> Vec<u32> {
    let page =
        GetLogPage { lid: LogPageId::CHANGED_NAMESPACES, dwords_z: 1023, offset: 0, retain_event: false };
    let list = host.admin_data(SubmissionEntry::get_log_page(NamespaceId::BROADCAST, page));
    ChangedNamespaces::read_from_bytes(&list).unwrap().iter().map(NamespaceId::get).collect()
}

fn next_notice(pair: &mut Pair) -> AsyncEventCode {
    AsyncEvent::from(pair.wait().dw0.get()).code()
}

#[test]
fn namespaces_with_gaps_keep_their_own_data_and_block_size() {
    for mode in [Mode::Inline, threaded(2)] {
        let mut host = Host::new(ControllerConfig { mode, ..sparse() });
        assert_eq!(active(&mut host), [3, 17, 900]);
        let mut io = host.io_pair(1, 8);
        for (nsid, len) in [(3, 4096), (17, 512), (900, 512)] {
            let data = pattern(nsid, len);
            io.ok(Buffer::filled(&host, &data).attach(write(nsid as u32, 5)));
        }
        for (nsid, len) in [(3, 4096), (17, 512), (900, 512)] {
            let target = Buffer::new(&host, len);
            io.ok(target.attach(read(nsid as u32, 5)));
            assert!(target.bytes() == pattern(nsid, len));
        }
        io.ok(SubmissionEntry::flush(NamespaceId::BROADCAST));
        let buffer = Buffer::new(&host, 512);
        for (nsid, code) in [
            (1, StatusCode::INVALID_FIELD),
            (899, StatusCode::INVALID_FIELD),
            (901, StatusCode::INVALID_NAMESPACE_OR_FORMAT),
            (0, StatusCode::INVALID_NAMESPACE_OR_FORMAT),
        ] {
            assert_eq!(io.status(buffer.attach(read(nsid, 0))), code, "{nsid}");
        }
    }
}

#[test]
fn formats_boundary_and_metadata_are_reported_and_metadata_is_not_served() {
    let config = ControllerConfig::with_namespace(memory(1, 512).with_metadata(8).with_optimal_boundary(96));
    let mut host = Host::new(config);
    let data = identify(&mut host, 1);
    assert_eq!((data.noiob.get(), data.nlbaf_z, data.format_index()), (96, 4, 4));
    let formats: Vec<_> = data.lbaf[..5].iter().map(|f| (f.lbads, f.ms.get())).collect();
    assert_eq!(formats, [(9, 0), (10, 0), (11, 0), (12, 0), (9, 8)]);
    let mut io = host.io_pair(1, 8);
    let buffer = Buffer::new(&host, 512);
    for command in [read(1, 0), write(1, 0)] {
        assert_eq!(io.status(buffer.attach(command)), StatusCode::INVALID_NAMESPACE_OR_FORMAT);
    }
    host.admin.ok(format(1, 0));
    io.ok(buffer.attach(read(1, 0)));
    host.admin.ok(format(1, 4));
    assert_eq!(identify(&mut host, 1).format_index(), 4);
}

#[test]
fn format_changes_the_block_size_and_leaves_nothing() {
    let mut host = Host::new(sparse());
    let data = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
    assert!(IdentifyController::read_from_bytes(&data).unwrap().oacs().contains(Oacs::FORMAT));
    let mut io = host.io_pair(1, 8);
    for nsid in [3, 17] {
        let bytes = pattern(1, 4096);
        io.ok(Buffer::filled(&host, &bytes).attach(write(nsid, 0)));
    }
    host.admin.ok(format(3, 0));
    let now = identify(&mut host, 3);
    assert_eq!((now.nsze.get(), now.lbaf[now.format_index()].lbads, now.nuse.get()), (2048, 9, 0));
    let target = Buffer::filled(&host, &[1; 512]);
    io.ok(target.attach(read(3, 2047)));
    io.ok(target.attach(read(3, 0)));
    assert!(target.bytes() == [0; 512], "contents are gone");
    io.ok(target.attach(read(17, 0)));
    assert!(target.bytes() == pattern(1, 4096)[..512], "others are left alone");
    let erase = FormatDw10::new().with_format_index(3).with_ses(SecureErase::USER_DATA.0);
    host.admin.ok(SubmissionEntry::format_nvm(NamespaceId::BROADCAST, erase));
    for nsid in [3, 17, 900] {
        assert_eq!(identify(&mut host, nsid).nsze.get(), 256);
    }
}

#[test]
fn formats_that_cannot_be_are_refused_and_change_nothing() {
    let mut host = Host::new(sparse());
    let with = |change: fn(FormatDw10) -> FormatDw10| {
        SubmissionEntry::format_nvm(NamespaceId::new(3), change(FormatDw10::new().with_format_index(3)))
    };
    let cases = [
        (format(3, 4), StatusCode::INVALID_FORMAT),
        (format(3, 15), StatusCode::INVALID_FORMAT),
        (format(3, 19), StatusCode::INVALID_FORMAT),
        (with(|f| f.with_pi(1)), StatusCode::INVALID_FORMAT),
        (with(|f| f.with_mset(true)), StatusCode::INVALID_FORMAT),
        (with(|f| f.with_ses(2)), StatusCode::INVALID_FIELD),
        (with(|f| f.with_ses(7)), StatusCode::INVALID_FIELD),
        (format(4, 0), StatusCode::INVALID_FIELD),
        (format(0, 0), StatusCode::INVALID_NAMESPACE_OR_FORMAT),
        (format(901, 0), StatusCode::INVALID_NAMESPACE_OR_FORMAT),
    ];
    for (command, status) in cases {
        assert_eq!(host.admin.status(command), status, "{command:?}");
    }
    assert_eq!(identify(&mut host, 3).nsze.get(), 256);
}

#[test]
fn format_while_commands_run_never_shows_a_mixture() {
    let mut host = Host::new(ControllerConfig { mode: threaded(2), ..memory_config(MIB, 512) });
    let mut io = host.io_pair(1, 16);
    let target = Buffer::new(&host, 4096);
    thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..3000 {
                let status = io.status(target.attach(read(1, 255)));
                assert!(matches!(status, StatusCode::SUCCESS | StatusCode::FORMAT_IN_PROGRESS), "{status}");
            }
        });
        for round in 0..50 {
            host.admin.ok(format(1, [3, 0][round % 2]));
        }
    });
    assert_eq!(host.ctrl.memory().fault_count(), 0);
}

#[test]
fn namespaces_come_go_and_grow_and_the_host_is_told() {
    for mode in [Mode::Inline, threaded(2)] {
        let mut host = Host::new(ControllerConfig { mode, ..sparse() });
        let mut io = host.io_pair(1, 8);
        want_notices(&mut host);
        host.ctrl.attach_namespace(&memory(1000, 512)).unwrap();
        assert_eq!(next_notice(&mut host.admin), AsyncEventCode::NAMESPACE_ATTRIBUTE_CHANGED);
        // More changes are not reported before the list was read, and are all in it.
        host.ctrl.detach_namespace(17).unwrap();
        host.ctrl.resize_namespace(3, 2 * MIB).unwrap();
        assert_eq!(changed(&mut host), [3, 17, 1000]);
        assert_eq!(changed(&mut host), [0u32; 0]);
        assert_eq!(active(&mut host), [3, 900, 1000]);
        let data = host.admin_data(SubmissionEntry::identify(Cns::CONTROLLER, NamespaceId::NONE));
        assert_eq!(IdentifyController::read_from_bytes(&data).unwrap().nn.get(), 1000);
        let buffer = Buffer::new(&host, 4096);
        io.ok(buffer.attach(write(1000, 9)));
        io.ok(buffer.attach(write(3, 511)));
        assert_eq!(io.status(buffer.attach(read(17, 0))), StatusCode::INVALID_FIELD);
        host.ctrl.resize_namespace(3, MIB).unwrap();
        assert_eq!(next_notice(&mut host.admin), AsyncEventCode::NAMESPACE_ATTRIBUTE_CHANGED);
        assert_eq!(io.status(buffer.attach(read(3, 511))), StatusCode::LBA_OUT_OF_RANGE);
    }
}

#[test]
fn what_was_cut_off_reads_as_zeroes_when_the_namespace_grows_again() {
    for (image, cache) in [
        (false, nvme_emulator::WriteCache::Host),
        (true, nvme_emulator::WriteCache::Host),
        (false, nvme_emulator::WriteCache::MODELLED),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let file = Backing::File { path, create: CreateMode::CreateNew };
        let backing = if image { file } else { Backing::Memory };
        let namespace = NamespaceConfig::new(Some(MIB), backing).with_lba_size(512);
        let config = ControllerConfig::with_namespace(namespace);
        let mut host = Host::new(ControllerConfig { write_cache: cache, ..config });
        let mut io = host.io_pair(1, 8);
        let data = pattern(1, 512);
        let buffer = Buffer::filled(&host, &data);
        io.ok(buffer.attach(write(1, 0)));
        io.ok(buffer.attach(write(1, 2047)));
        host.ctrl.resize_namespace(1, MIB / 2).unwrap();
        host.ctrl.resize_namespace(1, 4 * MIB).unwrap();
        let target = Buffer::filled(&host, &[1; 512]);
        io.ok(target.attach(read(1, 2047)));
        assert!(target.bytes() == [0; 512]);
        io.ok(target.attach(read(1, 0)));
        assert!(target.bytes() == data);
    }
}

#[test]
fn detached_image_is_closed_and_can_be_attached_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let backing = Backing::File { path: path.clone(), create: CreateMode::CreateNew };
    let created = NamespaceConfig::new(Some(MIB), backing);
    let mut host =
        Host::new(ControllerConfig { mode: threaded(2), ..ControllerConfig::with_namespace(created) });
    let mut io = host.io_pair(1, 8);
    let data = pattern(3, 4096);
    io.ok(Buffer::filled(&host, &data).attach(write(1, 7)));
    host.ctrl.detach_namespace(1).unwrap();
    host.ctrl.attach_namespace(&NamespaceConfig::image(&path).with_nsid(2)).unwrap();
    let target = Buffer::new(&host, 4096);
    io.ok(target.attach(read(2, 7)));
    assert!(target.bytes() == data);
}

#[test]
fn impossible_changes_are_refused() {
    let host = Host::new(sparse());
    let ctrl = &host.ctrl;
    assert!(matches!(ctrl.detach_namespace(4), Err(EmulatorError::NoNamespace { nsid: 4 })));
    assert!(matches!(ctrl.resize_namespace(4, MIB), Err(EmulatorError::NoNamespace { nsid: 4 })));
    assert!(matches!(ctrl.attach_namespace(&memory(3, 512)), Err(EmulatorError::Config(_))));
    assert!(matches!(ctrl.attach_namespace(&memory(0, 512)), Err(EmulatorError::Config(_))));
    for bytes in [0, 4095, 1 << 63, 1 << 40] {
        assert!(matches!(ctrl.resize_namespace(3, bytes), Err(EmulatorError::Config(_))), "{bytes}");
    }
}
