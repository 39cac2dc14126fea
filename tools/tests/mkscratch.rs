//! `pollux mkscratch` as people and scripts see it: what it writes, what it refuses, and what outlasts what.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use pollux::device::{self, DeviceSpec};
use pollux::scratch;

const SERIAL: &str = "POLLUX-EMU-0001";
const BLOCK: usize = 4096;
const FIRST: usize = 15 * BLOCK;

/// A drive in a file.
struct Drive {
    scratch: tempfile::TempDir,
}

impl Drive {
    fn new() -> Self {
        let drive = Self { scratch: tempfile::tempdir().unwrap() };
        fs::File::create(drive.path()).unwrap().set_len(64 << 20).unwrap();
        drive
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().join("drive.img")
    }

    fn spec_text(&self) -> String {
        format!("emu:{}", self.path().display())
    }

    fn spec(&self) -> DeviceSpec {
        device::parse(&self.spec_text()).unwrap()
    }

    fn pollux(&self, subcommand: &str, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_pollux"))
            .args([subcommand, "--device", &self.spec_text()])
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn mark(&self) {
        let output = self.pollux("mkscratch", &["--serial", SERIAL]);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        scratch::permit(&self.spec()).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = fs::OpenOptions::new().write(true).open(self.path()).unwrap();
        file.write_all_at(bytes, at as u64).unwrap();
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn drive_is_marked_with_its_serial_number_and_unmarked_again() {
    let drive = Drive::new();
    assert!(scratch::read(&drive.spec()).unwrap().is_none());
    let output = drive.pollux("mkscratch", &["--serial", SERIAL]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    for shown in [SERIAL, "model", "firmware", "64.0 MiB", "nothing known"] {
        assert!(said(&output).contains(shown), "{shown}: {}", said(&output));
    }
    let marker = scratch::permit(&drive.spec()).unwrap();
    assert_eq!(marker.serial(), SERIAL);
    let output = drive.pollux("mkscratch", &["--remove"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(scratch::permit(&drive.spec()).is_err());
    assert!(drive.bytes().iter().all(|byte| *byte == 0), "something else was written");
    let output = drive.pollux("mkscratch", &["--remove"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains("nothing to remove"), "{}", said(&output));
}

#[test]
fn without_terminal_or_with_a_wrong_serial_number_nothing_is_written() {
    let drive = Drive::new();
    for (arguments, code, reason) in [
        (&[][..], 2, "no terminal"),
        (&["--serial", "POLLUX-EMU-0002"], 1, "`POLLUX-EMU-0001`, not `POLLUX-EMU-0002`"),
        (&["--serial", ""], 1, "not ``"),
        (&["--serial", SERIAL, "--remove"], 2, "cannot be used with"),
    ] {
        let output = drive.pollux("mkscratch", arguments);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(said(&output).contains(reason), "{}", said(&output));
    }
    assert!(drive.bytes().iter().all(|byte| *byte == 0));
}

#[test]
fn what_a_drive_holds_is_not_marked_without_force() {
    for (at, magic, name) in [
        (510, &[0x55, 0xaa][..], "partition table"),
        (512, b"EFI PART", "GUID partition table"),
        (1080, &[0x53, 0xef], "ext4"),
        (0, b"XFSB", "XFS"),
        (65_600, b"_BHRfS_M", "btrfs"),
        (512, b"LABELONE", "LVM"),
        (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "RAID"),
        ((64 << 20) - 8192, &[0xfc, 0x4e, 0x2b, 0xa9], "RAID"),
        (4086, b"SWAPSPACE2", "swap"),
    ] {
        let drive = Drive::new();
        drive.put(at, magic);
        let before = drive.bytes();
        let output = drive.pollux("mkscratch", &["--serial", SERIAL]);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", said(&output));
        assert!(said(&output).contains(name) && said(&output).contains("--force"), "{}", said(&output));
        assert!(drive.bytes() == before, "{name}: the drive was changed");
        let output = drive.pollux("mkscratch", &["--serial", SERIAL, "--force"]);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", said(&output));
        assert!(said(&output).contains("wiped"), "{name}: {}", said(&output));
        scratch::permit(&drive.spec()).unwrap();
        // What comes later is somebody's again.
        drive.put(at, magic);
        let refusal = scratch::permit(&drive.spec()).unwrap_err().to_string();
        assert!(refusal.contains(name) && refusal.contains("--force"), "{refusal}");
    }
}

#[test]
fn marker_stays_through_mkfs_which_does_not_take_it_for_contents() {
    let drive = Drive::new();
    drive.mark();
    let output = drive.pollux("mkfs", &["--shards", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(said(&output).contains("still marked"), "{}", said(&output));
    scratch::permit(&drive.spec()).unwrap();
    let output = drive.pollux("fsck", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    // A volume that tests left behind does not keep the next tests away.
    let output = drive.pollux("mkscratch", &["--serial", SERIAL]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(drive.pollux("mkscratch", &["--remove"]).status.code(), Some(0));
    assert!(scratch::read(&drive.spec()).unwrap().is_none());
    let output = drive.pollux("fsck", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    // Without its marker the volume is somebody's.
    let output = drive.pollux("mkscratch", &["--serial", SERIAL]);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("Pollux volume"), "{}", said(&output));
}

#[test]
fn second_copy_outlasts_writes_to_the_beginning() {
    let drive = Drive::new();
    drive.mark();
    drive.put(0, &vec![0xee; 1 << 20]);
    let marker = scratch::permit(&drive.spec()).unwrap();
    // Tests put the first one back.
    scratch::write(&drive.spec(), &marker).unwrap();
    assert_eq!(drive.bytes()[FIRST..FIRST + BLOCK], marker.encode());
    assert!(drive.bytes()[FIRST + BLOCK..1 << 20].iter().all(|byte| *byte == 0xee));
}

/// A file of a volume may happen to hold a copy of a marker where the second copy would be.
#[test]
fn block_of_a_volume_is_neither_believed_nor_overwritten() {
    let drive = Drive::new();
    drive.mark();
    let marker = scratch::permit(&drive.spec()).unwrap();
    assert_eq!(drive.pollux("mkscratch", &["--remove"]).status.code(), Some(0));
    assert_eq!(drive.pollux("mkfs", &["--shards", "1"]).status.code(), Some(0));
    let second = (64 << 20) - 16 * BLOCK;
    drive.put(second, &marker.encode());
    assert!(scratch::read(&drive.spec()).unwrap().is_none());
    scratch::remove(&drive.spec()).unwrap();
    assert_eq!(drive.bytes()[second..second + BLOCK], marker.encode());
}

#[test]
fn damaged_marker_permits_nothing() {
    let drive = Drive::new();
    drive.mark();
    let marked = drive.bytes();
    drive.put(FIRST + 60, &[marked[FIRST + 60] ^ 1]);
    scratch::permit(&drive.spec()).unwrap();
    let second = (64 << 20) - 16 * BLOCK;
    drive.put(second + 60, &[marked[second + 60] ^ 1]);
    assert!(scratch::permit(&drive.spec()).unwrap_err().to_string().contains("not marked"));
}

#[test]
fn device_too_small_for_a_marker_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("tiny.img");
    fs::File::create(&path).unwrap().set_len(15 * 4096).unwrap();
    let error = scratch::survey(&device::parse(&format!("emu:{}", path.display())).unwrap()).unwrap_err();
    assert!(error.to_string().contains("too small"), "{error}");
}
