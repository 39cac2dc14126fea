//! Cost of a command inside the controller: batches of 4 KiB reads and writes, one doorbell for each batch.
//!
//! The host side is the tests' plain initiator, whose cost is included.
#![allow(missing_docs, dead_code, unused_imports, clippy::unwrap_used)]

#[path = "../tests/raw/initiator.rs"]
mod initiator;

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use initiator::{Buffer, Host, NS1, memory_config, threaded};
use nvme_emulator::{Backing, ControllerConfig, CreateMode, LatencyModel, Mode, NamespaceConfig};
use nvme_spec::SubmissionEntry;
use nvme_spec::command::ForceUnitAccess;

const BATCH: u64 = 32;
const BLOCKS: u64 = 16 << 10;

fn run(criterion: &mut Criterion, name: &str, config: ControllerConfig) {
    let mut host = Host::new(config);
    let mut io = host.io_pair(1, 64);
    let buffer = Buffer::new(&host, 4096);
    let fill = Buffer::filled(&host, &vec![7; 1 << 20]);
    for slba in (0..BLOCKS).step_by(256) {
        io.ok(fill.attach(SubmissionEntry::write(NS1, slba, 255, ForceUnitAccess::No)));
    }
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(BATCH));
    let mut random = 1u64;
    let mut batch = |build: &dyn Fn(u64) -> SubmissionEntry| {
        for _ in 0..BATCH {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let slba = ((u128::from(random) * u128::from(BLOCKS)) >> 64) as u64;
            io.push(buffer.attach(build(slba)));
        }
        io.ring();
        let mut seen = 0;
        while seen < BATCH {
            match io.peek() {
                Some(_) => seen += 1,
                None => std::thread::yield_now(),
            }
        }
        io.free();
    };
    group.bench_function("read", |b| b.iter(|| batch(&|slba| SubmissionEntry::read(NS1, slba, 0))));
    group.bench_function("write", |b| {
        b.iter(|| batch(&|slba| SubmissionEntry::write(NS1, slba, 0, ForceUnitAccess::No)));
    });
    group.finish();
}

fn controller(criterion: &mut Criterion) {
    let memory = memory_config(BLOCKS * 4096, 4096);
    run(criterion, "memory-inline", memory.clone());
    run(criterion, "memory-threaded", ControllerConfig { mode: threaded(1), ..memory.clone() });
    // 32 commands at once of 80 µs each, 2.5 µs apart: 157.5 µs for each batch if the model is exact.
    let latency = Some(LatencyModel::uniform(Duration::from_micros(80)).limited_to(400_000));
    run(criterion, "memory-80us", ControllerConfig { mode: threaded(1), latency, ..memory });
    let dir = tempfile::tempdir().unwrap();
    for (name, mode) in [("image-inline", Mode::Inline), ("image-threaded", threaded(1))] {
        let backing = Backing::File { path: dir.path().join("image"), create: CreateMode::OpenOrCreate };
        let namespace = NamespaceConfig::new(Some(BLOCKS * 4096), backing);
        let config = ControllerConfig { mode, ..ControllerConfig::with_namespace(namespace) };
        run(criterion, name, config);
    }
}

criterion_group!(benches, controller);
criterion_main!(benches);
