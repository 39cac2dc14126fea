//! `pollux list`: the NVMe controllers of this host, and whether they are free to be used.

use clap::Args;
use nvme::pci::{PciController, Sysfs, controllers};
use serde_json::{Value, json};

use super::print_json;
use crate::failure::{During, Failure};
use crate::output::outln;
use crate::quantity::show_size;

/// What a column says where there is nothing to say.
const NOTHING: &str = "-";

/// List the NVMe controllers of this host: address, model, driver, IOMMU group, NUMA node, whether in use
#[derive(Args)]
#[command(after_help = "\
IN USE names mounts, swap, programs that have a node open, and whatever is built on the namespaces, up to the top of the stack. Run as
root it sees the programs of all users. GROUP is the IOMMU group: what shares one is handed out together. `pollux bind` refuses what is in use.

JSON: {controllers: [{address, vendor_id, device_id, model, serial, firmware, driver, iommu_group, numa_node, kernel_name,
block_devices: [{name, bytes}], in_use, used_by: [text]}]}; null where the system does not say.

Example:
  pollux list
  pollux list --json")]
pub(super) struct List {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl List {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let found = controllers(&Sysfs::default()).during("cannot list NVMe controllers")?;
        if self.json {
            let found: Vec<Value> = found.iter().map(document).collect();
            return print_json(&json!({ "controllers": found }));
        }
        if found.is_empty() {
            outln!("no NVMe controllers on this host");
            return Ok(());
        }
        for line in table(&found) {
            outln!("{line}");
        }
        Ok(())
    }
}

fn document(controller: &PciController) -> Value {
    let devices: Vec<Value> = controller
        .block_devices
        .iter()
        .map(|device| json!({ "name": device.name, "bytes": device.bytes }))
        .collect();
    let used_by: Vec<String> = controller.in_use().map(ToString::to_string).collect();
    json!({
        "address": controller.address.to_string(),
        "vendor_id": controller.vendor_id,
        "device_id": controller.device_id,
        "model": controller.model,
        "serial": controller.serial,
        "firmware": controller.firmware,
        "driver": controller.driver,
        "iommu_group": controller.iommu_group,
        "numa_node": controller.numa_node,
        "kernel_name": controller.kernel_name,
        "block_devices": devices,
        "in_use": !used_by.is_empty(),
        "used_by": used_by,
    })
}

/// Aligned lines: headings, then one for each controller.
fn table(found: &[PciController]) -> Vec<String> {
    let headings = ["ADDRESS", "MODEL", "SIZE", "DRIVER", "GROUP", "NODE", "IN USE"].map(str::to_owned);
    let mut rows = vec![headings];
    rows.extend(found.iter().map(row));
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; 7]| -> String {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn row(controller: &PciController) -> [String; 7] {
    let or_nothing = |text: Option<String>| text.unwrap_or_else(|| NOTHING.to_owned());
    let model = controller
        .model
        .clone()
        .unwrap_or_else(|| format!("[{:04x}:{:04x}]", controller.vendor_id, controller.device_id));
    // Partitions lie within the namespaces.
    let namespaces = controller.block_devices.iter().filter(|device| !device.is_partition);
    let bytes: u64 = namespaces.filter_map(|device| device.bytes).sum();
    let uses: Vec<String> = controller.in_use().map(ToString::to_string).collect();
    [
        controller.address.to_string(),
        model,
        if bytes > 0 { show_size(bytes) } else { NOTHING.to_owned() },
        or_nothing(controller.driver.clone()),
        or_nothing(controller.iommu_group.map(|group| group.to_string())),
        or_nothing(controller.numa_node.map(|node| node.to_string())),
        if uses.is_empty() { "no".to_owned() } else { uses.join("; ") },
    ]
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use nvme::pci::{BlockDevice, InUse};

    use super::*;

    fn bare() -> PciController {
        PciController {
            address: "0000:01:00.0".parse().unwrap(),
            vendor_id: 0x144d,
            device_id: 0xa808,
            driver: None,
            iommu_group: None,
            numa_node: None,
            kernel_name: None,
            model: None,
            serial: None,
            firmware: None,
            block_devices: Vec::new(),
            opened_by: Vec::new(),
        }
    }

    fn mounted() -> PciController {
        let at = PathBuf::from("/srv");
        let part = BlockDevice {
            name: "nvme0n1p1".to_owned(),
            is_partition: true,
            bytes: Some(1 << 30),
            in_use: vec![InUse::Mounted { device: "nvme0n1p1".to_owned(), at }],
        };
        let whole = BlockDevice {
            name: "nvme0n1".to_owned(),
            is_partition: false,
            bytes: Some(2 << 30),
            in_use: Vec::new(),
        };
        PciController {
            driver: Some("nvme".to_owned()),
            iommu_group: Some(12),
            numa_node: Some(0),
            model: Some("Fast Drive".to_owned()),
            block_devices: vec![whole, part],
            ..bare()
        }
    }

    #[test]
    fn what_the_system_does_not_say_is_a_dash_or_null() {
        let lines = table(&[bare()]);
        assert!(lines[1].starts_with("0000:01:00.0  [144d:a808]  -"), "{lines:?}");
        assert!(lines[1].ends_with("no"), "{lines:?}");
        let document = document(&bare());
        assert!(document["driver"].is_null() && document["iommu_group"].is_null());
        assert_eq!(document["in_use"], false);
    }

    #[test]
    fn use_is_shown_with_where_and_size_counts_namespaces_once() {
        let lines = table(&[mounted(), bare()]);
        assert!(
            lines[1].contains("Fast Drive") && lines[1].contains("nvme0n1p1 is mounted on /srv"),
            "{lines:?}"
        );
        assert!(lines[1].contains("2.00 GiB"), "{lines:?}");
        let column = |line: &str, word: &str| line.find(word).unwrap();
        assert_eq!(column(&lines[0], "GROUP"), column(&lines[1], "12"), "{lines:?}");
        let document = document(&mounted());
        assert_eq!(document["in_use"], true);
        assert_eq!(document["used_by"][0], "nvme0n1p1 is mounted on /srv");
    }
}
