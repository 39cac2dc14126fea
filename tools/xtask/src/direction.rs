//! The direction of dependencies between the project's own crates.
//!
//! Owns: [`ALLOWED`], the table of which crate may know which. `nvme` and `fs-core` are siblings that meet only at
//! `reactor::block::BlockDevice`; an edge between them, in tests too, would undo that.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context;
use serde::Deserialize;

use crate::steps::cargo;

/// Which of the project's crates a crate may depend on.
enum May {
    Only(&'static [&'static str]),
    All,
}

const ALLOWED: &[(&str, May)] = &[
    ("planted", May::Only(&[])),
    ("reactor", May::Only(&["planted"])),
    ("nvme-spec", May::Only(&[])),
    ("vfio-user-protocol", May::Only(&[])),
    ("nvme-sigbus", May::Only(&[])),
    ("nvme-emulator", May::Only(&["reactor", "nvme-spec", "nvme-sigbus", "vfio-user-protocol"])),
    (
        "nvme",
        May::Only(&["reactor", "nvme-spec", "nvme-sigbus", "vfio-user-protocol", "nvme-emulator", "planted"]),
    ),
    ("fs-core", May::Only(&["reactor", "planted"])),
    ("pollux-fuzz", May::All),
    ("pollux-tools", May::All),
    ("hw-tests", May::All),
    ("pollux-bench", May::All),
    ("xtask", May::Only(&["planted"])),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    path: Option<String>,
}

/// Edges that the table does not allow, and crates it does not know.
pub(crate) fn problems(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = cargo(root)
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked", "--offline"])
        .output()
        .context("cannot run cargo metadata")?;
    anyhow::ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata's output")?;
    Ok(check(&metadata))
}

fn check(metadata: &Metadata) -> Vec<String> {
    let mut problems = Vec::new();
    for package in &metadata.packages {
        let own: BTreeSet<&str> =
            package.dependencies.iter().filter(|d| d.path.is_some()).map(|d| d.name.as_str()).collect();
        match ALLOWED.iter().find(|(name, _)| *name == package.name) {
            None => problems.push(format!(
                "crate {} has no row in the table of tools/xtask/src/direction.rs",
                package.name
            )),
            Some((_, May::All)) => {}
            Some((_, May::Only(allowed))) => problems.extend(
                own.iter()
                    .filter(|name| !allowed.contains(name))
                    .map(|name| format!("{} must not depend on {name} (see ARCHITECTURE.md)", package.name)),
            ),
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[&str]) -> Package {
        let dependencies = dependencies
            .iter()
            .map(|name| Dependency { name: (*name).into(), path: Some("somewhere".into()) })
            .collect();
        Package { name: name.into(), dependencies }
    }

    #[test]
    fn edge_between_siblings_is_a_problem() {
        let metadata = Metadata { packages: vec![package("fs-core", &["reactor", "nvme"])] };
        assert_eq!(check(&metadata).len(), 1);
    }

    #[test]
    fn edges_of_the_architecture_are_fine() {
        let metadata = Metadata {
            packages: vec![
                package("reactor", &[]),
                package("nvme", &["reactor", "nvme-spec", "nvme-emulator"]),
                package("fs-core", &["reactor"]),
                package("pollux-tools", &["nvme", "fs-core"]),
            ],
        };
        assert_eq!(check(&metadata), Vec::<String>::new());
    }

    #[test]
    fn unknown_crate_is_a_problem() {
        let metadata = Metadata { packages: vec![package("newcomer", &[])] };
        assert_eq!(check(&metadata).len(), 1);
    }
}
