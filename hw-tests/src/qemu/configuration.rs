//! What QEMU is started with: [`Configuration`], the command line made of it, and the [`matrix`] of those that every run tries.
//!
//! Excludes: starting it.

use std::path::Path;

use serde_json::{Value, json};

/// The controller's name and slot on the bus.
pub(super) const DEVICE_ID: &str = "nv0";
pub(super) const SLOT: u8 = 5;

const MIB: u64 = 1 << 20;

/// The machine around the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Board {
    /// PCI Express; no hot plug on the root bus.
    Q35,
    /// PCI with hot plug.
    Pc,
}

/// What lies between the controller and a disk's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Nothing.
    Plain,
    /// blkdebug with rules; requests can be held from the monitor.
    Debug(Vec<Value>),
    /// blklogwrites: `logN` records every write, flush and discard.
    WriteLog,
    /// So many requests a second.
    Throttled(u32),
    /// No file: reads give zeroes, after so many nanoseconds.
    Null(u64),
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its size.
    pub bytes: u64,
    /// How it fails or dawdles.
    pub layer: Layer,
}

/// What of the suite runs on a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// All of it.
    Everything,
    /// The cases whose `suite/name` contains this.
    Only(&'static str),
    /// Nothing: the device is refused, in these words.
    Refused(&'static str),
}

/// A QEMU to be started.
#[derive(Clone, Debug)]
pub struct Configuration {
    /// What is special about it.
    pub name: &'static str,
    /// The machine.
    pub board: Board,
    /// Its disks. The first is the controller's, unless there are namespaces.
    pub disks: Vec<Disk>,
    /// Options of the controller, with a comma before each.
    pub controller: &'static str,
    /// Further namespaces: options of each, disk by disk.
    pub namespaces: Vec<&'static str>,
    /// Whether a subsystem is between them.
    pub subsystem: bool,
    /// What runs on it.
    pub runs: Runs,
}

impl Configuration {
    /// One disk of 512-byte blocks and QEMU's defaults.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            board: Board::Q35,
            disks: vec![Disk { bytes: 256 * MIB, layer: Layer::Plain }],
            controller: "",
            namespaces: Vec::new(),
            subsystem: false,
            runs: Runs::Everything,
        }
    }

    /// With options of the controller.
    pub fn controller(mut self, options: &'static str) -> Self {
        self.controller = options;
        self
    }

    /// With something between controller and disk.
    pub fn layer(mut self, layer: Layer) -> Self {
        self.disks[0].layer = layer;
        self
    }

    /// With a smaller or larger disk.
    pub fn bytes(mut self, bytes: u64) -> Self {
        self.disks[0].bytes = bytes;
        self
    }

    /// With namespaces, each on a disk of its own.
    pub fn namespaces(mut self, options: &[&'static str]) -> Self {
        self.namespaces = options.to_vec();
        let disk = self.disks[0].clone();
        self.disks.resize(options.len(), disk);
        self
    }

    /// With hot plug.
    pub fn hot_plug(mut self) -> Self {
        self.board = Board::Pc;
        self
    }

    /// With another part of the suite.
    pub fn runs(mut self, runs: Runs) -> Self {
        self.runs = runs;
        self
    }

    /// QEMU's arguments, with files and sockets in `directory`.
    pub fn command_line(&self, directory: &Path) -> Vec<String> {
        let path = |name: &str| directory.join(name).display().to_string();
        let machine = match self.board {
            Board::Q35 => "q35",
            Board::Pc => "pc",
        };
        let mut line: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| line.extend([format!("-{option}"), value]);
        add("machine", format!("{machine},accel=tcg,memory-backend=ram"));
        add("object", format!("memory-backend-file,id=ram,size=512M,share=on,mem-path={}", path("ram")));
        add("m", "512M".into());
        add("display", "none".into());
        add("qtest", format!("unix:{},server=on,wait=off", path("qtest")));
        add("qtest-log", "none".into());
        add("qmp", format!("unix:{},server=on,wait=off", path("qmp")));
        for (index, disk) in self.disks.iter().enumerate() {
            if let Layer::Throttled(iops) = disk.layer {
                add("object", format!("throttle-group,id=throttle{index},x-iops-total={iops}"));
            }
            add("blockdev", disk.block_device(index, directory).to_string());
        }
        let mut controller = format!("nvme,id={DEVICE_ID},addr={SLOT:#x},serial=pollux{}", self.controller);
        if self.subsystem {
            add("device", "nvme-subsys,id=subsystem,nqn=pollux".into());
            controller += ",subsys=subsystem";
        }
        if self.namespaces.is_empty() {
            controller += ",drive=d0";
        }
        add("device", controller);
        for (index, options) in self.namespaces.iter().enumerate() {
            add("device", format!("nvme-ns,drive=d{index}{options}"));
        }
        line.extend(["-S", "-nodefaults", "-no-user-config"].map(str::to_owned));
        line
    }
}

