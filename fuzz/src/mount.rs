//! Mounted volumes that were changed before, with every checksum right.
//!
//! An input changes a volume ([`crate::volume::damage`]). It is checked, mounted, walked, worked on, unmounted and checked again.
//!
//! Checks: everything comes to an end; nothing behind the end of the volume is written. And if the check found nothing:
//!
//! - the volume can be mounted, unless it says that it is a newer version's;
//! - no request is answered with an input/output error, and none with "read-only";
//! - unmounting succeeds, and the next check finds nothing either.

use fs_core::fsck::DataCheck;
use fs_core::{MountError, Volume};
use reactor::sim::SimDisk;
use reactor::{Context, ReactorHandle};

use crate::script::Script;
use crate::volume::images::{disk, mount_options, simulator};
use crate::volume::look::{behind, checked, shown};
use crate::volume::work::Worker;
use crate::volume::{BASES, bases, damaged};

/// How a mount ended.
enum Session {
    NotMounted(MountError),
    /// With everything that must not happen to a volume that was clean.
    Ended(Vec<String>),
}

/// Changes a volume, and puts it to use.
pub fn run(data: &[u8]) {
    let mut script = Script::new(data.to_vec());
    let base = &bases()[usize::from(script.byte()) % BASES];
    let image = damaged(base, &mut script);
    let outside = behind(&image);
    let disk = disk(image);
    let clean = checked(&disk, DataCheck::Verify).is_ok_and(|report| report.is_clean());
    let session = session(&disk);
    let after = disk.image();
    assert!(
        behind(&after).ends_with(&outside) || outside.ends_with(&behind(&after)),
        "written behind the end"
    );
    let again = checked(&disk, DataCheck::Verify);
    if !clean {
        return;
    }
    match session {
        Session::NotMounted(MountError::NewerFeatures { .. }) => {}
        Session::NotMounted(error) => panic!("a volume that is clean does not mount: {error}"),
        Session::Ended(wrong) => {
            assert!(wrong.is_empty(), "a volume that is clean: {}", wrong.join("; "));
            let report = again.expect("a volume that was unmounted can be checked");
            assert!(report.is_clean(), "after unmounting a volume that was clean: {}", shown(&report));
        }
    }
}

fn session(disk: &SimDisk) -> Session {
    let sim = simulator(disk);
    let handles: Vec<ReactorHandle> = vec![sim.handle(0)];
    let work = async |ctx: Context| {
        let volume = match Volume::mount(&ctx, &handles, mount_options()).await {
            Ok(volume) => volume,
            Err(error) => return Session::NotMounted(error),
        };
        let mut worker = Worker::new(&volume);
        worker.walk().await;
        worker.work().await;
        worker.walk().await;
        let mut wrong = worker.wrong;
        if let Err(error) = volume.unmount().await {
            wrong.push(format!("unmounting: {error}"));
        }
        Session::Ended(wrong)
    };
    sim.block_on(0, work).expect("a mount, some work and an unmount end")
}
