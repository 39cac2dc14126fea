//! From a [`DeviceSpec`] to a [`Controller`].
//!
//! Excludes: parsing (see [`spec_string`](crate::spec_string)).

use std::sync::Arc;

use nvme_emulator::{
    Backing, ControllerConfig, CreateMode, EmulatedController, EmulatorError, LatencyModel, Mode,
    NamespaceConfig, ThreadOptions,
};
use thiserror::Error;

use crate::bring_up::BringUpError;
use crate::controller::{Controller, ControllerOptions, Keeper, QueueError, Recovery};
use crate::spec_string::{DeviceSpec, EmulatedBacking, EmulatedMode, EmulatedSpec, Target, namespace_path};
use crate::transport::embedded::EmbeddedTransport;
use crate::transport::qtest::{self, QtestError, QtestTransport};
use crate::transport::vfio::{VfioError, VfioTransport};
use crate::transport::vfio_user::{self, VfioUserError, VfioUserTransport};
use crate::transport::{SystemTiming, Timing, Transport};

/// Why a device could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The embedded controller could not be made.
    #[error("{device}: {source}")]
    Emulator {
        /// The spec.
        device: String,
        /// What went wrong.
        source: EmulatorError,
    },
    /// The controller on PCI could not be opened.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// The server behind a vfio-user socket cannot be used.
    #[error(transparent)]
    VfioUser(#[from] VfioUserError),
    /// QEMU's controller cannot be used.
    #[error(transparent)]
    Qtest(#[from] QtestError),
    /// The spec names a namespace that is not active.
    #[error("{0}; name one of these with `ns=`, or leave it out")]
    Namespace(QueueError),
    /// The controller could not be brought up.
    #[error(transparent)]
    BringUp(#[from] BringUpError),
}

/// What opening a device needs beside its spec.
#[derive(Clone)]
pub struct OpenOptions {
    /// Time, for deadlines.
    pub timing: Arc<dyn Timing>,
    /// Who looks after the controller.
    pub keeper: Keeper,
    /// What follows a fault that a reset may cure.
    pub recovery: Recovery,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            timing: Arc::new(SystemTiming::default()),
            keeper: Keeper::default(),
            recovery: Recovery::default(),
        }
    }
}

/// Opens a device and brings its controller up. Blocks for as long as that takes.
///
/// # Errors
/// The device cannot be opened, with the spec and what to do about it, or its controller cannot be brought up.
pub fn open(spec: &DeviceSpec, options: OpenOptions) -> Result<Arc<Controller>, OpenError> {
    let transport: Arc<dyn Transport> = match &spec.target {
        Target::Emulated(emulated) => {
            let controller = EmulatedController::new(emulator_config(emulated, spec))
                .map_err(|source| OpenError::Emulator { device: spec.to_string(), source })?;
            Arc::new(EmbeddedTransport::new(controller, device_name(emulated)))
        }
        Target::Pci(address) => VfioTransport::open(*address)?,
        Target::Qtest(path) => Arc::new(QtestTransport::open(path, qtest::DEFAULT_TIMEOUT)?),
        Target::VfioUser(path) => Arc::new(VfioUserTransport::connect(path, vfio_user::DEFAULT_TIMEOUT)?),
    };
    let controller_options = ControllerOptions {
        queues: spec.queues,
        namespace: spec.namespace,
        keeper: options.keeper,
        recovery: options.recovery,
    };
    let controller = Controller::bring_up(transport, options.timing, &controller_options)?;
    // One that cannot be used is there all the same: it can be looked at.
    match spec.namespace.map(|nsid| controller.namespace(nsid)) {
        Some(Err(error @ QueueError::NoSuchNamespace { .. })) => Err(OpenError::Namespace(error)),
        _ => Ok(controller),
    }
}

/// The part of a spec that names the device.
fn device_name(spec: &EmulatedSpec) -> String {
    match &spec.backing {
        EmulatedBacking::Memory => "emu:mem".to_owned(),
        EmulatedBacking::File(path) => format!("emu:{}", path.display()),
    }
}

/// Threads of a threaded embedded controller: while one waits for a flush, the other serves the other queues.
const WORKERS: u16 = 2;