impl Disk {
    /// The block layer's description of it, named `dN`.
    fn block_device(&self, index: usize, directory: &Path) -> Value {
        let file =
            |name: String| json!({ "driver": "file", "filename": directory.join(name), "discard": "unmap" });
        let name = format!("d{index}");
        let disk = file(format!("disk{index}"));
        match &self.layer {
            Layer::Plain => {
                json!({ "driver": "raw", "node-name": name, "discard": "unmap", "file": disk })
            }
            // Below `raw`: that is where requests pass the places that can be held.
            Layer::Debug(rules) => {
                let mut debug = json!({
                    "driver": "blkdebug", "node-name": format!("debug{index}"), "image": disk,
                    "discard": "unmap",
                });
                // QEMU refuses an empty list.
                if !rules.is_empty() {
                    debug["inject-error"] = json!(rules);
                }
                json!({ "driver": "raw", "node-name": name, "discard": "unmap", "file": debug })
            }
            Layer::WriteLog => json!({
                "driver": "blklogwrites", "node-name": name, "discard": "unmap",
                "file": { "driver": "raw", "file": disk, "discard": "unmap" },
                "log": { "driver": "file", "filename": directory.join(format!("log{index}")) },
                "log-sector-size": 512,
            }),
            Layer::Throttled(_) => json!({
                "driver": "throttle", "node-name": name, "discard": "unmap",
                "throttle-group": format!("throttle{index}"),
                "file": { "driver": "raw", "file": disk, "discard": "unmap" },
            }),
            Layer::Null(nanoseconds) => json!({
                "driver": "null-co", "node-name": name, "size": self.bytes,
                "latency-ns": nanoseconds, "read-zeroes": true,
            }),
        }
    }
}

/// A rule of blkdebug: requests of `kind` that touch a 512-byte `sector` fail with `errno`.
pub(super) fn fails(kind: &str, sector: u64, errno: i32) -> Value {
    json!({ "event": "none", "iotype": kind, "sector": sector, "errno": errno })
}

/// The configurations that every run tries.
pub fn matrix() -> Vec<Configuration> {
    let new = Configuration::new;
    let mut subsystem = new("subsystem").namespaces(&[",nsid=1"]);
    subsystem.subsystem = true;
    let io = Runs::Only("io/");
    let bring_up = Runs::Only("bring-up/");
    vec![
        new("lba-512"),
        new("lba-4096").controller(",logical_block_size=4096,physical_block_size=4096"),
        new("mdts-0").controller(",mdts=0").runs(io),
        new("mdts-1").controller(",mdts=1").runs(io),
        new("mdts-1 copies")
            .controller(",mdts=1")
            .namespaces(&[",mssrl=8,mcl=16,msrc=3"])
            .runs(Runs::Only("commands/")),
        new("mdts-5").controller(",mdts=5").runs(io),
        new("namespaces-with-gaps").namespaces(&[
            ",nsid=2",
            ",nsid=7,logical_block_size=4096,physical_block_size=4096",
            ",nsid=250",
        ]),
        new("one-queue").controller(",max_ioqpairs=1"),
        new("three-queues").controller(",max_ioqpairs=3").runs(Runs::Only("queues/")),
        new("msix-in-a-bar-of-its-own").controller(",msix-exclusive-bar=on").runs(bring_up),
        new("two-vectors").controller(",msix_qsize=2").runs(Runs::Only("queues/")),
        new("one-vector").controller(",msix_qsize=1").runs(Runs::Only("admin/")),
        new("controller-memory").controller(",cmb_size_mb=16").runs(io),
        subsystem.runs(bring_up),
        new("errors-elsewhere").layer(Layer::Debug(vec![fails("read", 333_333, 5)])).runs(io),
        new("throttled").layer(Layer::Throttled(2000)).runs(bring_up),
        new("slow").layer(Layer::Null(2_000_000)).runs(Runs::Only("bring-up/shutdown")),
        new("metadata").namespaces(&[",ms=8"]).runs(Runs::Refused("metadata")),
        new("zoned").namespaces(&[",zoned=true"]).runs(Runs::Refused("zoned command set")),
    ]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_matrix_has_twelve_configurations_or_more_each_with_a_name_of_its_own() {
        let names: BTreeSet<&str> = matrix().iter().map(|configuration| configuration.name).collect();
        assert!(names.len() >= 12);
        assert_eq!(names.len(), matrix().len());
    }

    #[test]
    fn a_command_line_names_every_disk_once_and_waits_for_nobody() {
        for configuration in matrix() {
            let line = configuration.command_line(Path::new("/x")).join(" ");
            for index in 0..configuration.disks.len() {
                assert_eq!(line.matches(&format!("drive=d{index}")).count(), 1, "{line}");
                assert_eq!(line.matches(&format!("\"node-name\":\"d{index}\"")).count(), 1, "{line}");
            }
            assert!(
                line.contains("-qtest unix:/x/qtest,server=on,wait=off") && line.contains("-S"),
                "{line}"
            );
        }
    }

    #[test]
    fn a_rule_of_blkdebug_is_below_the_format_where_requests_can_be_held() {
        let disk = Disk { bytes: MIB, layer: Layer::Debug(vec![fails("write", 8, 5)]) };
        let device = disk.block_device(0, Path::new("/x"));
        assert_eq!(device["driver"], "raw");
        assert_eq!(device["file"]["driver"], "blkdebug");
        assert_eq!(device["file"]["inject-error"][0]["sector"], 8);
    }
}
