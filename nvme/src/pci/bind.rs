//! Giving controllers to vfio-pci and back to the driver they had, by the files of sysfs (Documentation/ABI/testing/sysfs-bus-pci).
//!
//! Owns: [`bind()`] and [`unbind()`]; carrying a [`Plan`] out; what happens when a step fails.
//!
//! Invariants:
//! - a controller that anybody uses is left where it is. That is looked up before anything is written, and once more when the
//!   override is set and the namespaces are held exclusively, so that nobody new comes in before the old driver lets go;
//! - when a step of binding fails, every controller that the call has changed goes back to the driver and the override it had. If that
//!   fails too, the error says what it is bound to now, and the record stays, so that unbinding finishes it;
//! - unbinding that fails half-way can be repeated.
//!
//! | crash after | left behind | `unbind` then | `bind` then |
//! |---|---|---|---|
//! | the record | a record | removes it | begins anew |
//! | the override | and an override | clears it | begins anew, and knows what the override was |
//! | the old driver let go | and no driver | gives it back | goes on, and knows what the driver was |
//!
//! Excludes: giving the group's node to a user.

mod hands;
mod plan;
mod record;

use std::fs::File;
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use thiserror::Error;

use self::hands::{Hands, System};
use self::plan::{Action, Own, Part, check_free, check_usable, steps_back};
pub use self::plan::{Plan, Step};
use super::{InUse, PciAddress, PciError, Sysfs, controller, driver};

const VFIO_PCI: &str = "vfio-pci";

/// Why a controller could not be given to another driver.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BindError {
    /// There is no such controller, or its group is not viable.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// Somebody uses it.
    #[error("{address}: in use: {uses}")]
    InUse {
        /// Where.
        address: PciAddress,
        /// By what.
        uses: String,
    },
    /// A driver that is neither the kernel's for NVMe nor VFIO.
    #[error(
        "{address}: bound to the driver {driver}, whose users cannot be seen from here; if there are none, take it from that driver: \
         `echo {address} > /sys/bus/pci/devices/{address}/driver/unbind`"
    )]
    OtherDriver {
        /// Where.
        address: PciAddress,
        /// The driver.
        driver: String,
    },
    /// No IOMMU: vfio-pci would have it, but nobody could use it.
    #[error(
        "{address}: it is in no IOMMU group; turn the IOMMU on in the firmware (VT-d, AMD-Vi) and for the kernel (`intel_iommu=on` \
         on its command line; AMD's is on by itself)"
    )]
    NoGroup {
        /// Where.
        address: PciAddress,
    },
    /// A group without protection.
    #[error(
        "{address}: group {group} is in VFIO's noiommu mode, where a device can write to any memory; turn the IOMMU on instead"
    )]
    WithoutIommu {
        /// Where.
        address: PciAddress,
        /// The group.
        group: u32,
    },
    /// The driver vfio-pci is not there.
    #[error("{address}: the kernel has no driver vfio-pci; load it with `modprobe vfio-pci`")]
    NoVfio {
        /// Where.
        address: PciAddress,
    },
    /// The caller may not.
    #[error("{address}: no permission for {path}; only root may bind drivers", path = path.display())]
    NotAllowed {
        /// Where.
        address: PciAddress,
        /// The file.
        path: PathBuf,
    },
    /// sysfs refused.
    #[error("{address}: cannot write {path}: {source}{hint}", path = path.display())]
    Write {
        /// Where.
        address: PciAddress,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
        /// What may be done about it, with a separator before it.
        hint: &'static str,
    },
    /// A namespace could not be held.
    #[error("{address}: cannot open {node} exclusively: {source}", node = node.display())]
    Hold {
        /// Where.
        address: PciAddress,
        /// Its node.
        node: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Its driver changed while it was looked at.
    #[error("{address}: somebody else has given it to another driver meanwhile ({now}); try again")]
    Changed {
        /// Where.
        address: PciAddress,
        /// The driver now.
        now: String,
    },
    /// A driver was asked and did not take it.
    #[error("{address}: {driver} does not take it; the kernel log says why")]
    NotTaken {
        /// Where.
        address: PciAddress,
        /// The driver.
        driver: String,
    },
    /// A step failed when others had been done.
    #[error("{cause}; {aftermath}")]
    Interrupted {
        /// What failed.
        cause: Box<BindError>,
        /// What the controllers are bound to now.
        aftermath: String,
    },
}

/// What came of a plan that was carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// What is not quite as it should be, in words.
    pub notes: Vec<String>,
}

impl Plan {
    /// Does what is planned.
    ///
    /// # Errors
    /// A step failed. Binding is undone then; unbinding can be repeated.
    pub fn carry_out(&self, sysfs: &Sysfs) -> Result<Outcome, BindError> {
        carry_out(self, sysfs, &mut System)
    }
}

/// Binds a controller to vfio-pci. Does nothing if it is there already.
///
/// # Errors
/// It is in use, its group is not viable, or the system refuses.
pub fn bind(sysfs: &Sysfs, address: PciAddress) -> Result<Outcome, BindError> {
    Plan::to_bind(sysfs, &[address])?.carry_out(sysfs)
}

/// Gives a controller back to the driver that it had before [`bind()`], or to the one that the kernel has for it if that is not
/// known. Does nothing if it is not on VFIO.
///
/// # Errors
/// A program has it open, or the system refuses.
pub fn unbind(sysfs: &Sysfs, address: PciAddress) -> Result<Outcome, BindError> {
    Plan::to_unbind(sysfs, &[address])?.carry_out(sysfs)
}

