//! Namespaces in image files: opening, creating, locking, sparseness, what reaches the file.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nvme_emulator::{
    Backing, ControllerConfig, CreateMode, CutPolicy, EmulatedController, EmulatorError, NamespaceConfig,
    WriteCache,
};
use nvme_spec::command::{DeallocateZeroes, ForceUnitAccess};
use nvme_spec::identify::{Cns, IdentifyNamespace};
use nvme_spec::{StatusCode, SubmissionEntry};
use tempfile::TempDir;
use zerocopy::FromBytes;

use crate::initiator::{Buffer, Host, NS1, pattern, threaded};

fn image(path: &Path, size: Option<u64>, create: CreateMode) -> ControllerConfig {
    let backing = Backing::File { path: path.to_owned(), create };
    let namespace = NamespaceConfig::new(size, backing);
    ControllerConfig::with_namespace(namespace)
}

fn open(config: ControllerConfig) -> Result<Host, EmulatorError> {
    EmulatedController::new(config).map(Host::enabled)
}

fn error(config: ControllerConfig) -> EmulatorError {
    match open(config) {
        Ok(_) => panic!("opened although it must not"),
        Err(error) => error,
    }
}

#[test]
fn new_image_is_sparse_and_keeps_what_is_written() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    let data = pattern(1, 64 << 10);
    for mode in [nvme_emulator::Mode::Inline, threaded(1)] {
        let _ = fs::remove_file(&path);
        {
            let config = ControllerConfig { mode, ..image(&path, Some(4 << 30), CreateMode::OpenOrCreate) };
            let mut host = open(config).unwrap();
            let mut io = host.io_pair(1, 8);
            let source = Buffer::filled(&host, &data);
            io.ok(source.attach(SubmissionEntry::write(NS1, 1000, 15, ForceUnitAccess::Yes)));
            io.ok(SubmissionEntry::flush(NS1));
        }
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), 4 << 30);
        assert!(metadata.blocks() * 512 < 1 << 20, "not sparse");
        let mut raw = vec![0; data.len()];
        File::open(&path).unwrap().read_exact_at(&mut raw, 1000 * 4096).unwrap();
        assert!(raw == data);
        // Reopened without a size, as it is.
        let config = ControllerConfig { mode, ..image(&path, None, CreateMode::OpenExisting) };
        let mut host = open(config).unwrap();
        let mut io = host.io_pair(1, 8);
        let target = Buffer::new(&host, data.len());
        io.ok(target.attach(SubmissionEntry::read(NS1, 1000, 15)));
        assert!(target.bytes() == data);
    }
}

#[test]
fn cached_writes_are_in_the_file_at_once() {
    // A killed process loses nothing that completed: no cache of ours lies before the file.
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    for cache in [WriteCache::Host, WriteCache::MODELLED, WriteCache::Absent] {
        let _ = fs::remove_file(&path);
        let config =
            ControllerConfig { write_cache: cache, ..image(&path, Some(1 << 20), CreateMode::CreateNew) };
        let mut host = open(config).unwrap();
        let mut io = host.io_pair(1, 8);
        let data = pattern(2, 8192);
        let source = Buffer::filled(&host, &data);
        io.ok(source.attach(SubmissionEntry::write(NS1, 4, 1, ForceUnitAccess::No)));
        let mut raw = vec![0; data.len()];
        File::open(&path).unwrap().read_exact_at(&mut raw, 4 * 4096).unwrap();
        assert!(raw == data, "{cache:?}");
    }
}

#[test]
fn second_controller_on_the_same_image_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    let host = open(image(&path, Some(1 << 20), CreateMode::CreateNew)).unwrap();
    let refused = error(image(&path, None, CreateMode::OpenExisting));
    assert!(matches!(&refused, EmulatorError::InUse { path: p, .. } if *p == path));
    let text = refused.to_string();
    assert!(text.contains(path.to_str().unwrap()) && text.contains("another process"), "{text}");
    if let EmulatorError::InUse { holder: Some(pid), .. } = refused {
        assert_eq!(pid, std::process::id());
    }
    drop(host);
    open(image(&path, None, CreateMode::OpenExisting)).unwrap();
}

