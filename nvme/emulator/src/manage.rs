//! What happens to a controller from outside the host's reach: namespaces that come, go and grow, health that changes,
//! events. For tests, and for whoever runs the controller.
//!
//! Excludes: telling the host (`admin::events`).

use std::sync::Arc;

use nvme_spec::NamespaceId;
use nvme_spec::event::AsyncEventCode;
use nvme_spec::log::{AsyncEvent, LogPageId};

use crate::config::{MAX_NAMESPACE_BYTES, MAX_NAMESPACES, NamespaceConfig};
use crate::controller::EmulatedController;
use crate::error::EmulatorError;
use crate::locks::lock;
use crate::namespace::{Namespace, Service};
use crate::store::Durability;

/// How reliable the medium is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reliability {
    /// As it should be.
    Normal,
    /// Degraded by media or internal errors.
    Degraded,
}

/// An error of the controller that belongs to no command (§5.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControllerError {
    /// A diagnostic failure.
    Diagnostic,
    /// A persistent internal error.
    Persistent,
    /// A transient internal error.
    Transient,
    /// A firmware image could not be loaded.
    FirmwareLoad,
}

impl EmulatedController {
    /// Adds a namespace. An identifier beyond all that there were so far raises NN of Identify Controller.
    ///
    /// # Errors
    /// The configuration makes no sense, the identifier is taken, there are [`MAX_NAMESPACES`], or the image cannot be
    /// opened.
    pub fn attach_namespace(&self, config: &NamespaceConfig) -> Result<(), EmulatorError> {
        config.validate()?;
        let nsid = config.nsid;
        let table = &self.core.namespaces;
        let _one_at_a_time = table.change_one_at_a_time();
        let list = table.list();
        if list.find(NamespaceId::new(nsid)).is_ok() {
            return Err(EmulatorError::Config(format!("namespace {nsid} exists already")));
        }
        if list.all.len() >= MAX_NAMESPACES {
            return Err(EmulatorError::Config(format!("there are {MAX_NAMESPACES} namespaces already")));
        }
        table.put(Arc::new(Namespace::open(config, &self.core.config)?));
        self.core.namespace_changed(nsid);
        Ok(())
    }

    /// Takes a namespace away; when this returns, no command uses it any more and its image is closed.
    ///
    /// # Errors
    /// [`EmulatorError::NoNamespace`].
    pub fn detach_namespace(&self, nsid: u32) -> Result<(), EmulatorError> {
        let table = &self.core.namespaces;
        let _one_at_a_time = table.change_one_at_a_time();
        if !table.remove(NamespaceId::new(nsid)) {
            return Err(EmulatorError::NoNamespace { nsid });
        }
        self.core.wait_for_queues();
        self.core.namespace_changed(nsid);
        Ok(())
    }

    /// Changes a namespace's size to `bytes`. Commands that come meanwhile get Namespace Not Ready; what is cut off is
    /// lost. A namespace in memory can grow to 64 GiB, or to the size it began with.
    ///
    /// # Errors
    /// There is no such namespace, the size is no whole number of blocks, or the backing cannot have it.
    pub fn resize_namespace(&self, nsid: u32, bytes: u64) -> Result<(), EmulatorError> {
        let core = &self.core;
        let _one_at_a_time = core.namespaces.change_one_at_a_time();
        let found = core.namespace(NamespaceId::new(nsid));
        let old = found.map_err(|_| EmulatorError::NoNamespace { nsid })?;
        let block = old.lba_bytes();
        if bytes == 0 || bytes > MAX_NAMESPACE_BYTES || !bytes.is_multiple_of(block) {
            let message =
                format!("namespace {nsid}: size {bytes} is not a whole number of {block}-byte blocks");
            return Err(EmulatorError::Config(message));
        }
        core.namespaces.put(old.in_service(Service::Resizing));
        core.wait_for_queues();
        let cut = old.capacity().saturating_sub(bytes);
        let done = old.store().clear(bytes.min(old.capacity()), cut, Durability::Durable);
        match done.and_then(|()| old.store().resize(bytes)) {
            Ok(()) => core.namespaces.put(old.with_size(bytes)),
            Err(error) => {
                core.namespaces.put(old);
                return Err(EmulatorError::Config(format!("namespace {nsid} cannot be resized: {error}")));
            }
        }
        core.namespace_changed(nsid);
        Ok(())
    }

    /// Sets the composite temperature, in kelvins; 310 until then.
    pub fn set_temperature(&self, kelvin: u16) {
        lock(&self.core.admin).health.temperature = kelvin;
        self.core.report_warnings();
    }

    /// Sets the available spare, in percent; 100 until then. Below 10 it is a warning.
    pub fn set_spare(&self, percent: u8) {
        lock(&self.core.admin).health.spare = percent;
        self.core.report_warnings();
    }

    /// Sets the reliability of the medium.
    pub fn set_reliability(&self, reliability: Reliability) {
        lock(&self.core.admin).health.reliability_degraded = reliability == Reliability::Degraded;
        self.core.report_warnings();
    }

    /// Reports an error that belongs to no command as an asynchronous event.
    pub fn report_error(&self, error: ControllerError) {
        let code = match error {
            ControllerError::Diagnostic => AsyncEventCode::DIAGNOSTIC_FAILURE,
            ControllerError::Persistent => AsyncEventCode::PERSISTENT_INTERNAL_ERROR,
            ControllerError::Transient => AsyncEventCode::TRANSIENT_INTERNAL_ERROR,
            ControllerError::FirmwareLoad => AsyncEventCode::FIRMWARE_LOAD_ERROR,
        };
        self.core.report_event(AsyncEvent::from_code(code, LogPageId::ERROR));
    }

    /// Tells the host, if it wants to know, that a firmware activation starts. Nothing else happens.
    pub fn report_firmware_activation(&self) {
        self.core.report_notice(
            AsyncEventCode::FIRMWARE_ACTIVATION_STARTING,
            LogPageId::FIRMWARE_SLOT,
            |wanted| wanted.firmware_activation(),
        );
    }
}
