//! The `polluxd` daemon.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    pollux::logging::start();
    pollux::polluxd::Polluxd::parse().run()
}
