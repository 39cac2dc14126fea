//! A device that is wanted back while it is mounted: everything is written, the mount ends, the device is closed.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use fs_core::mkfs::{Force, FormatOptions, Owner, format};
use nvme::transport::SystemTiming;
use nvme::transport::embedded::EmbeddedTransport;
use nvme::{Controller, ControllerOptions, QueueOptions};
use nvme_emulator::{ControllerConfig, EmulatedController, Mode, NamespaceConfig, ThreadOptions};
use pollux::config::Config;
use pollux::daemon::Daemon;
use pollux::device::{self, Device};
use pollux::fuse::{Absent, MountPoint};
use pollux::signals::Signals;
use reactor::{ReactorConfig, SystemClock};

const DEVICE_BYTES: u64 = 128 << 20;

fn bring_up(emulator: &Arc<EmulatedController>) -> (Arc<EmbeddedTransport>, Arc<Controller>) {
    let transport = Arc::new(EmbeddedTransport::new(Arc::clone(emulator), "emu:removal"));
    let timing = Arc::new(SystemTiming::default());
    let controller = Controller::bring_up(transport.clone(), timing, &ControllerOptions::default()).unwrap();
    (transport, controller)
}

/// Mounts the volume at `point` and calls `inside` once it is; returns when the daemon has ended.
fn serve(emulator: &Arc<EmulatedController>, point: &Path, inside: impl FnOnce(&EmbeddedTransport)) {
    let (transport, controller) = bring_up(emulator);
    let queue = QueueOptions { pool_bytes: 16 << 20, ..QueueOptions::default() };
    let device =
        Device::over(Arc::clone(&controller), "emu:removal", &[0], ReactorConfig::default(), queue).unwrap();
    let signals = Signals::block().unwrap();
    let daemon = Daemon {
        device: device::parse("emu:mem,size=128MiB").unwrap(),
        point: MountPoint::prepare(point, Absent::Refuse).unwrap(),
        cores: None,
        socket: Some(point.with_extension("sock")),
        config: Config::default(),
    };
    daemon.run_on(device, &signals, |_| inside(&transport)).unwrap();
    assert!(controller.life().is_final(), "the device was let go");
}

/// The request was once reported and nothing more: `unbind` waited until somebody stopped the daemon by hand.
#[test]
fn a_daemon_whose_device_is_wanted_back_writes_everything_and_ends() {
    if !Path::new("/dev/fuse").exists() || !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs /dev/fuse and root");
        return;
    }
    let mode = Mode::Threaded(ThreadOptions { workers: 2, ..ThreadOptions::default() });
    let namespace = NamespaceConfig::memory(DEVICE_BYTES).with_lba_size(4096);
    let emulator =
        EmulatedController::new(ControllerConfig { mode, ..ControllerConfig::with_namespace(namespace) })
            .unwrap();
    let (_, controller) = bring_up(&emulator);
    let queue =
        controller.create_queue(&QueueOptions { pool_bytes: 16 << 20, ..QueueOptions::default() }).unwrap();
    let options =
        FormatOptions { shards: 1, label: "removal".to_owned(), force: Force::Refuse, owner: Owner::ROOT };
    reactor::block_on(Some(Box::new(queue)), Arc::new(SystemClock::new()), 1, |ctx| async move {
        format(&ctx, &options).await.map(drop)
    })
    .unwrap();
    controller.shutdown().unwrap();
    drop(controller);

    let folder = tempfile::tempdir().unwrap();
    let point = folder.path().join("mnt");
    fs::create_dir(&point).unwrap();
    serve(&emulator, &point, |transport| {
        fs::write(point.join("file"), b"written just before").unwrap();
        transport.request_removal();
    });
    assert!(!point.join("file").exists(), "unmounted");
    serve(&emulator, &point, |transport| {
        assert_eq!(fs::read(point.join("file")).unwrap(), b"written just before");
        transport.request_removal();
    });
}
