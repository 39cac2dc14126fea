//! Changes of bytes that a script tells: what damage, and people who mean harm, do to a structure.
//!
//! Owns: [`change`], one change of one place. A place is a number of 1, 2, 4 or 8 bytes; what it becomes is what formats have
//! borders at: one more or less, nothing, everything, what stands elsewhere.
//!
//! Excludes: making checksums right afterwards, which only those can who know the structure.

use crate::script::Script;

/// Changes one place of `bytes`.
pub fn change(script: &mut Script, bytes: &mut [u8]) {
    if bytes.is_empty() {
        return;
    }
    let width = script.pick(&[8, 4, 2, 1]).min(bytes.len());
    // Places are aligned within their structure, as fields are.
    let places = bytes.len() / width;
    let at = usize::from(script.word()) % places * width;
    let old = number(&bytes[at..at + width]);
    let new = match script.byte() % 8 {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => 0,
        3 => u64::MAX,
        4 => old ^ 1 << (script.byte() % 64),
        5 => script.long(),
        6 => u64::from(script.byte()),
        _ => {
            let other = usize::from(script.word()) % places * width;
            number(&bytes[other..other + width])
        }
    };
    bytes[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Stores the CRC32C of `bytes`, taken with zeroes in its place, at `at`. Returns it.
pub fn seal(bytes: &mut [u8], at: usize) -> u32 {
    bytes[at..at + 4].fill(0);
    let crc = crc32c::crc32c(bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn change_stays_within_its_bytes() {
        for length in 0..20 {
            for first in 0..=u8::MAX {
                let mut bytes = vec![7; length];
                let script = [first, 0xff, first, first, 3, 9, 9, 9, 9, 9, 9, 9];
                change(&mut Script::new(script.to_vec()), &mut bytes);
                assert_eq!(bytes.len(), length);
            }
        }
        let mut bytes = [1, 0, 0, 0, 2, 0, 0, 0];
        change(&mut Script::new(vec![1, 1, 0, 0]), &mut bytes);
        assert_eq!(bytes, [1, 0, 0, 0, 3, 0, 0, 0], "the second number of four bytes grew by one");
    }

    #[test]
    fn seal_is_the_checksum_with_zeroes_in_its_place() {
        let mut bytes = [5; 32];
        let crc = seal(&mut bytes, 8);
        assert_eq!(bytes[8..12], crc.to_le_bytes());
        bytes[8..12].fill(0);
        assert_eq!(crc, crc32c::crc32c(&bytes));
    }
}
