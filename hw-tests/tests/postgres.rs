//! PostgreSQL on the mount: kill -9 of the daemon under pgbench, and whether the database has everything that it was told is
//! durable.
//!
//! `POLLUX_PGBENCH_SECONDS` is how long pgbench runs before the daemon is killed (6 unless said otherwise).

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hw_tests::{Daemon, Scratch, fsck_clean, run, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

/// How long the server may take to begin or to end.
const DEADLINE: Duration = Duration::from_secs(60);

/// Users of the server when pgbench runs.
const CLIENTS: &str = "4";

/// A row of money that moves between accounts, tellers and branches comes out the same everywhere.
const BALANCES: &str = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
     and (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history) \
     and (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history)";

/// The newest PostgreSQL that is installed: the folder of its programs.
fn programs() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    found.retain(|folder| folder.join("postgres").is_file() && folder.join("pg_amcheck").is_file());
    found.sort();
    found.pop().context("PostgreSQL is missing: `apt-get install postgresql`")
}

/// A database on the mount, and who may run it: the server refuses root.
struct Database {
    programs: PathBuf,
    user: User,
    data: PathBuf,
    /// Where its socket lies, off the mount.
    socket: tempfile::TempDir,
}

impl Database {
    fn new(scratch: &Scratch) -> Result<Self> {
        let user = User::from_name("postgres")?.context("there is no user postgres")?;
        let own = |path: &Path| chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()));
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o711))?;
        let data = scratch.mount().join("database");
        fs::create_dir(&data)?;
        own(&data)?;
        let socket = tempfile::tempdir()?;
        own(socket.path())?;
        Ok(Self { programs: programs()?, user, data, socket })
    }

    /// A program of PostgreSQL, as its user.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.uid(self.user.uid.as_raw()).gid(self.user.gid.as_raw());
        command.current_dir("/").env("PGHOST", self.socket.path()).env("PGDATABASE", "postgres");
        command.env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    fn initialise(&self) -> Result<()> {
        run(self.command("initdb").args(["--data-checksums", "--auth=trust", "-D"]).arg(&self.data))?;
        Ok(())
    }

    /// Starts the server and waits until it answers; after a crash, until it has recovered.
    fn start(&self, log: &Path) -> Result<Server> {
        let output = fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = self.command("postgres");
        command.arg("-D").arg(&self.data).arg("-k").arg(self.socket.path());
        command.args(["-c", "listen_addresses="]);
        let child = command.stdout(output.try_clone()?).stderr(output).spawn()?;
        let mut server = Server { child, log: log.to_owned() };
        let began = Instant::now();
        while !self.command("pg_isready").stdout(Stdio::null()).status()?.success() {
            if let Some(status) = server.child.try_wait()? {
                bail!("the server ended with {status}:\n{}", server.log());
            }
            ensure!(began.elapsed() < DEADLINE, "the server does not answer:\n{}", server.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    fn query(&self, query: &str) -> Result<String> {
        Ok(run(self.command("psql").args(["-X", "-A", "-t", "-c", query]))?.trim().to_owned())
    }

    /// Inserts one row after the other, each a transaction, until the server is gone. `told` is the last one that the server
    /// has said is committed.
    fn keep_inserting(&self, told: Arc<AtomicU64>) -> Result<std::thread::JoinHandle<()>> {
        let mut command = self.command("psql");
        command
            .args(["-X", "-q", "-A", "-t"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn()?;
        let mut input = child.stdin.take().context("psql has no input")?;
        let mut answers = BufReader::new(child.stdout.take().context("psql has no output")?).lines();
        Ok(std::thread::spawn(move || {
            for number in 1_u64.. {
                let line = format!("insert into ledger values ({number}) returning number;\n");
                let sent = input.write_all(line.as_bytes());
                match answers.next() {
                    Some(Ok(answer)) if sent.is_ok() && answer == number.to_string() => {
                        told.store(number, Ordering::SeqCst);
                    }
                    _ => break,
                }
            }
            drop(input);
            let _ended = child.wait();
        }))
    }
}

/// A running server.
struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX))
    }

    /// A "fast" shutdown: what is committed is written.
    fn stop(mut self) -> Result<()> {
        kill(self.pid(), Signal::SIGINT)?;
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the server ended with {status}:\n{}", self.log());
                return Ok(());
            }
            ensure!(began.elapsed() < DEADLINE, "the server does not end:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Each of its processes has a session of its own, and one that waits for a lock of another outlives the first. So none
        // is started any more, then all are ended. After a shutdown there are none.
        let first = self.pid();
        let _stopped = kill(first, Signal::SIGSTOP);
        for process in children_of(first).into_iter().chain([first]) {
            let _gone = kill(process, Signal::SIGKILL);
        }
        let _reaped = self.child.wait();
    }
}

/// The processes that a process has started and that run.
fn children_of(parent: Pid) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_child = |id: &i32| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(')').next().unwrap_or("").split_whitespace();
        fields.nth(1) == Some(parent.to_string().as_str())
    };
    ids.filter(is_child).map(Pid::from_raw).collect()
}

#[test]
fn database_survives_kill_nine_of_the_daemon_under_pgbench() -> Result<()> {
    if !nix::unistd::Uid::effective().is_root() {
        bail!("this test starts PostgreSQL as its own user and so needs root");
    }
    let seconds =
        std::env::var("POLLUX_PGBENCH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    let scratch = Scratch::new()?;
    let daemon = Daemon::up(&scratch, &["--size", "4GiB"])?;
    let database = Database::new(&scratch)?;
    let log = scratch.path().join("postgres.log");
    database.initialise()?;
    let server = database.start(&log)?;
    run(database.command("pgbench").args(["--initialize", "--quiet", "--scale=4"]))?;
    database.query("create table ledger (number bigint primary key)")?;

    let told = Arc::new(AtomicU64::new(0));
    let inserting = database.keep_inserting(Arc::clone(&told))?;
    let limit = (10 * seconds).to_string();
    let mut command = database.command("pgbench");
    command.args(["--client", CLIENTS, "--jobs=2", "--no-vacuum", "--time", &limit]);
    let pgbench = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    std::thread::sleep(Duration::from_secs(seconds));
    daemon.kill()?;
    drop(server);
    inserting.join().ok().context("the inserting thread panicked")?;
    let ended = pgbench.wait_with_output()?;
    ensure!(!ended.status.success(), "pgbench did not notice that its database was gone: {}", text(&ended));

    fsck_clean(&scratch)?;
    let daemon = Daemon::up(&scratch, &[])?;
    let server = database.start(&log)?;
    let told = told.load(Ordering::SeqCst);
    let kept: u64 = database.query("select coalesce(max(number), 0) from ledger")?.parse()?;
    let rows: u64 = database.query("select count(*) from ledger")?.parse()?;
    let transactions: u64 = database.query("select count(*) from pgbench_history")?.parse()?;
    println!("{told} insertions were acknowledged, {kept} are there; {transactions} transactions of pgbench");
    ensure!(told > 0 && transactions > 0, "nothing was committed before the daemon was killed");
    // One more may have been committed and not been told.
    ensure!(rows == kept && (told..=told + 1).contains(&kept), "{rows} rows up to {kept}, {told} were told");
    ensure!(database.query(BALANCES)? == "t", "the balances of pgbench do not agree");
    let checked = database
        .command("pg_amcheck")
        .args(["--all", "--install-missing", "--heapallindexed", "--parent-check", "--no-password"])
        .output()?;
    ensure!(checked.status.success(), "pg_amcheck: {}", text(&checked));
    server.stop()?;
    daemon.stop()?;
    fsck_clean(&scratch)
}
