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
use crate::controller::{Controller, ControllerOptions, Keeper, Recovery};
use crate::spec_string::{DeviceSpec, EmulatedBacking, EmulatedMode, EmulatedSpec, Target};
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
    Ok(Controller::bring_up(transport, options.timing, &controller_options)?)
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
    let mut namespace = NamespaceConfig::new(spec.size, backing);
    namespace.lba_size = spec.lba.map(crate::spec_string::LbaSize::bytes);
    let mut config = ControllerConfig::with_namespace(namespace);
    // Nothing can complete later on the caller's thread.
    let default_mode = if spec.latency.is_some() { EmulatedMode::Threaded } else { default_mode };
    config.mode = match spec.mode.unwrap_or(default_mode) {
        EmulatedMode::Inline => Mode::Inline,
        EmulatedMode::Threaded => {
            Mode::Threaded(ThreadOptions { workers: WORKERS, ..ThreadOptions::default() })
        }
    };
    config.latency = spec.latency.map(LatencyModel::uniform);
    config.mdts = spec.mdts.unwrap_or(config.mdts);
    config.io_queues = device.queues.unwrap_or(config.io_queues);
    config
}
