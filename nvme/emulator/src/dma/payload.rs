//! The data of one command: a list of pieces of mapped memory, copied to and from host buffers and files.
//!
//! Owns: [`SegmentList`] (reused from command to command, so that it stops allocating), [`Payload`] (a list with
//! the view that resolved it), [`PayloadCursor`] (walks it once, front to back).
//!
//! Invariants: every segment lies within a mapped region of the view it was resolved with; a payload borrows that
//! view, so the pages cannot go away under it.
//!
//! Excludes: deciding which memory a command names (`prp`).

// File transfers go straight between the page cache and mapped memory: a bounce buffer would cost a copy of every
// byte. `preadv` and `pwritev2` need raw pointers, and no safe wrapper takes memory that others may write.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

use super::{DmaView, Place, SINK_BYTES, Unmapped};

/// A page of zeroes to copy from.
pub(crate) static ZEROES: [u8; 65_536] = [0; 65_536];

/// Pieces given to one vectored system call. A contiguous buffer is one piece; 64 cover 256 KiB of single pages.
const IOVECS_PER_CALL: usize = 64;
/// Bytes compared at a time.
const COMPARE_CHUNK: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Segment {
    place: Place,
    len: usize,
}

/// Pieces of mapped memory in transfer order. Neighbours in memory are merged.
#[derive(Debug, Default)]
pub(crate) struct SegmentList {
    segments: Vec<Segment>,
    bytes: usize,
}

impl SegmentList {
    pub(crate) fn clear(&mut self) {
        self.segments.clear();
        self.bytes = 0;
    }

    /// Appends `len` bytes at `place`.
    pub(crate) fn push(&mut self, place: Place, len: usize) {
        self.bytes += len;
        if let Some(last) = self.segments.last_mut()
            && last.place.region == place.region
            && last.place.offset + last.len == place.offset
        {
            last.len += len;
            return;
        }
        self.segments.push(Segment { place, len });
    }

    /// Device address and length of each piece, in transfer order.
    pub(crate) fn addresses<'a>(&'a self, view: &'a DmaView) -> impl Iterator<Item = (u64, usize)> + 'a {
        self.segments.iter().map(|segment| (view.address_of(segment.place), segment.len))
    }

    /// Appends `len` bytes that are dropped (SGL bit bucket).
    pub(crate) fn push_dropped(&mut self, view: &mut DmaView, len: usize) -> Result<(), Unmapped> {
        let place = view.sink()?;
        let mut left = len;
        while left > 0 {
            let piece = left.min(SINK_BYTES);
            self.segments.push(Segment { place, len: piece });
            self.bytes += piece;
            left -= piece;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    #[cfg(test)]
    pub(crate) fn pieces(&self) -> usize {
        self.segments.len()
    }
}

/// A command's data in mapped memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload<'a> {
    view: &'a DmaView,
    list: &'a SegmentList,
}

impl<'a> Payload<'a> {
    /// Joins a list with the view that resolved it.
    pub(crate) fn new(view: &'a DmaView, list: &'a SegmentList) -> Self {
        Self { view, list }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.list.bytes
    }

    /// A cursor at the first byte.
    pub(crate) fn cursor(&self) -> PayloadCursor<'a> {
        PayloadCursor { payload: *self, segment: 0, offset: 0 }
    }
}

/// A position in a payload that moves front to back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PayloadCursor<'a> {
    payload: Payload<'a>,
    segment: usize,
    offset: usize,
}

