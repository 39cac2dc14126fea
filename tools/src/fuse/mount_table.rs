//! What is mounted where: `/proc/self/mountinfo`, read and decoded.
//!
//! Owns: [`MountEntry`] and the parser. Reading the table touches no filesystem but proc, so it cannot hang on a mount
//! whose daemon has died.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Filesystem type of our mounts.
pub(super) const FILESYSTEM_TYPE: &str = "fuse.pollux";

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number, major and minor: `st_dev` of everything on the mount.
    pub device: (u32, u32),
    /// Where it is mounted.
    pub path: PathBuf,
    /// Type, such as `fuse.pollux`.
    pub filesystem: String,
    /// What is mounted, such as `emu:/var/lib/p.img`.
    pub source: String,
}

impl MountEntry {
    /// Whether it is a FUSE filesystem of any kind.
    pub fn is_fuse(&self) -> bool {
        self.filesystem == "fuse" || self.filesystem.starts_with("fuse.")
    }

    /// Whether it is one of ours.
    pub fn is_pollux(&self) -> bool {
        self.filesystem == FILESYSTEM_TYPE
    }
}

/// Every mount that this process sees, in the order in which they were made.
///
/// # Errors
/// The table cannot be read, for example because `/proc` is not mounted.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The mount on top at `path`, which must be canonical.
pub(super) fn mount_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rev().find(|entry| entry.path == path))
}

/// One line: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw` (proc_pid_mountinfo(5)).
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let path = decode(fields.nth(1)?);
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let filesystem = String::from_utf8_lossy(&decode(fields.next()?)).into_owned();
    let source = String::from_utf8_lossy(&decode(fields.next()?)).into_owned();
    Some(MountEntry {
        device: (major.parse().ok()?, minor.parse().ok()?),
        path: PathBuf::from(OsString::from_vec(path)),
        filesystem,
        source,
    })
}

/// Takes back the octal escapes of space, tab, newline and backslash.
fn decode(field: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        let octal = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match value {
            Some(value) => {
                decoded.push(value);
                rest = &tail[3..];
            }
            None => decoded.push(byte),
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_with_escapes_and_optional_fields_is_decoded() {
        let line = br"66 28 0:57 / /mnt/with\040space rw,nosuid,nodev shared:9 - fuse.pollux emu:/a\040b.img rw,user_id=0";
        let entry = parse(line).unwrap();
        assert_eq!(entry.device, (0, 57));
        assert_eq!(entry.path, Path::new("/mnt/with space"));
        assert_eq!(entry.source, "emu:/a b.img");
        assert!(entry.is_fuse() && entry.is_pollux());
    }

    #[test]
    fn malformed_lines_are_left_out() {
        for line in [&b""[..], b"36 35", b"36 35 98 / /mnt rw - ext4 x", b"36 35 98:0 / /mnt rw ext4 x"] {
            assert_eq!(parse(line), None);
        }
        assert_eq!(decode(br"a\04"), br"a\04");
        assert_eq!(decode(br"a\999b"), br"a\999b");
    }

    #[test]
    fn own_table_can_be_read() {
        assert!(mounts().unwrap().iter().any(|entry| entry.path == Path::new("/proc")));
    }
}
