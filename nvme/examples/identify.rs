//! Opens a device and prints what its controller and namespaces are.
//!
//! `cargo run --release --example identify -p nvme -- emu:mem,size=64MiB`

use std::error::Error;

use nvme::{DeviceSpec, OpenOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let spec = std::env::args().nth(1).unwrap_or_else(|| "emu:mem,size=1GiB".to_owned());
    let spec: DeviceSpec = spec.parse()?;
    let controller = nvme::open(&spec, OpenOptions::default())?;

    let info = controller.info();
    println!(
        "{}: {}, serial number {}, firmware {}",
        controller.name(),
        info.model,
        info.serial,
        info.firmware
    );
    println!("  NVMe {}", info.version);
    println!(
        "  {} I/O queues of up to {} entries",
        controller.max_queues(),
        u32::from(info.cap.mqes_z()) + 1
    );
    match info.max_transfer {
        Some(bytes) => println!("  commands of up to {} KiB", bytes >> 10),
        None => println!("  commands of any size"),
    }
    println!("  volatile write cache: {}", if info.volatile_write_cache { "yes" } else { "no" });
    let health = controller.smart_log()?;
    println!(
        "  {} °C, {}% of its endurance used",
        i32::from(health.temperature.get()) - 273,
        health.percentage_used
    );

    for entry in controller.namespaces().iter() {
        match &entry.checked {
            Ok(namespace) => println!(
                "  namespace {}: {} blocks of {} bytes, {} MiB",
                namespace.nsid,
                namespace.blocks,
                namespace.lba_size(),
                (namespace.blocks << namespace.lba_shift) >> 20
            ),
            // One that cannot be used does not keep the others from being used.
            Err(problem) => println!("  namespace {}: not usable, {problem}", entry.nsid),
        }
    }
    // The last handle would do it too, when dropped; this way an error is seen.
    Ok(controller.shutdown()?)
}
