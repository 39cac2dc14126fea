//! Operations on a whole volume: each rule of POSIX that the kernel leaves to the filesystem.

use reactor::WallTime;

use super::harness::{Client, Machine};
use crate::error::FsError;
use crate::request::{
    AttributeChange, FileKind, KillPrivileges, NewInode, RenameMode, Reply, Request, SetXattrMode, TimeChange,
};
use crate::types::InodeNr;

const ROOT: InodeNr = InodeNr::ROOT;

/// Runs `test` on one shard, on several of one reactor, and on several of several.
fn everywhere(test: &impl AsyncFn(&Client)) {
    for (reactors, shards) in [(1, 1), (1, 3), (3, 4)] {
        Machine { seed: 7, reactors, shards }.run(async |client| {
            test(client).await;
        });
    }
}

fn size_to(size: u64) -> AttributeChange {
    AttributeChange { size: Some(size), ..AttributeChange::default() }
}

#[test]
fn names_are_made_found_and_removed() {
    everywhere(&async |client| {
        let directory = client.directory(ROOT, "d").await;
        let file = client.file(directory, "f").await;
        assert_eq!(file.shard(), directory.shard(), "a file is born in its directory's shard");
        assert_eq!(client.lookup(directory, "f").await.unwrap().inode, file);
        assert_eq!(client.lookup(directory, "..").await.unwrap().inode, ROOT);
        assert_eq!(client.lookup(directory, "g").await, Err(FsError::NotFound));
        assert_eq!(client.lookup(file, "g").await, Err(FsError::NotDirectory));
        let long = "x".repeat(256);
        assert_eq!(client.lookup(ROOT, &long).await, Err(FsError::NameTooLong));
        assert_eq!(client.make(ROOT, &long, NewInode::Fifo).await, Err(FsError::NameTooLong));
        assert_eq!(client.make(directory, "f", NewInode::Directory).await, Err(FsError::Exists));
        assert_eq!(client.make(file, "f", NewInode::Regular).await, Err(FsError::NotDirectory));
        assert_eq!(client.unlink(ROOT, "d").await, Err(FsError::IsDirectory));
        assert_eq!(client.remove_directory(directory, "f").await, Err(FsError::NotDirectory));
        assert_eq!(client.remove_directory(ROOT, "d").await, Err(FsError::NotEmpty));
        client.unlink(directory, "f").await.unwrap();
        client.remove_directory(ROOT, "d").await.unwrap();
        assert_eq!(client.lookup(ROOT, "d").await, Err(FsError::NotFound));
        // Still known to the front end, but nothing can be made in it any more.
        assert_eq!(client.make(directory, "g", NewInode::Regular).await, Err(FsError::NotFound));
        assert_eq!(client.list(directory, 10).await, Ok(vec![]));
        assert_eq!(client.attributes(directory).await.unwrap().links, 0);
    });
}

#[test]
fn unlinked_file_lives_until_it_is_forgotten() {
    everywhere(&async |client| {
        let file = client.file(ROOT, "f").await;
        client.expect_inodes(2).await;
        client.unlink(ROOT, "f").await.unwrap();
        assert_eq!(client.attributes(file).await.unwrap().links, 0);
        assert_eq!(client.link(file, ROOT, "again").await, Err(FsError::NotFound));
        client.change(file, size_to(100)).await.unwrap();
        assert_eq!(client.attributes(file).await.unwrap().size, 100);
        client.expect_inodes(2).await;
        client.forget(file, 1).await;
        client.expect_inodes(1).await;
        assert_eq!(client.attributes(file).await, Err(FsError::NotFound));
    });
}

#[test]
fn hard_links_count_and_share() {
    everywhere(&async |client| {
        let directory = client.directory(ROOT, "d").await;
        let file = client.file(ROOT, "f").await;
        assert_eq!(client.link(file, directory, "g").await.unwrap().links, 2);
        assert_eq!(client.link(file, directory, "g").await, Err(FsError::Exists));
        assert_eq!(client.link(directory, ROOT, "h").await, Err(FsError::NotPermitted));
        assert_eq!(client.link(file, file, "h").await, Err(FsError::NotDirectory));
        // Two names of one inode: a rename of one onto the other does nothing.
        client.rename((ROOT, "f"), (directory, "g"), RenameMode::Replace).await.unwrap();
        assert_eq!(client.lookup(ROOT, "f").await.unwrap().links, 2);
        client.unlink(ROOT, "f").await.unwrap();
        assert_eq!(client.lookup(directory, "g").await.unwrap().links, 1);
        client.walk().await;
    });
}