#[test]
fn wrong_sizes_and_paths_are_refused_with_reasons() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    let missing = error(image(&path, None, CreateMode::OpenOrCreate));
    assert!(matches!(missing, EmulatorError::Missing { .. }), "{missing}");
    let missing = error(image(&path, Some(1 << 20), CreateMode::OpenExisting));
    assert!(matches!(missing, EmulatorError::Missing { .. }), "{missing}");
    assert!(!path.exists(), "a refused open leaves nothing behind");
    drop(open(image(&path, Some(1 << 20), CreateMode::OpenOrCreate)).unwrap());
    let exists = error(image(&path, Some(1 << 20), CreateMode::CreateNew));
    assert!(matches!(exists, EmulatorError::Exists { .. }), "{exists}");
    let other = error(image(&path, Some(2 << 20), CreateMode::OpenOrCreate));
    assert!(
        matches!(other, EmulatorError::SizeMismatch { actual: 0x10_0000, expected: 0x20_0000, .. }),
        "{other}"
    );
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20, "and changes nothing");
    let directory = error(image(dir.path(), None, CreateMode::OpenExisting));
    assert!(matches!(directory, EmulatorError::NotAFile { .. }), "{directory}");
    let device = error(image(Path::new("/dev/null"), None, CreateMode::OpenExisting));
    assert!(matches!(device, EmulatorError::NotAFile { .. }), "{device}");
    let nowhere = error(image(&dir.path().join("no/p.img"), Some(1 << 20), CreateMode::OpenOrCreate));
    assert!(matches!(nowhere, EmulatorError::Open { .. }), "{nowhere}");
    fs::write(&path, [0; 1000]).unwrap();
    let odd = error(image(&path, None, CreateMode::OpenExisting));
    assert!(matches!(odd, EmulatorError::BadLength { bytes: 1000, lba_size: 512, .. }), "{odd}");
    fs::write(&path, []).unwrap();
    let empty = error(image(&path, None, CreateMode::OpenExisting));
    assert!(matches!(empty, EmulatorError::BadLength { bytes: 0, .. }), "{empty}");
    // Its creator died before it gave the image a size.
    drop(open(image(&path, Some(1 << 20), CreateMode::OpenOrCreate)).unwrap());
}

#[test]
fn block_size_of_a_reopened_image_follows_its_length() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    for (bytes, lba, lbads) in [(8192, None, 12), (8192 + 512, None, 9), (8192, Some(512), 9)] {
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let mut config = image(&path, None, CreateMode::OpenExisting);
        config.namespaces[0].lba_size = lba;
        let mut host = open(config).unwrap();
        let data = host.admin_data(SubmissionEntry::identify(Cns::NAMESPACE, NS1));
        let data = IdentifyNamespace::read_from_bytes(&data).unwrap();
        assert_eq!((data.lbaf[data.format_index()].lbads, data.nsze.get()), (lbads, bytes >> lbads));
    }
}

#[test]
fn deallocation_and_write_zeroes_punch_holes() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    let mut host = open(image(&path, Some(8 << 20), CreateMode::CreateNew)).unwrap();
    let mut io = host.io_pair(1, 8);
    let source = Buffer::filled(&host, &pattern(1, 1 << 20));
    for i in 0..4 {
        io.ok(source.attach(SubmissionEntry::write(NS1, i * 256, 255, ForceUnitAccess::No)));
    }
    io.ok(SubmissionEntry::flush(NS1));
    let used = || fs::metadata(&path).unwrap().blocks() * 512;
    let full = used();
    io.ok(SubmissionEntry::write_zeroes(NS1, 0, 511, DeallocateZeroes::No));
    let mut range = nvme_spec::DsmRange::default();
    range.slba.set(512);
    range.blocks.set(256);
    let list = Buffer::filled(&host, zerocopy::IntoBytes::as_bytes(&range));
    io.ok(list.attach(SubmissionEntry::deallocate(NS1, 0)));
    io.ok(SubmissionEntry::flush(NS1));
    assert!(used() <= full - (3 << 20), "{} of {full} still in use", used());
    let target = Buffer::new(&host, 1 << 20);
    io.ok(target.attach(SubmissionEntry::read(NS1, 256, 255)));
    assert!(target.bytes().iter().all(|b| *b == 0));
    io.ok(target.attach(SubmissionEntry::read(NS1, 768, 255)));
    assert!(target.bytes() == source.bytes());
}

