//! Standard output whose reader may have gone.
//!
//! Owns: [`outln`], for commands, and [`say`], for daemons. `pollux status | head` closes the pipe early; that ends the command quietly, with the exit code
//! that a shell shows for a program ended by SIGPIPE.

use std::fmt::Arguments;
use std::io::{self, Write};

/// Exit code of a command whose reader has gone: 128 + SIGPIPE.
const READER_GONE: i32 = 128 + 13;

/// Prints a line to standard output, like `println!`.
macro_rules! outln {
    () => { $crate::output::print_line(format_args!("")) };
    ($($format:tt)+) => { $crate::output::print_line(format_args!($($format)+)) };
}
pub(crate) use outln;

/// Prints a line to standard output if somebody reads it: what a daemon says must not end it.
macro_rules! say {
    () => { $crate::output::try_line(format_args!("")) };
    ($($format:tt)+) => { $crate::output::try_line(format_args!($($format)+)) };
}
pub(crate) use say;

/// See [`say`].
pub(crate) fn try_line(line: Arguments<'_>) {
    let mut output = io::stdout().lock();
    let _unheard =
        output.write_fmt(line).and_then(|()| output.write_all(b"\n")).and_then(|()| output.flush());
}

/// See [`outln`].
pub(crate) fn print_line(line: Arguments<'_>) {
    let mut output = io::stdout().lock();
    let printed = output.write_fmt(line).and_then(|()| output.write_all(b"\n")).and_then(|()| output.flush());
    if let Err(error) = printed {
        if error.kind() == io::ErrorKind::BrokenPipe {
            std::process::exit(READER_GONE);
        }
        eprintln!("pollux: cannot write to standard output: {error}");
        std::process::exit(1);
    }
}
