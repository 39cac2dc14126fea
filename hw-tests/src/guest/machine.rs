//! A booted guest: options, boot, steps, logs.
//!
//! Owns: [`Guest`], [`GuestOptions`], [`boot`]. A guest is a QEMU with Debian's kernel, an IOMMU, and an initramfs made of
//! busybox and the binaries under test.
//!
//! Invariants: nothing on the host needs root; the guest ends with its [`Guest`], and with this process; its files are
//! unlinked as soon as it runs, so that nothing is left of it in any case; every wait has a limit; an error tells the step, both of
//! its outputs and the end of the kernel's log.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::channel::{Channel, Events, Output};
use super::initramfs::Archive;
use super::kernel::Kernel;
use super::process::{Monitor, Process};
use crate::suite::Environment;

const QEMU: &str = "qemu-system-x86_64";

/// How long a guest may take to boot, on the slowest machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// What a step is given unless it asks for more.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// Lines of the kernel's log in an error.
const SHOWN_LOG_LINES: usize = 30;

/// As many bytes of it are looked at.
const SHOWN_LOG_BYTES: usize = 8 << 10;

/// The ordinary user of the guest.
pub const USER: &str = "user";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n";
const GROUP: &str = "root:x:0:\nuser:x:1000:\n";

/// What is in a machine beside processors, memory and the IOMMU.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// Name for messages.
    pub name: String,
    /// QEMU's `-drive`, `-blockdev` and `-device` arguments.
    pub devices: Vec<String>,
    /// Memory in MiB.
    pub memory_mib: u32,
}

impl GuestOptions {
    /// A machine without a drive.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), devices: Vec::new(), memory_mib: 1536 }
    }

    /// Adds an argument and its value.
    #[must_use]
    pub fn with(mut self, argument: &str, value: impl Into<String>) -> Self {
        self.devices.extend([argument.to_owned(), value.into()]);
        self
    }

    /// Adds a raw file as the back end `id`, which stays when its device is unplugged.
    #[must_use]
    pub fn drive(self, id: &str, file: &Path) -> Self {
        let file = json!({ "driver": "file", "filename": file, "discard": "unmap" });
        let node = json!({ "driver": "raw", "node-name": id, "discard": "unmap", "file": file });
        self.with("-blockdev", node.to_string())
    }
}

/// A guest that runs.
pub struct Guest {
    name: String,
    process: Process,
    channel: Channel,
    monitor: Monitor,
    events: Events,
    console: File,
}

/// Boots a guest and waits for its agent.
///
/// # Errors
/// The machine does not come up; with the end of its log.
pub fn boot(environment: &Environment, options: &GuestOptions) -> Result<Guest> {
    let kernel = Kernel::obtain(&cache_directory(environment))?;
    let directory = tempfile::Builder::new().prefix("guest-").tempdir_in(&environment.scratch_root)?;
    let initramfs = directory.path().join("initramfs");
    fs::write(&initramfs, root_filesystem(environment, &kernel)?)?;
    let arguments = arguments(&kernel, options);
    let log = directory.path().join("qemu.log");
    let process = Process::start(QEMU, &arguments, directory.path(), &log)?;
    let connected = connect(&process, directory.path());
    let console = File::open(directory.path().join("console.log"));
    match (connected, console) {
        (Ok((channel, monitor, events)), Ok(console)) => {
            Ok(Guest { name: options.name.clone(), process, channel, monitor, events, console })
        }
        (connected, console) => {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let shown = console.map_or_else(|_| String::new(), |console| tail(&console));
            let error = connected.err().context("QEMU has made no console");
            let error = error.unwrap_or_else(|error| error);
            Err(error.context(format!("guest {} does not come up: {said}\n{shown}", options.name)))
        }
    }
}

fn connect(process: &Process, directory: &Path) -> Result<(Channel, Monitor, Events)> {
    let monitor = Monitor::new(process.connect(&directory.join("monitor"))?)?;
    let events = Events::collect(process.connect(&directory.join("events"))?)?;
    let mut channel = Channel::new(process.connect(&directory.join("agent"))?)?;
    channel.await_agent(BOOT_LIMIT, &|| still_runs(process))?;
    Ok((channel, monitor, events))
}

fn still_runs(process: &Process) -> Result<()> {
    match process.ended() {
        Some(status) => bail!("QEMU has ended with {status}"),
        None => Ok(()),
    }
}