#[test]
fn image_cut_short_behind_our_back_is_a_read_error() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    let mut host = open(image(&path, Some(1 << 20), CreateMode::CreateNew)).unwrap();
    let mut io = host.io_pair(1, 8);
    File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
    let target = Buffer::new(&host, 4096);
    io.ok(target.attach(SubmissionEntry::read(NS1, 1, 0)));
    let done = io.run(target.attach(SubmissionEntry::read(NS1, 2, 0)));
    assert_eq!(done.status().code(), StatusCode::UNRECOVERED_READ_ERROR);
    assert!(!done.status().dnr());
}

#[test]
fn full_file_system_is_a_status_and_no_more() {
    // RLIMIT-free way to a file that cannot grow: one sealed against it.
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsRawFd;
    let memfd = memfd_create("image", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    File::from(memfd.try_clone().unwrap()).set_len(1 << 20).unwrap();
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let mut host = open(image(Path::new(&path), None, CreateMode::OpenExisting)).unwrap();
    let mut io = host.io_pair(1, 8);
    let source = Buffer::filled(&host, &pattern(1, 4096));
    let write = source.attach(SubmissionEntry::write(NS1, 0, 0, ForceUnitAccess::No));
    assert_eq!(io.status(write), StatusCode::WRITE_FAULT);
    let target = Buffer::new(&host, 4096);
    io.ok(target.attach(SubmissionEntry::read(NS1, 0, 0)));
    assert!(target.bytes().iter().all(|b| *b == 0));
}

#[test]
fn modelled_cache_over_an_image_loses_unflushed_writes_only() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("p.img");
    let config = ControllerConfig {
        write_cache: WriteCache::MODELLED,
        ..image(&path, Some(1 << 20), CreateMode::CreateNew)
    };
    let mut host = open(config).unwrap();
    let mut io = host.io_pair(1, 8);
    let (first, second) = (pattern(1, 4096), pattern(2, 4096));
    let buffers = [Buffer::filled(&host, &first), Buffer::filled(&host, &second)];
    io.ok(buffers[0].attach(SubmissionEntry::write(NS1, 0, 0, ForceUnitAccess::No)));
    io.ok(SubmissionEntry::flush(NS1));
    io.ok(buffers[1].attach(SubmissionEntry::write(NS1, 0, 0, ForceUnitAccess::No)));
    io.ok(buffers[1].attach(SubmissionEntry::write(NS1, 1, 0, ForceUnitAccess::No)));
    assert_eq!(host.ctrl.power_cut(CutPolicy::DropAll).dropped, 2);
    let raw = fs::read(&path).unwrap();
    assert!(raw[..4096] == first && raw[4096..].iter().all(|b| *b == 0));
}

#[test]
fn configurations_that_make_no_sense_are_refused_by_field() {
    let bad: [(&str, ControllerConfig); 8] = [
        ("io_queues", ControllerConfig { io_queues: 0, ..ControllerConfig::default() }),
        ("mqes_z", ControllerConfig { mqes_z: 0, ..ControllerConfig::default() }),
        ("mdts", ControllerConfig { mdts: 17, ..ControllerConfig::default() }),
        ("dstrd", ControllerConfig { dstrd: 11, ..ControllerConfig::default() }),
        ("serial", ControllerConfig { serial: "x".repeat(21), ..ControllerConfig::default() }),
        ("workers", ControllerConfig { mode: threaded(0), ..ControllerConfig::default() }),
        ("lba size", ControllerConfig::with_namespace(NamespaceConfig::memory(4096).with_lba_size(513))),
        ("size", ControllerConfig::with_namespace(NamespaceConfig::memory(4097).with_lba_size(4096))),
    ];
    for (word, config) in bad {
        let text = error(config).to_string();
        assert!(text.contains(word), "{text}");
    }
    let twice = vec![NamespaceConfig::memory(4096), NamespaceConfig::memory(4096)];
    let text = error(ControllerConfig { namespaces: twice, ..ControllerConfig::default() }).to_string();
    assert!(text.contains("twice"), "{text}");
}
