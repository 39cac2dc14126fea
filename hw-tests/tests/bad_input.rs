//! Bad input: a clear error each, the documented exit code, and no change on disk.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use hw_tests::{Daemon, Scratch, binary, fsck_clean, pollux, text};

/// Byte offsets of the two superblock rings and the size of a slot (see docs/on-disk-format.md).
const RING_A: u64 = 16 * 4096;
const RING_B: u64 = 4160 * 4096;
const RING_BYTES: usize = 8 * 4096;

/// Sizes and contents in one number, to see that nothing was changed.
fn fingerprint(path: &Path) -> Result<u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in fs::read(path)? {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    Ok(hash)
}

fn device(path: &Path) -> String {
    format!("emu:{}", path.display())
}

fn expect(output: &Output, code: i32, words: &[&str]) -> Result<()> {
    let said = text(output);
    ensure!(output.status.code() == Some(code), "exit {:?} instead of {code}:\n{said}", output.status.code());
    ensure!(!said.contains("panicked"), "{said}");
    for word in words {
        ensure!(said.to_lowercase().contains(&word.to_lowercase()), "the message lacks {word:?}:\n{said}");
    }
    Ok(())
}

fn format_image(scratch: &Scratch, size: &str, more: &[&str]) -> Result<()> {
    let spec = format!("{},size={size}", device(&scratch.image()));
    let mut arguments = vec!["mkfs", "--device", &spec];
    arguments.extend(more);
    let output = pollux(&arguments)?;
    ensure!(output.status.success(), "{}", text(&output));
    Ok(())
}

fn overwrite(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all_at(bytes, offset).context("damaging the image")
}

#[test]
fn malformed_device_specs_are_usage_errors() -> Result<()> {
    for (spec, word) in [
        ("floppy:/dev/fd0", "floppy"),
        ("emu:", "emu"),
        ("emu:/tmp/x,size=12parsecs", "12parsecs"),
        ("emu:/tmp/x,lba=1000", "lba"),
        ("emu:/tmp/x,colour=red", "colour"),
        ("emu:mem", "size"),
        ("pci:01:00", "01:00"),
        ("", "device"),
    ] {
        let output = pollux(&["identify", "--device", spec])?;
        expect(&output, 2, &[word]).with_context(|| format!("device spec {spec:?}"))?;
    }
    Ok(())
}

#[test]
fn missing_image_is_named_with_what_to_do() -> Result<()> {
    let scratch = Scratch::new()?;
    let spec = device(&scratch.image());
    for command in ["identify", "dump", "mkfs"] {
        expect(&pollux(&[command, "--device", &spec])?, 1, &["p.img", "size="]).context(command)?;
    }
    expect(&pollux(&["fsck", "--device", &spec])?, 8, &["p.img"])?;
    ensure!(!scratch.image().exists(), "no command makes an image without size=");
    Ok(())
}

#[test]
fn image_of_something_else_is_refused_and_left_alone() -> Result<()> {
    let scratch = Scratch::new()?;
    let image = scratch.image();
    fs::File::create(&image)?.set_len(256 << 20)?;
    overwrite(&image, 1080, &[0x53, 0xEF])?; // ext4's magic
    let before = fingerprint(&image)?;
    let spec = device(&image);
    expect(&pollux(&["fsck", "--device", &spec])?, 8, &["not a Pollux"])?;
    expect(&pollux(&["mkfs", "--device", &spec])?, 1, &["ext", "--force"])?;
    let up = pollux(&[
        "up".as_ref(),
        "--image".as_ref(),
        image.as_os_str(),
        "--mount".as_ref(),
        scratch.mount().as_os_str(),
    ])?;
    expect(&up, 1, &["not a Pollux"])?;
    ensure!(fingerprint(&image)? == before, "the image was changed");
    Ok(())
}

#[test]
fn mkfs_keeps_an_existing_volume_without_force() -> Result<()> {
    let scratch = Scratch::new()?;
    format_image(&scratch, "128MiB", &[])?;
    let before = fingerprint(&scratch.image())?;
    let spec = device(&scratch.image());
    expect(&pollux(&["mkfs", "--device", &spec])?, 1, &["Pollux", "--force"])?;
    ensure!(fingerprint(&scratch.image())? == before, "the image was changed");
    let forced = pollux(&["mkfs", "--device", &spec, "--force"])?;
    ensure!(forced.status.success(), "{}", text(&forced));
    fsck_clean(&scratch)
}

