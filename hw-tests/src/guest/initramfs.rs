//! The guest's root filesystem: an archive in the format "newc" (Documentation/driver-api/early-userspace/buffer-format).
//!
//! Owns: [`Archive`], and [`Archive::program`], which takes a program along with the shared libraries that it asks for.
//!
//! Invariants: directories come before what is in them, each once; everything belongs to root.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const TRAILER: &str = "TRAILER!!!";

/// An archive that grows.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
    present: BTreeSet<String>,
}

impl Archive {
    /// A directory, and those that it is in.
    pub(super) fn directory(&mut self, path: &str) {
        let mut whole = String::new();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !whole.is_empty() {
                whole.push('/');
            }
            whole.push_str(part);
            if self.present.insert(whole.clone()) {
                self.entry(&whole, DIRECTORY | 0o755, &[]);
            }
        }
    }

    /// A file with a mode; an earlier one of the name stays.
    pub(super) fn file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        let path = path.trim_start_matches('/');
        if let Some((directory, _)) = path.rsplit_once('/') {
            self.directory(directory);
        }
        if self.present.insert(path.to_owned()) {
            self.entry(path, REGULAR | mode, contents);
        }
    }

    /// A program of this machine as `path`, and the libraries that it needs where it looks for them.
    pub(super) fn program(&mut self, path: &str, mode: u32, source: &Path) -> Result<()> {
        let read = |file: &Path| fs::read(file).with_context(|| format!("reading {}", file.display()));
        for library in libraries(source)? {
            let shown = library.to_str().context("a library with a printable name")?.to_owned();
            self.file(&shown, 0o755, &read(&library)?);
        }
        self.file(path, mode, &stripped(source).map_or_else(|| read(source), Ok)?);
        Ok(())
    }

    /// The archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.inodes += 1;
        let length = u32::try_from(contents.len()).unwrap_or(u32::MAX);
        let name_length = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // Inode, mode, owner, group, links, time, length, device and node numbers, length of the name, no checksum.
        let fields = [self.inodes, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The program without its debug information, which only costs time to load; `None` if it cannot be had so.
fn stripped(source: &Path) -> Option<Vec<u8>> {
    let target = tempfile::NamedTempFile::new().ok()?;
    let mut command = Command::new("strip");
    command.arg("--strip-debug").arg("-o").arg(target.path()).arg(source);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
    status.success().then(|| fs::read(target.path()).ok())?
}

/// The shared libraries of a program and its loader; none if it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).stdin(Stdio::null()).output();
    let output = output.context("ldd is missing: `apt-get install libc-bin`")?;
    Ok(named_libraries(&String::from_utf8_lossy(&output.stdout)))
}

/// The paths in what ldd prints: `name => /path (address)` or `/path (address)`.
fn named_libraries(listing: &str) -> Vec<PathBuf> {
    let paths = listing.lines().filter_map(|line| {
        let place = line.split_once("=>").map_or(line, |(_, place)| place).trim();
        place.split_whitespace().next().filter(|path| path.starts_with('/'))
    });
    paths.map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, modes and contents, read by the rules of the format.
    fn parse(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                let text = std::str::from_utf8(&bytes[start..start + 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, length, name_length) = (field(1), field(6) as usize, field(11) as usize);
            let name_at = at + 110;
            let name = String::from_utf8(bytes[name_at..name_at + name_length - 1].to_vec()).unwrap();
            assert_eq!(bytes[name_at + name_length - 1], 0);
            let data_at = (name_at + name_length).next_multiple_of(4);
            at = (data_at + length).next_multiple_of(4);
            if name == TRAILER {
                assert_eq!(at, bytes.len());
                return entries;
            }
            entries.push((name, mode, bytes[data_at..data_at + length].to_vec()));
        }
    }

    #[test]
    fn an_archive_reads_back_with_directories_before_their_files() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", 0o644, b"hello");
        archive.file("a/b/d", 0o4755, b"");
        archive.file("a/b/c", 0o600, b"a second time");
        let entries = parse(&archive.finish());
        let expected = [
            ("a", DIRECTORY | 0o755, &b""[..]),
            ("a/b", DIRECTORY | 0o755, b""),
            ("a/b/c", REGULAR | 0o644, b"hello"),
            ("a/b/d", REGULAR | 0o4755, b""),
        ];
        assert_eq!(entries.len(), expected.len());
        for ((name, mode, contents), (expected_name, expected_mode, expected_contents)) in
            entries.iter().zip(expected)
        {
            assert_eq!(
                (name.as_str(), *mode, contents.as_slice()),
                (expected_name, expected_mode, expected_contents)
            );
        }
    }

    #[test]
    fn libraries_are_found_with_the_loader_and_without_the_vdso() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlibgone.so => not found\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(named_libraries(listing), expected);
        assert!(named_libraries("\tnot a dynamic executable\n").is_empty());
    }
}
