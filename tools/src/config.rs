//! The configuration file of `polluxd`: TOML, every key optional.
//!
//! Owns: the keys, their defaults and limits, and the errors about them. An unknown key is an error: it is more often
//! a typing error than a wish from the future.
//!
//! | key | default | means |
//! |---|---|---|
//! | `idle_spin_us` | 50 | how long a reactor without work spins before it sleeps |
//! | `page_memory_mib` | 512 | memory for file contents |
//! | `tree_memory_mib` | 256 | memory for the tree's nodes |
//! | `commit_interval_s` | 5 | the longest time that accepted changes stay volatile without an fsync |
//! | `suid` | false | set-uid and set-gid bits of programs on the mount are honoured |
//! | `dev` | false | device nodes on the mount are honoured |

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use fs_core::MountOptions;
use reactor::ReactorConfig;
use serde::Deserialize;

use crate::failure::{During, Failure};
use crate::fuse::{Extras, Honoured};

/// Spin before sleep: beyond a second a reactor would just be busy.
const SPIN_RANGE_US: RangeInclusive<u64> = 0..=1_000_000;

/// Memory of each kind.
const MEMORY_RANGE_MIB: RangeInclusive<u64> = 16..=1 << 20;

/// Commit interval.
const COMMIT_RANGE_S: RangeInclusive<u64> = 1..=300;

/// The configuration. See the module documentation.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    idle_spin_us: Option<u64>,
    page_memory_mib: Option<u64>,
    tree_memory_mib: Option<u64>,
    commit_interval_s: Option<u64>,
    suid: bool,
    dev: bool,
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or says something that cannot be.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let text = std::fs::read_to_string(path).during(format_args!("cannot read configuration {shown}"))?;
        Self::parse(&text).map_err(|error| {
            Failure::usage(format!("configuration {shown}: {error}"))
                .remedy("the keys are listed by polluxd --help")
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        let ranges = [
            ("idle_spin_us", config.idle_spin_us, SPIN_RANGE_US),
            ("page_memory_mib", config.page_memory_mib, MEMORY_RANGE_MIB),
            ("tree_memory_mib", config.tree_memory_mib, MEMORY_RANGE_MIB),
            ("commit_interval_s", config.commit_interval_s, COMMIT_RANGE_S),
        ];
        for (key, value, range) in ranges {
            if value.is_some_and(|value| !range.contains(&value)) {
                return Err(format!("{key} has to be between {} and {}", range.start(), range.end()));
            }
        }
        Ok(config)
    }

    /// For the reactors.
    pub fn reactor(&self) -> ReactorConfig {
        let mut config = ReactorConfig::default();
        if let Some(spin) = self.idle_spin_us {
            config.idle_spin = Duration::from_micros(spin);
        }
        config
    }

    /// For the mount.
    pub fn extras(&self) -> Extras {
        let honoured = |yes| if yes { Honoured::Yes } else { Honoured::No };
        Extras { suid: honoured(self.suid), dev: honoured(self.dev) }
    }

    /// For the volume.
    pub fn volume(&self) -> MountOptions {
        let default = MountOptions::default();
        let bytes = |mib: Option<u64>, default: u64| mib.map_or(default, |mib| mib << 20);
        MountOptions {
            page_memory: bytes(self.page_memory_mib, default.page_memory),
            tree_memory: bytes(self.tree_memory_mib, default.tree_memory),
            commit_interval: self.commit_interval_s.map_or(default.commit_interval, Duration::from_secs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_configuration_is_the_default() {
        let config = Config::parse("").unwrap();
        assert_eq!(config.extras(), Extras::default());
        assert_eq!(config.reactor().idle_spin, ReactorConfig::default().idle_spin);
    }

    #[test]
    fn keys_are_taken_over() {
        let config = Config::parse("idle_spin_us = 7\nsuid = true\n").unwrap();
        assert_eq!(config.reactor().idle_spin, Duration::from_micros(7));
        assert_eq!(config.extras(), Extras { suid: Honoured::Yes, dev: Honoured::No });
    }

    #[test]
    fn unknown_and_impossible_keys_are_refused() {
        for text in [
            "spin = 1",
            "idle_spin_us = -1",
            "idle_spin_us = 9000000",
            "commit_interval_s = 0",
            "suid = 1",
            "[",
        ] {
            assert!(Config::parse(text).is_err(), "{text}");
        }
    }
}