#[test]
fn too_small_devices_and_too_many_shards_say_what_is_needed() -> Result<()> {
    let scratch = Scratch::new()?;
    let spec = format!("{},size=1MiB", device(&scratch.image()));
    expect(&pollux(&["mkfs", "--device", &spec])?, 1, &["MiB"])?;
    let other = format!("emu:{}/other.img,size=64MiB", scratch.path().display());
    expect(&pollux(&["mkfs", "--device", &other, "--shards", "64"])?, 1, &["shard"])?;
    expect(&pollux(&["mkfs", "--device", &other, "--shards", "65"])?, 2, &["64"])?;
    Ok(())
}

#[test]
fn damaged_superblock_is_read_from_its_twin_or_the_generation_before() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "128MiB"])?;
    fs::write(scratch.mount().join("file"), b"contents")?;
    daemon.stop()?;
    let image = scratch.image();
    let rings = fs::read(&image)?;
    let at = |offset: u64| -> Result<Vec<u8>> {
        let start = usize::try_from(offset)?;
        Ok(rings[start..start + RING_BYTES].to_vec())
    };
    let (ring_a, ring_b) = (at(RING_A)?, at(RING_B)?);
    for (ring, other) in [(RING_A, RING_B), (RING_B, RING_A)] {
        overwrite(&image, ring, &vec![0xA5; RING_BYTES])?;
        let output = pollux(&["fsck", "--device", &device(&image)])?;
        expect(&output, 0, &["superblock"])
            .with_context(|| format!("ring at {ring} lost, ring at {other} whole"))?;
        overwrite(&image, RING_A, &ring_a)?;
        overwrite(&image, RING_B, &ring_b)?;
    }
    overwrite(&image, RING_A, &vec![0xA5; RING_BYTES])?;
    let daemon = Daemon::up(&scratch, &[])?;
    ensure!(fs::read(scratch.mount().join("file"))? == b"contents", "the file is there");
    ensure!(daemon.log().to_lowercase().contains("superblock"), "the daemon says so:\n{}", daemon.log());
    daemon.stop()?;
    // Both gone: nothing may be changed.
    overwrite(&image, RING_A, &vec![0xA5; RING_BYTES])?;
    overwrite(&image, RING_B, &vec![0xA5; RING_BYTES])?;
    let before = fingerprint(&image)?;
    expect(&pollux(&["fsck", "--device", &device(&image)])?, 8, &["superblock"])?;
    ensure!(fingerprint(&image)? == before, "the image was changed");
    Ok(())
}

#[test]
fn second_daemon_on_the_same_image_is_refused() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "128MiB"])?;
    let other = scratch.path().join("other");
    let second = pollux(&[
        "up".as_ref(),
        "--image".as_ref(),
        scratch.image().as_os_str(),
        "--mount".as_ref(),
        other.as_os_str(),
    ])?;
    expect(&second, 1, &["p.img", "in use"])?;
    expect(&pollux(&["mkfs", "--device", &device(&scratch.image()), "--force"])?, 1, &["in use"])?;
    expect(&pollux(&["fsck", "--device", &device(&scratch.image())])?, 8, &["in use"])?;
    fs::write(scratch.mount().join("file"), b"still works")?;
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn unsuitable_mount_points_are_refused() -> Result<()> {
    let scratch = Scratch::new()?;
    format_image(&scratch, "128MiB", &[])?;
    let before = fingerprint(&scratch.image())?;
    let daemon = binary("polluxd")?;
    let try_mount = |point: &Path| -> Result<Output> {
        Command::new(&daemon)
            .args(["--device", &device(&scratch.image()), "--mount"])
            .arg(point)
            .stdin(Stdio::null())
            .output()
            .context("running polluxd")
    };
    expect(&try_mount(&scratch.path().join("missing"))?, 1, &["missing", "mkdir"])?;
    let file = scratch.path().join("a-file");
    fs::write(&file, b"")?;
    expect(&try_mount(&file)?, 1, &["a-file", "not a directory"])?;
    let full = scratch.path().join("full");
    fs::create_dir(&full)?;
    fs::write(full.join("something"), b"")?;
    expect(&try_mount(&full)?, 1, &["full", "not empty"])?;
    expect(&try_mount(Path::new("/proc"))?, 1, &["/proc"])?;
    ensure!(fingerprint(&scratch.image())? == before, "the image was changed");
    Ok(())
}

#[test]
fn size_of_an_existing_image_is_only_checked() -> Result<()> {
    let scratch = Scratch::new()?;
    format_image(&scratch, "128MiB", &[])?;
    let before = fingerprint(&scratch.image())?;
    let output = pollux(&[
        "up".as_ref(),
        "--image".as_ref(),
        scratch.image().as_os_str(),
        "--size".as_ref(),
        "256MiB".as_ref(),
        "--mount".as_ref(),
        scratch.mount().as_os_str(),
    ])?;
    expect(&output, 1, &["128", "256"])?;
    ensure!(fingerprint(&scratch.image())? == before, "the image was changed");
    Ok(())
}
