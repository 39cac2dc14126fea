//! `pollux status`: what a running daemon does.
//!
//! The daemon counts; rates come from looking twice, [`INTERVAL`] apart.

use std::thread::sleep;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::{Daemon, print_json};
use crate::control::{client, protocol::Command};
use crate::failure::Failure;
use crate::output::outln;
use crate::quantity::{show_nanos, show_rate, show_size};

/// Time between the two looks.
const INTERVAL: Duration = Duration::from_millis(500);

/// Bytes of a block of the volume.
const BLOCK: u64 = 4096;

/// Show what a running daemon does: rates, latencies, dirty bytes, space, errors
#[derive(Args)]
#[command(after_help = "\
JSON: the figures of one look {daemon, controller, reactors, queues, volume}, and under `rates` what changed per second in half a
second {requests, commands, read_bytes, written_bytes}.

Example:
  pollux status ./pollux-mnt")]
pub(super) struct Status {
    #[command(flatten)]
    daemon: Daemon,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Status {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let socket = self.daemon.socket()?;
        let before = client::ask(&socket, Command::Status)?;
        sleep(INTERVAL);
        let mut now = client::ask(&socket, Command::Status)?;
        let rates = Rates::between(&before, &now);
        if self.json {
            now["rates"] = rates.json();
            return print_json(&now);
        }
        print_volume(&now, &rates);
        print_controller(&now);
        print_shards(&now);
        print_reactors(&before, &now);
        print_queues(&before, &now);
        Ok(())
    }
}

/// Changes per second.
struct Rates {
    requests: f64,
    commands: f64,
    read_bytes: f64,
    written_bytes: f64,
}

impl Rates {
    fn between(before: &Value, now: &Value) -> Self {
        let rate = |list: &str, key: &str| {
            let sum = |report: &Value| -> u64 { items(report, list).map(|item| number(item, key)).sum() };
            per_second(before, now, sum(before), sum(now))
        };
        Self {
            requests: rate("/volume/shards", "/requests"),
            commands: rate("/queues", "/commands"),
            read_bytes: rate("/queues", "/read_bytes"),
            written_bytes: rate("/queues", "/written_bytes"),
        }
    }

    fn json(&self) -> Value {
        json!({
            "requests": self.requests,
            "commands": self.commands,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
        })
    }
}

fn per_second(before: &Value, now: &Value, old: u64, new: u64) -> f64 {
    let uptime = |report: &Value| number(report, "/daemon/uptime_ns");
    let nanos = uptime(now).saturating_sub(uptime(before)).max(1);
    new.saturating_sub(old) as f64 * 1e9 / nanos as f64
}

fn number(value: &Value, pointer: &str) -> u64 {
    value.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or("?")
}

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

fn print_volume(now: &Value, rates: &Rates) {
    let volume = &now["volume"];
    let size = |key: &str| show_size(number(volume, key).saturating_mul(BLOCK));
    let seconds = number(now, "/daemon/uptime_ns") / 1_000_000_000;
    outln!("{} on {}", text(now, "/daemon/device"), text(now, "/daemon/mount"));
    outln!(
        "  daemon      {}, process {}, up {seconds} s",
        text(now, "/daemon/version"),
        number(now, "/daemon/pid")
    );
    outln!("  volume      {} {}", text(volume, "/uuid"), text(volume, "/label"));
    outln!(
        "  space       {} free of {}, {} for writers",
        size("/free_blocks"),
        size("/blocks"),
        size("/available_blocks")
    );
    outln!("  dirty       {}", show_size(number(volume, "/dirty_bytes")));
    outln!(
        "  epochs      open {}, durable {}; {} checkpoints of {} on average",
        number(volume, "/open_epoch"),
        number(volume, "/durable_epoch"),
        number(volume, "/checkpoints"),
        show_nanos(number(volume, "/checkpoint_mean_ns"))
    );
    outln!(
        "  rates       {} requests/s; device {} commands/s, {}/s read, {}/s written",
        show_rate(rates.requests),
        show_rate(rates.commands),
        show_size(rates.read_bytes as u64),
        show_size(rates.written_bytes as u64)
    );
    outln!("  damage      {} blocks", number(volume, "/damage"));
    if let Some(reason) = volume["read_only"].as_str() {
        outln!("  READ-ONLY   {reason}");
    }
    for warning in items(volume, "/warnings").filter_map(Value::as_str) {
        outln!("  warning     {warning}");
    }
}

