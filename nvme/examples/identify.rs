//! Opens a device and prints what its controller and namespaces are.
//!
//! `cargo run -p nvme --example identify -- emu:mem,size=1GiB`

use std::error::Error;

use nvme::{DeviceSpec, OpenOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let spec = std::env::args().nth(1).unwrap_or_else(|| "emu:mem,size=1GiB".to_owned());
    let spec: DeviceSpec = spec.parse()?;
    let controller = nvme::open(&spec, OpenOptions::default())?;
    let info = controller.info();
    println!("{}: {} {} (firmware {})", controller.name(), info.model, info.serial, info.firmware);
    println!("  NVMe {}, {} I/O queues", info.version, controller.max_queues());
    match info.max_transfer {
        Some(bytes) => println!("  commands of up to {} KiB", bytes >> 10),
        None => println!("  commands of any size"),
    }
    println!("  volatile write cache: {}", if info.volatile_write_cache { "yes" } else { "no" });
    for entry in controller.namespaces().iter() {
        match &entry.checked {
            Ok(namespace) => println!(
                "  namespace {}: {} blocks of {} bytes",
                namespace.nsid,
                namespace.blocks,
                namespace.lba_size()
            ),
            Err(problem) => println!("  namespace {}: not usable, {problem}", entry.nsid),
        }
    }
    Ok(())
}
