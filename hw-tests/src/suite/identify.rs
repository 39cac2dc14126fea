//! What a controller says of itself: its registers, its identify data and its namespaces must agree.

use anyhow::{Context, Result, anyhow, ensure};
use nvme_spec::NamespaceId;
use nvme_spec::identify::{Cns, NamespaceList};
use reactor::block::BlockDevice;
use zerocopy::FromBytes;

use super::device::{Device, block_bytes, pattern, queue_options, read, same, write};
use super::{Case, Subject, Verdict};

const SUITE: &str = "identify";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "the_controller_agrees_with_its_registers", run: controller },
    Case { suite: SUITE, name: "the_list_names_exactly_the_active_namespaces", run: namespaces },
    Case { suite: SUITE, name: "the_queue_has_the_namespace's_geometry", run: geometry },
    Case { suite: SUITE, name: "namespaces_do_not_share_blocks", run: several_namespaces },
];

fn controller(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let info = device.controller.info();
    ensure!(!info.serial.trim().is_empty(), "no serial number");
    ensure!(!info.model.trim().is_empty(), "no model");
    ensure!(info.nn > 0, "NN is 0");
    ensure!(info.page_size.is_power_of_two() && info.page_size >= 4096, "page size {}", info.page_size);
    if let Some(most) = info.max_transfer {
        let smallest = 4096_u64 << info.cap.mpsmin();
        ensure!(most == smallest << info.raw.mdts, "MDTS {} and {most} bytes at most", info.raw.mdts);
    } else {
        ensure!(info.raw.mdts == 0, "MDTS {} and no limit", info.raw.mdts);
    }
    // Asked again, it gives the same answer.
    let again = device.controller.identify(Cns::CONTROLLER, NamespaceId::NONE)?;
    let raw = nvme_spec::identify::IdentifyController::read_from_bytes(&again[..])
        .map_err(|error| anyhow!("{error}"))?;
    ensure!(raw.sn == info.raw.sn && raw.mn == info.raw.mn, "serial number or model changed");
    ensure!(raw.oncs() == info.oncs, "ONCS {:?}, at first {:?}", raw.oncs(), info.oncs);
    device.close()?;
    Ok(Verdict::Passed)
}

fn namespaces(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let list = device.controller.identify(Cns::ACTIVE_NAMESPACES, NamespaceId::NONE)?;
    let list = NamespaceList::read_from_bytes(&list[..]).map_err(|error| anyhow!("{error}"))?;
    let listed: Vec<u32> = list.ids.iter().map(|id| id.get()).take_while(|&id| id != 0).collect();
    ensure!(listed.windows(2).all(|pair| pair[0] < pair[1]), "not ascending: {listed:?}");
    let found: Vec<u32> = device.controller.namespaces().iter().map(|entry| entry.nsid.get()).collect();
    ensure!(found == listed, "the driver has namespaces {found:?}, the list {listed:?}");
    for entry in device.controller.namespaces().iter() {
        let nsid = entry.nsid;
        let raw = &entry.raw;
        ensure!(raw.nsze.get() > 0, "namespace {nsid} is in the list and has no blocks");
        ensure!(raw.ncap.get() <= raw.nsze.get(), "namespace {nsid}: NCAP {} > NSZE {}", raw.ncap, raw.nsze);
        ensure!(raw.nuse.get() <= raw.ncap.get(), "namespace {nsid}: NUSE {} > NCAP {}", raw.nuse, raw.ncap);
        if let Ok(namespace) = &entry.checked {
            ensure!(namespace.blocks == raw.nsze.get(), "namespace {nsid}: {} blocks", namespace.blocks);
        }
        // Optional before NVMe 1.3.
        if let Ok(uids) = device.controller.namespace_uids(nsid) {
            let nguid = raw.nguid != [0; 16];
            let said = uids.contains(&nvme::NamespaceUid::Nguid(raw.nguid));
            ensure!(
                said || !nguid || uids.is_empty(),
                "namespace {nsid}: NGUID {:02x?}, descriptors {uids:?}",
                raw.nguid
            );
        }
    }
    let missing =
        (1..).find(|id| !listed.contains(id)).map(NamespaceId::new).context("an unused identifier")?;
    ensure!(
        device.controller.namespace(missing).is_err(),
        "namespace {missing} is not listed and can be used"
    );
    device.close()?;
    Ok(Verdict::Passed)
}

fn geometry(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let namespace = device.controller.default_namespace()?;
    let queue = device.queue()?;
    let geometry = queue.geometry();
    ensure!(geometry.lba_size == namespace.lba_size(), "{} and {}", geometry.lba_size, namespace.lba_size());
    ensure!(geometry.lba_count.get() == namespace.blocks, "{} and {}", geometry.lba_count, namespace.blocks);
    let info = device.controller.info();
    ensure!(geometry.volatile_write_cache == info.volatile_write_cache, "write cache: {geometry:?}");
    if let Some(most) = info.max_transfer {
        let preferred = u64::from(geometry.preferred_transfer);
        ensure!(preferred <= most, "transfers of {preferred} bytes, the device takes {most}");
    }
    let entries = u32::from(info.cap.mqes_z()) + 1;
    ensure!(u32::from(geometry.queue_depth) < entries, "{} in {entries} entries", geometry.queue_depth);
    drop(queue);
    device.close()?;
    Ok(Verdict::Passed)
}

fn several_namespaces(subject: &Subject) -> Result<Verdict> {
    let device = Device::open(subject)?;
    let entries = device.controller.namespaces();
    let usable: Vec<NamespaceId> =
        entries.iter().filter(|entry| entry.checked.is_ok()).map(|entry| entry.nsid).collect();
    if usable.len() < 2 {
        return Verdict::skipped("the controller has one usable namespace");
    }
    if subject.kind == super::DeviceKind::Drive {
        return Verdict::skipped("the other namespaces of a drive are not ours to write to");
    }
    let mut written = Vec::new();
    for pass in 0..2 {
        for &nsid in &usable {
            let options = nvme::QueueOptions { namespace: Some(nsid), ..queue_options() };
            let mut queue = device.queue_with(&options)?;
            let block = block_bytes(&queue);
            let data = pattern(u64::from(nsid.get()) << 20, 1, 4 * block, block);
            if pass == 0 {
                write(&mut queue, 1, &data)?;
                written.push(nsid);
            } else {
                same(&read(&mut queue, 1, data.len())?, &data, &format!("namespace {nsid}"))?;
            }
        }
    }
    device.close()?;
    Ok(Verdict::Passed)
}
