//! What binding and unbinding consist of: [`Plan`], a list of steps that can be shown, and are carried out as they are shown.
//!
//! Invariants: making a plan reads and writes nothing but reads; every refusal that can be known in advance comes from here.
//!
//! Excludes: carrying it out, and what happens when a step fails.

use std::fmt;
use std::path::PathBuf;

use super::super::{
    InUse, PciAddress, PciController, Sysfs, controller, driver, group, is_vfio_driver, text,
};
use super::record::{self, Before};
use super::{BindError, VFIO_PCI};

/// Drivers that a controller may be taken from: whoever uses it through them is seen.
const KNOWN_DRIVERS: [&str; 2] = ["nvme", "pci-stub"];

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    pub(super) action: Action,
    why: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Write a record of what was.
    Remember { path: PathBuf, text: String },
    /// Remove it.
    Forget { path: PathBuf },
    /// Write a file of sysfs.
    Write { path: PathBuf, value: String },
    /// Open a block device exclusively.
    Hold { node: PathBuf },
    /// Check that it is still free, and still bound to this driver.
    LookAgain { driver: Option<String> },
    /// Check what it is bound to now.
    Expect { driver: String },
}

impl Step {
    fn new(action: Action, why: impl Into<String>) -> Self {
        Self { action, why: why.into() }
    }

    fn write(path: PathBuf, value: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new(Action::Write { path, value: value.into() }, why)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.action {
            Action::Remember { path, text } => {
                let lines: Vec<&str> = text.lines().skip(1).collect();
                write!(f, "{} ← {}", path.display(), lines.join(", "))?;
            }
            Action::Forget { path } => write!(f, "{} is removed", path.display())?,
            Action::Write { path, value } if value.trim().is_empty() => {
                write!(f, "{} ← an empty line", path.display())?;
            }
            Action::Write { path, value } => write!(f, "{} ← {value}", path.display())?,
            Action::Hold { node } => write!(f, "{} is opened exclusively", node.display())?,
            Action::LookAgain { .. } => f.write_str("who uses it is looked up again")?,
            Action::Expect { driver } => write!(f, "its driver has to be {driver}")?,
        }
        write!(f, "  ({})", self.why)
    }
}

/// What is done to one controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) address: PciAddress,
    /// What it was, to go back to if a step fails; `None` if it stays where it came to.
    pub(super) before: Option<Before>,
    pub(super) steps: Vec<Step>,
}

/// What will be done, to one controller after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub(super) parts: Vec<Part>,
    /// All that are asked for, those included for which nothing is to be done.
    pub(super) addresses: Vec<PciAddress>,
}

impl Plan {
    /// Each controller with its steps; none if it is already as wanted.
    pub fn steps(&self) -> impl Iterator<Item = (PciAddress, &[Step])> {
        self.addresses.iter().map(|address| {
            let part = self.parts.iter().find(|part| part.address == *address);
            (*address, part.map(|part| part.steps.as_slice()).unwrap_or_default())
        })
    }

    /// Plans to bind controllers to vfio-pci, those that are not there yet.
    ///
    /// # Errors
    /// One is absent, in use, on another driver than the kernel's, or could not be used there; nothing was changed.
    pub fn to_bind(sysfs: &Sysfs, addresses: &[PciAddress]) -> Result<Self, BindError> {
        let mut parts: Vec<Part> = Vec::new();
        for &address in addresses {
            let found = controller(sysfs, address)?;
            if !found.is_on_vfio() && parts.iter().all(|part| part.address != address) {
                parts.push(bind_one(sysfs, &found, addresses)?);
            }
        }
        Ok(Self { parts, addresses: addresses.to_vec() })
    }

