//! `pollux` on the device: what scripts rely on.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::device::Device;
use super::{Case, Subject, Verdict};
use crate::{binary, run};

const SUITE: &str = "tools";

pub(super) const CASES: &[Case] = &[
    Case { suite: SUITE, name: "identify_agrees_with_the_device", run: identify },
    Case { suite: SUITE, name: "smart_has_the_known_keys", run: smart },
    Case { suite: SUITE, name: "perf_measures_and_has_the_documented_keys", run: perf },
];

fn pollux(arguments: &[&str]) -> Result<Value> {
    let text = run(Command::new(binary("pollux")?).args(arguments))?;
    serde_json::from_str(&text)
        .with_context(|| format!("pollux {arguments:?} is to print one JSON document: {text}"))
}

fn identify(subject: &Subject) -> Result<Verdict> {
    let (serial, model) = {
        let device = Device::open(subject)?;
        let told = (device.controller.info().serial.clone(), device.controller.info().model.clone());
        device.close()?;
        told
    };
    let document = pollux(&["identify", "--device", &subject.spec, "--json"])?;
    let controller = &document["controller"];
    ensure!(controller["sn"].as_str().map(str::trim) == Some(serial.trim()), "sn: {}", controller["sn"]);
    ensure!(controller["mn"].as_str().map(str::trim) == Some(model.trim()), "mn: {}", controller["mn"]);
    for key in
        ["vid", "ssvid", "fr", "mdts", "cntlid", "ver", "oacs", "oncs", "vwc", "sqes", "cqes", "nn", "sgls"]
    {
        ensure!(!controller[key].is_null(), "the key controller.{key} is missing");
    }
    let namespaces = document["namespaces"].as_array().context("the key namespaces is no list")?;
    ensure!(!namespaces.is_empty(), "no namespace");
    for key in ["nsze", "ncap", "nuse", "flbas", "lbafs"] {
        ensure!(namespaces.iter().all(|namespace| !namespace[key].is_null()), "a namespace without {key}");
    }
    Ok(Verdict::Passed)
}

fn smart(subject: &Subject) -> Result<Verdict> {
    let document = pollux(&["smart", "--device", &subject.spec, "--json"])?;
    for key in [
        "critical_warning",
        "temperature",
        "avail_spare",
        "spare_thresh",
        "percent_used",
        "data_units_read",
        "data_units_written",
        "host_read_commands",
        "host_write_commands",
        "power_cycles",
        "unsafe_shutdowns",
        "media_errors",
        "num_err_log_entries",
    ] {
        ensure!(document[key].is_number(), "the key {key} is {}", document[key]);
    }
    Ok(Verdict::Passed)
}

fn perf(subject: &Subject) -> Result<Verdict> {
    for rw in ["randread", "write"] {
        let mut arguments = vec!["perf", "--device", &subject.spec, "--rw", rw, "--bs", "4k"];
        arguments.extend(["--iodepth", "4", "--runtime", "1", "--cores", "0", "--json", "--destroy-data"]);
        let document = pollux(&arguments)?;
        ensure!(document["errors"] == 0, "{rw}: {}", document["first_error"]);
        let iops = document["iops"].as_f64().context("iops")?;
        let bandwidth = document["bw_bytes"].as_f64().context("bw_bytes")?;
        ensure!(iops > 0.0, "{rw}: no I/O in a second");
        ensure!((bandwidth / 4096.0 / iops - 1.0).abs() < 0.01, "{rw}: {iops} IOPS and {bandwidth} bytes/s");
        let latency = &document["lat_ns"];
        let mut last = 0.0;
        for key in ["min", "p50", "p99", "p999", "max"] {
            let value = latency[key].as_f64().with_context(|| format!("lat_ns.{key}"))?;
            ensure!(value >= last, "{rw}: lat_ns.{key} is {value} and the one before {last}");
            last = value;
        }
        ensure!(latency["mean"].is_number(), "lat_ns.mean is {}", latency["mean"]);
    }
    Ok(Verdict::Passed)
}
