//! The driver's own cost: 4 KiB reads of an embedded controller in memory, inline, at several depths.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use nvme::{DeviceSpec, OpenOptions, QueueOptions};
use reactor::block::{BlockDevice, Lba, OpTag, Request};
use reactor::dma::DmaBuffer;

fn random_reads(criterion: &mut Criterion) {
    let spec: DeviceSpec = "emu:mem,size=256MiB,mode=inline".parse().expect("a constant spec");
    let controller = nvme::open(&spec, OpenOptions::default()).expect("memory is there");
    let mut group = criterion.benchmark_group("4 KiB random reads, inline");
    for depth in [1usize, 8, 32, 128] {
        let mut queue = controller.create_queue(&QueueOptions::default()).expect("a queue is left");
        let mut buffers: Vec<DmaBuffer> =
            (0..depth).map(|_| queue.pool().try_alloc(4096).expect("the pool is larger")).collect();
        let blocks = queue.geometry().lba_count.get();
        let mut state = 1u64;
        group.throughput(Throughput::Elements(depth as u64));
        group.bench_function(BenchmarkId::from_parameter(depth), |bencher| {
            bencher.iter(|| {
                for (tag, buffer) in buffers.drain(..).enumerate() {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    // Multiply-shift instead of a division.
                    let lba = Lba::new(((u128::from(state) * u128::from(blocks)) >> 64) as u64);
                    queue.submit(OpTag(tag as u64), Request::Read { lba, buffer }).expect("there is room");
                }
                queue.ring();
                while queue.in_flight() > 0 {
                    queue.process_completions(depth, &mut |completion| {
                        assert!(black_box(&completion.result).is_ok());
                        buffers.extend(completion.buffer);
                    });
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, random_reads);
criterion_main!(benches);
