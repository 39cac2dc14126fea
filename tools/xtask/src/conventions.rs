//! House rules that no lint knows: file headers, module names, file sizes, nothing large in the repository.
//!
//! Owns: the rules and the walk over the sources. Excludes: everything rustfmt, rustc and clippy check already.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

/// Lines of code, tests apart, above which a file has to be split.
const FILE_LINE_LIMIT: usize = 1_000;

/// Names that say nothing about what a module owns.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "base", "helpers", "misc"];

/// Folders that hold sources of ours.
const SOURCE_FOLDERS: &[&str] =
    &["reactor", "nvme", "fs-core", "fuzz", "planted", "tools", "hw-tests", "bench"];

/// Directories below which nothing is looked at, and how deep the walk goes.
const SKIPPED: &[&str] = &["target", "fixtures"];
const DEPTH_LIMIT: usize = 12;

/// Bytes of a file in the repository at most. A test's leftovers are found here, before everybody has to fetch them.
const TRACKED_LIMIT: u64 = 1 << 20;

/// Everything that breaks a rule.
pub(crate) fn problems(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut problems = large_files(root);
    for folder in SOURCE_FOLDERS {
        let mut files = Vec::new();
        collect(&root.join(folder), 0, &mut files)?;
        for file in files {
            let text =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let shown = file.strip_prefix(root).unwrap_or(&file).display().to_string();
            problems.extend(broken_rules(&file, &text).into_iter().map(|rule| format!("{shown}: {rule}")));
        }
    }
    Ok(problems)
}

/// Files of the repository that are too large; none where the sources are not in one.
fn large_files(root: &Path) -> Vec<String> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output();
    let listed = listed.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    let listed = String::from_utf8_lossy(&listed.unwrap_or_default()).into_owned();
    let size = |name: &str| fs::symlink_metadata(root.join(name)).map_or(0, |found| found.len());
    let large = listed.split('\0').filter(|name| !name.is_empty() && size(name) > TRACKED_LIMIT);
    large.map(|name| format!("{name}: {} bytes, more than a repository should hold", size(name))).collect()
}

fn collect(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    if depth > DEPTH_LIMIT {
        return Ok(());
    }
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name();
        if entry.file_type()?.is_dir() {
            if !SKIPPED.iter().any(|skipped| name == *skipped) {
                collect(&path, depth + 1, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn broken_rules(file: &Path, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if !text.starts_with("//!") {
        broken.push("opens without a `//!` header (what it owns, invariants, what it excludes)".into());
    }
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if EMPTY_NAMES.contains(&stem) {
        broken.push(format!("a module called `{stem}` owns nothing in particular; name the thing"));
    }
    let is_test = stem == "tests" || file.components().any(|part| part.as_os_str() == "tests");
    let lines = text.lines().take_while(|line| !line.starts_with("mod tests {")).count();
    if !is_test && lines > FILE_LINE_LIMIT {
        broken.push(format!("{lines} lines without tests; split it before {FILE_LINE_LIMIT}"));
    }
    broken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_header_is_reported() {
        assert_eq!(broken_rules(Path::new("src/ring.rs"), "fn main() {}\n").len(), 1);
        assert_eq!(broken_rules(Path::new("src/ring.rs"), "//! Rings.\n").len(), 0);
    }

    #[test]
    fn empty_names_are_reported() {
        assert_eq!(broken_rules(Path::new("src/util.rs"), "//! Things.\n").len(), 1);
    }

    #[test]
    fn long_files_are_reported_without_their_tests() {
        let code = format!("//! Long.\n{}", "fn f() {}\n".repeat(FILE_LINE_LIMIT));
        assert_eq!(broken_rules(Path::new("src/long.rs"), &code).len(), 1);
        assert_eq!(broken_rules(Path::new("src/long/tests.rs"), &code).len(), 0);
        let tested = format!("//! Short.\nmod tests {{\n{}}}\n", "fn f() {}\n".repeat(FILE_LINE_LIMIT));
        assert_eq!(broken_rules(Path::new("src/short.rs"), &tested).len(), 0);
    }
}
