//! The front end on real mounts, over a volume in memory. These need `/dev/fuse` and root: `cargo xtask test` runs them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, UNIX_EPOCH};

use super::memory::MemoryVolume;
use super::{Absent, Extras, FrontEnd, MountPoint, Mounted, Urgency, collect_mapped_pages};

/// How long a session may take to end, on the slowest machine.
const END_DEADLINE: Duration = Duration::from_secs(60);

struct Fixture {
    _scratch: tempfile::TempDir,
    volume: MemoryVolume,
    mounted: Option<Mounted>,
    root: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let point = MountPoint::prepare(&scratch.path().join("m,n \\o"), Absent::Create).unwrap();
        let volume = MemoryVolume::new();
        let front = FrontEnd::new(volume.clone());
        let mounted = Mounted::mount(front, &point, "memory", Extras::default(), 2).unwrap();
        let root = mounted.path().to_path_buf();
        Self { _scratch: scratch, volume, mounted: Some(mounted), root }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn mounted(&self) -> &Mounted {
        self.mounted.as_ref().unwrap()
    }

    /// Waits until the session is over, in bounded time.
    fn join(&mut self) -> std::io::Result<()> {
        let mounted = self.mounted.take().unwrap();
        let (sender, ended) = mpsc::channel();
        std::thread::spawn(move || sender.send(mounted.join()));
        ended.recv_timeout(END_DEADLINE).expect("the session threads end")
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(mounted) = &self.mounted {
            let _gone = mounted.unmount(Urgency::Now);
        }
    }
}

fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn files_are_written_and_read_back() {
    let fixture = Fixture::new();
    let data: Vec<u8> = (0..3_000_000_u32).map(|value| (value % 251) as u8).collect();
    fs::write(fixture.path("file"), &data).unwrap();
    assert!(fs::read(fixture.path("file")).unwrap() == data);
    let file = File::options().read(true).write(true).open(fixture.path("file")).unwrap();
    file.write_all_at(b"changed", 1_000_000).unwrap();
    file.set_len(1_000_004).unwrap();
    let mut tail = [0; 8];
    assert_eq!(file.read_at(&mut tail, 999_998).unwrap(), 6);
    assert_eq!(&tail[2..6], b"chan");
    assert_eq!(file.metadata().unwrap().len(), 1_000_004);
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn append_and_truncation_on_open_reach_the_volume() {
    let fixture = Fixture::new();
    fs::write(fixture.path("log"), "one").unwrap();
    File::options().append(true).open(fixture.path("log")).unwrap().write_all(b" two").unwrap();
    assert_eq!(fs::read(fixture.path("log")).unwrap(), b"one two");
    fs::write(fixture.path("log"), "3").unwrap();
    assert_eq!(fs::read(fixture.path("log")).unwrap(), b"3");
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn names_appear_move_and_disappear() {
    let fixture = Fixture::new();
    assert!(!fixture.path("a").exists());
    fs::create_dir(fixture.path("a")).unwrap();
    fs::write(fixture.path("a/x"), "x").unwrap();
    fs::rename(fixture.path("a/x"), fixture.path("y")).unwrap();
    assert!(!fixture.path("a/x").exists());
    assert_eq!(fs::read(fixture.path("y")).unwrap(), b"x");
    fs::hard_link(fixture.path("y"), fixture.path("z")).unwrap();
    assert_eq!(fs::metadata(fixture.path("y")).unwrap().nlink(), 2);
    std::os::unix::fs::symlink("y", fixture.path("s")).unwrap();
    assert_eq!(fs::read(fixture.path("s")).unwrap(), b"x");
    assert_eq!(names(&fixture.root), ["a", "s", "y", "z"]);
    fs::remove_file(fixture.path("y")).unwrap();
    fs::remove_dir(fixture.path("a")).unwrap();
    assert_eq!(names(&fixture.root), ["s", "z"]);
    fs::write(fixture.path("y"), "new").unwrap();
    assert_eq!(fs::read(fixture.path("s")).unwrap(), b"new");
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn large_directory_is_listed_once_each() {
    let fixture = Fixture::new();
    let long = "n".repeat(150);
    for index in 0..1_000 {
        File::create(fixture.path(&format!("{long}{index:04}"))).unwrap();
    }
    let listed = names(&fixture.root);
    assert_eq!(listed.len(), 1_000);
    assert!(listed.windows(2).all(|pair| pair[0] != pair[1]));
    // A second time: from the kernel's cache; then after a change.
    assert_eq!(names(&fixture.root), listed);
    fs::remove_file(fixture.path(&listed[0])).unwrap();
    assert_eq!(names(&fixture.root), listed[1..]);
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn attributes_change_and_old_times_keep_their_nanoseconds() {
    let fixture = Fixture::new();
    let file = File::create(fixture.path("file")).unwrap();
    fs::set_permissions(fixture.path("file"), fs::Permissions::from_mode(0o4751)).unwrap();
    assert_eq!(fs::metadata(fixture.path("file")).unwrap().mode() & 0o7777, 0o4751);
    let old = UNIX_EPOCH - Duration::from_nanos(1_250_000_001);
    file.set_modified(old).unwrap();
    // The attributes are asked for anew after each change.
    assert_eq!(fs::metadata(fixture.path("file")).unwrap().modified().unwrap(), old);
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn sync_of_the_root_covers_the_volume() {
    let fixture = Fixture::new();
    let mut file = File::create(fixture.path("file")).unwrap();
    file.write_all(b"data").unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    File::open(&fixture.root).unwrap().sync_all().unwrap();
    fixture.volume.look(|state| {
        assert_eq!(state.seen.file_syncs, 2);
        assert_eq!(state.seen.volume_syncs, 1);
    });
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn closing_a_file_that_was_only_read_asks_nothing_of_the_volume() {
    let fixture = Fixture::new();
    fs::write(fixture.path("file"), "data").unwrap();
    let mut file = File::open(fixture.path("file")).unwrap();
    file.read_to_end(&mut Vec::new()).unwrap();
    drop(file);
    let before = fixture.volume.look(|state| (state.seen.flushes, state.seen.requests));
    assert_eq!(before.0, 1);
    let mut file = File::open(fixture.path("file")).unwrap();
    assert_eq!(file.read(&mut [0; 16]).unwrap(), 4);
    drop(file);
    let after = fixture.volume.look(|state| (state.seen.flushes, state.seen.requests));
    assert_eq!(after, before, "open, cached read and close need no request");
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn unmount_by_anybody_ends_the_session() {
    let mut fixture = Fixture::new();
    fs::write(fixture.path("file"), "data").unwrap();
    nix::mount::umount(&fixture.root).unwrap();
    fixture.join().unwrap();
    assert_eq!(names(&fixture.root), [] as [&str; 0]);
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn busy_mount_is_left_alone_until_forced() {
    let mut fixture = Fixture::new();
    let mut file = File::create(fixture.path("file")).unwrap();
    let error = fixture.mounted().unmount(Urgency::Polite).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    file.write_all(b"still works").unwrap();
    fixture.mounted().unmount(Urgency::Now).unwrap();
    fixture.join().unwrap();
    assert!(file.write_all(b"too late").is_err());
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn second_mount_at_the_same_place_is_refused() {
    let fixture = Fixture::new();
    let failure = MountPoint::prepare(&fixture.root, Absent::Create).unwrap_err().to_string();
    assert!(failure.contains("busy"), "{failure}");
    fs::write(fixture.path("file"), "alive").unwrap();
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn collecting_mapped_pages_works_beside_requests() {
    let fixture = Fixture::new();
    fs::write(fixture.path("file"), [0_u8; 8192]).unwrap();
    collect_mapped_pages(&fixture.root).unwrap();
    assert_eq!(fs::read(fixture.path("file")).unwrap().len(), 8192);
}

#[test]
#[ignore = "needs /dev/fuse and root"]
fn figures_of_the_volume_are_shown() {
    let fixture = Fixture::new();
    let space = nix::sys::statvfs::statvfs(&fixture.root).unwrap();
    assert_eq!((space.blocks(), space.blocks_free(), space.blocks_available()), (1000, 600, 500));
    assert_eq!((space.block_size(), space.name_max()), (4096, 255));
}
