//! What must hold in a guest.
//!
//! Owns: [`cases`], [`matrix`], and the machine that the parts of a case share.
//!
//! | controller of the shared machine | where | for |
//! |---|---|---|
//! | [`DRIVE`] | alone behind a hot-plug port | nearly everything |
//! | [`NEIGHBOURED`] | shares its IOMMU group with [`NEIGHBOUR`], a network card | group viability; what the kernel uses |
//!
//! Invariants: a part leaves both controllers to the kernel's driver, or fails; none needs that another ran before; the part
//! after one that failed gets a machine of its own.

mod binding;
mod matrix;
mod ordinary_user;
mod power_cut;
mod protection;
mod removal;
mod suite;
mod volume;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::machine::{Guest, GuestOptions, boot, missing};
use crate::suite::{Environment, MachineCase, Verdict};

pub use matrix::matrix;

/// Address of the controller that nearly everything is done with.
const DRIVE: &str = "0000:01:00.0";
/// Address of the controller that has a neighbour.
const NEIGHBOURED: &str = "0000:00:08.0";
/// Address of the neighbour.
const NEIGHBOUR: &str = "0000:00:08.1";
/// Serial number of [`DRIVE`].
const SERIAL: &str = "pollux-guest";
/// Where volumes are mounted.
const MOUNT: &str = "/mnt/p";

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// The cases of this tier: a boot each (two for the power cut), of several parts where they can share one.
pub fn cases() -> Vec<MachineCase> {
    let cases: [Named; 7] = [
        ("controllers_are_bound_given_back_and_confined", |environment| {
            in_one_boot(environment, &[binding::PARTS, protection::PARTS, ordinary_user::PARTS])
        }),
        ("volumes_live_behind_vfio_and_survive_removal", |environment| {
            in_one_boot(environment, &[volume::PARTS, removal::PARTS])
        }),
        ("the_generic_suite_passes_behind_vfio", suite::passes),
        ("what_was_synced_survives_a_power_cut", power_cut::survives),
        ("large_blocks_and_small_transfers", |environment| {
            matrix::passes(environment, &matrix::LARGE_BLOCKS)
        }),
        ("namespaces_with_a_gap_and_few_queues", |environment| {
            matrix::passes(environment, &matrix::NAMESPACES)
        }),
        ("msix_and_cmb_in_other_bars_beside_a_second_controller", |environment| {
            matrix::passes(environment, &matrix::BARS)
        }),
    ];
    cases.map(|(name, run)| MachineCase { suite: "guest", name, run }).into()
}

