//! `cargo xtask check`: everything that can be said about the sources without running them.
//!
//! Owns: the order of the checks and their options. Excludes: what each finds ([`direction`], [`conventions`]).

use crate::steps::{Steps, has_cargo_command};
use crate::{conventions, direction};

/// Runs all checks.
pub(crate) fn run(steps: &mut Steps) {
    // A workspace of its own, so no build of this one notices that its lock file has fallen behind.
    steps.cargo(
        "lock file of fuzz/coverage",
        &["fetch", "--quiet", "--locked", "--manifest-path", "fuzz/coverage/Cargo.toml"],
    );
    steps.cargo("format", &["fmt", "--all", "--check"]);
    steps.cargo(
        "clippy",
        &["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "--deny", "warnings"],
    );
    steps.cargo_with(
        "rustdoc",
        &["doc", "--quiet", "--locked", "--workspace", "--no-deps"],
        &[("RUSTDOCFLAGS", "--deny warnings")],
    );
    steps.check("dependency direction", direction::problems);
    steps.check("conventions", conventions::problems);
    deny(steps);
}

/// Licences, sources and duplicates need only the local index; advisories need their database.
fn deny(steps: &mut Steps) {
    if !has_cargo_command(steps.root(), "deny") {
        steps.skip("cargo-deny", "not installed; `cargo install --locked cargo-deny` enables it");
        return;
    }
    steps.cargo("cargo-deny", &["deny", "--offline", "check", "bans", "licenses", "sources"]);
    if std::env::var_os("POLLUX_ADVISORIES").is_some() {
        steps.cargo("advisories", &["deny", "check", "advisories"]);
    } else {
        steps.skip(
            "advisories",
            "needs the advisory database from a git host; POLLUX_ADVISORIES=1 turns it on where one is reachable",
        );
    }
}
