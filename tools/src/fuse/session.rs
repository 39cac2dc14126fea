//! Mounting, the session with the kernel, and unmounting.
//!
//! Owns: [`Mounted`], one mount with the threads that read its requests.
//!
//! As root the mount is made with mount(2) and is for all users; otherwise `fusermount3` makes it, for its owner. It
//! never honours set-uid bits and device nodes unless asked ([`Extras`]).
//!
//! | state | goes on when | to |
//! |---|---|---|
//! | mounted | [`Mounted::unmount`] succeeds, or anybody runs umount(8) | ended |
//! | mounted, in use | [`Mounted::unmount`] with [`Urgency::Now`] | aborted and detached: programs still using it get errors |
//! | ended, aborted | the session threads have left | [`Mounted::ended`] is raised |

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use fuser::{Config, MountOption, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{getegid, geteuid};

use super::front::{FrontEnd, MAX_TRANSFER, VolumeFront};
use super::mount_point::MountPoint;
use super::mount_table::{FILESYSTEM_TYPE, mount_at};
use crate::failure::{During, Failure};
use crate::signals::Alarm;

const FUSE_DEVICE: &str = "/dev/fuse";

/// Session threads at most. They only translate and copy; the reactors do the work.
const THREAD_LIMIT: usize = 8;

/// What a mount honours beyond the default of `nosuid,nodev`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// Set-uid and set-gid bits of programs.
    pub suid: Honoured,
    /// Device nodes.
    pub dev: Honoured,
}

/// Whether something is honoured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Honoured {
    /// It is not.
    #[default]
    No,
    /// It is.
    Yes,
}

/// How hard an unmount tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Fails with EBUSY while the mount is in use.
    Polite,
    /// Aborts what is in flight and detaches the mount.
    Now,
}

/// A mount and its session.
pub struct Mounted {
    path: PathBuf,
    device: (u32, u32),
    ended: Arc<Alarm>,
    runner: JoinHandle<io::Result<()>>,
}

impl Mounted {
    /// Mounts `front` at `point`. `source` is what the table of mounts shows; `threads` read requests.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn mount<V: VolumeFront>(
        front: FrontEnd<V>,
        point: &MountPoint,
        source: &str,
        extras: Extras,
        threads: usize,
    ) -> Result<Self, Failure> {
        let path = point.path().to_path_buf();
        let shown = path.display();
        let mut config = Config::default();
        config.n_threads = Some(threads.clamp(1, THREAD_LIMIT));
        config.clone_fd = true;
        let session = if geteuid().is_root() {
            config.acl = SessionACL::All;
            let device = open_device()?;
            mount_directly(&device, point.path(), source, extras)?;
            // From here on the mount exists: a failure has to take it away again.
            Session::from_fd(front, device, SessionACL::All, config).map_err(|error| {
                let _already_gone = detach(&path);
                Failure::new(format!("the kernel refuses the FUSE session at {shown}: {error}"))
            })?
        } else {
            mount_with_helper(front, point.path(), source, config)?
        };
        let entry = mount_at(&path).during("cannot read the table of mounts")?;
        let device = entry
            .map(|entry| entry.device)
            .ok_or_else(|| Failure::new(format!("{shown} was unmounted while it was being mounted")))?;
        raise_read_ahead(device);
        let ended = Arc::new(Alarm::new().during("cannot create an eventfd")?);
        let alarm = RaiseOnDrop(ended.clone());
        let runner = std::thread::Builder::new()
            .name("fuse".into())
            .spawn(move || {
                let _alarm = alarm;
                session.run()
            })
            .during("cannot start the FUSE threads")?;
        Ok(Self { path, device, ended, runner })
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device number of the mount: `st_dev` of everything on it.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// Raised when the session is over, for whatever reason.
    pub fn ended(&self) -> &Alarm {
        &self.ended
    }

    /// Takes the mount away. One that somebody else has taken away is left alone, also if another filesystem is
    /// mounted there by now.
    ///
    /// # Errors
    /// EBUSY while it is in use, unless [`Urgency::Now`].
    pub fn unmount(&self, urgency: Urgency) -> io::Result<()> {
        if mount_at(&self.path)?.is_none_or(|entry| entry.device != self.device) {
            return Ok(());
        }
        let flags = match urgency {
            Urgency::Polite => MntFlags::UMOUNT_NOFOLLOW,
            // Force ends the connection, so that nobody waits for a daemon that is about to go.
            Urgency::Now => MntFlags::MNT_FORCE | MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        };
        match umount2(&self.path, flags) {
            Ok(()) | Err(Errno::EINVAL) => Ok(()),
            Err(Errno::EPERM) => unmount_with_helper(&self.path, urgency),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the session's threads. Only after [`Self::ended`] is this sure not to wait long.
    ///
    /// # Errors
    /// What ended the session, if it was not an unmount.
    pub fn join(self) -> io::Result<()> {
        self.runner.join().map_err(|_| io::Error::other("a FUSE thread panicked"))?
    }
}

/// Asks the kernel to hand over what programs have stored through shared mappings of files of the mount at `path`. To
/// be called while the session serves requests, and not by one of its threads.
///
/// # Errors
/// The kernel's.
pub fn collect_mapped_pages(path: &Path) -> io::Result<()> {
    let root = File::open(path)?;
    nix::unistd::syncfs(root).map_err(io::Error::from)
}

struct RaiseOnDrop(Arc<Alarm>);

impl Drop for RaiseOnDrop {
    fn drop(&mut self) {
        self.0.raise();
    }
}

/// Detaches whatever is mounted at `path`, without asking anything of it.
pub(super) fn detach(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EPERM) => unmount_with_helper(path, Urgency::Now),
        result => result.map_err(io::Error::from),
    }
}