fn print_controller(now: &Value) {
    let controller = &now["controller"];
    outln!(
        "  controller  {}; {}, serial number {}, firmware {}; reset {} times",
        text(controller, "/state"),
        text(controller, "/model"),
        text(controller, "/serial"),
        text(controller, "/firmware"),
        number(controller, "/resets")
    );
    if let Some(fault) = controller["fault"].as_str() {
        outln!("  FAULT       {fault}");
    }
}

fn print_shards(now: &Value) {
    outln!("\n  shard  requests  running    inodes  in memory  tree memory  free space");
    for shard in items(now, "/volume/shards") {
        outln!(
            "  {:>5}  {:>8}  {:>7}  {:>8}  {:>9}  {:>11}  {:>10}",
            number(shard, "/shard"),
            number(shard, "/requests"),
            number(shard, "/running_requests"),
            number(shard, "/inodes"),
            number(shard, "/inodes_in_memory"),
            show_size(number(shard, "/tree_memory_bytes")),
            show_size(number(shard, "/free_blocks").saturating_mul(BLOCK)),
        );
    }
}

fn print_reactors(before: &Value, now: &Value) {
    outln!("\n  reactor  polls/s  completions/s  sleeps/s  wake-ups/s  busy  tasks");
    for (old, new) in items(before, "/reactors").zip(items(now, "/reactors")) {
        let rate = |key: &str| show_rate(per_second(before, now, number(old, key), number(new, key)));
        let change = |key: &str| number(new, key).saturating_sub(number(old, key));
        let busy = 100 * change("/busy_loops") / change("/loops").max(1);
        outln!(
            "  {:>7}  {:>7}  {:>13}  {:>8}  {:>10}  {:>3}%  {:>5}",
            number(new, "/reactor"),
            rate("/polls"),
            rate("/completions"),
            rate("/sleeps"),
            rate("/wakeups"),
            busy,
            number(new, "/tasks"),
        );
    }
}

fn print_queues(before: &Value, now: &Value) {
    outln!(
        "\n  queue  commands/s      read/s   written/s  doorbells  errors  retried  overdue  latency p50 / p99 / p99.9 / max"
    );
    for (old, new) in items(before, "/queues").zip(items(now, "/queues")) {
        let rate = |key: &str| per_second(before, now, number(old, key), number(new, key));
        outln!(
            "  {:>5}  {:>10}  {:>10}  {:>10}  {:>9}  {:>6}  {:>7}  {:>7}  {}",
            number(new, "/queue"),
            show_rate(rate("/commands")),
            show_size(rate("/read_bytes") as u64),
            show_size(rate("/written_bytes") as u64),
            show_rate(rate("/doorbells")),
            number(new, "/errors"),
            number(new, "/retried"),
            number(new, "/timeouts"),
            LATENCIES.map(|(name, key)| latency(new, name, key)).join("; "),
        );
    }
}

/// Names of the latency distributions, and where they are.
const LATENCIES: [(&str, &str); 3] =
    [("read", "/read_lat_ns"), ("write", "/write_lat_ns"), ("other", "/other_lat_ns")];

fn latency(queue: &Value, name: &str, pointer: &str) -> String {
    if number(queue, &format!("{pointer}/samples")) == 0 {
        return format!("{name} -");
    }
    let at = |key: &str| show_nanos(number(queue, &format!("{pointer}/{key}")));
    format!("{name} {} / {} / {} / {}", at("p50"), at("p99"), at("p999"), at("max"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_two_looks() {
        let look = |uptime: u64, requests: u64| {
            json!({
                "daemon": { "uptime_ns": uptime },
                "volume": { "shards": [{ "requests": requests }, { "requests": 1 }] },
                "queues": [],
            })
        };
        let rates = Rates::between(&look(1_000_000_000, 10), &look(1_500_000_000, 60));
        assert!((rates.requests - 100.0).abs() < 1e-6);
        assert!(rates.commands.abs() < 1e-6);
    }

    #[test]
    fn document_of_another_daemon_does_not_panic() {
        for document in [json!(null), json!([]), json!({ "queues": 3, "volume": { "shards": "x" } })] {
            let rates = Rates::between(&document, &document);
            print_volume(&document, &rates);
            print_controller(&document);
            print_shards(&document);
            print_reactors(&document, &document);
            print_queues(&document, &document);
        }
    }
}
