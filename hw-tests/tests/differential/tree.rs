//! What a whole tree comes to, so that trees of different file systems can be compared.
//!
//! Owns: [`Tree`], names with attributes, links, contents and holes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::operation::{attributes, blocks_with_contents, data_blocks};

/// One name.
struct Entry {
    /// Attributes, the first name of the inode, the target of a symbolic link, extended attributes.
    said: String,
    /// What each block that is not all zeroes comes to.
    contents: BTreeMap<u64, u64>,
    /// Blocks that are no holes.
    data: BTreeSet<u64>,
}

/// Every name of a file system.
pub(crate) struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    pub(crate) fn of(root: &Path) -> Result<Self> {
        let mut tree = Self { entries: BTreeMap::new() };
        tree.add(root, "", &mut BTreeMap::new()).with_context(|| root.display().to_string())?;
        // What mkfs makes.
        tree.entries.remove("lost+found");
        Ok(tree)
    }

    fn add(&mut self, folder: &Path, prefix: &str, inodes: &mut BTreeMap<u64, String>) -> Result<()> {
        let mut names = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
        names.sort_by_key(fs::DirEntry::file_name);
        for name in names {
            let path = name.path();
            let shown = format!("{prefix}{}", name.file_name().to_string_lossy());
            let found = path.symlink_metadata()?;
            let first = inodes.entry(found.ino()).or_insert_with(|| shown.clone()).clone();
            let mut said = format!("{}, first name {first}, {}", attributes(&found), extended(&path)?);
            let (mut contents, mut data) = (BTreeMap::new(), BTreeSet::new());
            if found.is_symlink() {
                said.push_str(&format!(", to {:?}", fs::read_link(&path)?));
            } else if found.is_file() {
                let file = File::open(&path)?;
                data = data_blocks(&file)?;
                for (block, bytes) in blocks_with_contents(&file, &data)? {
                    let mut hasher = DefaultHasher::new();
                    bytes.hash(&mut hasher);
                    contents.insert(block, hasher.finish());
                }
            }
            self.entries.insert(shown.clone(), Entry { said, contents, data });
            if found.is_dir() {
                self.add(&path, &format!("{shown}/"), inodes)?;
            }
        }
        Ok(())
    }

    /// Names, and what is said of each; contents.
    pub(crate) fn same_as(&self, other: &Self) -> Result<()> {
        let names = |tree: &Self| tree.entries.keys().cloned().collect::<BTreeSet<_>>();
        let differ: Vec<_> = names(self).symmetric_difference(&names(other)).cloned().collect();
        ensure!(differ.is_empty(), "only one of them has {differ:?}");
        for (name, entry) in &self.entries {
            let theirs = &other.entries[name];
            ensure!(entry.said == theirs.said, "{name}: {}; there: {}", entry.said, theirs.said);
            let blocks = entry.contents.keys().chain(theirs.contents.keys());
            let differ: BTreeSet<_> =
                blocks.filter(|block| entry.contents.get(block) != theirs.contents.get(block)).collect();
            ensure!(differ.is_empty(), "{name}: blocks {differ:?} have other contents there");
        }
        Ok(())
    }

    /// Blocks that are holes on all `others` are holes here: nobody wrote or allocated them.
    pub(crate) fn has_holes_of(&self, others: &[Self]) -> Result<()> {
        for (name, entry) in &self.entries {
            let data =
                |tree: &Self| tree.entries.get(name).map(|entry| entry.data.clone()).unwrap_or_default();
            let theirs: BTreeSet<u64> = others.iter().flat_map(data).collect();
            let filled: Vec<_> = entry.data.difference(&theirs).collect();
            ensure!(filled.is_empty(), "{name}: blocks {filled:?} are data here and holes everywhere else");
        }
        Ok(())
    }
}

/// Extended attributes, in order. Those of other name spaces are the system's.
fn extended(path: &Path) -> Result<String> {
    let mut names = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names[..])?;
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0) {
        if !name.starts_with(b"user.") && !name.starts_with(b"trusted.") {
            continue;
        }
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        found.insert(String::from_utf8_lossy(name).into_owned(), value[..length].to_vec());
    }
    let mut hasher = DefaultHasher::new();
    found.hash(&mut hasher);
    Ok(format!("attributes {:?} ({:x})", found.keys(), hasher.finish()))
}

#[test]
fn trees_differ_by_contents_name_link_size_and_filled_hole() -> Result<()> {
    use std::os::unix::fs::FileExt;

    let folder = tempfile::tempdir()?;
    type Change<'a> = &'a dyn Fn(&Path) -> Result<()>;

    let made = |name: &str, change: Change<'_>| -> Result<Tree> {
        let root = folder.path().join(name);
        fs::create_dir(&root)?;
        let file = File::create(root.join("file"))?;
        file.write_all_at(&[7; 5_000], 3 << 20)?;
        fs::write(root.join("other"), "x")?;
        change(&root)?;
        file.sync_all()?;
        Tree::of(&root)
    };
    let plain = made("plain", &|_| Ok(()))?;
    let [same, zeroes] = [
        made("same", &|_| Ok(()))?,
        made("zeroes", &|root| {
            Ok(File::options().write(true).open(root.join("file"))?.write_all_at(&[0; 4096], 4096)?)
        })?,
    ];
    plain.same_as(&same)?;
    plain.has_holes_of(&[same])?;
    plain.same_as(&zeroes)?;
    plain.has_holes_of(&[zeroes])?;
    let filled = made("filled", &|root| {
        Ok(File::options().write(true).open(root.join("file"))?.write_all_at(&[0; 4096], 4096)?)
    })?;
    ensure!(filled.has_holes_of(&[plain]).is_err(), "a hole that was filled is not noticed");

    let plain = made("again", &|_| Ok(()))?;
    let changes: [(&str, Change<'_>); 4] = [
        ("byte", &|root| {
            Ok(File::options().write(true).open(root.join("file"))?.write_all_at(&[8], 3 << 20)?)
        }),
        ("name", &|root| Ok(fs::write(root.join("third"), "")?)),
        ("link", &|root| Ok(fs::hard_link(root.join("file"), root.join("linked"))?)),
        ("size", &|root| Ok(File::options().write(true).open(root.join("file"))?.set_len(4 << 20)?)),
    ];
    for (name, change) in changes {
        ensure!(plain.same_as(&made(name, change)?).is_err(), "{name} is not noticed");
    }
    Ok(())
}
