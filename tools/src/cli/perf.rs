//! `pollux perf`: load on the raw device, by the same driver and reactors that the daemon uses.
//!
//! Owns: options, the safety catch before writes, and the reports. The load itself is [`crate::load`].

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use nvme::QueueOptions;
use reactor::ReactorConfig;
use serde_json::json;

use super::print_json;
use crate::device::{self, Device, DeviceSpec, parse_size};
use crate::failure::{During, Failure};
use crate::load::{Load, Measured, Pattern, RunningLoad};
use crate::output::outln;
use crate::quantity::{CoreList, parse_cores, parse_seconds, show_nanos, show_rate, show_size};

/// Most requests in flight on one core.
const DEPTH_LIMIT: u32 = 4096;

/// DMA memory for each byte of buffers: the pool hands out powers of two.
const POOL_SLACK: u64 = 2;

/// Largest request.
const BLOCK_LIMIT: u64 = 1 << 20;

/// Measure the raw device: rate, bandwidth, latencies
#[derive(Args)]
#[command(after_help = "\
JSON keys: iops, bw_bytes (bytes per second), lat_ns {min, mean, p50, p99, p999, max}, errors; rw, bs, iodepth, cores,
runtime_s, device say what was measured.

Example:
  pollux perf --device emu:mem,size=1GiB --rw randread --bs 4k --iodepth 32 --runtime 3 --json")]
pub(super) struct Perf {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// What to do
    #[arg(long, value_enum)]
    rw: Direction,

    /// Share of reads in a mixed load, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,

    /// Size of a request
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = parse_size)]
    bs: u64,

    /// Requests in flight on each core
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(DEPTH_LIMIT)))]
    iodepth: u32,

    /// How long to measure, in seconds
    #[arg(long, value_name = "S", default_value = "10", value_parser = parse_seconds)]
    runtime: Duration,

    /// How long to run before that, in seconds
    #[arg(long, value_name = "S", default_value = "0", value_parser = parse_seconds)]
    warmup: Duration,

    /// Core ids, one reactor on each
    #[arg(long, value_name = "LIST", default_value = "0", value_parser = parse_cores)]
    cores: CoreList,

    /// Print one JSON document
    #[arg(long)]
    json: bool,

    /// Allow writes to a device that is not emu:mem: its contents are lost
    #[arg(long)]
    destroy_data: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Direction {
    Randread,
    Randwrite,
    Read,
    Write,
    Randrw,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::Randrw => "randrw",
        }
    }

    fn writes(self) -> bool {
        matches!(self, Self::Randwrite | Self::Write | Self::Randrw)
    }
}

