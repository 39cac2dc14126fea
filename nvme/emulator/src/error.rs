//! Why a controller could not be made or configured.

use std::io;
use std::path::PathBuf;

/// Errors of construction and configuration. Errors of commands are statuses in completions, never this.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulatorError {
    /// A field of the configuration makes no sense.
    #[error("invalid controller configuration: {0}")]
    Config(String),
    /// The image cannot be opened or created.
    #[error("cannot open image {}: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The image does not exist and no size was given to create it with.
    #[error("image {} does not exist; add a size to create it, as in `,size=4GiB`", path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// The image exists although a new one was asked for.
    #[error("image {} exists already; remove it or open it as it is", path.display())]
    Exists {
        /// The image.
        path: PathBuf,
    },
    /// The path names something that cannot be an image.
    #[error("{} is not a regular file, so it cannot be an image", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// Another process, or another controller of this one, has the image open.
    #[error("image {} is in use by another process{}; stop it first", path.display(), holder_suffix(*.holder))]
    InUse {
        /// The image.
        path: PathBuf,
        /// Process id of the holder, where the system tells.
        holder: Option<u32>,
    },
    /// The image's length is not the size asked for.
    #[error("image {} is {actual} bytes long, not the {expected} bytes asked for; leave the size out to use it as it is", path.display())]
    SizeMismatch {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        actual: u64,
        /// The size asked for in bytes.
        expected: u64,
    },
    /// The image's length is not a whole number of logical blocks.
    #[error("image {} is {bytes} bytes long, which is not a whole number of {lba_size}-byte blocks (or none at all)", path.display())]
    BadLength {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        bytes: u64,
        /// Bytes of a logical block.
        lba_size: u32,
    },
    /// The controller's thread could not be started.
    #[error("cannot start the controller's thread: {0}")]
    Thread(#[source] io::Error),
    /// There is no such namespace.
    #[error("namespace {nsid} does not exist")]
    NoNamespace {
        /// Its identifier.
        nsid: u32,
    },
    /// There is no such interrupt vector.
    #[error("interrupt vector {vector} does not exist; the controller has {count}")]
    NoVector {
        /// The vector asked for.
        vector: u16,
        /// Vectors of the controller.
        count: u16,
    },
}

fn holder_suffix(holder: Option<u32>) -> String {
    holder.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}