    /// Plans to give controllers back to the driver that they had, or to the one that the kernel has for them if that is
    /// not known.
    ///
    /// # Errors
    /// One is absent, or a program has it open; nothing was changed.
    pub fn to_unbind(sysfs: &Sysfs, addresses: &[PciAddress]) -> Result<Self, BindError> {
        let mut parts: Vec<Part> = Vec::new();
        for &address in addresses {
            let found = controller(sysfs, address)?;
            let steps = unbind_one(sysfs, &found)?;
            if !steps.is_empty() && parts.iter().all(|part| part.address != address) {
                parts.push(Part { address, before: None, steps });
            }
        }
        Ok(Self { parts, addresses: addresses.to_vec() })
    }
}

/// Steps that bind a controller.
fn bind_one(sysfs: &Sysfs, found: &PciController, together: &[PciAddress]) -> Result<Part, BindError> {
    let address = found.address;
    if let Some(other) = found.driver.as_deref().filter(|driver| !KNOWN_DRIVERS.contains(driver)) {
        return Err(BindError::OtherDriver { address, driver: other.to_owned() });
    }
    check_free(found, Own::Counts)?;
    check_usable(sysfs, found, together)?;
    if !sysfs.sys("bus/pci/drivers").join(VFIO_PCI).exists() {
        return Err(BindError::NoVfio { address });
    }
    let before = before(sysfs, found);
    let directory = sysfs.function(address);
    let mut steps = vec![
        Step::new(
            Action::Remember { path: record::path(sysfs, address), text: record::text_of(found, &before) },
            "what `pollux unbind` goes back to",
        ),
        Step::write(directory.join("driver_override"), VFIO_PCI, "no other driver may take it from now on"),
    ];
    for device in found.block_devices.iter().filter(|device| !device.is_partition) {
        let node = sysfs.dev(&device.name);
        steps.push(Step::new(Action::Hold { node }, "nobody can mount it or build on it meanwhile"));
    }
    let driver = found.driver.clone();
    steps.push(Step::new(Action::LookAgain { driver }, "somebody may have come in between"));
    if let Some(driver) = &found.driver {
        let unbind = directory.join("driver/unbind");
        steps.push(Step::write(unbind, address.to_string(), format!("{driver} lets go of it")));
    }
    let probe = sysfs.sys("bus/pci/drivers_probe");
    steps.push(Step::write(probe, address.to_string(), format!("{VFIO_PCI} takes it")));
    steps.push(Step::new(Action::Expect { driver: VFIO_PCI.to_owned() }, "the kernel may have refused"));
    Ok(Part { address, before: Some(before), steps })
}

/// What the controller is now, or was before a binding that never came to its end.
fn before(sysfs: &Sysfs, found: &PciController) -> Before {
    let before = Before { driver: found.driver.clone(), driver_override: override_of(sysfs, found.address) };
    match record::read(sysfs, found) {
        Some(earlier) if before.driver_override.as_deref() == Some(VFIO_PCI) => {
            Before { driver: before.driver.or(earlier.driver), driver_override: earlier.driver_override }
        }
        _ => before,
    }
}

/// Steps that unbind a controller.
fn unbind_one(sysfs: &Sysfs, found: &PciController) -> Result<Vec<Step>, BindError> {
    let record = record::read(sysfs, found);
    let path = record::path(sysfs, found.address);
    let forget = path.exists().then(|| Step::new(Action::Forget { path }, "it is done"));
    let mut steps = match (&found.driver, record) {
        // Somebody else has given it a driver. What is left of ours goes.
        (Some(driver), Some(record)) if !is_vfio_driver(driver) => {
            let record = Before { driver: Some(driver.clone()), ..record };
            steps_back(sysfs, found.address, Some(&record))
        }
        (Some(driver), None) if !is_vfio_driver(driver) => Vec::new(),
        // It is where a binding of a controller without a driver goes back to.
        (None, None) if override_of(sysfs, found.address).as_deref() != Some(VFIO_PCI) => Vec::new(),
        (_, record) => {
            // The kernel would wait for as long as the device is open.
            check_free(found, Own::Counts)?;
            steps_back(sysfs, found.address, record.as_ref())
        }
    };
    steps.extend(forget);
    Ok(steps)
}

