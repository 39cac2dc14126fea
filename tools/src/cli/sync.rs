//! `pollux sync`: everything accepted before is durable when it returns.

use std::time::Duration;

use clap::Args;

use super::Daemon;
use crate::control::{client, protocol::Command};
use crate::failure::Failure;
use crate::output::outln;

/// Make everything that the volume has accepted durable (sync(1) does not reach a FUSE server)
#[derive(Args)]
#[command(after_help = "Example:\n  pollux sync ./pollux-mnt")]
pub(super) struct Sync {
    #[command(flatten)]
    daemon: Daemon,
}

impl Sync {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let result = client::ask(&self.daemon.socket()?, Command::Sync)?;
        let took = Duration::from_nanos(result["took_ns"].as_u64().unwrap_or(0));
        outln!("synced in {:.1} ms", took.as_secs_f64() * 1e3);
        Ok(())
    }
}