fn carry_out(plan: &Plan, sysfs: &Sysfs, hands: &mut dyn Hands) -> Result<Outcome, BindError> {
    let mut outcome = Outcome::default();
    for (index, part) in plan.parts.iter().enumerate() {
        let mut run = Run { sysfs, hands: &mut *hands, plan, part, held: Vec::new(), wrote: false };
        if let Err(cause) = run.steps(&mut outcome) {
            // What is held is let go before the old driver has it again.
            let wrote = run.wrote;
            drop(run);
            let done = if wrote { index + 1 } else { index };
            let aftermath = undo(&plan.parts[..done], sysfs, hands);
            return Err(if aftermath.is_empty() {
                forget(part, sysfs, hands);
                cause
            } else {
                BindError::Interrupted { cause: Box::new(cause), aftermath }
            });
        }
    }
    Ok(outcome)
}

/// The steps of one part on their way.
struct Run<'a> {
    sysfs: &'a Sysfs,
    hands: &'a mut dyn Hands,
    plan: &'a Plan,
    part: &'a Part,
    held: Vec<File>,
    /// Whether something may have changed.
    wrote: bool,
}

impl Run<'_> {
    fn steps(&mut self, outcome: &mut Outcome) -> Result<(), BindError> {
        for step in &self.part.steps {
            match &step.action {
                Action::Remember { path, text } => {
                    if let Err(error) = self.hands.remember(path, text) {
                        let address = self.part.address;
                        let path = path.display();
                        outcome.notes.push(format!(
                            "{address}: cannot write {path} ({error}): `pollux unbind` will let the kernel choose the driver"
                        ));
                    }
                }
                Action::Forget { path } => {
                    self.hands.forget(path).map_err(|error| self.refused(path, error))?;
                }
                Action::Write { path, value } => {
                    let written = self.hands.write(path, value).map_err(|error| self.refused(path, error));
                    // Who may not write has not written; other errors can come too late.
                    self.wrote |= !matches!(written, Err(BindError::NotAllowed { .. }));
                    written?;
                }
                Action::Hold { node } => self.hold(node)?,
                Action::LookAgain { driver } => self.look_again(driver.as_deref())?,
                Action::Expect { driver } => self.expect(driver)?,
            }
        }
        Ok(())
    }

    fn refused(&self, path: &std::path::Path, source: io::Error) -> BindError {
        let (address, path) = (self.part.address, path.to_owned());
        let hint = match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EACCES | Errno::EPERM) => return BindError::NotAllowed { address, path },
            Some(Errno::EROFS) => {
                "; sysfs is mounted read-only here, as containers have it: do it on the host"
            }
            _ => "",
        };
        BindError::Write { address, path, source, hint }
    }

    fn hold(&mut self, node: &std::path::Path) -> Result<(), BindError> {
        let address = self.part.address;
        match self.hands.hold(node) {
            Ok(held) => {
                self.held.extend(held);
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => {
                let uses = InUse::Claimed { node: node.to_owned() }.to_string();
                Err(BindError::InUse { address, uses })
            }
            Err(source) => Err(BindError::Hold { address, node: node.to_owned(), source }),
        }
    }

    fn look_again(&self, driver: Option<&str>) -> Result<(), BindError> {
        let found = controller(self.sysfs, self.part.address)?;
        if found.driver.as_deref() != driver {
            let now = found.driver.unwrap_or_else(|| "none".to_owned());
            return Err(BindError::Changed { address: found.address, now });
        }
        check_free(&found, Own::IsOurs)?;
        check_usable(self.sysfs, &found, &self.plan.addresses)
    }

    fn expect(&self, wanted: &str) -> Result<(), BindError> {
        let address = self.part.address;
        match driver(&self.sysfs.function(address)) {
            Some(driver) if driver == wanted => Ok(()),
            _ => Err(BindError::NotTaken { address, driver: wanted.to_owned() }),
        }
    }
}

/// Puts back what binding has changed, the last first. Says what came of it; nothing if there is nothing to say.
fn undo(parts: &[Part], sysfs: &Sysfs, hands: &mut dyn Hands) -> String {
    let mut said = Vec::new();
    for part in parts.iter().rev() {
        let address = part.address;
        let undone = match &part.before {
            None => Ok(()),
            Some(before) => {
                let steps = steps_back(sysfs, address, Some(before));
                let back = Part { address, before: None, steps };
                let plan = Plan { parts: Vec::new(), addresses: vec![address] };
                let mut run = Run {
                    sysfs,
                    hands: &mut *hands,
                    plan: &plan,
                    part: &back,
                    held: Vec::new(),
                    wrote: false,
                };
                run.steps(&mut Outcome::default())
            }
        };
        let now =
            driver(&sysfs.function(address)).map_or("no driver".to_owned(), |name| format!("driver {name}"));
        match (undone, &part.before) {
            (Ok(()), Some(_)) => {
                forget(part, sysfs, hands);
                said.push(format!("{address} is as it was before ({now})"));
            }
            (Ok(()), None) => said.push(format!("{address} has {now} now; `pollux unbind {address}` tries again")),
            (Err(error), _) => said.push(format!(
                "and it could not be put back ({error}): {address} has {now} now; `pollux unbind {address}` tries again"
            )),
        }
    }
    said.join("; ")
}

/// Removes the record of a binding that was undone. One that stays does no harm: it tells what is so.
fn forget(part: &Part, sysfs: &Sysfs, hands: &mut dyn Hands) {
    if part.before.is_some() {
        let _ = hands.forget(&record::path(sysfs, part.address));
    }
}

#[cfg(test)]
mod tests;
