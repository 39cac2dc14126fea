//! A real file tree through the whole stack: daemon, mount, ordinary programs.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hw_tests::{
    Daemon, Random, Scratch, binary, fsck_clean, make_tree, need, pollux, read_file, run, same_tree, shell,
    text,
};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn tree_survives_unmount_and_remount() -> Result<()> {
    let scratch = Scratch::new()?;
    let source = scratch.path().join("source");
    make_tree(&source, 3_000, 1)?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let copy = scratch.mount().join("copy");
    ensure!(fs::read_dir(scratch.mount())?.next().is_none(), "a fresh volume is empty");
    run(Command::new("cp").arg("-a").arg(&source).arg(&copy))?;
    same_tree(&source, &copy)?;
    let (status, took) = daemon.interrupt()?;
    ensure!(status.success(), "{status}");
    println!("Ctrl-C to end: {took:?}");
    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    same_tree(&source, &copy)?;
    run(Command::new("rm").arg("-r").arg(&copy))?;
    ensure!(fs::read_dir(scratch.mount())?.next().is_none(), "everything was removed");
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn git_clones_and_checks_a_repository() -> Result<()> {
    need("git", "git")?;
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let clone = scratch.mount().join("clone");
    run(Command::new("git").args(["clone", "--quiet", "--no-hardlinks"]).arg(repository()).arg(&clone))?;
    run(Command::new("git").arg("-C").arg(&clone).args(["fsck", "--strict"]))?;
    run(Command::new("git").arg("-C").arg(&clone).args(["gc", "--quiet"]))?;
    run(Command::new("git").arg("-C").arg(&clone).args(["fsck", "--strict"]))?;
    let changed = run(Command::new("git").arg("-C").arg(&clone).args(["status", "--porcelain"]))?;
    ensure!(changed.is_empty(), "git sees changes in a fresh clone: {changed}");
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn sqlite_keeps_its_integrity() -> Result<()> {
    need("sqlite3", "sqlite3")?;
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    let database = scratch.mount().join("test.db");
    let script = scratch.path().join("insert.sql");
    let mut lines = String::from(
        "create table t (id integer primary key, a text, b integer);\ncreate index t_b on t (b);\n",
    );
    for batch in 0..100 {
        lines.push_str("begin;\n");
        for row in 0..1_000 {
            let id = batch * 1_000 + row;
            lines.push_str(&format!(
                "insert into t values ({id}, 'row {id} of the test', {});\n",
                (id * 7_919) % 100_003
            ));
        }
        lines.push_str("commit;\n");
    }
    fs::write(&script, lines)?;
    shell(&format!("sqlite3 {} < {}", database.display(), script.display()))?;
    let answer = run(Command::new("sqlite3")
        .arg(&database)
        .arg("pragma integrity_check; select count(*), sum(b) from t;"))?;
    ensure!(answer.starts_with("ok\n100000|"), "{answer}");
    daemon.stop()?;
    let daemon = Daemon::up(&scratch, &[])?;
    let again = run(Command::new("sqlite3")
        .arg(&database)
        .arg("pragma integrity_check; select count(*), sum(b) from t;"))?;
    ensure!(again == answer, "{again} instead of {answer}");
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn fio_verifies_random_writes() -> Result<()> {
    need("fio", "fio")?;
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "4GiB"])?;
    run(Command::new("fio").args([
        "--name=verify",
        &format!("--directory={}", scratch.mount().display()),
        "--rw=randwrite",
        "--bs=4k",
        "--size=256m",
        "--numjobs=4",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--ioengine=psync",
        "--group_reporting",
    ]))?;
    daemon.stop()?;
    fsck_clean(&scratch)
}

/// What was synced must be there after kill -9, whatever was going on; nothing needs repair.
#[test]
fn synced_files_survive_kill_nine_twenty_times() -> Result<()> {
    let scratch = Scratch::new()?;
    let source = scratch.path().join("source");
    make_tree(&source, 400, 2)?;
    let mut random = Random(3);
    let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
    let mut daemon = Daemon::up(&scratch, &["--size", "1GiB"])?;
    for round in 0..20 {
        let mount = scratch.mount();
        let volume_sync = round % 2 == 0;
        let name = format!("kept-{round}");
        let length = usize::try_from(1 + random.below(300_000))?;
        let contents = random.bytes(length);
        // One round syncs the whole volume, the next fsyncs one file.
        let mut file = fs::File::create(mount.join(&name))?;
        file.write_all(&contents)?;
        if volume_sync {
            run(Command::new("cp").arg("-a").arg(&source).arg(mount.join(format!("tree-{round}"))))?;
            let output = pollux(&["sync".as_ref(), mount.as_os_str()])?;
            ensure!(output.status.success(), "pollux sync: {}", text(&output));
        } else {
            file.sync_all()?;
        }
        drop(file);
        kept.push((name, contents));
        let mut copy = Command::new("cp")
            .arg("-a")
            .arg(&source)
            .arg(mount.join(format!("copy-{round}")))
            .stderr(std::process::Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(random.below(150)));
        daemon.kill()?;
        let _interrupted = copy.wait()?;
        // A copy that is slow to start finds the directory below the mount, and fills that.
        let below = mount.join(format!("copy-{round}"));
        if below.exists() {
            fs::remove_dir_all(&below)?;
        }
        fsck_clean(&scratch).with_context(|| format!("round {round}"))?;
        daemon = Daemon::up(&scratch, &[])?;
        for (name, contents) in &kept {
            let found = read_file(&mount.join(name)).with_context(|| format!("round {round}"))?;
            ensure!(
                found == *contents,
                "round {round}: {name} has changed ({} bytes, {} expected)",
                found.len(),
                contents.len()
            );
        }
        if volume_sync {
            same_tree(&source, &mount.join(format!("tree-{round}")))
                .with_context(|| format!("round {round}"))?;
        }
    }
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn full_volume_tells_the_writer_and_recovers() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "256MiB"])?;
    let block = Random(4).bytes(1 << 20);
    for round in 0..3 {
        let path = scratch.mount().join("big");
        let mut file = fs::File::create(&path)?;
        let mut written = 0_u64;
        let error = loop {
            match file.write_all_at(&block, written) {
                Ok(()) => written += block.len() as u64,
                Err(error) => break error,
            }
            ensure!(written < 256 << 20, "a volume of 256 MiB took {written} bytes");
        };
        ensure!(error.raw_os_error() == Some(libc::ENOSPC), "{error} instead of ENOSPC");
        ensure!(written > 160 << 20, "round {round}: full after only {written} bytes");
        file.sync_all().context("what was accepted can be written back")?;
        let mut start = vec![0; 1 << 20];
        fs::File::open(&path)?.read_exact_at(&mut start, 0)?;
        ensure!(start == block, "contents of the full volume");
        file.flush()?;
        drop(file);
        fs::remove_file(&path).context("deleting works on a full volume")?;
    }
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn reader_on_another_core_never_sees_stale_data() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "256MiB"])?;
    let file = scratch.mount().join("relay");
    let said = run(Command::new(binary("relay")?).arg(&file).arg("100000"))?;
    println!("{said}");
    daemon.stop()?;
    fsck_clean(&scratch)
}

#[test]
fn idle_daemon_uses_less_than_one_percent_of_a_core() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "256MiB"])?;
    fs::write(scratch.mount().join("file"), b"some work first")?;
    // Let the last commit interval pass.
    std::thread::sleep(Duration::from_secs(6));
    let before = daemon.cpu_time()?;
    std::thread::sleep(Duration::from_secs(10));
    let used = daemon.cpu_time()? - before;
    println!("CPU time in 10 s idle: {used:?}");
    ensure!(used < Duration::from_millis(100), "an idle daemon used {used:?} of CPU time in 10 s");
    daemon.stop()
}
