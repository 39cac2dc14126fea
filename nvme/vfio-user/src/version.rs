//! The VERSION message: numbers and the JSON with capabilities.
//!
//! Excludes: capabilities that neither side here has (migration, twin sockets); they are skipped.

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, IntoBytes};

use crate::wire::{VERSION_MAJOR, VERSION_MINOR};

/// What a side can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Descriptors in one message.
    #[serde(default = "one")]
    pub max_msg_fds: u64,
    /// Bytes of data in one region or DMA access.
    #[serde(default = "one_mebibyte")]
    pub max_data_xfer_size: u64,
}

fn one() -> u64 {
    1
}

fn one_mebibyte() -> u64 {
    1 << 20
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { max_msg_fds: one(), max_data_xfer_size: one_mebibyte() }
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Document {
    #[serde(default)]
    capabilities: Capabilities,
}

/// Why the other side's version cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VersionError {
    /// Too short.
    #[error("the version message has {0} bytes, which is too short")]
    Short(usize),
    /// Another protocol.
    #[error(
        "the other side speaks version {major}.{minor} of vfio-user, this one {VERSION_MAJOR}.{VERSION_MINOR}"
    )]
    Major {
        /// Its major number.
        major: u16,
        /// Its minor number.
        minor: u16,
    },
    /// Not JSON, or capabilities of the wrong type.
    #[error("the capabilities of the other side cannot be read: {0}")]
    Capabilities(String),
}

/// Body of a VERSION message.
pub fn version_body(capabilities: Capabilities) -> Vec<u8> {
    let mut body = [U16::new(VERSION_MAJOR), U16::new(VERSION_MINOR)].as_bytes().to_vec();
    let json = serde_json::to_vec(&Document { capabilities }).expect("two numbers are JSON");
    body.extend_from_slice(&json);
    body.push(0);
    body
}

/// Reads the body of a VERSION message. Without JSON, the protocol's defaults hold.
///
/// # Errors
/// [`VersionError`].
pub fn parse_version(body: &[u8]) -> Result<Capabilities, VersionError> {
    let ([major, minor], json) =
        <[U16; 2]>::read_from_prefix(body).map_err(|_| VersionError::Short(body.len()))?;
    if major.get() != VERSION_MAJOR {
        return Err(VersionError::Major { major: major.get(), minor: minor.get() });
    }
    let json = json.split(|&byte| byte == 0).next().unwrap_or_default();
    if json.is_empty() {
        return Ok(Capabilities::default());
    }
    let document: Document =
        serde_json::from_slice(json).map_err(|error| VersionError::Capabilities(error.to_string()))?;
    Ok(document.capabilities)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_survive_the_way() {
        let ours = Capabilities { max_msg_fds: 8, max_data_xfer_size: 65536 };
        assert_eq!(parse_version(&version_body(ours)), Ok(ours));
    }

    #[test]
    fn what_is_not_said_has_the_protocols_default() {
        assert_eq!(parse_version(&[0, 0, 1, 0]), Ok(Capabilities::default()));
        assert_eq!(parse_version(b"\0\0\x01\0{}\0"), Ok(Capabilities::default()));
        let partial =
            parse_version(b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"migration\":{\"pgsize\":1}}}\0");
        assert_eq!(partial, Ok(Capabilities { max_msg_fds: 8, ..Capabilities::default() }));
    }

    #[test]
    fn nonsense_is_an_error() {
        assert_eq!(parse_version(&[0, 0, 1]), Err(VersionError::Short(3)));
        assert_eq!(parse_version(&[1, 0, 0, 0]), Err(VersionError::Major { major: 1, minor: 0 }));
        for json in
            ["{", "[1]", "{\"capabilities\":{\"max_msg_fds\":-1}}", "{\"capabilities\":7}", "\u{fffd}"]
        {
            let mut body = vec![0, 0, 1, 0];
            body.extend_from_slice(json.as_bytes());
            assert!(matches!(parse_version(&body), Err(VersionError::Capabilities(_))), "{json}");
        }
        let deep = [b"\0\0\x01\0".as_slice(), "[".repeat(60_000).as_bytes()].concat();
        assert!(matches!(parse_version(&deep), Err(VersionError::Capabilities(_))));
    }
}
