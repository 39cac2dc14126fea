//! `pollux perf`: load on raw devices, by the same driver that the daemon uses.
//!
//! Owns: options, the safety catch before writes, progress, and the reports. The load itself is [`crate::load`].

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use nvme::{Controller, QueueError};
use serde_json::{Map, Value, json};

use super::print_json;
use crate::device::{self, DeviceSpec, parse_size};
use crate::failure::{During, Failure};
use crate::load::{
    DeviceFigures, Figures, Latency, Load, LoadError, Measured, Pattern, Precondition, RunningLoad, Verify,
};
use crate::output::outln;
use crate::quantity::{CoreList, parse_cores, parse_seconds, show_nanos, show_rate, show_size};
use crate::signals::{Alarm, Signals, Woken, is_readable};

/// Most requests in flight on one queue.
const DEPTH_LIMIT: u32 = 4096;

/// Largest request.
const BLOCK_LIMIT: u64 = 1 << 20;

/// Time between two lines of progress.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two looks at whether the load has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Measure raw devices: rate, bandwidth, latencies
#[derive(Args)]
#[command(after_help = "\
Each core polls one queue of every device. Ctrl-C ends the measurement early, with the figures so far.

JSON keys: iops, bw_bytes (bytes per second), lat_ns {min, mean, p50, p99, p999, max} (null with --no-latency), errors, first_error; read and
write {iops, bw_bytes, lat_ns}; verify {checked, wrong, first_wrong} (requests; null without --verify); devices, the same for each device; rw, rwmixread, bs, iodepth, cores, runtime_s and
device say what was measured.

Example:
  pollux perf --device emu:mem,size=1GiB --rw randread --bs 4k --iodepth 32 --runtime 3 --json")]
pub(super) struct Perf {
    /// The device; may be given several times
    #[arg(long = "device", value_name = "SPEC", value_parser = device::parse, required = true)]
    devices: Vec<DeviceSpec>,

    /// What to do
    #[arg(long, value_enum)]
    rw: Access,

    /// Share of reads in a mixed load, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,

    /// Size of a request
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = parse_size)]
    bs: u64,

    /// Requests in flight on each queue; from 64 on, completions are taken in runs of 16 if they come within a microsecond
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(DEPTH_LIMIT)))]
    iodepth: u32,

    /// How long to measure, in seconds
    #[arg(long, value_name = "S", default_value = "10", value_parser = parse_seconds)]
    runtime: Duration,

    /// How long to run before that, in seconds
    #[arg(long, value_name = "S", default_value = "0", value_parser = parse_seconds)]
    warmup: Duration,

    /// Core ids: a thread on each, with a queue of every device
    #[arg(long, value_name = "LIST", default_value = "0", value_parser = parse_cores)]
    cores: CoreList,

    /// Do not take the time of requests: a little faster
    #[arg(long)]
    no_latency: bool,

    /// Write each block with data of its own, check reads of it, and read all of it back at the end; wrong data ends with exit code 1
    #[arg(long)]
    verify: bool,

    /// Write all of the device once before the time begins
    #[arg(long)]
    precondition: bool,

    /// Seed of the places and the data, to repeat a load
    #[arg(long, value_name = "N", default_value_t = 1)]
    randseed: u64,

    /// Print one JSON document
    #[arg(long)]
    json: bool,

    /// Allow writes to a device that is not emu:mem: its contents are lost
    #[arg(long)]
    destroy_data: bool,
}

/// What a load does, in fio's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Access {
    /// Reads at random places
    Randread,
    /// Writes at random places
    Randwrite,
    /// Reads, one place after the other
    Read,
    /// Writes, one place after the other
    Write,
    /// Reads and writes at random places
    Randrw,
    /// Reads and writes, one place after the other
    #[value(alias = "readwrite")]
    Rw,
}

