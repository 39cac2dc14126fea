//! How a command fails: what, on which device or path, what to do about it, and the exit code.
//!
//! Owns: [`Failure`], the error of every subcommand and of the daemon, and [`Exit`], the exit codes of the contract.
//!
//! Invariant: a message stands on its own, without the command line that led to it.

use std::fmt;
use std::process::ExitCode;

/// Exit codes of `pollux` and `polluxd`. 0 is success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The operation failed.
    Failed,
    /// The command line makes no sense.
    Usage,
    /// `scrub` found damage.
    DamageFound,
    /// `fsck` found errors, as in fsck(8).
    ErrorsFound,
    /// `dedupe` was given ranges that differ.
    Different,
    /// `fsck` could not run, as in fsck(8).
    CheckImpossible,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::DamageFound => 3,
            Exit::ErrorsFound => 4,
            Exit::Different => 5,
            Exit::CheckImpossible => 8,
        })
    }
}

/// Why a command failed.
#[derive(Debug)]
pub struct Failure {
    message: String,
    remedy: Option<String>,
    exit: Exit,
}

impl Failure {
    /// An operation failed; `message` says what and on which device or path.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), remedy: None, exit: Exit::Failed }
    }

    /// The command line makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, ..Self::new(message) }
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Sets the exit code.
    #[must_use]
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// The exit code.
    pub fn code(&self) -> Exit {
        self.exit
    }

    /// Prints the failure on standard error, in the name of `program`, and gives the exit code.
    pub fn report(&self, program: &str) -> ExitCode {
        eprintln!("{program}: {self}");
        self.exit.into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(remedy) = &self.remedy {
            write!(f, "\n  {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Says what was being done when an error came.
pub trait During<T> {
    /// Turns the error into a [`Failure`] that begins with `what`.
    ///
    /// # Errors
    /// If `self` is one.
    fn during(self, what: impl fmt::Display) -> Result<T, Failure>;
}

impl<T, E: fmt::Display> During<T> for Result<T, E> {
    fn during(self, what: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(format!("{what}: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_carries_its_remedy_on_a_line_of_its_own() {
        let failure = Failure::new("cannot open /x: missing").remedy("create it: touch /x");
        assert_eq!(failure.to_string(), "cannot open /x: missing\n  create it: touch /x");
        assert_eq!(failure.code(), Exit::Failed);
    }

    #[test]
    fn usage_has_its_own_exit_code() {
        assert_eq!(Failure::usage("no").code(), Exit::Usage);
    }
}