/// A case: its name and what it does.
type Named = (&'static str, fn(&Environment) -> Result<Verdict>);

/// A part of a case: what must hold, as a name, and what it does.
type Part = (&'static str, fn(&mut Guest) -> Result<()>);

/// Runs parts one after another in one machine. All run, whatever fails.
fn in_one_boot(environment: &Environment, parts: &[&[Part]]) -> Result<Verdict> {
    if let Some(reason) = missing(environment) {
        return Ok(Verdict::Skipped(reason));
    }
    let mut machine: Option<Guest> = None;
    let mut failures = Vec::new();
    for (name, part) in parts.iter().copied().flatten() {
        let start = Instant::now();
        // Taken out, so that a machine in an unknown state ends with a part that fails.
        let outcome = machine.take().map_or_else(|| boot_shared(environment), Ok).and_then(|mut guest| {
            guest.ok("dmesg -c >/dev/null")?;
            part(&mut guest)?;
            machine = Some(guest);
            Ok(())
        });
        let took = start.elapsed().as_millis();
        match outcome {
            Ok(()) => eprintln!("guest: {name} passed {took}ms"),
            Err(error) => {
                eprintln!("guest: {name} failed {took}ms");
                failures.push(format!("{name}: {error:#}"));
            }
        }
    }
    ensure!(failures.is_empty(), "{} of the parts failed: {}", failures.len(), failures.join("\n"));
    Ok(Verdict::Passed)
}

fn boot_shared(environment: &Environment) -> Result<Guest> {
    let directory = drives(environment)?;
    let first = image(directory.path(), "first", GIB)?;
    let second = image(directory.path(), "second", 256 * MIB)?;
    let options = GuestOptions::new("shared")
        .drive("first", &first)
        .drive("second", &second)
        .with("-device", "pcie-root-port,id=slot0,slot=1,chassis=1")
        .with("-device", format!("nvme,id=ctrl0,serial={SERIAL},drive=first,bus=slot0"))
        .with("-device", "nvme,serial=neighboured,drive=second,addr=8.0,multifunction=on")
        .with("-device", "e1000,addr=8.1");
    // QEMU has the images open: their names may go.
    boot(environment, &options)
}

/// A directory for images.
fn drives(environment: &Environment) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("drives-")
        .tempdir_in(&environment.scratch_root)
        .context("making a directory")
}

/// A sparse file.
fn image(directory: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = directory.join(name);
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    file.set_len(bytes).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Steps that several cases take.
impl Guest {
    /// The controller is vfio-pci's afterwards; its nodes are returned: its group's, or those of iommufd.
    fn bind(&mut self, address: &str) -> Result<Vec<String>> {
        let said = self.ok(&format!("pollux bind {address}"))?;
        let function = format!("/sys/bus/pci/devices/{address}");
        let script = format!(
            "group=/dev/vfio/$(basename $(readlink {function}/iommu_group)); \
             if test -c $group; then echo $group; \
             else echo /dev/vfio/devices/$(ls {function}/vfio-dev) /dev/iommu; fi"
        );
        let nodes = self.ok(&script)?;
        let nodes: Vec<String> = nodes.split_whitespace().map(str::to_owned).collect();
        for node in &nodes {
            self.ok(&format!("test -c {node}"))?;
            ensure!(said.contains(node), "`pollux bind` does not name {node}: {said}");
        }
        ensure!(self.driver(address)? == "vfio-pci", "{address} is not bound to vfio-pci");
        Ok(nodes)
    }

    /// The controller is the kernel's afterwards, with a block device, whose name is returned.
    fn unbind(&mut self, address: &str) -> Result<String> {
        self.ok(&format!("pollux unbind {address}"))?;
        ensure!(self.driver(address)? == "nvme", "{address} is not bound to nvme");
        self.block_device(address)
    }

    /// The kernel's name of the first namespace, such as `/dev/nvme0n1`.
    fn block_device(&mut self, address: &str) -> Result<String> {
        let pattern = format!("/sys/bus/pci/devices/{address}/nvme/nvme*/nvme*n*");
        self.until(Duration::from_secs(30), &format!("ls -d {pattern}"))?;
        let name = self.ok(&format!("basename $(ls -d {pattern} | head -n 1)"))?;
        let device = format!("/dev/{}", name.trim());
        self.until(Duration::from_secs(30), &format!("test -b {device}"))?;
        Ok(device)
    }

    fn driver(&mut self, address: &str) -> Result<String> {
        let link = format!("/sys/bus/pci/devices/{address}/driver");
        Ok(self.ok(&format!("basename $(readlink {link} || echo none)"))?.trim().to_owned())
    }

    /// Starts polluxd on `device` and waits for its mount at [`MOUNT`].
    fn mount(&mut self, device: &str) -> Result<()> {
        self.ok(&format!(
            "mkdir -p {MOUNT}; rm -f /tmp/polluxd.code; \
             {{ polluxd --device {device} --mount {MOUNT}; echo $? >/tmp/polluxd.code; }} >/tmp/polluxd.log 2>&1 &"
        ))?;
        let mounted = format!("grep -q ' {MOUNT} fuse' /proc/mounts || test -f /tmp/polluxd.code");
        self.until(Duration::from_secs(60), &mounted)?;
        self.ok(&format!("grep -q ' {MOUNT} fuse' /proc/mounts || {{ cat /tmp/polluxd.log >&2; exit 1; }}"))?;
        Ok(())
    }

    /// Ends polluxd as an operator does; it must end well.
    fn unmount(&mut self) -> Result<()> {
        self.ok("kill -INT $(pidof polluxd)")?;
        self.until(Duration::from_secs(60), "test -f /tmp/polluxd.code")?;
        self.ok("test $(cat /tmp/polluxd.code) = 0 || { cat /tmp/polluxd.log >&2; exit 1; }")?;
        self.ok(&format!("! grep ' {MOUNT} ' /proc/mounts"))?;
        Ok(())
    }

    /// A volume takes a tree in, is whole after an unmount, and gives the tree back.
    fn keep_a_tree(&mut self, device: &str) -> Result<()> {
        self.ok(TREE)?;
        self.ok(&format!("pollux mkfs --force --device {device}"))?;
        self.mount(device)?;
        self.ok(&format!(
            "cp -a /tmp/tree {MOUNT}/ && diff -r /tmp/tree {MOUNT}/tree && pollux sync {MOUNT}"
        ))?;
        self.unmount()?;
        self.ok(&format!("pollux fsck --device {device}"))?;
        self.mount(device)?;
        self.ok(&format!("diff -r /tmp/tree {MOUNT}/tree"))?;
        self.unmount()
    }

    /// The kernel has complained about nothing since the case began.
    fn quiet_kernel(&mut self) -> Result<()> {
        let complaints = "BUG|WARNING:|Oops|Call Trace|DMAR:.*fault|DMAR: .DMA|I/O error|nvme.*(timeout|abort|failed|down|reset)";
        // A controller memory buffer that it cannot use is nobody's fault.
        let script = format!("! dmesg | grep -v 'failed to register the CMB' | grep -E '{complaints}' >&2");
        self.ok(&script).context("the kernel complains")?;
        Ok(())
    }
}

/// Makes `/tmp/tree`: 200 files of 0 to 60 KiB in nested directories, links, and a file of 4 MiB.
const TREE: &str = r#"
test -d /tmp/tree && exit 0
mkdir -p /tmp/tree.new && cd /tmp/tree.new || exit 1
head -c 4194304 /dev/urandom >large
n=0
while [ $n -lt 200 ]; do
    d=d$((n % 7))/e$((n % 3))
    [ -d $d ] || mkdir -p $d
    dd if=large of=$d/f$n bs=300 skip=$n count=$((n * n % 200)) 2>/dev/null
    n=$((n + 1))
done
ln d0/e0/f0 d1/hard && ln -s ../d0/e0/f21 d2/soft && chmod 751 d3/e1/f10
mv /tmp/tree.new /tmp/tree
"#;
