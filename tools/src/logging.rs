//! Where messages go: standard error, filtered by the environment variable `POLLUX_LOG`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Messages shown if `POLLUX_LOG` is not set. fuser reports every reply that came too late (its asker was
/// interrupted, or the mount was forced away) as an error.
const DEFAULT_FILTER: &str = "warn,fuser=off";

/// Sets logging up for this process; the first call counts.
pub fn start() {
    let filter = EnvFilter::try_from_env("POLLUX_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    // A second call finds the first one's logger in place.
    let _already_started = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .try_init();
}
