//! `fs-bench`: what `cargo xtask bench fs` runs, a process for each load, so that what is compared shares nothing.
//!
//! | subcommand | does |
//! |---|---|
//! | `files` | a load on a directory, of whatever filesystem it is |
//! | `library` | the same loads, and others, on a volume in this process: no kernel in between |
//! | `serve` | a volume in memory, mounted until it is told to stop |
//! | `responder` | a FUSE server that answers from memory and does nothing else: the floor of any mount |
//! | `instructions` | requests on a device that is nothing but memory, to be counted by callgrind |
//!
//! Each prints one JSON object. Excludes: comparing and judging, which is xtask's.

mod files;
mod instructions;
mod library;
mod quantiles;
mod responder;
mod serve;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "fs-bench", about = "Loads of `cargo xtask bench fs`")]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// A load on a directory
    Files(files::Files),
    /// A load on a volume in this process
    Library(library::Library),
    /// Mount a volume in memory until SIGINT or SIGTERM
    Serve(serve::Serve),
    /// Mount a server that answers from memory, until it is unmounted
    Responder(responder::Responder),
    /// Requests to be counted by callgrind
    Instructions(instructions::Instructions),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().what {
        What::Files(files) => files.run(),
        What::Library(library) => library.run(),
        What::Serve(serve) => serve.run(),
        What::Responder(responder) => responder.run(),
        What::Instructions(instructions) => instructions.run(),
    }
}
