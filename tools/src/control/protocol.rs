//! The control protocol, version 1.
//!
//! A client sends requests, the daemon answers each in order. Both are JSON objects on one line, ended by a newline:
//!
//! ```text
//! → {"version":1,"command":"sync"}
//! ← {"version":1,"result":{"took_ns":1234567}}
//! → {"version":1,"command":"fly"}
//! ← {"version":1,"error":"unknown command `fly`: this daemon knows status, sync, scrub, relocate, grow, shrink, dedupe"}
//! → {"version":1,"command":"scrub"}
//! ← {"version":1,"progress":{"done":4096,"total":81920}}
//! ← {"version":1,"result":{"blocks":81234,"damage":[]}}
//! → {"version":1,"command":"relocate","group":3}
//! ← {"version":1,"result":{"groups_emptied":1,…}}
//! → {"version":1,"command":"dedupe","range":{"source":9,"source_offset":0,"target":10,"target_offset":4096,"length":8192}}
//! ← {"version":1,"result":{"same":true,"extents":2}}
//! ```
//!
//! `dedupe` names files by their inode numbers on the mount; if its answer is that they are not the same, and that without a
//! comparison (there is no such file or range), `why` says so. `relocate` without a group empties all of them, one after the other.
//!
//! Long work says how far it is, any number of times before its answer. A client that leaves ends it.
//!
//! A request of another version gets an error that names the daemon's version. A line longer than [`REQUEST_LIMIT`],
//! or one that is no such object, gets an error, and the connection ends.

use fs_core::relocate::RelocateScope;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version that this build speaks.
pub const VERSION: u32 = 1;

/// Bytes of a request at most, newline included.
pub const REQUEST_LIMIT: u64 = 4096;

/// Bytes of an answer at most: a client reads no more.
pub const ANSWER_LIMIT: u64 = 16 << 20;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlRequest {
    /// The client's version.
    pub version: u32,
    /// What to do.
    pub command: String,
    /// `relocate`: the group to empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u64>,
    /// `shrink`, `grow`: the size that the volume is to have; without it, `grow` takes the whole device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// `dedupe`: what is to be shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<SharedRange>,
}

/// Ranges of two files, or of one, that are to share their blocks if they hold the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedRange {
    /// Inode number, on the mount, of the file whose blocks stay.
    pub source: u64,
    /// First byte in it.
    pub source_offset: u64,
    /// Inode number of the file that gets them.
    pub target: u64,
    /// First byte in it.
    pub target_offset: u64,
    /// Bytes.
    pub length: u64,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ControlAnswer {
    /// The daemon's version.
    pub version: u32,
    /// The result, if it went well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    /// How far it is; the answer is still to come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What went wrong otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How far long work is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Blocks done.
    pub done: u64,
    /// Blocks there are, as far as known.
    pub total: u64,
}

impl ControlAnswer {
    /// A word on how far it is.
    pub fn progress(progress: Progress) -> Self {
        Self { version: VERSION, result: None, progress: Some(progress), error: None }
    }

    /// The answer to a request that went well, or did not.
    pub fn new(outcome: Result<Value, String>) -> Self {
        match outcome {
            Ok(result) => Self { version: VERSION, result: Some(result), progress: None, error: None },
            Err(error) => Self { version: VERSION, result: None, progress: None, error: Some(error) },
        }
    }
}

/// Commands of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Figures of daemon, reactors, queues and volume.
    Status,
    /// Everything accepted before is durable when the answer comes.
    Sync,
    /// Every checksum on the device is verified.
    Scrub,
    /// Everything is moved out of a group, or out of one group after the other.
    Relocate(RelocateScope),
    /// The volume becomes so many bytes large, or as large as its device.
    Grow(Option<u64>),
    /// What lies behind so many bytes is moved, and the volume ends before it.
    Shrink(u64),
    /// Two ranges share their blocks, if they hold the same bytes.
    Dedupe(SharedRange),
}

impl Command {
    /// The name in a request.
    pub fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Sync => "sync",
            Self::Scrub => "scrub",
            Self::Relocate(_) => "relocate",
            Self::Grow(_) => "grow",
            Self::Shrink(_) => "shrink",
            Self::Dedupe(_) => "dedupe",
        }
    }

    /// The request that asks for it.
    pub fn request(self) -> ControlRequest {
        let group = match self {
            Self::Relocate(RelocateScope::Group(group)) => Some(group),
            _ => None,
        };
        let bytes = match self {
            Self::Grow(bytes) => bytes,
            Self::Shrink(bytes) => Some(bytes),
            _ => None,
        };
        let range = match self {
            Self::Dedupe(range) => Some(range),
            _ => None,
        };
        ControlRequest { version: VERSION, command: self.name().into(), group, bytes, range }
    }

    /// What a request line asks for.
    ///
    /// # Errors
    /// The text for [`ControlAnswer::error`].
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        let request: ControlRequest =
            serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))?;
        if request.version != VERSION {
            return Err(format!("this daemon speaks version {VERSION}, not {}", request.version));
        }
        let scope = request.group.map_or(RelocateScope::All, RelocateScope::Group);
        if request.command == "dedupe" && request.range.is_none() {
            return Err("dedupe needs a range".to_owned());
        }
        if request.command == "shrink" && request.bytes.is_none() {
            return Err("shrink needs a number of bytes".to_owned());
        }
        let (dedupe, shrink) = (request.range.map(Self::Dedupe), request.bytes.map(Self::Shrink));
        let known = [Self::Status, Self::Sync, Self::Scrub, Self::Relocate(scope), Self::Grow(request.bytes)];
        known
            .into_iter()
            .chain(dedupe)
            .chain(shrink)
            .find(|command| command.name() == request.command)
            .ok_or_else(|| {
                let command = request.command.escape_debug();
                format!(
                    "unknown command `{command}`: this daemon knows status, sync, scrub, relocate, dedupe"
                )
            })
    }
}