/// QEMU's command line. Sockets and files are relative to the machine's directory.
fn arguments(kernel: &Kernel, options: &GuestOptions) -> Vec<String> {
    let memory = options.memory_mib.to_string();
    let image = kernel.image.display().to_string();
    let fixed = [
        "-machine",
        "q35,accel=tcg,kernel-irqchip=off",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        &memory,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-nic",
        "none",
        "-kernel",
        &image,
        "-initrd",
        "initramfs",
        // VFIO refuses an IOMMU that does not remap interrupts.
        "-device",
        "intel-iommu,intremap=on",
        // Under emulation on a busy machine the kernel's look at its timer fails now and then, and it panics.
        "-append",
        "console=ttyS0 intel_iommu=on no_timer_check quiet loglevel=5 panic=-1 oops=panic",
        "-serial",
        "file:console.log",
        "-qmp",
        "unix:monitor,server=on,wait=off",
        "-device",
        "virtio-serial-pci",
        "-chardev",
        "socket,id=agent,path=agent,server=on,wait=off",
        "-device",
        "virtserialport,chardev=agent",
        "-chardev",
        "socket,id=events,path=events,server=on,wait=off",
        "-device",
        "virtserialport,chardev=events",
    ];
    fixed.iter().map(|text| (*text).to_owned()).chain(options.devices.iter().cloned()).collect()
}

/// What the guest boots into.
fn root_filesystem(environment: &Environment, kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["proc", "sys", "dev", "tmp", "run", "root", "mnt", "bin", "etc", "home/user"] {
        archive.directory(directory);
    }
    archive.program("bin/busybox", 0o755, &busybox()?)?;
    archive.file("init", 0o755, include_bytes!("init.sh"));
    archive.file("etc/passwd", 0o644, PASSWD.as_bytes());
    archive.file("etc/group", 0o644, GROUP.as_bytes());
    let mut order = String::new();
    for module in kernel.modules() {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.object);
        if module.at_start {
            order += &format!("{}\n", module.name);
        }
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    for name in ["pollux", "polluxd"] {
        archive.program(&format!("bin/{name}"), 0o755, &environment.bin_dir.join(name))?;
    }
    for name in ["hw-suite", "hw-probe"] {
        if let Ok(path) = program(environment, name) {
            archive.program(&format!("bin/{name}"), 0o755, &path)?;
        }
    }
    // The busybox here has no device mapper, and its cp copies what could be shared.
    for (name, path) in [("dmsetup", "bin/dmsetup"), ("cp", "bin/gnu-cp")] {
        let source = find(name).with_context(|| format!("{name} is missing"))?;
        archive.program(path, 0o755, &source)?;
    }
    // Without it an ordinary user cannot mount; steps look for it.
    if let Some(path) = find("fusermount3") {
        archive.program("bin/fusermount3", 0o4755, &path)?;
    }
    Ok(archive.finish())
}

/// A program of this package: with the binaries under test, or built beside the one that runs.
pub(super) fn program(environment: &Environment, name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding the running program")?;
    let directories = own.ancestors().skip(1).take(2).map(Path::to_owned);
    let mut candidates =
        std::iter::once(environment.bin_dir.clone()).chain(directories).map(|directory| directory.join(name));
    candidates.find(|path| path.is_file()).with_context(|| format!("{name} is not built"))
}

fn busybox() -> Result<PathBuf> {
    find("busybox").context("busybox is missing: `apt-get install busybox-static`")
}

/// Where a program is, if it is installed.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let places = std::env::split_paths(&path).chain(usual);
    places.map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// Where the unpacked kernel is kept: in the build's directory, if this program lies in one.
fn cache_directory(environment: &Environment) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let target = own.ancestors().find(|path| path.join("CACHEDIR.TAG").is_file());
    target.unwrap_or(&environment.scratch_root).join("guest-cache")
}

/// Why no guest can be booted here, with what to install; `None` if one can.
pub fn missing(environment: &Environment) -> Option<String> {
    let packages = [
        (QEMU, "qemu-system-x86"),
        ("busybox", "busybox-static"),
        ("setpriv", "util-linux"),
        ("ldd", "libc-bin"),
        ("dpkg-deb", "dpkg"),
        ("dmsetup", "dmsetup"),
    ];
    let absent: Vec<&str> =
        packages.iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if !absent.is_empty() {
        return Some(format!("apt-get install --no-install-recommends {}", absent.join(" ")));
    }
    Kernel::obtain(&cache_directory(environment)).err().map(|error| format!("{error:#}").replace('\n', " "))
}