#[test]
fn new_inodes_inherit_from_set_gid_directories() {
    everywhere(&async |client| {
        let directory = client.directory(ROOT, "d").await;
        let change =
            AttributeChange { permissions: Some(0o2775), gid: Some(77), ..AttributeChange::default() };
        client.change(directory, change).await.unwrap();
        let below = client.make(directory, "below", NewInode::Directory).await.unwrap();
        assert_eq!((below.gid, below.permissions), (77, 0o2755));
        let file = client.make(below.inode, "f", NewInode::Regular).await.unwrap();
        assert_eq!((file.uid, file.gid, file.permissions), (1000, 77, 0o755));
    });
}

#[test]
fn special_files_keep_what_they_are() {
    everywhere(&async |client| {
        let link = client.make(ROOT, "l", NewInode::Symlink(b"a/b"[..].into())).await.unwrap();
        assert_eq!((link.kind, link.size), (FileKind::Symlink, 3));
        let read = client.call(Request::ReadLink { inode: link.inode }).await;
        assert_eq!(read, Ok(Reply::Data(b"a/b".to_vec())));
        assert_eq!(client.call(Request::ReadLink { inode: ROOT }).await, Err(FsError::Invalid));
        let longest = NewInode::Symlink(vec![b'x'; 4095].into());
        assert_eq!(client.make(ROOT, "longest", longest).await.unwrap().size, 4095);
        let too_long = NewInode::Symlink(vec![b'x'; 4096].into());
        assert_eq!(client.make(ROOT, "too long", too_long).await, Err(FsError::NameTooLong));
        let device = client.make(ROOT, "n", NewInode::CharDevice(0x501)).await.unwrap();
        assert_eq!((device.kind, device.device), (FileKind::CharDevice, 0x501));
        assert_eq!(client.change(device.inode, size_to(1)).await, Err(FsError::Invalid));
        assert_eq!(client.change(ROOT, size_to(1)).await, Err(FsError::IsDirectory));
    });
}

#[test]
fn attributes_change_as_asked() {
    everywhere(&async |client| {
        let file = client.file(ROOT, "f").await;
        let before = client.attributes(file).await.unwrap();
        let time = WallTime::new(-5, 123_456_789).unwrap();
        let times = AttributeChange {
            accessed: Some(TimeChange::To(time)),
            modified: Some(TimeChange::Now),
            ..AttributeChange::default()
        };
        let changed = client.change(file, times).await.unwrap();
        assert_eq!(changed.accessed, time);
        assert!(changed.modified > before.modified && changed.changed == changed.modified);
        assert_eq!(changed.created, before.created);
        let privileged = AttributeChange { permissions: Some(0o6755), ..AttributeChange::default() };
        assert_eq!(client.change(file, privileged).await.unwrap().permissions, 0o6755);
        let owner = AttributeChange {
            uid: Some(5),
            kill_privileges: KillPrivileges::Drop,
            ..AttributeChange::default()
        };
        let owned = client.change(file, owner).await.unwrap();
        assert_eq!((owned.uid, owned.gid, owned.permissions), (5, 1001, 0o755));
        // To the size it has: times move all the same.
        let same = client.change(file, size_to(0)).await.unwrap();
        assert!(same.modified > owned.modified && same.changed > owned.changed);
        assert_eq!(client.attributes(file).await, Ok(same));
        assert_eq!(client.change(file, size_to(u64::MAX)).await, Err(FsError::FileTooLarge));
    });
}

