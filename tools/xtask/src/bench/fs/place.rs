//! What is measured, mounted: a kernel filesystem, Pollux, the minimal responder.
//!
//! Invariant: dropping a [`Place`] unmounts it and ends its server. If it never comes to that, the namespace that the
//! mounts are in ends with the last process of the run.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;

use super::Tools;

/// Size of each device.
const SIZE: u64 = 4 << 30;
/// Size of the tmpfs at most: what lies on it is taken as it is written.
const TMPFS_SIZE: &str = "16g";

/// A filesystem of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    Btrfs,
    Xfs,
    Ext4,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Btrfs => "btrfs",
            Self::Xfs => "xfs",
            Self::Ext4 => "ext4",
        }
    }

    /// The program that makes one, and its package.
    pub(super) fn maker(self) -> (&'static str, &'static str) {
        match self {
            Self::Btrfs => ("mkfs.btrfs", "btrfs-progs"),
            Self::Xfs => ("mkfs.xfs", "xfsprogs"),
            Self::Ext4 => ("mkfs.ext4", "e2fsprogs"),
        }
    }

    pub(super) fn clones(self) -> bool {
        self != Self::Ext4
    }
}

/// What to mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Kernel(Kind),
    Pollux,
    Responder,
}

impl What {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kernel(kind) => kind.name(),
            Self::Pollux => "Pollux",
            Self::Responder => "the responder",
        }
    }
}

/// Something mounted.
pub(super) struct Place {
    pub(super) what: What,
    pub(super) dir: PathBuf,
    server: Option<Child>,
    image: Option<PathBuf>,
}

impl Place {
    pub(super) fn mount(tools: &Tools, what: What) -> anyhow::Result<Self> {
        let dir = tools.scratch.join(what.name().replace(' ', "-"));
        std::fs::create_dir_all(&dir)?;
        let mut place = Self { what, dir, server: None, image: None };
        match what {
            What::Kernel(kind) => place.mount_kernel(tools, kind)?,
            What::Pollux => {
                let device = format!("emu:mem,size={SIZE}");
                let arguments = ["serve", "--device", &device, "--cores", &cores()];
                place.serve(tools, &arguments)?;
            }
            What::Responder => place.serve(tools, &["responder"])?,
        }
        Ok(place)
    }

    fn mount_kernel(&mut self, tools: &Tools, kind: Kind) -> anyhow::Result<()> {
        let image = tools.scratch.join(format!("{}.img", kind.name()));
        let file = std::fs::File::create(&image)?;
        file.set_len(SIZE)?;
        self.image = Some(image.clone());
        run(Command::new(kind.maker().0).arg("-q").arg(&image))?;
        run(Command::new("mount").args(["-t", kind.name(), "-o", "loop,noatime"]).arg(&image).arg(&self.dir))
    }

    /// Starts a server, and waits for the line that says it has mounted.
    fn serve(&mut self, tools: &Tools, arguments: &[&str]) -> anyhow::Result<()> {
        // However this process ends, its servers end too, and with them the namespace.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM", "--"]).arg(&tools.bench);
        command.args(arguments).arg("--mount").arg(&self.dir).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting fs-bench")?;
        let output = child.stdout.take().context("its output was asked for")?;
        self.server = Some(child);
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(line.starts_with('{'), "{} did not mount", self.what.name());
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.dir)) {
            eprintln!("{error:#}");
        }
        if let Some(mut server) = self.server.take() {
            // It ends because its mount has gone.
            let _ended = server.wait();
        }
        if let Some(image) = &self.image {
            let _on_a_tmpfs_that_goes = std::fs::remove_file(image);
        }
    }
}

/// The tmpfs that images and mount points lie on.
pub(super) struct Tmpfs(PathBuf);

pub(super) fn mount_tmpfs(dir: &Path) -> anyhow::Result<Tmpfs> {
    let options = format!("size={TMPFS_SIZE},mode=755");
    run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "pollux-bench"]).arg(dir))?;
    Ok(Tmpfs(dir.to_owned()))
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.0)) {
            eprintln!("{error:#}");
        }
    }
}

/// One reactor: with more, the load would have no core.
fn cores() -> String {
    "0".to_owned()
}

pub(super) fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
