//! `pollux dedupe` of a given range, what it leaves alone because it is shared already, and what the daemon says to nonsense.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use hw_tests::{Daemon, Random, Scratch, fsck_clean, read_file, text};
use pollux::control::client::ask;
use pollux::control::location;
use pollux::control::protocol::{Command, SharedRange};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// `pollux dedupe --json`: the exit code, what it prints as JSON (null if nothing), and what it says besides.
fn dedupe(arguments: &[&str]) -> Result<(Option<i32>, Value, String)> {
    let output = hw_tests::pollux(&[&["dedupe", "--json"], arguments].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = if output.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&output.stdout)? };
    Ok((output.status.code(), json, said))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes)?;
    Ok(fs::File::open(path)?.sync_all()?)
}

/// Extents of a file, and how many are shared.
fn extents(path: &str) -> Result<String> {
    let output = hw_tests::pollux(&["dump", "--extents", path])?;
    ensure!(output.status.success(), "{}", text(&output));
    text(&output).lines().last().map(str::to_owned).context("an empty list")
}

#[test]
fn range_is_shared_as_a_whole_or_not_at_all() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let path = |name: &str| scratch.mount().join(name).display().to_string();
    fs::create_dir(path("folder"))?; // of another shard
    let contents = Random(20).bytes(20 * MIB + 1234);
    for name in ["folder/one", "two", "moved", "changed"] {
        let (one, place) = (path(name), 3 * MIB + 7);
        write(Path::new(&one), &contents)?;
        let file = fs::OpenOptions::new().write(true).open(&one)?;
        match name {
            "moved" => write(Path::new(&one), &[vec![1; 2 * MIB], contents[..8 * MIB].to_vec()].concat())?,
            "changed" => file.write_all_at(&[!contents[place]], place as u64)?,
            _ => {}
        }
    }
    let (one, two, moved, changed) = (path("folder/one"), path("two"), path("moved"), path("changed"));

    let (code, json, said) = dedupe(&[&one, &changed, "--length", "16MiB"])?;
    ensure!(
        code == Some(5) && json["same"] == false && json["different_at"] == 3 * MIB + 7,
        "{code:?}: {json} {said}"
    );
    let words = format!("byte {} of {changed} is not byte {0} of {one}", 3 * MIB + 7);
    ensure!(said.contains(&words) && said.contains("nothing was shared"), "{said}");
    ensure!(extents(&changed)?.ends_with(" 0 shared"), "{} although they differ", extents(&changed)?);

    // All of it, the end inside a block included; then once more.
    for (shared, already) in [(contents.len(), 0), (0, contents.len())] {
        let (code, json, said) = dedupe(&[&one, &two, "--src-offset", "0"])?;
        ensure!(
            code == Some(0) && json["shared_bytes"] == shared && json["already_shared_bytes"] == already,
            "{code:?}: {json} instead of {shared} and {already}; {said}"
        );
    }
    let options = ["--src-offset", "1MiB", "--dst-offset", "3MiB", "--length", "4MiB"];
    let (code, json, said) = dedupe(&[&[&*one, &*moved][..], &["--dry-run"], &options].concat())?;
    ensure!(code == Some(0) && json["shared_bytes"] == 0 && json["same"] == true, "{code:?}: {json} {said}");
    ensure!(extents(&moved)?.ends_with(" 0 shared"), "a dry run shares");
    let (code, json, said) = dedupe(&[&[&*one, &*moved][..], &options].concat())?;
    ensure!(code == Some(0) && json["shared_bytes"] == 4 * MIB, "{code:?}: {json} {said}");
    ensure!(!extents(&moved)?.ends_with(" 0 shared"), "{}", extents(&moved)?);

    let mount = scratch.mount().display().to_string();
    for (arguments, code, words) in [
        (vec![&*one, &two, "--src-offset", "5", "--length", "4096"], 2, "5 is no multiple of 4096"),
        (vec![&*one, &two, "--length", "100"], 2, "100 is no multiple"),
        (vec![&*one, &two, "--src-offset", "1GiB", "--length", "4KiB"], 2, "from byte 1073741824 on"),
        (vec![&*one, &moved, "--length", "16MiB"], 2, "bytes, no 16777216 from byte 0 on"),
        (vec![&*one, &one, "--dst-offset", "4KiB", "--length", "8KiB"], 2, "overlap"),
        (vec![&*one, "--length", "8KiB"], 2, "SRC DST"),
        (vec![&*one, &mount, "--length", "8KiB"], 1, "not a regular file"),
        (vec![&*one, "/proc/self/status", "--length", "8KiB"], 1, "another file system"),
        (vec![&*one, &two, "--length", "8KiB", "--min-length", "4KiB"], 2, "cannot be used with"),
    ] {
        let (found, _, said) = dedupe(&arguments)?;
        ensure!(found == Some(code) && said.contains(words), "{arguments:?}: {found:?} {said}");
    }
    for name in [&one, &two] {
        ensure!(read_file(Path::new(name))? == contents, "{name} holds something else");
    }
    ensure!(read_file(Path::new(&moved))?[2 * MIB..] == contents[..8 * MIB], "{moved} holds something else");
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn what_is_shared_already_is_left_as_it_is() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let mount = scratch.mount().display().to_string();
    let contents = Random(21).bytes(5 * MIB);
    for folder in ["", "one", "two", "three"] {
        let folder = scratch.mount().join(folder);
        fs::create_dir_all(&folder)?;
        write(&folder.join("file"), &contents)?;
    }
    let all = 3 * contents.len();
    for (options, shared, already) in
        [(&["--dry-run"][..], 0, 0), (&[], all, 0), (&["--dry-run"], 0, all), (&[], 0, all)]
    {
        let (code, json, said) = dedupe(&[&[&*mount], options].concat())?;
        ensure!(
            code == Some(0)
                && json["same_bytes"] == all
                && json["shared_bytes"] == shared
                && json["already_shared_bytes"] == already,
            "{options:?}: {code:?}: {json} instead of {shared} and {already}; {said}"
        );
    }
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn daemon_that_is_asked_to_share_nonsense_says_so_and_goes_on() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let contents = Random(22).bytes(100_000);
    let [one, two] = ["one", "two"].map(|name| scratch.mount().join(name));
    write(&one, &contents)?;
    write(&two, &contents)?;
    fs::create_dir(scratch.mount().join("folder"))?;
    std::os::unix::fs::symlink("one", scratch.mount().join("link"))?;
    let inode = |name: &str| scratch.mount().join(name).symlink_metadata().map(|found| found.ino());
    let (good, other) = (inode("one")?, inode("two")?);
    let socket = location::of_path(&scratch.mount()).map_err(anyhow::Error::msg)?;
    let fine = SharedRange { source: good, source_offset: 0, target: other, target_offset: 0, length: 4096 };

    let strange = [0, 1, inode("folder")?, inode("link")?, 999_999, 1 << 40, 63 << 58, u64::MAX];
    let files = strange
        .into_iter()
        .flat_map(|number| [SharedRange { source: number, ..fine }, SharedRange { target: number, ..fine }]);
    let far = [1, 4095, 100_000, 1 << 62, u64::MAX - 4095, u64::MAX];
    let ranges = far.into_iter().flat_map(|offset| {
        [
            SharedRange { source_offset: offset, ..fine },
            SharedRange { target_offset: offset, ..fine },
            SharedRange { length: offset, source_offset: offset, ..fine },
        ]
    });
    for range in files.chain(ranges) {
        // The whole files are the same, and a range as long as both is none of these.
        let answer = ask(&socket, Command::Dedupe(range)).map_err(anyhow::Error::msg)?;
        ensure!(
            answer["same"] == false && answer["why"].as_str().is_some_and(|why| !why.is_empty()),
            "{range:?}: {answer}"
        );
    }
    let nothing = ask(&socket, Command::Dedupe(SharedRange { length: 0, ..fine }));
    ensure!(nothing.is_err_and(|error| error.to_string().contains("no bytes")), "an empty range");
    let answer = ask(&socket, Command::Dedupe(fine)).map_err(anyhow::Error::msg)?;
    ensure!(answer["same"] == true, "what makes sense after all that: {answer}");
    ensure!(read_file(&one)? == contents && read_file(&two)? == contents, "the files hold something else");
    daemon.stop()?;
    fsck_clean(&scratch)
}