#[test]
fn directory_times_follow_their_entries() {
    everywhere(&async |client| {
        let directory = client.directory(ROOT, "d").await;
        let mut last = client.attributes(directory).await.unwrap();
        let file = client.file(directory, "f").await;
        let check = async |last: &mut crate::request::Attributes, what: &str| {
            let now = client.attributes(directory).await.unwrap();
            assert!(now.modified > last.modified && now.changed > last.changed, "{what}");
            *last = now;
        };
        check(&mut last, "create").await;
        let before = client.attributes(file).await.unwrap();
        client.link(file, directory, "g").await.unwrap();
        check(&mut last, "link").await;
        let linked = client.attributes(file).await.unwrap();
        assert!(linked.changed > before.changed && linked.modified == before.modified, "link: of the file");
        client.rename((directory, "g"), (directory, "h"), RenameMode::NoReplace).await.unwrap();
        check(&mut last, "rename").await;
        assert!(client.attributes(file).await.unwrap().changed > linked.changed, "rename: of the file");
        client.unlink(directory, "h").await.unwrap();
        check(&mut last, "unlink").await;
        client.directory(directory, "sub").await;
        check(&mut last, "mkdir").await;
        client.remove_directory(directory, "sub").await.unwrap();
        check(&mut last, "rmdir").await;
        // A failure moves nothing.
        assert_eq!(client.unlink(directory, "h").await, Err(FsError::NotFound));
        assert_eq!(client.attributes(directory).await.unwrap(), last);
    });
}

#[test]
fn renames_follow_posix() {
    everywhere(&async |client| {
        let (one, two) = (client.directory(ROOT, "one").await, client.directory(ROOT, "two").await);
        let inner = client.directory(one, "inner").await;
        let file = client.file(one, "file").await;
        let full = client.directory(two, "full").await;
        client.file(full, "x").await;
        client.directory(two, "empty").await;
        use RenameMode::{Exchange, NoReplace, Replace};
        assert_eq!(client.rename((one, "none"), (two, "x"), Replace).await, Err(FsError::NotFound));
        assert_eq!(client.rename((one, "file"), (two, "full"), NoReplace).await, Err(FsError::Exists));
        assert_eq!(client.rename((one, "file"), (two, "none"), Exchange).await, Err(FsError::NotFound));
        assert_eq!(client.rename((one, "file"), (two, "full"), Replace).await, Err(FsError::IsDirectory));
        assert_eq!(client.rename((one, "inner"), (one, "file"), Replace).await, Err(FsError::NotDirectory));
        assert_eq!(client.rename((one, "inner"), (two, "full"), Replace).await, Err(FsError::NotEmpty));
        assert_eq!(client.rename((ROOT, "one"), (inner, "below"), Replace).await, Err(FsError::Invalid));
        assert_eq!(client.rename((ROOT, "one"), (one, "self"), Replace).await, Err(FsError::Invalid));
        assert_eq!(client.rename((one, "inner"), (inner, "x"), Replace).await, Err(FsError::Invalid));
        assert_eq!(client.rename((one, "file"), (file, "x"), Replace).await, Err(FsError::NotDirectory));
        assert_eq!(client.rename((one, "inner"), (ROOT, "one"), Exchange).await, Err(FsError::Invalid));
        client.rename((one, "file"), (one, "file"), Replace).await.unwrap();
        assert_eq!(client.rename((one, "file"), (one, "file"), NoReplace).await, Err(FsError::Exists));
        client.walk().await;

        // A directory over an empty one, in another shard or not.
        client.rename((one, "inner"), (two, "empty"), Replace).await.unwrap();
        assert_eq!(client.lookup(two, "empty").await.unwrap().inode, inner);
        assert_eq!(client.lookup(inner, "..").await.unwrap().inode, two);
        // A file and a directory change places.
        client.rename((one, "file"), (two, "full"), Exchange).await.unwrap();
        assert_eq!(client.lookup(one, "file").await.unwrap().inode, full);
        assert_eq!(client.lookup(two, "full").await.unwrap().inode, file);
        assert_eq!(client.lookup(full, "..").await.unwrap().inode, one);
        client.walk().await;
        let links = async |inode| client.attributes(inode).await.unwrap().links;
        assert_eq!((links(one).await, links(two).await, links(ROOT).await), (3, 3, 4));
    });
}