/// The end of the kernel's log.
fn tail(console: &File) -> String {
    let mut log = vec![0; SHOWN_LOG_BYTES];
    let end = console.metadata().map_or(0, |metadata| metadata.len());
    let count = console.read_at(&mut log, end.saturating_sub(SHOWN_LOG_BYTES as u64)).unwrap_or(0);
    let log = String::from_utf8_lossy(&log[..count]).replace('\r', "");
    let lines: Vec<&str> = log.lines().collect();
    let shown = &lines[lines.len().saturating_sub(SHOWN_LOG_LINES)..];
    format!("end of the guest's console:\n{}", shown.join("\n"))
}

impl Guest {
    /// Runs a script and returns what it left, whatever its exit code.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn run(&mut self, script: &str) -> Result<Output> {
        self.run_for(STEP_LIMIT, script)
    }

    /// As [`Self::run`], with more time.
    ///
    /// # Errors
    /// The guest does not answer, or the step has not ended in time.
    pub fn run_for(&mut self, limit: Duration, script: &str) -> Result<Output> {
        let process = &self.process;
        let outcome = self.channel.step(script, limit, &|| still_runs(process));
        let output = outcome.with_context(|| self.place(script))?;
        ensure!(
            output.code != 137 && output.code != 143,
            "not ended after {limit:?}: {}\n{}",
            self.place(script),
            shown(&output)
        );
        Ok(output)
    }

    /// Runs a script that must succeed, and returns its standard output.
    ///
    /// # Errors
    /// It fails.
    pub fn ok(&mut self, script: &str) -> Result<String> {
        self.ok_for(STEP_LIMIT, script)
    }

    /// As [`Self::ok`], with more time.
    ///
    /// # Errors
    /// It fails.
    pub fn ok_for(&mut self, limit: Duration, script: &str) -> Result<String> {
        let output = self.run_for(limit, script)?;
        ensure!(output.code == 0, "exit code {} of {}\n{}", output.code, self.place(script), shown(&output));
        Ok(output.stdout)
    }

    /// Runs a script that must fail, with every one of `words` in what it says on standard error.
    ///
    /// # Errors
    /// It succeeds, or says something else.
    pub fn refused(&mut self, script: &str, words: &[&str]) -> Result<String> {
        let output = self.run(script)?;
        ensure!(
            output.code != 0,
            "this succeeded and should not: {}\n{}",
            self.place(script),
            shown(&output)
        );
        for word in words {
            ensure!(
                output.stderr.contains(word),
                "the error does not say {word:?}: {}\n{}",
                self.place(script),
                shown(&output)
            );
        }
        Ok(output.stderr)
    }

    /// Runs a script that prints one JSON document.
    ///
    /// # Errors
    /// It fails, or prints something else.
    pub fn json(&mut self, script: &str) -> Result<Value> {
        let text = self.ok(script)?;
        serde_json::from_str(&text)
            .with_context(|| format!("not a JSON document, of {}:\n{text}", self.place(script)))
    }

    /// Repeats a script every 100 ms until it succeeds.
    ///
    /// # Errors
    /// It has not within `limit`.
    pub fn until(&mut self, limit: Duration, script: &str) -> Result<()> {
        let seconds = limit.as_secs();
        let repeated = format!(
            "n=0; until ( {script} ); do n=$((n+1)); [ $n -lt {} ] || exit 1; usleep 100000; done",
            seconds * 10
        );
        let start = Instant::now();
        let output = self.run_for(limit * 4, &repeated)?;
        ensure!(
            output.code == 0,
            "still not so after {:?}: {}\n{}",
            start.elapsed(),
            self.place(script),
            shown(&output)
        );
        Ok(())
    }

    /// The lines that the guest has written to `/dev/events`.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The kernel's log as it is on the console.
    pub fn console(&self) -> String {
        tail(&self.console)
    }

    /// Unplugs a device, as by a hand on the drive, and waits until QEMU has let it go.
    ///
    /// # Errors
    /// QEMU refuses, or the guest does not let it go.
    pub fn unplug(&mut self, id: &str) -> Result<()> {
        self.monitor.execute("device_del", &json!({ "id": id }))?;
        let gone = self.monitor.await_event("DEVICE_DELETED");
        gone.with_context(|| format!("guest {}: unplugging {id}\n{}", self.name, tail(&self.console)))
    }

    /// Plugs a device in.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn plug(&mut self, device: &Value) -> Result<()> {
        self.monitor.execute("device_add", device).map(|_| ())
    }

    /// Ends QEMU as a power failure would end the machine.
    pub fn kill(mut self) {
        self.process.kill();
    }

    fn place(&self, script: &str) -> String {
        format!("step in guest {}: {}\n{}", self.name, script.trim(), tail(&self.console))
    }
}

fn shown(output: &Output) -> String {
    format!("standard output:\n{}\nstandard error:\n{}", output.stdout.trim_end(), output.stderr.trim_end())
}
