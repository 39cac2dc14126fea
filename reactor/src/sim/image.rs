//! The contents of a simulated disk: sparse, cheap to copy.
//!
//! Invariants: what was never written reads as zeroes; a copy shares what neither side has changed since. Equality is
//! of contents. Excludes: caches, time, faults (`disk`).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock};

use crate::random::mix;

/// Bytes that are shared or copied together.
const CHUNK: usize = 4096;

/// What a disk holds.
#[derive(Clone, Debug, Default)]
pub struct DiskImage {
    chunks: BTreeMap<u64, Arc<Chunk>>,
    len: u64,
}

/// A part, with what its hash was found to be.
#[derive(Debug)]
struct Chunk {
    bytes: [u8; CHUNK],
    hash: OnceLock<u64>,
}

impl Chunk {
    /// Depends on the bytes alone; 0 if they are all zero.
    fn hash(&self) -> u64 {
        *self.hash.get_or_init(|| {
            if self.bytes.iter().all(|&byte| byte == 0) {
                return 0;
            }
            let words = self.bytes.chunks_exact(8);
            words.map(|word| word.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b))).fold(0, mix) | 1
        })
    }
}

impl Clone for Chunk {
    /// For what is going to be changed.
    fn clone(&self) -> Self {
        Self { bytes: self.bytes, hash: OnceLock::new() }
    }
}

impl DiskImage {
    /// `len` zero bytes.
    pub fn zeroed(len: u64) -> Self {
        Self { chunks: BTreeMap::new(), len }
    }

    /// An image with the contents of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut image = Self::zeroed(bytes.len() as u64);
        image.write(0, bytes);
        image
    }

    /// The same cut off, or with zeroes behind it: `len` bytes, as after the device was made smaller or larger.
    ///
    /// # Panics
    /// If it is cut in the middle of 4 KiB.
    #[must_use]
    pub fn resized(mut self, len: u64) -> Self {
        assert!(len >= self.len || len.is_multiple_of(CHUNK as u64), "an image is cut between chunks");
        self.chunks.split_off(&len.div_ceil(CHUNK as u64));
        self.len = len;
        self
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the image has no bytes at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies from `offset` on.
    ///
    /// # Panics
    /// If the range is not inside the image.
    pub fn read(&self, offset: u64, mut dst: &mut [u8]) {
        self.check(offset, dst.len() as u64);
        let mut at = offset;
        while !dst.is_empty() {
            let (chunk, start) = split(at);
            let (part, rest) = dst.split_at_mut(dst.len().min(CHUNK - start));
            match self.chunks.get(&chunk) {
                Some(held) => part.copy_from_slice(&held.bytes[start..start + part.len()]),
                None => part.fill(0),
            }
            at += part.len() as u64;
            dst = rest;
        }
    }

    /// Stores `src` from `offset` on.
    ///
    /// # Panics
    /// If the range is not inside the image.
    pub fn write(&mut self, offset: u64, mut src: &[u8]) {
        self.check(offset, src.len() as u64);
        let mut at = offset;
        while !src.is_empty() {
            let (chunk, start) = split(at);
            let (part, rest) = src.split_at(src.len().min(CHUNK - start));
            self.chunk_mut(chunk)[start..start + part.len()].copy_from_slice(part);
            at += part.len() as u64;
            src = rest;
        }
    }

    /// Sets `len` bytes from `offset` on to zero.
    ///
    /// # Panics
    /// If the range is not inside the image.
    pub fn zero(&mut self, offset: u64, len: u64) {
        self.check(offset, len);
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (chunk, start) = split(at);
            let step = ((CHUNK - start) as u64).min(end - at);
            if step == CHUNK as u64 {
                self.chunks.remove(&chunk);
            } else if self.chunks.contains_key(&chunk) {
                self.chunk_mut(chunk)[start..start + step as usize].fill(0);
            }
            at += step;
        }
    }

    /// Inverts bit `bit % 8` of the byte at `offset`.
    ///
    /// # Panics
    /// If the byte is not inside the image.
    pub fn flip_bit(&mut self, offset: u64, bit: u8) {
        self.check(offset, 1);
        let (chunk, start) = split(offset);
        self.chunk_mut(chunk)[start] ^= 1 << (bit % 8);
    }

    /// A hash of the contents. What images share is looked at once.
    pub fn content_hash(&self) -> u64 {
        let held = self.chunks.iter().map(|(&at, chunk)| (at, chunk.hash())).filter(|(_, hash)| *hash != 0);
        held.fold(self.len, |hash, (at, chunk)| mix(mix(hash, at), chunk))
    }

    /// Writes everything, zeroes included.
    ///
    /// # Errors
    /// What `out` says.
    pub fn write_to(&self, out: &mut impl io::Write) -> io::Result<()> {
        let mut buffer = [0; CHUNK];
        let mut at = 0;
        while at < self.len {
            let step = (self.len - at).min(CHUNK as u64) as usize;
            self.read(at, &mut buffer[..step]);
            out.write_all(&buffer[..step])?;
            at += step as u64;
        }
        Ok(())
    }

    fn chunk_mut(&mut self, chunk: u64) -> &mut [u8; CHUNK] {
        let zeroes = || Arc::new(Chunk { bytes: [0; CHUNK], hash: OnceLock::new() });
        let chunk = Arc::make_mut(self.chunks.entry(chunk).or_insert_with(zeroes));
        chunk.hash = OnceLock::new();
        &mut chunk.bytes
    }

    fn check(&self, offset: u64, len: u64) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} of an image of {}",
            self.len
        );
    }
}

impl PartialEq for DiskImage {
    fn eq(&self, other: &Self) -> bool {
        let zero = [0; CHUNK];
        let bytes = |image: &Self, chunk: &u64| image.chunks.get(chunk).map_or(zero, |held| held.bytes);
        self.len == other.len
            && self.chunks.keys().chain(other.chunks.keys()).all(|chunk| {
                match (self.chunks.get(chunk), other.chunks.get(chunk)) {
                    (Some(ours), Some(theirs)) if Arc::ptr_eq(ours, theirs) => true,
                    _ => bytes(self, chunk) == bytes(other, chunk),
                }
            })
    }
}

impl Eq for DiskImage {}

fn split(offset: u64) -> (u64, usize) {
    (offset / CHUNK as u64, (offset % CHUNK as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unaligned_writes_read_back_and_copies_are_independent() {
        let mut image = DiskImage::zeroed(3 * CHUNK as u64);
        image.write(CHUNK as u64 - 2, &[1, 2, 3, 4]);
        let copy = image.clone();
        image.zero(CHUNK as u64, 1);
        let mut bytes = [9; 6];
        image.read(CHUNK as u64 - 3, &mut bytes);
        assert_eq!(bytes, [0, 1, 2, 0, 4, 0]);
        copy.read(CHUNK as u64 - 3, &mut bytes);
        assert_eq!(bytes, [0, 1, 2, 3, 4, 0]);
        assert_ne!(image, copy);
        assert_ne!(image.content_hash(), copy.content_hash());
        // A hash that is known is forgotten with the next change.
        image.write(CHUNK as u64, &[3]);
        assert_eq!(image.content_hash(), copy.content_hash());
    }

    #[test]
    fn written_zeroes_equal_never_written() {
        let mut image = DiskImage::zeroed(2 * CHUNK as u64);
        image.write(10, &[0; 5000]);
        assert_eq!(image, DiskImage::zeroed(2 * CHUNK as u64));
        assert_eq!(image.content_hash(), DiskImage::zeroed(2 * CHUNK as u64).content_hash());
    }
}