#[test]
fn extended_attributes_follow_their_modes() {
    everywhere(&async |client| {
        let inode = client.file(ROOT, "f").await;
        let set = async |name: &str, length: usize, mode| {
            let (name, value) = (name.as_bytes().into(), vec![1; length].into());
            client.call(Request::SetXattr { inode, name, value, mode }).await
        };
        assert_eq!(set("user.a", 4000, SetXattrMode::Replace).await, Err(FsError::NoAttribute));
        assert_eq!(set("user.a", 4000, SetXattrMode::Create).await, Ok(Reply::Done));
        assert_eq!(set("user.a", 10, SetXattrMode::Create).await, Err(FsError::Exists));
        assert_eq!(set("user.b", 4001, SetXattrMode::Set).await, Err(FsError::NoSpace));
        assert_eq!(set("user.b", 65_537, SetXattrMode::Set).await, Err(FsError::TooBig));
        assert_eq!(set("system.posix_acl_access", 8, SetXattrMode::Set).await, Err(FsError::NotSupported));
        assert_eq!(set("user.", 8, SetXattrMode::Set).await, Err(FsError::Invalid));
        assert_eq!(set("security.capability", 0, SetXattrMode::Set).await, Ok(Reply::Done));
        let get = client.call(Request::GetXattr { inode, name: b"user.a"[..].into() }).await;
        assert_eq!(get, Ok(Reply::Data(vec![1; 4000])));
        let Ok(Reply::Data(names)) = client.call(Request::ListXattr { inode }).await else { panic!() };
        assert_eq!(names.len(), "user.a".len() + "security.capability".len() + 2);
        let remove = || Request::RemoveXattr { inode, name: b"user.a"[..].into() };
        assert_eq!(client.call(remove()).await, Ok(Reply::Done));
        assert_eq!(client.call(remove()).await, Err(FsError::NoAttribute));
        // They go with the inode.
        client.unlink(ROOT, "f").await.unwrap();
        client.forget(inode, 1).await;
        client.expect_inodes(1).await;
    });
}

/// A listing that goes on while entries come and go shows those that were there all the time exactly once.
#[test]
fn listing_survives_changes() {
    everywhere(&async |client| {
        for number in 0..30 {
            client.file(ROOT, &format!("stays{number}")).await;
            client.file(ROOT, &format!("goes{number}")).await;
        }
        let (mut seen, mut after, mut round) = (Vec::new(), 0, 0);
        loop {
            let request = Request::ReadDirectory { inode: ROOT, after, limit: 7 };
            let Ok(Reply::Directory(listed)) = client.call(request).await else { panic!() };
            let Some(last) = listed.last() else { break };
            after = last.cookie;
            seen.extend(listed.into_iter().map(|entry| String::from_utf8(entry.name.into_vec()).unwrap()));
            if round < 30 {
                client.unlink(ROOT, &format!("goes{round}")).await.unwrap();
                client.file(ROOT, &format!("comes{round}")).await;
                round += 1;
            }
        }
        let mut stays: Vec<_> = seen.iter().filter(|name| name.starts_with("stays")).collect();
        stays.sort();
        stays.dedup();
        assert_eq!(stays.len(), 30);
        assert_eq!(seen.iter().filter(|name| name.starts_with("stays")).count(), 30);
    });
}

/// Directories are dealt out to all shards.
#[test]
fn new_directories_are_spread() {
    Machine { seed: 1, reactors: 2, shards: 4 }.run(async |client| {
        let mut shards = std::collections::BTreeSet::new();
        for number in 0..8 {
            shards.insert(client.directory(ROOT, &number.to_string()).await.shard());
        }
        assert_eq!(shards.len(), 4);
    });
}

/// Everything is still there after an unmount and a mount; an orphan that was open is gone. But not an orphan that the
/// new mount itself makes: its recovery once ran beside the first requests and took theirs for a crash's.
#[test]
fn second_mount_finds_everything_but_orphans() {
    for (seed, reactors, shards) in (0..20).flat_map(|seed| [(seed, 1, 1), (seed, 3, 4)]) {
        let machine = Machine { seed, reactors, shards };
        let fill = async |client: &Client| {
            for number in 0..5 {
                let directory = client.directory(ROOT, &format!("d{number}")).await;
                let file = client.file(directory, "file").await;
                client.link(file, ROOT, &format!("link{number}")).await.unwrap();
                let open = client.file(directory, "open").await;
                client.change(open, size_to(10_000)).await.unwrap();
                client.unlink(directory, "open").await.unwrap();
            }
            client.expect_inodes(16).await;
            client.walk().await
        };
        machine.run_twice(fill, async |client, before| {
            assert_eq!(client.check().await, before);
        });
    }
}
