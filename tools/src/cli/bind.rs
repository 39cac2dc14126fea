//! `pollux bind` and `pollux unbind`: controllers to vfio-pci, and back to the driver they had.
//!
//! Owns: the command lines, and giving a group's node to a user. What is done to the drivers is in [`nvme::pci`].

use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use nix::unistd::{Gid, Uid, User};
use nvme::PciAddress;
use nvme::pci::{self, BindError, BindPlan, PciController, Sysfs};

use crate::failure::{During, Failure};
use crate::output::outln;

/// How long a group's node may take to appear: the kernel makes it before the driver says that it is done.
const NODE_DEADLINE: Duration = Duration::from_secs(5);
const NODE_POLL: Duration = Duration::from_millis(10);

/// Bind NVMe controllers to vfio-pci, so that `pci:ADDR` devices can be opened
#[derive(Args)]
#[command(after_help = "\
Needs root. Refused, with the reason and before anything is changed:
  - a controller in use: mounted, swap, member of a RAID array, LVM, encryption or multipath (all the way up), a loop
    device on it, offered by the kernel's NVMe target, or one of its nodes open in a program;
  - one in an IOMMU group with a device that the kernel uses; several controllers of one group are bound together;
  - one that is bound to another driver than nvme, pci-stub or none, or in no IOMMU group.
If a step fails, everything is put back as it was. Doing it twice does nothing.

The driver that it had is remembered in /run/pollux/bind until `pollux unbind`.
--user gives the group's node (/dev/vfio/GROUP) to a user until it goes away; a udev rule does that for good
(docs/hardware.md). On a kernel without nodes for groups these are the device's own and /dev/iommu.

Exit codes: 0 bound, 1 refused or failed, 2 the command line makes no sense.

Example:
  pollux bind --dry-run 0000:01:00.0
  pollux bind 0000:01:00.0 --user alice")]
pub(super) struct Bind {
    /// PCI addresses, as `pollux list` shows them
    #[arg(value_name = "ADDR", required = true)]
    addresses: Vec<PciAddress>,

    /// Show what would be written where, and why, and do nothing
    #[arg(long)]
    dry_run: bool,

    /// Give the node to this user: a name or a number
    #[arg(long, value_name = "USER", value_parser = parse_user)]
    user: Option<Owner>,
}

impl Bind {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let sysfs = Sysfs::default();
        let plan =
            BindPlan::to_bind(&sysfs, &self.addresses).map_err(|error| failed("bind to vfio-pci", &error))?;
        if self.dry_run {
            show(&plan, "already bound to vfio-pci");
            if let Some(owner) = &self.user {
                outln!("  its node in /dev/vfio is given to {}", owner.name);
            }
            return Ok(());
        }
        let outcome = plan.carry_out(&sysfs).map_err(|error| failed("bind to vfio-pci", &error))?;
        for note in outcome.notes {
            eprintln!("pollux: note: {note}");
        }
        for &address in &self.addresses {
            let found = pci::controller(&sysfs, address).during("cannot look at it again")?;
            self.hand_over(&sysfs, &found)?;
        }
        Ok(())
    }

    /// Gives the nodes to the user, and says where they are.
    fn hand_over(&self, sysfs: &Sysfs, found: &PciController) -> Result<(), Failure> {
        let address = found.address;
        let driver = found.driver.as_deref().unwrap_or("no driver");
        let Some(group) = found.iommu_group else {
            outln!("{address}: bound to {driver}");
            return Ok(());
        };
        let nodes = await_nodes(sysfs, address, group);
        let named: Vec<String> = nodes.iter().map(|node| node.display().to_string()).collect();
        let named = named.join(" and ");
        if nodes.is_empty() {
            let group = sysfs.dev("vfio").join(group.to_string());
            return Err(Failure::new(format!(
                "{address}: bound to {driver}, but neither {} nor a node below {} has appeared",
                group.display(),
                sysfs.dev("vfio/devices").display()
            ))
            .remedy("see `dmesg | tail`, and whether devtmpfs is mounted on /dev"));
        }
        let Some(owner) = &self.user else {
            outln!("{address}: bound to {driver}; {}", belongs(&nodes, &named, ""));
            return Ok(());
        };
        for node in &nodes {
            chown(node, Some(owner.uid.as_raw()), owner.gid.map(Gid::as_raw)).map_err(|error| {
                let (node, name) = (node.display(), &owner.name);
                Failure::new(format!(
                    "{address}: bound to {driver}, but cannot give {node} to {name}: {error}"
                ))
                .remedy(format!("as root: chown {name} {node}"))
            })?;
        }
        outln!("{address}: bound to {driver}; {}", belongs(&nodes, &named, &owner.name));
        Ok(())
    }
}

