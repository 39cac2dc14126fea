//! The fuzz targets under libFuzzer, which keeps inputs that reach new code: `cargo xtask fuzz` where there is a C++ compiler.
//!
//! The environment variable `POLLUX_FUZZ_TARGET` names the target; arguments are libFuzzer's.
//!
//! Excludes: the targets (`pollux_fuzz`), and how this is built (`tools/xtask/src/fuzz.rs`).

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use pollux_fuzz::{TARGETS, Target};

fn chosen() -> &'static Target {
    static CHOSEN: OnceLock<&'static Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = std::env::var("POLLUX_FUZZ_TARGET").unwrap_or_default();
        let names = || TARGETS.iter().map(|target| target.name).collect::<Vec<_>>().join(", ");
        pollux_fuzz::target(&name).unwrap_or_else(|| panic!("POLLUX_FUZZ_TARGET={name}: there are {}", names()))
    })
}

fuzz_target!(|data: &[u8]| (chosen().run)(data));
