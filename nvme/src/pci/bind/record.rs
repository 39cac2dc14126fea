//! What a controller was before it was bound to vfio-pci, remembered for `unbind`: a file for each in `/run/pollux/bind`.
//!
//! ```text
//! pollux bind record 1
//! device 144d:a80a
//! driver nvme
//! driver_override -
//! ```
//!
//! Invariants: a record of another device that sits at the address now is not believed; nor is one that is damaged. A file
//! is replaced as a whole. `-` stands for nothing.

use std::path::PathBuf;

use super::super::{PciAddress, PciController, Sysfs, text};

const HEADING: &str = "pollux bind record 1";
const NOTHING: &str = "-";

/// What a controller was bound to, and was to be bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Before {
    /// Its driver.
    pub(super) driver: Option<String>,
    /// The only driver that the kernel was to try.
    pub(super) driver_override: Option<String>,
}

/// Where the record of a controller is.
pub(super) fn path(sysfs: &Sysfs, address: PciAddress) -> PathBuf {
    sysfs.run("pollux/bind").join(address.to_string())
}

/// The text of a record.
pub(super) fn text_of(found: &PciController, before: &Before) -> String {
    let or_nothing = |name: &Option<String>| name.clone().unwrap_or_else(|| NOTHING.to_owned());
    format!(
        "{HEADING}\ndevice {:04x}:{:04x}\ndriver {}\ndriver_override {}\n",
        found.vendor_id,
        found.device_id,
        or_nothing(&before.driver),
        or_nothing(&before.driver_override)
    )
}

/// The record of a controller, if there is one that is about it.
pub(super) fn read(sysfs: &Sysfs, found: &PciController) -> Option<Before> {
    let text = text(&path(sysfs, found.address))?;
    let mut lines = text.lines();
    (lines.next()? == HEADING).then_some(())?;
    let mut value = |key: &str| lines.next()?.strip_prefix(key)?.strip_prefix(' ').map(str::to_owned);
    let device = value("device")?;
    (device == format!("{:04x}:{:04x}", found.vendor_id, found.device_id)).then_some(())?;
    let named = |name: String| if name == NOTHING { None } else { Some(name) };
    let before =
        Before { driver: named(value("driver")?), driver_override: named(value("driver_override")?) };
    let is_name = |name: &String| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
    };
    let sound = before.driver.iter().chain(&before.driver_override).all(is_name);
    sound.then_some(before)
}