impl<'a> PayloadCursor<'a> {
    /// Memory from here on, as far as it is contiguous and at most `limit` bytes; `None` at the end.
    fn peek(&self, limit: usize) -> Option<VolatileSlice<'a>> {
        let segment = self.payload.list.segments.get(self.segment)?;
        let place = Place { region: segment.place.region, offset: segment.place.offset + self.offset };
        Some(self.payload.view.slice(place, (segment.len - self.offset).min(limit)))
    }

    fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let left = self.payload.list.segments[self.segment].len - self.offset;
            if bytes < left {
                self.offset += bytes;
                return;
            }
            bytes -= left;
            self.segment += 1;
            self.offset = 0;
        }
    }

    /// Writes `src` to mapped memory. The payload must have that many bytes left.
    pub(crate) fn put(&mut self, mut src: &[u8]) {
        while !src.is_empty() {
            let slice = self.peek(src.len()).expect("the caller sized the transfer by the payload");
            let (now, later) = src.split_at(slice.len());
            slice.copy_from(now);
            self.advance(now.len());
            src = later;
        }
    }

    /// [`Self::put`] from memory that others may be writing to.
    pub(crate) fn put_volatile(&mut self, src: &VolatileSlice<'_>) {
        let mut at = 0;
        while at < src.len() {
            let rest = src.offset(at).expect("below the length");
            let slice = self.peek(rest.len()).expect("the caller sized the transfer by the payload");
            rest.copy_to_volatile_slice(slice);
            self.advance(slice.len());
            at += slice.len();
        }
    }

    /// [`Self::take`] into memory that others may be reading.
    pub(crate) fn take_volatile(&mut self, dst: &VolatileSlice<'_>) {
        let mut at = 0;
        while at < dst.len() {
            let rest = dst.offset(at).expect("below the length");
            let slice = self.peek(rest.len()).expect("the caller sized the transfer by the payload");
            slice.copy_to_volatile_slice(rest);
            self.advance(slice.len());
            at += slice.len();
        }
    }

    /// Writes `len` zero bytes to mapped memory.
    pub(crate) fn put_zeroes(&mut self, mut len: usize) {
        while len > 0 {
            let step = len.min(ZEROES.len());
            self.put(&ZEROES[..step]);
            len -= step;
        }
    }

    /// Reads mapped memory into `dst`. The payload must have that many bytes left.
    pub(crate) fn take(&mut self, mut dst: &mut [u8]) {
        while !dst.is_empty() {
            let slice = self.peek(dst.len()).expect("the caller sized the transfer by the payload");
            let (now, later) = dst.split_at_mut(slice.len());
            slice.copy_to(now);
            self.advance(slice.len());
            dst = later;
        }
    }

    /// Whether the next bytes of mapped memory equal `expected`.
    pub(crate) fn matches(&mut self, expected: &[u8]) -> bool {
        let mut buffer = [0u8; COMPARE_CHUNK];
        expected.chunks(COMPARE_CHUNK).all(|part| {
            self.take(&mut buffer[..part.len()]);
            buffer[..part.len()] == *part
        })
    }

    /// Reads `len` bytes of `file` at `position` into mapped memory.
    ///
    /// # Errors
    /// The system's; [`io::ErrorKind::UnexpectedEof`] if the file ends early.
    pub(crate) fn put_from_file(&mut self, file: &File, position: u64, len: usize) -> io::Result<()> {
        self.transfer(position, len, io::ErrorKind::UnexpectedEof, |iovecs, at| {
            // SAFETY: each iovec points into a mapped region and was bounded by `VolatileSlice`; the regions live
            // as long as the view that the payload borrows. The kernel only writes bytes there, and all access of
            // this process to that memory is volatile.
            unsafe { libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, at) }
        })
    }

    /// Writes the next `len` bytes of mapped memory to `file` at `position`, with the flags of `pwritev2`.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn take_to_file(
        &mut self,
        file: &File,
        position: u64,
        len: usize,
        flags: libc::c_int,
    ) -> io::Result<()> {
        self.transfer(position, len, io::ErrorKind::WriteZero, |iovecs, at| {
            let count = iovecs.len() as libc::c_int;
            if flags == 0 {
                // SAFETY: as in `put_from_file`; the kernel only reads the memory.
                unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, at) }
            } else {
                // SAFETY: as in `put_from_file`; the kernel only reads the memory.
                unsafe { libc::pwritev2(file.as_raw_fd(), iovecs.as_ptr(), count, at, flags) }
            }
        })
    }

    /// Repeats a vectored call until `len` bytes were moved; `stuck` is the error when a call moves none.
    fn transfer(
        &mut self,
        mut position: u64,
        mut len: usize,
        stuck: io::ErrorKind,
        mut call: impl FnMut(&[libc::iovec], libc::off_t) -> libc::ssize_t,
    ) -> io::Result<()> {
        while len > 0 {
            let mut iovecs = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; IOVECS_PER_CALL];
            let count = self.fill_iovecs(&mut iovecs, len);
            let at = libc::off_t::try_from(position).map_err(|_| io::ErrorKind::InvalidInput)?;
            match call(&iovecs[..count], at) {
                0 => return Err(stuck.into()),
                moved if moved > 0 => {
                    let moved = moved.cast_unsigned();
                    self.advance(moved);
                    position += moved as u64;
                    len -= moved;
                }
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Describes up to `len` bytes from here on, without moving; returns the entries used.
    fn fill_iovecs(&self, iovecs: &mut [libc::iovec; IOVECS_PER_CALL], len: usize) -> usize {
        let mut ahead = *self;
        let mut left = len;
        let mut count = 0;
        while left > 0 && count < IOVECS_PER_CALL {
            let Some(slice) = ahead.peek(left) else { break };
            iovecs[count] =
                libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
            ahead.advance(slice.len());
            left -= slice.len();
            count += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DmaDirection, DmaSpace};
    use super::*;

    /// A payload of `pages` single pages in reverse order, so that none can be merged.
    fn scattered(space: &DmaSpace, iova: u64, pages: usize) -> (DmaView, SegmentList) {
        let mut view = space.view();
        let mut list = SegmentList::default();
        for page in (0..pages).rev() {
            let place = view.resolve(iova + page as u64 * 4096, 4096, DmaDirection::ToHost).unwrap();
            list.push(place, 4096);
        }
        (view, list)
    }

    #[test]
    fn contiguous_pieces_are_merged() {
        let space = DmaSpace::new();
        let region = space.map(4 * 4096).unwrap();
        let mut view = space.view();
        let mut list = SegmentList::default();
        for page in 0..4 {
            let place = view.resolve(region.iova() + page * 4096, 4096, DmaDirection::ToHost).unwrap();
            list.push(place, 4096);
        }
        assert_eq!((list.pieces(), list.bytes()), (1, 4 * 4096));
    }

    #[test]
    #[cfg_attr(miri, ignore = "opens a file")]
    fn scattered_payload_round_trips_through_a_file() {
        let pages = IOVECS_PER_CALL * 2 + 3;
        let space = DmaSpace::new();
        let source = space.map(pages * 4096).unwrap();
        let target = space.map(pages * 4096).unwrap();
        let bytes: Vec<u8> = (0..pages * 4096).map(|i| (i / 7 % 251) as u8).collect();
        let (view, list) = scattered(&space, source.iova(), pages);
        Payload::new(&view, &list).cursor().put(&bytes);
        let file = tempfile::tempfile().unwrap();
        Payload::new(&view, &list).cursor().take_to_file(&file, 512, bytes.len(), 0).unwrap();
        let (view, list) = scattered(&space, target.iova(), pages);
        let payload = Payload::new(&view, &list);
        payload.cursor().put_from_file(&file, 512, bytes.len()).unwrap();
        let mut back = vec![0; bytes.len()];
        payload.cursor().take(&mut back);
        assert!(back == bytes);
        assert!(payload.cursor().matches(&bytes));
        let last = bytes.len() - 1;
        let mut other = bytes;
        other[last] ^= 1;
        assert!(!payload.cursor().matches(&other));
    }

    #[test]
    #[cfg_attr(miri, ignore = "opens a file")]
    fn file_that_ends_early_is_an_error() {
        let space = DmaSpace::new();
        let region = space.map(8192).unwrap();
        let (view, list) = scattered(&space, region.iova(), 2);
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        let error = Payload::new(&view, &list).cursor().put_from_file(&file, 0, 8192).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
