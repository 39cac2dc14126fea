//! What machine the figures are from.

use std::fs;
use std::process::Command;

/// Processor, cores, kernel, compiler and date, as one line.
pub(super) fn describe() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name").and_then(|rest| rest.split_once(':')))
        .map_or("unknown processor", |(_, model)| model.trim());
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let virtual_machine = if cpu.contains(" hypervisor") { ", a virtual machine" } else { "" };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let rustc = first_line(Command::new("rustc").arg("--version"));
    let date = first_line(Command::new("date").arg("+%Y-%m-%d"));
    format!("{date}, {model}, {cores} cores{virtual_machine}, Linux {}, {rustc}.\n", kernel.trim())
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}
