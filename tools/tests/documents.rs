//! What the documents promise of the programs is so: messages that they explain exist.

#![allow(clippy::unwrap_used, reason = "a failed step of a test is the failure of the test")]

use std::fs;
use std::path::{Path, PathBuf};

/// Root of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// All sources below a directory, with strings that go over several lines in one.
fn sources(directory: &Path, text: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).unwrap();
            let mut lines = source.lines();
            while let Some(line) = lines.next() {
                text.push_str(line);
                while text.ends_with('\\') {
                    text.pop();
                    text.push_str(lines.next().unwrap_or_default().trim_start());
                }
                text.push('\n');
            }
        }
    }
}

/// Whoever looks an error up finds the words that the program uses.
#[test]
fn messages_that_the_hardware_guide_explains_are_those_of_the_driver() {
    let guide = fs::read_to_string(root().join("docs/hardware.md")).unwrap();
    let (_, table) = guide.split_once("## When it does not work").unwrap();
    let mut source = String::new();
    sources(&root().join("nvme/src"), &mut source);
    // Names in braces stand for what the guide has an ellipsis for.
    let mut explained = 0;
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let messages = row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2);
        for part in messages.flat_map(|message| message.split('…')) {
            let part = part.trim_matches(|letter: char| letter == ' ' || letter == ';');
            let written = source.contains(part) || source.contains(&part.replace("vfio-pci", "{driver}"));
            assert!(written, "docs/hardware.md explains `{part}`, which nvme/src does not say (any more)");
            explained += usize::from(!part.is_empty());
        }
    }
    assert!(explained > 20, "the table was not found: {explained} messages");
}