impl Perf {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let load = self.load()?;
        let name = self.device.to_string();
        if self.rw.writes() && !self.destroy_data && !device::is_memory(&self.device) {
            return Err(Failure::usage(format!("--rw {} would overwrite {name}", self.rw.name()))
                .remedy("if its contents may be lost, add --destroy-data"));
        }
        let buffers = self.bs.saturating_mul(self.iodepth.into()).saturating_mul(POOL_SLACK);
        let default = QueueOptions::default();
        let queue = QueueOptions {
            depth: default.depth.max(u16::try_from(self.iodepth).unwrap_or(u16::MAX)),
            pool_bytes: default.pool_bytes.max(usize::try_from(buffers).unwrap_or(usize::MAX)),
            ..default
        };
        let device = Device::start(&self.device, self.cores.ids(), ReactorConfig::default(), queue)?;
        let running = RunningLoad::start(device.runtime().handles(), &load)
            .during(format_args!("cannot measure {name}"))?;
        self.show_progress(&running);
        let measured = running.finish().during(format_args!("cannot measure {name}"));
        let stopped = device.stop();
        let measured = measured?;
        stopped?;
        if self.json { self.print_json(&measured) } else { self.print(&measured) }.and_then(|()| {
            match measured.errors {
                0 => Ok(()),
                errors => Err(Failure::new(format!(
                    "{errors} requests to {name} failed, the first with: {}",
                    measured.first_error.as_deref().unwrap_or("unknown")
                ))),
            }
        })
    }

    fn load(&self) -> Result<Load, Failure> {
        if self.bs == 0 || self.bs > BLOCK_LIMIT || !self.bs.is_multiple_of(512) {
            return Err(Failure::usage(format!("--bs {} is not possible", self.bs))
                .remedy("give a multiple of 512 bytes, at most 1MiB"));
        }
        if self.runtime.is_zero() {
            return Err(Failure::usage("--runtime 0 measures nothing").remedy("give at least 0.1"));
        }
        let pattern = match self.rw {
            Direction::Randread | Direction::Randwrite | Direction::Randrw => Pattern::Random,
            Direction::Read | Direction::Write => Pattern::Sequential,
        };
        let read_percent = match self.rw {
            Direction::Randread | Direction::Read => 100,
            Direction::Randwrite | Direction::Write => 0,
            Direction::Randrw => self.rwmixread,
        };
        Ok(Load {
            pattern,
            read_percent,
            block_bytes: self.bs,
            depth: self.iodepth,
            runtime: self.runtime,
            warmup: self.warmup,
        })
    }

    /// Shows how it goes until the time is up.
    fn show_progress(&self, running: &RunningLoad) {
        let whole = self.warmup + self.runtime;
        let started = Instant::now();
        let bar = (std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:30} {elapsed} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(u64::try_from(whole.as_millis()).unwrap_or(u64::MAX)).with_style(style)
        });
        let interval = if bar.is_some() { Duration::from_millis(200) } else { Duration::from_secs(1) };
        let mut before = (started, 0);
        while started.elapsed() < whole && !running.is_finished() {
            std::thread::sleep(interval.min(whole.saturating_sub(started.elapsed())));
            let now = (Instant::now(), running.requests());
            let rate = (now.1 - before.1) as f64 / (now.0 - before.0).as_secs_f64().max(1e-9);
            before = now;
            match &bar {
                Some(bar) => {
                    bar.set_position(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX));
                    bar.set_message(format!("{} IOPS", show_rate(rate)));
                }
                None if !self.json => {
                    eprintln!("{:>5.1} s  {} IOPS", started.elapsed().as_secs_f64(), show_rate(rate));
                }
                None => {}
            }
        }
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
    }

    fn print_json(&self, measured: &Measured) -> Result<(), Failure> {
        let latency = &measured.latency;
        print_json(&json!({
            "device": self.device.to_string(),
            "rw": self.rw.name(),
            "bs": self.bs,
            "iodepth": self.iodepth,
            "cores": self.cores.ids(),
            "runtime_s": self.runtime.as_secs_f64(),
            "iops": measured.iops(),
            "bw_bytes": measured.bandwidth().round() as u64,
            "lat_ns": {
                "min": latency.min(),
                "mean": latency.mean(),
                "p50": latency.value_at_quantile(0.50),
                "p99": latency.value_at_quantile(0.99),
                "p999": latency.value_at_quantile(0.999),
                "max": latency.max(),
            },
            "errors": measured.errors,
        }))
    }

    fn print(&self, measured: &Measured) -> Result<(), Failure> {
        let latency = &measured.latency;
        outln!(
            "{} {} {} requests, {} in flight on each of {} cores, {:.1} s",
            self.device,
            self.rw.name(),
            show_size(self.bs),
            self.iodepth,
            self.cores.ids().len(),
            self.runtime.as_secs_f64()
        );
        outln!("  iops       {}", show_rate(measured.iops()));
        outln!("  bandwidth  {}/s", show_size(measured.bandwidth() as u64));
        outln!(
            "  latency    min {}, mean {}, p50 {}, p99 {}, p99.9 {}, max {}",
            show_nanos(latency.min()),
            show_nanos(latency.mean() as u64),
            show_nanos(latency.value_at_quantile(0.50)),
            show_nanos(latency.value_at_quantile(0.99)),
            show_nanos(latency.value_at_quantile(0.999)),
            show_nanos(latency.max()),
        );
        outln!("  errors     {}", measured.errors);
        Ok(())
    }
}