fn open_device() -> Result<OwnedFd, Failure> {
    match OpenOptions::new().read(true).write(true).open(FUSE_DEVICE) {
        Ok(file) => Ok(file.into()),
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => {
                    "load the kernel module: modprobe fuse (in a container: run it with --device /dev/fuse)"
                }
                io::ErrorKind::PermissionDenied => {
                    "in a container: run it with --device /dev/fuse and --cap-add SYS_ADMIN; else: chmod 666 /dev/fuse"
                }
                _ => "load the kernel module: modprobe fuse",
            };
            Err(Failure::new(format!("cannot open {FUSE_DEVICE}: {error}")).remedy(remedy))
        }
    }
}

fn mount_directly(device: &OwnedFd, path: &Path, source: &str, extras: Extras) -> Result<(), Failure> {
    let shown = path.display();
    let mode = fs::metadata(path).during(format_args!("cannot use mount point {shown}"))?.mode();
    let data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions,allow_other",
        device.as_raw_fd(),
        mode & libc::S_IFMT,
        geteuid(),
        getegid()
    );
    let mut flags = MsFlags::empty();
    flags.set(MsFlags::MS_NOSUID, extras.suid == Honoured::No);
    flags.set(MsFlags::MS_NODEV, extras.dev == Honoured::No);
    mount(Some(source), path, Some(FILESYSTEM_TYPE), flags, Some(data.as_str())).map_err(|error| {
        let failure = Failure::new(format!("cannot mount at {shown}: {error}"));
        match error {
            Errno::EPERM | Errno::EACCES => failure
                .remedy("mounting needs CAP_SYS_ADMIN; in a container: run it with --cap-add SYS_ADMIN"),
            Errno::ENODEV => failure.remedy("the kernel has no FUSE: modprobe fuse"),
            _ => failure,
        }
    })
}

fn mount_with_helper<V: VolumeFront>(
    front: FrontEnd<V>,
    path: &Path,
    source: &str,
    mut config: Config,
) -> Result<Session<FrontEnd<V>>, Failure> {
    open_device()?;
    if helper().is_none() {
        return Err(Failure::new("cannot mount: not root, and fusermount3 is not installed")
            .remedy("install it: sudo apt-get install fuse3; or run as root"));
    }
    config.acl = SessionACL::Owner;
    // fusermount splits its options at commas.
    let source = source.replace('\\', "\\\\").replace(',', "\\,");
    config.mount_options = vec![
        MountOption::FSName(source),
        MountOption::Subtype("pollux".into()),
        MountOption::DefaultPermissions,
        MountOption::NoSuid,
        MountOption::NoDev,
    ];
    Session::new(front, path, &config).map_err(|error| {
        Failure::new(format!("fusermount3 cannot mount at {}: {error}", path.display()))
            .remedy("the mount point must belong to you")
    })
}

fn unmount_with_helper(path: &Path, urgency: Urgency) -> io::Result<()> {
    let program = helper().ok_or_else(|| io::Error::other("not root, and fusermount3 is not installed"))?;
    let mut command = Command::new(program);
    command.arg("-u");
    if urgency == Urgency::Now {
        command.arg("-z");
    }
    let output = command.arg("--").arg(path).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let kind = if message.contains("busy") { io::ErrorKind::ResourceBusy } else { io::ErrorKind::Other };
    Err(io::Error::new(kind, message))
}

fn helper() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join("fusermount3")).find(|program| program.is_file())
}

/// Lets the kernel read ahead in pieces as large as a request may be. It starts with 128 KiB, and FUSE has no say in
/// it; where sysfs is missing or not ours, it stays at that.
fn raise_read_ahead((major, minor): (u32, u32)) {
    let file = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    if let Err(error) = fs::write(&file, (MAX_TRANSFER / 1024).to_string()) {
        tracing::debug!(%file, %error, "read-ahead stays at the kernel's default");
    }
}
