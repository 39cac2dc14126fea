//! Errors of file operations, each with the errno a caller of the system call sees.
//!
//! Owns: [`FsError`]. Mount, format and check have error types of their own: they speak to an operator, these to a
//! program.

use crate::types::{BlockNr, InodeNr};

/// Why a file operation failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FsError {
    /// No such entry, inode or attribute target.
    #[error("no such file or directory")]
    NotFound,
    /// The name exists already.
    #[error("file exists")]
    Exists,
    /// A directory was needed.
    #[error("not a directory")]
    NotDirectory,
    /// A directory was given where none may be.
    #[error("is a directory")]
    IsDirectory,
    /// The directory has entries.
    #[error("directory not empty")]
    NotEmpty,
    /// The operation is not possible on this object or with these arguments.
    #[error("invalid argument")]
    Invalid,
    /// The object's owner or kind forbids it.
    #[error("operation not permitted")]
    NotPermitted,
    /// A name is longer than 255 bytes, or a symlink target longer than 4,095.
    #[error("file name too long")]
    NameTooLong,
    /// The file would become larger than [`crate::MAX_FILE_SIZE`].
    #[error("file too large")]
    FileTooLarge,
    /// The inode has [`crate::MAX_LINKS`] links.
    #[error("too many links")]
    TooManyLinks,
    /// Neither free space nor anything that could be freed is left.
    #[error("no space left on device")]
    NoSpace,
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// The value does not fit the buffer or the format's limit.
    #[error("value too large")]
    Range,
    /// Too large for an extended attribute.
    #[error("argument list too long")]
    TooBig,
    /// Offset beyond the end of the file (SEEK_DATA, SEEK_HOLE).
    #[error("no such device or address")]
    NoData,
    /// Source and destination lie on different volumes or cannot be renamed into each other.
    #[error("invalid cross-device link")]
    CrossDevice,
    /// Not offered by this version.
    #[error("operation not supported")]
    NotSupported,
    /// The volume is read-only, or was made so by an earlier failure.
    #[error("read-only file system")]
    ReadOnly,
    /// The volume is being unmounted or its daemon is stopping.
    #[error("shutting down")]
    ShuttingDown,
    /// The device failed.
    #[error("input/output error: {0}")]
    Io(String),
    /// Stored data or metadata does not match its checksum, or makes no sense.
    #[error("damaged: {what} (block {block:?}, inode {inode:?})")]
    Damaged {
        /// What is wrong.
        what: String,
        /// Where on the device, if known.
        block: Option<BlockNr>,
        /// Whose, if known.
        inode: Option<InodeNr>,
    },
}

impl FsError {
    /// The errno of this error, as in `errno(3)` for Linux on x86-64.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotPermitted => 1,
            Self::NotFound => 2,
            Self::Io(_) | Self::Damaged { .. } => 5,
            Self::NoData => 6,
            Self::TooBig => 7,
            Self::Exists => 17,
            Self::CrossDevice => 18,
            Self::NotDirectory => 20,
            Self::IsDirectory => 21,
            Self::Invalid => 22,
            Self::FileTooLarge => 27,
            Self::NoSpace => 28,
            Self::ReadOnly => 30,
            Self::TooManyLinks => 31,
            Self::Range => 34,
            Self::NameTooLong => 36,
            Self::NotEmpty => 39,
            Self::NoAttribute => 61,
            Self::NotSupported => 95,
            Self::ShuttingDown => 108,
        }
    }
}

impl From<reactor::block::IoError> for FsError {
    fn from(error: reactor::block::IoError) -> Self {
        Self::Io(error.to_string())
    }
}
