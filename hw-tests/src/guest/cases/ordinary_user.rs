//! Without root: whoever owns the group's node uses the controller.

use anyhow::{Result, ensure};

use super::{DRIVE, MOUNT, Part};
use crate::guest::{Guest, USER};

pub(super) const PARTS: &[Part] =
    &[("the_owner_of_the_node_needs_no_root", owner), ("too_little_lockable_memory_is_told", too_little)];

/// KiB that are enough for a daemon.
const ENOUGH_KIB: u32 = 1 << 20;

/// A script run by the ordinary user, who may lock so many KiB.
fn as_user(lockable_kib: u32, script: &str) -> String {
    format!("cd /home/{USER}; ulimit -l {lockable_kib}; exec su {USER} -c '{script}'")
}

fn owner(guest: &mut Guest) -> Result<()> {
    let nodes = guest.bind(DRIVE)?;
    let device = format!("pci:{DRIVE}");
    let identify = as_user(ENOUGH_KIB, &format!("pollux identify --json --device {device}"));
    // With iommufd two nodes are needed, one as well as the other.
    for node in &nodes {
        guest.refused(&identify, &[&format!("no permission for {node}"), "chown"])?;
        guest.ok(&format!("chown {USER} {node}"))?;
    }
    guest.json(&identify)?;
    guest.unbind(DRIVE)?;
    guest.ok("test ! -c /dev/iommu || chown root /dev/iommu")?;
    guest.ok(&format!("pollux bind --user {USER} {DRIVE} | grep 'belongs\\? to {USER}'"))?;
    guest.refused(&as_user(ENOUGH_KIB, &format!("pollux unbind {DRIVE}")), &["root"])?;
    guest.json(&identify)?;
    let load = format!("pollux perf --json --device {device} --rw randread --bs 4k --iodepth 32 --runtime 1");
    let reads = guest.json(&as_user(ENOUGH_KIB, &load))?;
    ensure!(reads["errors"] == 0, "{reads}");
    guest.ok(&as_user(ENOUGH_KIB, &format!("pollux mkfs --force --device {device}")))?;
    if guest.run("command -v fusermount3")?.code == 0 {
        mount(guest, &device)?;
    }
    guest.ok(&as_user(ENOUGH_KIB, &format!("pollux fsck --device {device}")))?;
    guest.unbind(DRIVE)?;
    guest.quiet_kernel()
}

/// The user mounts as well, by fusermount3.
fn mount(guest: &mut Guest, device: &str) -> Result<()> {
    guest.ok(&format!("mkdir -p {MOUNT} && chown {USER} {MOUNT}"))?;
    let daemon = format!(
        "{{ polluxd --device {device} --mount {MOUNT}; echo $? >/tmp/user.code; }} >/tmp/user.log 2>&1 &"
    );
    guest.ok(&format!("rm -f /tmp/user.code /tmp/user.log; {}", as_user(ENOUGH_KIB, &daemon)))?;
    let mounted = format!("grep -q ' {MOUNT} fuse' /proc/mounts");
    guest.until(std::time::Duration::from_secs(60), &format!("{mounted} || test -f /tmp/user.code"))?;
    guest.ok(&format!("{mounted} || {{ cat /tmp/user.log >&2; exit 1; }}"))?;
    guest
        .ok(&as_user(ENOUGH_KIB, &format!("cp -r /modules {MOUNT}/ && diff -r /modules {MOUNT}/modules")))?;
    guest.ok(&as_user(ENOUGH_KIB, "kill -INT $(pidof polluxd)"))?;
    guest.until(std::time::Duration::from_secs(60), "test -f /tmp/user.code")?;
    guest.ok("test $(cat /tmp/user.code) = 0 || { cat /tmp/user.log >&2; exit 1; }")?;
    guest.ok(&format!("chown root {MOUNT}; rm -f /tmp/user.*"))?;
    Ok(())
}

fn too_little(guest: &mut Guest) -> Result<()> {
    let nodes = guest.bind(DRIVE)?;
    guest.ok(&format!("chown {USER} {}", nodes.join(" ")))?;
    let identify = format!("pollux identify --device pci:{DRIVE}");
    guest.refused(&as_user(64, &identify), &["RLIMIT_MEMLOCK", "65536", "ulimit -l"])?;
    // Enough to open it, not for the buffers of a queue.
    let load = format!("pollux perf --device pci:{DRIVE} --rw randread --bs 256k --iodepth 256 --runtime 1");
    guest.refused(&as_user(24 << 10, &load), &["RLIMIT_MEMLOCK", "ulimit -l"])?;
    guest.unbind(DRIVE)?;
    guest.quiet_kernel()
}