impl Access {
    fn name(self) -> &'static str {
        match self {
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::Randrw => "randrw",
            Self::Rw => "rw",
        }
    }

    fn pattern(self) -> Pattern {
        match self {
            Self::Randread | Self::Randwrite | Self::Randrw => Pattern::Random,
            Self::Read | Self::Write | Self::Rw => Pattern::Sequential,
        }
    }

    fn read_percent(self, mixed: u8) -> u8 {
        match self {
            Self::Randread | Self::Read => 100,
            Self::Randwrite | Self::Write => 0,
            Self::Randrw | Self::Rw => mixed,
        }
    }
}

/// Whether the device has gone, or is to be let go.
fn is_wanted_back(controller: &Controller) -> bool {
    controller.removal_event().is_some_and(is_readable)
}

impl Perf {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let load = self.load()?;
        self.refuse_writes(&load)?;
        // Before any thread exists, so that all of them leave the signals to this one.
        let signals = Signals::block().during("cannot wait for signals")?;
        let controllers =
            self.devices.iter().map(device::open).collect::<Result<Vec<Arc<Controller>>, Failure>>()?;
        let measured = self.measure(&controllers, &load, &signals);
        let mut stopped = Ok(());
        for controller in &controllers {
            let shut = controller.shutdown().during(format_args!("{} did not shut down", controller.name()));
            // After a fault that the figures tell of, shutdown has nothing to add.
            stopped = stopped.and(shut);
        }
        let measured = measured?;
        if self.json {
            self.print_json(&measured)?;
        } else {
            self.print(&measured);
        }
        stopped?;
        if let Some((device, wrong)) =
            measured.devices.iter().find_map(|device| Some((device, device.first_wrong.as_ref()?)))
        {
            return Err(Failure::new(format!(
                "{} of {} requests checked returned wrong data, the first on {}: {wrong}",
                measured.total().wrong,
                measured.total().checked,
                device.device
            )));
        }
        let gone = controllers.iter().find(|controller| is_wanted_back(controller));
        match measured.devices.iter().find(|device| device.errors > 0) {
            None => match gone {
                None => Ok(()),
                Some(controller) => Err(Failure::new(format!(
                    "{}: the device is being removed or wanted back; the load ended early",
                    controller.name()
                ))),
            },
            Some(first) => Err(Failure::new(format!(
                "{} requests failed, the first on {}: {}",
                measured.total().errors,
                first.device,
                first.first_error.as_deref().unwrap_or("unknown")
            ))),
        }
    }

    fn load(&self) -> Result<Load, Failure> {
        if self.bs == 0 || self.bs > BLOCK_LIMIT || !self.bs.is_multiple_of(512) {
            return Err(Failure::usage(format!("--bs {} is not possible", self.bs))
                .remedy("give a multiple of 512 bytes, at most 1MiB"));
        }
        if self.runtime.is_zero() {
            return Err(Failure::usage("--runtime 0 measures nothing").remedy("give at least 0.1"));
        }
        let writes = self.rw.read_percent(self.rwmixread) < 100 || self.precondition;
        if self.verify && !writes {
            return Err(Failure::usage(
                "--verify checks what the same run has written, and this one only reads",
            )
            .remedy("give --rw write, randwrite, rw or randrw, or add --precondition"));
        }
        Ok(Load {
            pattern: self.rw.pattern(),
            read_percent: self.rw.read_percent(self.rwmixread),
            block_bytes: self.bs,
            depth: self.iodepth,
            runtime: self.runtime,
            warmup: self.warmup,
            latency: if self.no_latency { Latency::Ignore } else { Latency::Record },
            seed: self.randseed,
            verify: if self.verify { Verify::On } else { Verify::Off },
            precondition: if self.precondition { Precondition::Written } else { Precondition::Nothing },
        })
    }

    fn refuse_writes(&self, load: &Load) -> Result<(), Failure> {
        let lasting = self.devices.iter().find(|spec| !device::is_memory(spec));
        match lasting {
            Some(spec)
                if (load.read_percent < 100 || load.precondition == Precondition::Written)
                    && !self.destroy_data =>
            {
                let option = if load.read_percent < 100 {
                    format!("--rw {}", self.rw.name())
                } else {
                    "--precondition".to_owned()
                };
                Err(Failure::usage(format!("{option} would overwrite {spec}"))
                    .remedy("if its contents may be lost, add --destroy-data"))
            }
            _ => Ok(()),
        }
    }

    fn measure(
        &self,
        controllers: &[Arc<Controller>],
        load: &Load,
        signals: &Signals,
    ) -> Result<Measured, Failure> {
        let running = RunningLoad::start(controllers, self.cores.ids(), load).map_err(|error| {
            let failure = Failure::new(format!("cannot measure: {error}"));
            match error {
                LoadError::Queue { error: QueueError::NoQueueLeft { .. }, .. } => failure
                    .remedy("name fewer cores with --cores, or more queues in the device spec: ,queues=N"),
                _ => failure,
            }
        })?;
        self.watch(&running, controllers, signals)?;
        let mut measured = running.finish().during("cannot measure")?;
        // By the spec that the user gave: several devices in memory have the same name.
        for (device, spec) in measured.devices.iter_mut().zip(&self.devices) {
            device.device = spec.to_string();
        }
        Ok(measured)
    }

    /// Shows how it goes until the time is up, somebody asks for the end, or a device is to be given back.
    fn watch(
        &self,
        running: &RunningLoad,
        controllers: &[Arc<Controller>],
        signals: &Signals,
    ) -> Result<(), Failure> {
        let never = Alarm::new().during("cannot wait for signals")?;
        let progress = Progress::new(self.warmup + self.runtime, self.bs, self.json);
        let started = Instant::now();
        let mut line = (started, 0);
        while !running.is_finished() {
            let woken = signals.wait(&never, Some(LOOK_INTERVAL)).during("cannot wait for signals")?;
            if woken == Woken::Signal || controllers.iter().any(|controller| is_wanted_back(controller)) {
                running.end_early();
                break;
            }
            progress.move_to(started.elapsed());
            let (since, before) = line;
            let span = since.elapsed();
            if span >= LINE_INTERVAL {
                let requests = running.requests();
                let rate = (requests - before) as f64 / span.as_secs_f64();
                let recent = running.recent_latency();
                let p99 = (!recent.is_empty()).then(|| recent.value_at_quantile(0.99));
                progress.show(started.elapsed(), rate, p99);
                line = (Instant::now(), requests);
            }
        }
        progress.finish();
        Ok(())
    }

    fn print_json(&self, measured: &Measured) -> Result<(), Failure> {
        let mut document = self.figures_of(&measured.total());
        if self.devices.len() > 1 {
            document.remove("device");
        }
        let devices: Vec<Value> =
            measured.devices.iter().map(|device| Value::Object(self.figures_of(device))).collect();
        let said = [
            ("devices", json!(devices)),
            ("rw", json!(self.rw.name())),
            ("rwmixread", json!(self.rw.read_percent(self.rwmixread))),
            ("bs", json!(self.bs)),
            ("iodepth", json!(self.iodepth)),
            ("cores", json!(self.cores.ids())),
            ("runtime_s", json!(measured.elapsed.as_secs_f64())),
        ];
        document.extend(said.map(|(key, value)| (key.to_owned(), value)));
        print_json(&document)
    }

    fn figures_of(&self, device: &DeviceFigures) -> Map<String, Value> {
        let mut object = self.rates_of(&device.both());
        let said = [
            ("device", json!(device.device)),
            ("errors", json!(device.errors)),
            ("first_error", json!(device.first_error)),
            ("verify", self.verify_of(device)),
            ("read", Value::Object(self.rates_of(&device.read))),
            ("write", Value::Object(self.rates_of(&device.write))),
        ];
        object.extend(said.map(|(key, value)| (key.to_owned(), value)));
        object
    }

    fn verify_of(&self, device: &DeviceFigures) -> Value {
        if !self.verify {
            return Value::Null;
        }
        let first = device.first_wrong.as_ref().map(ToString::to_string);
        json!({ "checked": device.checked, "wrong": device.wrong, "first_wrong": first })
    }

    fn rates_of(&self, figures: &Figures) -> Map<String, Value> {
        let latency = &figures.latency;
        let latencies = json!({
            "min": latency.min(),
            "mean": latency.mean(),
            "p50": latency.value_at_quantile(0.50),
            "p99": latency.value_at_quantile(0.99),
            "p999": latency.value_at_quantile(0.999),
            "max": latency.max(),
        });
        let mut object = Map::new();
        object.insert("iops".into(), json!(figures.iops));
        object.insert("bw_bytes".into(), json!((figures.iops * self.bs as f64).round() as u64));
        object.insert("lat_ns".into(), if self.no_latency { Value::Null } else { latencies });
        object
    }

    fn print(&self, measured: &Measured) {
        let names: Vec<String> = self.devices.iter().map(ToString::to_string).collect();
        outln!(
            "{} {} {} requests, {} in flight on {}, {:.1} s",
            names.join(" "),
            self.rw.name(),
            show_size(self.bs),
            self.iodepth,
            match self.cores.ids().len() * self.devices.len() {
                1 => "one queue".to_owned(),
                queues => format!("each of {queues} queues"),
            },
            measured.elapsed.as_secs_f64()
        );
        if measured.devices.len() > 1 {
            for device in &measured.devices {
                outln!("{}", device.device);
                self.print_device(device);
            }
            outln!("total");
        }
        self.print_device(&measured.total());
    }

    fn print_device(&self, device: &DeviceFigures) {
        let both = device.both();
        self.print_figures("", &both);
        if device.read.requests > 0 && device.write.requests > 0 {
            self.print_figures("read ", &device.read);
            self.print_figures("write ", &device.write);
        }
        outln!("  {:<16} {}", "errors", device.errors);
        if self.verify {
            outln!("  {:<16} {} requests, {} wrong", "checked", device.checked, device.wrong);
        }
    }

    fn print_figures(&self, kind: &str, figures: &Figures) {
        let bandwidth = (figures.iops * self.bs as f64) as u64;
        outln!("  {:<16} {}", format!("{kind}iops"), show_rate(figures.iops));
        outln!("  {:<16} {}/s", format!("{kind}bandwidth"), show_size(bandwidth));
        if self.no_latency {
            return;
        }
        let latency = &figures.latency;
        let at = |quantile| show_nanos(latency.value_at_quantile(quantile));
        outln!(
            "  {:<16} min {}, mean {}, p50 {}, p99 {}, p99.9 {}, max {}",
            format!("{kind}latency"),
            show_nanos(latency.min()),
            show_nanos(latency.mean() as u64),
            at(0.50),
            at(0.99),
            at(0.999),
            show_nanos(latency.max()),
        );
    }
}

/// How it goes: a bar on a terminal, plain lines otherwise, nothing beside a JSON document.
struct Progress {
    bar: Option<ProgressBar>,
    plain: bool,
    block_bytes: u64,
}

impl Progress {
    fn new(whole: Duration, block_bytes: u64, json: bool) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:30} {elapsed} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(millis(whole)).with_style(style)
        });
        Self { plain: bar.is_none() && !json, bar, block_bytes }
    }

    fn move_to(&self, elapsed: Duration) {
        if let Some(bar) = &self.bar {
            bar.set_position(millis(elapsed));
        }
    }

    fn show(&self, elapsed: Duration, rate: f64, p99: Option<u64>) {
        let bandwidth = show_size((rate * self.block_bytes as f64) as u64);
        let p99 = p99.map(|nanos| format!("  p99 {}", show_nanos(nanos))).unwrap_or_default();
        let text = format!("{} IOPS  {bandwidth}/s{p99}", show_rate(rate));
        match &self.bar {
            Some(bar) => bar.set_message(text),
            None if self.plain => eprintln!("{:>5.1} s  {text}", elapsed.as_secs_f64()),
            None => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