/// Steps from wherever the controller is to what it was; to whatever the kernel has for it if that is not known.
pub(super) fn steps_back(sysfs: &Sysfs, address: PciAddress, before: Option<&Before>) -> Vec<Step> {
    let directory = sysfs.function(address);
    let (now, now_override) = (driver(&directory), override_of(sysfs, address));
    let only = |name: Option<&str>, why: String| {
        // An empty line clears it; nothing at all would be no write.
        Step::write(directory.join("driver_override"), name.unwrap_or("\n"), why)
    };
    let earlier = before.and_then(|before| before.driver_override.as_deref());
    let wanted = before.and_then(|before| before.driver.as_deref());
    let loaded = |name: &&str| sysfs.sys("bus/pci/drivers").join(name).exists();
    let put_back = "as it was before";
    let mut steps = Vec::new();
    if before.is_some() && wanted == now.as_deref() {
        if now_override.as_deref() != earlier {
            steps.push(only(earlier, put_back.to_owned()));
        }
        return steps;
    }
    let is_chosen = wanted.filter(loaded);
    let first_why = match (before, is_chosen) {
        (_, Some(wanted)) => format!("only {wanted} may take it"),
        (Some(Before { driver: Some(gone), .. }), None) => {
            format!("{gone}, which it had, is not loaded: any driver may take it")
        }
        (Some(_), None) => "it had no driver, and is not offered to any".to_owned(),
        (None, None) => "which driver it had is not known: any driver may take it".to_owned(),
    };
    // Without a driver before, there is no probe that an override could be kept from.
    let in_between = if wanted.is_none() { earlier } else { is_chosen };
    if now_override.as_deref() != in_between || before.is_none() {
        steps.push(only(in_between, first_why));
    }
    if let Some(now) = &now {
        let unbind = directory.join("driver/unbind");
        steps.push(Step::write(unbind, address.to_string(), format!("{now} lets go of it")));
    }
    if before.is_none() || wanted.is_some() {
        let why = is_chosen.map_or("the kernel looks for a driver".to_owned(), |it| format!("{it} takes it"));
        steps.push(Step::write(sysfs.sys("bus/pci/drivers_probe"), address.to_string(), why));
    }
    if in_between != earlier {
        steps.push(only(earlier, put_back.to_owned()));
    }
    if let Some(driver) = is_chosen {
        let driver = driver.to_owned();
        steps.push(Step::new(Action::Expect { driver }, "the kernel may have refused"));
    }
    steps
}

/// Whether uses by this very process count.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Own {
    Counts,
    /// It holds the block devices, so that others cannot.
    IsOurs,
}

pub(super) fn check_free(found: &PciController, own: Own) -> Result<(), BindError> {
    let ours = |used: &&InUse| matches!(used, InUse::Open { pid, .. } if own == Own::IsOurs && *pid == std::process::id());
    let uses: Vec<String> = found.in_use().filter(|used| !ours(used)).map(ToString::to_string).collect();
    if uses.is_empty() {
        return Ok(());
    }
    Err(BindError::InUse { address: found.address, uses: uses.join(", ") })
}

/// Whether VFIO would hand the controller out.
pub(super) fn check_usable(
    sysfs: &Sysfs,
    found: &PciController,
    together: &[PciAddress],
) -> Result<(), BindError> {
    let address = found.address;
    let id = found.iommu_group.ok_or(BindError::NoGroup { address })?;
    let group = group(sysfs, id)?;
    if group.without_iommu {
        return Err(BindError::WithoutIommu { address, group: id });
    }
    let mut wanted = vec![address];
    wanted.extend(together.iter().filter(|other| **other != address));
    Ok(group.check_viable(&wanted)?)
}

/// The only driver that the kernel is to try; `None` if any will do.
pub(super) fn override_of(sysfs: &Sysfs, address: PciAddress) -> Option<String> {
    // The kernel shows an absent one as `(null)`.
    text(&sysfs.function(address).join("driver_override")).filter(|name| !name.is_empty() && name != "(null)")
}