/// What the embedded controller of a spec is made of.
pub fn emulator_config(spec: &EmulatedSpec, device: &DeviceSpec) -> ControllerConfig {
    // A flush of a file takes milliseconds, which must not stop a reactor; memory is faster than a change of threads.
    let (backing, default_mode) = match &spec.backing {
        EmulatedBacking::Memory => (Backing::Memory, EmulatedMode::Inline),
        EmulatedBacking::File(path) => {
            let create =
                if spec.size.is_some() { CreateMode::OpenOrCreate } else { CreateMode::OpenExisting };
            (Backing::File { path: path.clone(), create }, EmulatedMode::Threaded)
        }
    };
    let metadata = spec.metadata.unwrap_or(0);
    let mut namespace = NamespaceConfig::new(spec.size, backing).with_metadata(metadata);
    namespace.lba_size = spec.lba.map(crate::spec_string::LbaSize::bytes);
    let lba_size = namespace.lba_size;
    let mut config = ControllerConfig::with_namespace(namespace);
    for (nsid, size) in &spec.more_namespaces {
        let backing = match &spec.backing {
            EmulatedBacking::Memory => Backing::Memory,
            EmulatedBacking::File(first) => {
                Backing::File { path: namespace_path(first, *nsid), create: CreateMode::OpenOrCreate }
            }
        };
        let mut namespace =
            NamespaceConfig::new(Some(*size), backing).with_nsid(nsid.get()).with_metadata(metadata);
        namespace.lba_size = lba_size;
        config.namespaces.push(namespace);
    }
    // Nothing can complete later on the caller's thread.
    let default_mode = if spec.latency.is_some() { EmulatedMode::Threaded } else { default_mode };
    config.mode = match spec.mode.unwrap_or(default_mode) {
        EmulatedMode::Inline => Mode::Inline,
        EmulatedMode::Threaded => {
            Mode::Threaded(ThreadOptions { workers: WORKERS, ..ThreadOptions::default() })
        }
    };
    config.latency =
        spec.latency.map(|latency| LatencyModel { iops_limit: spec.iops, ..LatencyModel::uniform(latency) });
    config.mdts = spec.mdts.unwrap_or(config.mdts);
    config.sgls = spec.sgls.unwrap_or(config.sgls);
    config.shadow_doorbells = spec.shadow.unwrap_or(config.shadow_doorbells);
    config.write_cache = spec.cache.unwrap_or(config.write_cache);
    config.mpsmin = spec.mpsmin.unwrap_or(config.mpsmin);
    config.dstrd = spec.dstrd.unwrap_or(config.dstrd);
    config.io_queues = device.queues.unwrap_or(config.io_queues);
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_emulator::{SglSupport, ShadowDoorbells, WriteCache};

    fn config(text: &str) -> ControllerConfig {
        let spec: DeviceSpec = text.parse().unwrap();
        let Target::Emulated(emulated) = &spec.target else { panic!("{text}") };
        emulator_config(emulated, &spec)
    }

    #[test]
    fn what_a_spec_does_not_say_is_the_emulators_default() {
        let config = config("emu:mem,size=1MiB");
        let namespace = NamespaceConfig::memory(1 << 20);
        assert_eq!(config, ControllerConfig::with_namespace(namespace));
    }

    #[test]
    fn every_option_reaches_the_controller() {
        let config = config(
            "emu:mem,size=1MiB,lba=512,mdts=3,sgls=off,shadow=on,cache=off,mpsmin=8k,dstrd=1,meta=8,ns9=2MiB,queues=3",
        );
        let first = NamespaceConfig::memory(1 << 20).with_lba_size(512).with_metadata(8);
        let ninth = NamespaceConfig::memory(2 << 20).with_lba_size(512).with_metadata(8).with_nsid(9);
        let expected = ControllerConfig {
            namespaces: vec![first, ninth],
            io_queues: 3,
            mdts: 3,
            sgls: SglSupport::Absent,
            shadow_doorbells: ShadowDoorbells::Offered,
            write_cache: WriteCache::Absent,
            mpsmin: 1,
            dstrd: 1,
            ..ControllerConfig::default()
        };
        assert_eq!(config, expected);
        config.validate().unwrap();
    }

    /// Was found out by the first queue only, so that `pollux identify` described another namespace than the one named.
    #[test]
    fn a_namespace_that_is_not_active_is_refused_with_those_that_are() {
        let open_at = |ns: &str| {
            open(&format!("emu:mem,size=1MiB,ns7=1MiB{ns}").parse().unwrap(), OpenOptions::default())
        };
        for nsid in ["2", "8", "4294967294"] {
            let error = open_at(&format!(",ns={nsid}")).err().unwrap().to_string();
            let says = format!("emu:mem has no active namespace {nsid} (active: 1, 7); name one of these");
            assert!(error.starts_with(&says), "{error}");
        }
        for ns in ["", ",ns=1", ",ns=7"] {
            assert!(open_at(ns).is_ok(), "{ns}");
        }
        let with_metadata = "emu:mem,size=1MiB,meta=8,ns=1".parse().unwrap();
        assert!(open(&with_metadata, OpenOptions::default()).is_ok(), "it can be looked at");
    }

    #[test]
    fn each_namespace_of_a_file_is_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let first = folder.path().join("x");
        let text = format!("emu:{},size=1MiB,ns7=2MiB", first.display());
        for nsid in [1, 7] {
            let spec: DeviceSpec = format!("{text},ns={nsid}").parse().unwrap();
            let controller = open(&spec, OpenOptions::default()).unwrap();
            controller.shutdown().unwrap();
        }
        let bytes = |path: &std::path::Path| std::fs::metadata(path).unwrap().len();
        assert_eq!(bytes(&first), 1 << 20);
        assert_eq!(bytes(&folder.path().join("x.ns7")), 2 << 20);
    }
}