/// What is said of a controller's nodes.
fn belongs(nodes: &[PathBuf], named: &str, owner: &str) -> String {
    match (nodes.len(), owner) {
        (1, "") => format!("its node is {named}"),
        (_, "") => format!("its nodes are {named}"),
        (1, owner) => format!("its node {named} belongs to {owner}"),
        (_, owner) => format!("its nodes {named} belong to {owner}"),
    }
}

/// A controller's nodes, which may be about to appear; empty if they do not.
fn await_nodes(sysfs: &Sysfs, address: PciAddress, group: u32) -> Vec<PathBuf> {
    let deadline = Instant::now() + NODE_DEADLINE;
    loop {
        let nodes = pci::vfio_nodes(sysfs, address, group);
        if !nodes.is_empty() || Instant::now() > deadline {
            return nodes;
        }
        std::thread::sleep(NODE_POLL);
    }
}

/// Give NVMe controllers back to the driver that they had
#[derive(Args)]
#[command(after_help = "\
Needs root. A controller that a program has open is refused: the kernel would wait for as long as that lasts. The driver that it had
before `pollux bind` gets it back, or none if it had none; where that is not known (/run was lost, or something else has bound it),
the kernel looks for a driver. If a step fails, try again. Doing it twice does nothing.

Exit codes: 0 given back, 1 refused or failed, 2 the command line makes no sense.

Example:
  pollux unbind 0000:01:00.0
  pollux unbind --dry-run 0000:01:00.0")]
pub(super) struct Unbind {
    /// PCI addresses, as `pollux list` shows them
    #[arg(value_name = "ADDR", required = true)]
    addresses: Vec<PciAddress>,

    /// Show what would be written where, and why, and do nothing
    #[arg(long)]
    dry_run: bool,
}

impl Unbind {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let sysfs = Sysfs::default();
        let plan = BindPlan::to_unbind(&sysfs, &self.addresses).map_err(|error| failed("unbind", &error))?;
        if self.dry_run {
            show(&plan, "not bound to vfio-pci: nothing to give back");
            return Ok(());
        }
        plan.carry_out(&sysfs).map_err(|error| failed("unbind", &error))?;
        for &address in &self.addresses {
            let found = pci::controller(&sysfs, address).during("cannot look at it again")?;
            match found.driver {
                Some(driver) => outln!("{address}: bound to {driver}"),
                None => {
                    outln!("{address}: bound to no driver; to have the kernel look for one:");
                    outln!("  echo {address} > /sys/bus/pci/drivers_probe");
                }
            }
        }
        Ok(())
    }
}

fn failed(what: &str, error: &BindError) -> Failure {
    Failure::new(format!("cannot {what}: {error}"))
}

/// Prints a plan.
fn show(plan: &BindPlan, nothing: &str) {
    for (address, steps) in plan.steps() {
        if steps.is_empty() {
            outln!("{address}: {nothing}");
            continue;
        }
        outln!("{address}:");
        for step in steps {
            outln!("  {step}");
        }
    }
}

/// Who is to own a node.
#[derive(Clone, Debug)]
struct Owner {
    name: String,
    uid: Uid,
    gid: Option<Gid>,
}

fn parse_user(text: &str) -> Result<Owner, String> {
    if let Ok(uid) = text.parse() {
        return Ok(Owner { name: text.to_owned(), uid: Uid::from_raw(uid), gid: None });
    }
    match User::from_name(text) {
        Ok(Some(user)) => Ok(Owner { name: user.name, uid: user.uid, gid: Some(user.gid) }),
        Ok(None) => Err(format!("there is no user `{text}`")),
        Err(error) => Err(format!("cannot look for the user `{text}`: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_names_or_numbers() {
        assert_eq!(parse_user("4711").unwrap().uid.as_raw(), 4711);
        assert_eq!(parse_user("root").unwrap().uid.as_raw(), 0);
        assert!(parse_user("no-such-user-here").unwrap_err().contains("no-such-user-here"));
    }

    #[test]
    fn nodes_are_waited_for() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("dev/vfio")).unwrap();
        let node = root.path().join("dev/vfio/7");
        let appearing = node.clone();
        let maker = std::thread::spawn(move || std::fs::write(appearing, "").unwrap());
        let nodes = await_nodes(&Sysfs::under(root.path()), "0000:01:00.0".parse().unwrap(), 7);
        maker.join().unwrap();
        assert_eq!(nodes, [node]);
    }

    #[test]
    fn one_node_or_two_are_named() {
        let nodes = ["/dev/vfio/devices/vfio0", "/dev/iommu"].map(PathBuf::from);
        assert_eq!(belongs(&nodes[..1], "A", ""), "its node is A");
        assert_eq!(belongs(&nodes, "A and B", "me"), "its nodes A and B belong to me");
    }
}
