//! The `pollux` command line tool.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    pollux::logging::start();
    pollux::cli::Pollux::parse().run()
}
