//! The command line as scripts see it: help, exit codes, JSON documents.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const SUBCOMMANDS: [&str; 14] = [
    "up",
    "mkfs",
    "mkscratch",
    "fsck",
    "dump",
    "list",
    "bind",
    "unbind",
    "identify",
    "smart",
    "perf",
    "serve",
    "status",
    "sync",
];

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).stdin(Stdio::null()).output().expect("cargo has built the program")
}

fn pollux(arguments: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_pollux"), arguments)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Standard output as the one JSON document it has to be.
fn document(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", said(output));
    serde_json::from_slice(&output.stdout).expect("standard output is one JSON document")
}

#[test]
fn binding_what_is_no_controller_is_refused() {
    for subcommand in ["bind", "unbind"] {
        let output = pollux(&[subcommand, "ffff:ff:1f.7"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output).contains("there is no such PCI device"), "{}", said(&output));
        let output = pollux(&[subcommand, "--dry-run", "ffff:ff:1f.7"]);
        assert_eq!(output.status.code(), Some(1));
        let output = pollux(&[subcommand]);
        assert_eq!(output.status.code(), Some(2));
        let output = pollux(&[subcommand, "01:00"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(said(&output).contains("the function is missing"), "{}", said(&output));
    }
}

#[test]
fn every_help_has_an_example() {
    for subcommand in SUBCOMMANDS {
        let output = pollux(&[subcommand, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{subcommand}");
        assert!(said(&output).contains(&format!("Example:\n  pollux {subcommand}")), "{}", said(&output));
    }
    let output = run(env!("CARGO_BIN_EXE_polluxd"), &["--help"]);
    assert!(said(&output).contains("Example:\n  polluxd "), "{}", said(&output));
    let output = pollux(&["--help"]);
    assert!(said(&output).contains("Exit codes:"), "{}", said(&output));
}

#[test]
fn senseless_command_lines_exit_with_2() {
    let cases: [&[&str]; 12] = [
        &[],
        &["fly"],
        &["mkfs"],
        &["mkfs", "--device", "emu:/nowhere/x", "--shards", "0"],
        &["perf", "--device", "emu:mem,size=1GiB"],
        &["perf", "--device", "emu:mem,size=1GiB", "--rw", "sideways"],
        &["perf", "--device", "emu:mem,size=1GiB", "--rw", "read", "--bs", "1000"],
        &["perf", "--device", "emu:mem,size=1GiB", "--rw", "read", "--iodepth", "0"],
        &["perf", "--device", "emu:mem,size=1GiB", "--rw", "rw", "--rwmixread", "101"],
        &["perf", "--rw", "read"],
        &["smart"],
        &["up", "--cores", "x"],
    ];
    for arguments in cases {
        let output = pollux(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
        assert!(!said(&output).contains("panicked"), "{}", said(&output));
    }
    assert_eq!(run(env!("CARGO_BIN_EXE_polluxd"), &["--mount", "/mnt"]).status.code(), Some(2));
}

/// What a user can get wrong about a device, and the words that say so; PCI devices in the wrong hands are in the driver's own tests.
#[test]
fn every_bad_device_is_an_error_that_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "no socket").unwrap();
    let (file, absent) = (file.display(), folder.path().join("absent"));
    let absent = absent.display();
    for (device, code, says) in [
        ("nvme:x".to_owned(), 2, "must begin with `emu:`, `pci:` or `vfio-user:`"),
        ("pci:01:00".to_owned(), 2, "the function is missing"),
        ("pci:zz:00.0".to_owned(), 2, "is not 2 hexadecimal digits"),
        ("pci:01:00.0,speed=9".to_owned(), 2, "`speed` is not an option of `pci:` devices; those are"),
        ("pci:ffff:ff:1f.7".to_owned(), 1, "there is no such PCI device; `pollux list` shows"),
        ("emu:mem".to_owned(), 2, "a device in memory needs a size"),
        ("emu:mem,size=1MiB,speed=9".to_owned(), 2, "`speed` is not an option of `emu:` devices; those are"),
        ("emu:mem,size=1MiB,ns7=1MiB,ns=2".to_owned(), 1, "no active namespace 2 (active: 1, 7)"),
        ("emu:mem,size=1MiB,meta=8".to_owned(), 1, "8 bytes of metadata a block, which is not supported"),
        (format!("emu:{absent}"), 1, "does not exist; add a size to create it"),
        (format!("vfio-user:{absent}"), 1, "is the server running, and is this its socket?"),
        (format!("vfio-user:{file}"), 1, "it is not a socket"),
        (
            format!("vfio-user:{file},size=1GiB"),
            2,
            "`size` is not an option of `vfio-user:` devices; those are",
        ),
    ] {
        let output = pollux(&["perf", "--rw", "read", "--runtime", "0.1", "--device", &device]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(code), "{device}: {said}");
        assert!(said.contains(says), "{device}: {said}");
        assert!(!said.contains("fewer cores"), "{device}: another remedy than what is wrong: {said}");
    }
}

#[test]
fn perf_gives_the_documented_keys() {
    for rw in ["randread", "randwrite", "read", "write", "randrw", "rw"] {
        let output = pollux(&[
            "perf",
            "--device",
            "emu:mem,size=64MiB",
            "--rw",
            rw,
            "--bs",
            "4k",
            "--iodepth",
            "8",
            "--runtime",
            "0.2",
            "--warmup",
            "0.1",
            "--json",
        ]);
        let document = document(&output);
        for key in ["iops", "bw_bytes"] {
            assert!(document[key].as_f64().unwrap() > 0.0, "{rw}: {document}");
        }
        assert_eq!(document["errors"], 0, "{rw}");
        let latency = |key: &str| document["lat_ns"][key].as_f64().unwrap();
        let ascending = ["min", "p50", "p99", "p999", "max"].map(latency);
        assert!(ascending.is_sorted(), "{rw}: {document}");
        assert!(latency("min") <= latency("mean") && latency("mean") <= latency("max"), "{rw}: {document}");
        let ratio = document["bw_bytes"].as_f64().unwrap() / document["iops"].as_f64().unwrap();
        // The bandwidth is a whole number.
        assert!((ratio - 4096.0).abs() < 1.0, "{rw}: {document}");
        let of = |kind: &str| document[kind]["iops"].as_f64().unwrap();
        assert_eq!(of("read") > 0.0, !rw.ends_with("write"), "{rw}: {document}");
        assert_eq!(of("write") > 0.0, !rw.ends_with("read"), "{rw}: {document}");
        assert!(
            (of("read") + of("write") - document["iops"].as_f64().unwrap()).abs() < 1.0,
            "{rw}: {document}"
        );
    }
}

#[test]
fn perf_on_several_devices_reports_each_and_the_total() {
    let output = pollux(&[
        "perf",
        "--device",
        "emu:mem,size=64MiB",
        "--device",
        "emu:mem,size=32MiB,lba=512",
        "--rw",
        "randrw",
        "--rwmixread",
        "50",
        "--cores",
        "0,1",
        "--iodepth",
        "4",
        "--runtime",
        "0.2",
        "--json",
    ]);
    let document = document(&output);
    let devices = document["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    let iops = |value: &Value| value["iops"].as_f64().unwrap();
    let sum: f64 = devices.iter().map(iops).sum();
    assert!((sum - iops(&document)).abs() < 1.0, "{document}");
    for device in devices {
        assert!(iops(device) > 0.0 && device["lat_ns"]["p99"].as_u64().unwrap() > 0, "{device}");
    }
    assert_eq!(devices[1]["device"], "emu:mem,size=32MiB,lba=512");
    assert_eq!(document["cores"], serde_json::json!([0, 1]));
}

#[test]
fn perf_without_latency_says_null() {
    let arguments = ["--rw", "read", "--runtime", "0.1", "--no-latency", "--json"];
    let document = document(&pollux(&[&["perf", "--device", "emu:mem,size=64MiB"], &arguments[..]].concat()));
    assert!(document["iops"].as_f64().unwrap() > 0.0);
    assert!(document["lat_ns"].is_null(), "{document}");
}

#[test]
fn perf_verifies_what_it_wrote() {
    let arguments =
        ["perf", "--device", "emu:mem,size=8MiB", "--runtime", "0.1", "--verify", "--json", "--rw"];
    let checked = document(&pollux(&[&arguments[..], &["randrw"]].concat()));
    assert!(checked["verify"]["checked"].as_u64().unwrap() > 0, "{checked}");
    assert_eq!(checked["verify"]["wrong"], 0, "{checked}");
    assert!(checked["verify"]["first_wrong"].is_null(), "{checked}");
    let written = document(&pollux(&[&arguments[..], &["randread", "--precondition"]].concat()));
    assert!(written["verify"]["checked"].as_u64().unwrap() >= 2048, "{written}");
    assert_eq!(written["verify"]["wrong"], 0, "{written}");
    let reads_only = pollux(&[&arguments[..], &["randread"]].concat());
    assert_eq!(reads_only.status.code(), Some(2));
    assert!(said(&reads_only).contains("this one only reads"), "{}", said(&reads_only));
}

#[test]
fn interrupted_perf_shows_the_figures_so_far() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pollux"))
        .args(["perf", "--device", "emu:mem,size=64MiB", "--rw", "randread", "--runtime", "3600"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first line of progress says that it runs.
    let mut line = String::new();
    let mut progress = std::io::BufReader::new(child.stderr.take().unwrap());
    progress.read_line(&mut line).unwrap();
    assert!(line.contains("IOPS"), "{line}");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains("iops"), "{}", said(&output));
}

#[test]
fn smart_has_the_field_names_of_nvme_cli() {
    let document = document(&pollux(&["smart", "--device", "emu:mem,size=64MiB", "--json"]));
    let keys = "critical_warning temperature avail_spare spare_thresh percent_used data_units_read data_units_written \
        host_read_commands host_write_commands controller_busy_time power_cycles power_on_hours unsafe_shutdowns \
        media_errors num_err_log_entries warning_temp_time critical_comp_time";
    for key in keys.split_whitespace() {
        assert!(document[key].is_u64(), "{key}: {document}");
    }
    let text = said(&pollux(&["smart", "--device", "emu:mem,size=64MiB"]));
    assert!(text.contains("temperature") && text.contains(" K)"), "{text}");
}

#[test]
fn devices_that_are_not_there_are_named() {
    let scratch = tempfile::tempdir().unwrap();
    let image = format!("emu:{}/missing.img", scratch.path().display());
    let socket = format!("vfio-user:{}/missing.sock", scratch.path().display());
    let slot = "pci:ffff:ff:1f.7".to_owned();
    for spec in [image, socket, slot] {
        let perf = ["perf", "--rw", "read", "--runtime", "0.1", "--device", &spec];
        for arguments in [&["identify", "--device", &spec][..], &["smart", "--device", &spec], &perf] {
            let output = pollux(arguments);
            assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", said(&output));
            let named = spec.split_once(':').unwrap().1;
            assert!(said(&output).contains(named), "{arguments:?}: {}", said(&output));
            assert!(output.stdout.is_empty() && !said(&output).contains("panicked"), "{}", said(&output));
        }
    }
    assert!(std::fs::read_dir(scratch.path()).unwrap().next().is_none(), "something was created");
}

#[test]
fn perf_with_more_cores_than_queues_says_what_to_do() {
    let arguments = ["--rw", "read", "--cores", "0-1", "--runtime", "0.1", "--json"];
    let output = pollux(&[&["perf", "--device", "emu:mem,size=64MiB,queues=1"], &arguments[..]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("queues=N") && output.stdout.is_empty(), "{}", said(&output));
}

/// Whatever this host has, the list is a table or says that there is nothing.
#[test]
fn list_works_on_any_host() {
    let document = document(&pollux(&["list", "--json"]));
    let controllers = document["controllers"].as_array().unwrap();
    let text = said(&pollux(&["list"]));
    assert_eq!(controllers.is_empty(), text.contains("no NVMe controllers"), "{text}");
    for controller in controllers {
        assert!(text.contains(controller["address"].as_str().unwrap()), "{text}");
    }
}

#[test]
fn perf_does_not_write_to_an_image_unasked() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("p.img");
    std::fs::write(&image, vec![7; 1 << 20]).unwrap();
    let spec = format!("emu:{}", image.display());
    let arguments = ["perf", "--device", &spec, "--rw", "randwrite", "--runtime", "0.1"];
    let output = pollux(&arguments);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("--destroy-data"), "{}", said(&output));
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 7), "the image was changed");
    let output = pollux(&[&arguments[..], &["--destroy-data"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(std::fs::read(&image).unwrap().iter().any(|byte| *byte != 7), "nothing was written");
}

#[test]
fn perf_on_a_device_that_is_too_small_fails_with_1() {
    let output = pollux(&[
        "perf",
        "--device",
        "emu:mem,size=512KiB",
        "--rw",
        "read",
        "--bs",
        "1MiB",
        "--runtime",
        "0.1",
    ]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("emu:mem"), "{}", said(&output));
}

#[test]
fn identify_has_the_field_names_of_nvme_cli() {
    let document = document(&pollux(&["identify", "--device", "emu:mem,size=64MiB,lba=512", "--json"]));
    for key in ["vid", "sn", "mn", "fr", "mdts", "ver", "oacs", "nn", "oncs", "vwc", "sgls", "subnqn"] {
        assert!(!document["controller"][key].is_null(), "{key}: {document}");
    }
    let namespace = &document["namespaces"][0];
    assert_eq!(namespace["nsid"], 1);
    assert_eq!(namespace["nsze"], (64 << 20) / 512);
    let format = usize::try_from(namespace["flbas"].as_u64().unwrap() & 0xf).unwrap();
    assert_eq!(namespace["lbafs"][format]["ds"], 9);
    assert_eq!(namespace["lbafs"][format]["in_use"], true);
    assert!(namespace["problem"].is_null(), "{namespace}");
    let text = said(&pollux(&["identify", "--device", "emu:mem,size=64MiB"]));
    assert!(text.contains("nsze") && text.contains("mdts"), "{text}");
    assert_eq!(text.matches("(in use)").count(), 1, "{text}");
}

#[test]
fn status_and_sync_name_what_is_not_a_mount() {
    let scratch = tempfile::tempdir().unwrap();
    for subcommand in ["status", "sync"] {
        let output = pollux(&[subcommand, scratch.path().to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(said(&output).contains("Pollux mount"), "{}", said(&output));
        let output = pollux(&[subcommand, "--socket", "/nowhere/at/all"]);
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        assert!(said(&output).contains("/nowhere/at/all"), "{}", said(&output));
    }
}

#[test]
fn nothing_is_created_by_a_refused_start() {
    let scratch = tempfile::tempdir().unwrap();
    let image = scratch.path().join("p.img");
    let full = scratch.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("file"), "x").unwrap();
    let arguments = ["up", "--image", image.to_str().unwrap(), "--mount", full.to_str().unwrap()];
    let output = pollux(&arguments);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("not empty"), "{}", said(&output));
    assert!(!Path::new(&image).exists());
}

/// `pollux dump | head` ended with a panic's text instead of quietly.
#[test]
fn reader_that_leaves_early_is_no_error_message() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_pollux"))
        .args(["identify", "--device", "emu:mem,size=64MiB"])
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(141));
}

/// Starts a server and waits until its socket is there.
fn serve(socket: &Path) -> std::process::Child {
    let spec =
        ["serve", "--device", "emu:mem,size=64MiB", "--socket", socket.to_str().expect("a path in UTF-8")];
    let mut child = Command::new(env!("CARGO_BIN_EXE_pollux"))
        .args(spec)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("a server under test");
    // It says where it listens once it does.
    let mut line = String::new();
    let output = child.stdout.take().expect("a server under test");
    let mut output = std::io::BufReader::new(output);
    std::io::BufRead::read_line(&mut output, &mut line).expect("a server under test");
    assert!(line.contains(&socket.display().to_string()), "{line}");
    child.stdout = Some(output.into_inner());
    child
}

fn terminate(child: &mut std::process::Child) -> Option<i32> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a server under test"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("a server under test");
    child.wait().expect("a server under test").code()
}

#[test]
fn served_controller_is_used_by_another_process_and_ends_on_a_signal() {
    let scratch = tempfile::tempdir().unwrap();
    let socket = scratch.path().join("cntrl");
    let mut server = serve(&socket);
    let spec = format!("vfio-user:{}", socket.display());
    let document = document(&pollux(&["identify", "--device", &spec, "--json"]));
    assert_eq!(document["namespaces"][0]["nsid"], 1);
    let second = pollux(&["serve", "--device", "emu:mem,size=1MiB", "--socket", socket.to_str().unwrap()]);
    assert_eq!(second.status.code(), Some(1), "{}", said(&second));
    assert!(said(&second).contains("served by another process"), "{}", said(&second));
    assert_eq!(terminate(&mut server), Some(0));
    assert!(!socket.exists());
    let output = pollux(&["identify", "--device", &spec]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("is the server running"), "{}", said(&output));
}

#[test]
fn serve_replaces_a_dead_socket_and_nothing_else() {
    let scratch = tempfile::tempdir().unwrap();
    let socket = scratch.path().join("cntrl");
    let mut killed = serve(&socket);
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(socket.exists());
    let mut next = serve(&socket);
    assert_eq!(terminate(&mut next), Some(0));
    std::fs::write(&socket, "precious").unwrap();
    let arguments = ["serve", "--device", "emu:mem,size=1MiB", "--socket", socket.to_str().unwrap()];
    let output = pollux(&arguments);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("not a socket"), "{}", said(&output));
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
    let output = pollux(&["serve", "--device", "pci:0000:01:00.0", "--socket", "/nowhere/x"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    let output = pollux(&["serve", "--device", "emu:mem,size=1MiB", "--socket", "/nowhere/at/all"]);
    assert!(said(&output).contains("mkdir -p /nowhere/at"), "{}", said(&output));
}
