//! A FUSE server that answers from memory: what the kernel's side of any FUSE mount costs.
//!
//! Speaks the protocol itself (`include/uapi/linux/fuse.h`, version 7.31), on as many threads as the front end under
//! test has, with the same agreements with the kernel (no open, names and attributes valid for long, requests up to 1 MiB). It
//! knows one directory of regular files; every answer is made on the thread that read the request.
//!
//! Excludes: everything that the measured loads do not use; that gets ENOSYS.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use clap::Args;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

const ROOT: u64 = 1;
const MAX_WRITE: u32 = 1 << 20;
/// Requests are read into so much: a write of the largest size and its headers.
const BUFFER: usize = MAX_WRITE as usize + 8192;
const REQUEST_HEADER: usize = 40;
const REPLY_HEADER: usize = 16;
const VALID_S: u64 = 24 * 3600;
const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_644;

/// ASYNC_READ, BIG_WRITES, ASYNC_DIO, NO_OPEN_SUPPORT, PARALLEL_DIROPS, MAX_PAGES, NO_OPENDIR_SUPPORT,
/// EXPLICIT_INVAL_DATA, HANDLE_KILLPRIV_V2: what the front end under test asks for.
const WANTED: u32 = 1 | 1 << 5 | 1 << 15 | 1 << 17 | 1 << 18 | 1 << 22 | 1 << 24 | 1 << 25 | 1 << 28;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const UNLINK: u32 = 10;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const MKDIR: u32 = 9;
const RMDIR: u32 = 11;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// Options of `responder`.
#[derive(Args)]
pub(crate) struct Responder {
    /// Where to mount
    #[arg(long)]
    mount: PathBuf,
    /// Threads that answer
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

impl Responder {
    pub(crate) fn run(&self) -> Result<()> {
        std::fs::create_dir_all(&self.mount)?;
        let device =
            OpenOptions::new().read(true).write(true).open("/dev/fuse").context("opening /dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        mount(
            Some("responder"),
            &self.mount,
            Some("fuse.responder"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )
        .with_context(|| format!("mounting at {}", self.mount.display()))?;
        println!("{{}}");
        let files = Mutex::new(Files::new());
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..self.threads).map(|_| scope.spawn(|| answer_all(&device, &files))).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("an answering thread does not panic"))
        })?;
        Ok(())
    }
}

/// Answers until the mount is gone.
fn answer_all(mut device: &File, files: &Mutex<Files>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut reply = Vec::new();
    loop {
        let length = match device.read(&mut buffer) {
            Ok(length) => length,
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENODEV) => return Ok(()),
                Some(Errno::EINTR | Errno::ENOENT | Errno::EAGAIN) => continue,
                _ => return Err(error),
            },
        };
        let request = Request(&buffer[..length]);
        reply.clear();
        let result = files.lock().unwrap_or_else(PoisonError::into_inner).answer(&request, &mut reply);
        let error = match result {
            Some(Ok(())) => 0,
            Some(Err(errno)) => {
                reply.clear();
                -(errno as i32)
            }
            None => continue,
        };
        let mut header = [0; REPLY_HEADER];
        header[..4].copy_from_slice(&((REPLY_HEADER + reply.len()) as u32).to_le_bytes());
        header[4..8].copy_from_slice(&error.to_le_bytes());
        header[8..].copy_from_slice(&request.u64_at(8).to_le_bytes());
        match device.write_vectored(&[IoSlice::new(&header), IoSlice::new(&reply)]) {
            Ok(_) => {}
            // The request was interrupted, or the mount is gone: the next read tells.
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
            Err(error) => return Err(error),
        }
    }
}

/// A request as the kernel, which is trusted here, has written it.
struct Request<'a>(&'a [u8]);

impl Request<'_> {
    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.0[offset..offset + 4].try_into().expect("four bytes"))
    }

    fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.0[offset..offset + 8].try_into().expect("eight bytes"))
    }

    fn node(&self) -> u64 {
        self.u64_at(16)
    }

    /// The name that begins `offset` bytes behind the header.
    fn name(&self, offset: usize) -> Vec<u8> {
        self.0[REQUEST_HEADER + offset..].iter().copied().take_while(|byte| *byte != 0).collect()
    }
}

struct Node {
    mode: u32,
    data: Vec<u8>,
}

/// Every file there is.
struct Files {
    nodes: HashMap<u64, Node>,
    names: HashMap<(u64, Vec<u8>), u64>,
    next: u64,
}

impl Files {
    fn new() -> Self {
        let root = Node { mode: DIRECTORY, data: Vec::new() };
        Self { nodes: HashMap::from([(ROOT, root)]), names: HashMap::new(), next: 2 }
    }

    /// Answers into `reply`; `None` for requests that have no answer.
    fn answer(&mut self, request: &Request<'_>, reply: &mut Vec<u8>) -> Option<Result<(), Errno>> {
        let node = request.node();
        let body = REQUEST_HEADER;
        Some(match request.u32_at(4) {
            FORGET | BATCH_FORGET | INTERRUPT => return None,
            INIT => {
                init(request, reply);
                Ok(())
            }
            LOOKUP => {
                match self.names.get(&(node, request.name(0))).copied() {
                    Some(found) => self.entry(found, reply),
                    None => no_entry(reply),
                }
                Ok(())
            }
            GETATTR => self.attributes(node, reply),
            SETATTR => {
                if request.u32_at(body) & 1 << 3 != 0
                    && let Some(found) = self.nodes.get_mut(&node)
                {
                    found.data.resize(request.u64_at(body + 16) as usize, 0);
                }
                self.attributes(node, reply)
            }
            CREATE => {
                self.create(node, request.name(16), REGULAR, reply);
                reply.extend([0; 16]);
                Ok(())
            }
            MKDIR => {
                self.create(node, request.name(8), DIRECTORY, reply);
                Ok(())
            }
            UNLINK | RMDIR => {
                let gone = self.names.remove(&(node, request.name(0)));
                gone.and_then(|gone| self.nodes.remove(&gone)).map(drop).ok_or(Errno::ENOENT)
            }
            READ => self.read(node, request.u64_at(body + 8), request.u32_at(body + 16), reply),
            WRITE => self.write(node, request, reply),
            STATFS => {
                reply.extend([0; 80]);
                Ok(())
            }
            RELEASE | FSYNC | FLUSH => Ok(()),
            _ => Err(Errno::ENOSYS),
        })
    }

    fn create(&mut self, parent: u64, name: Vec<u8>, mode: u32, reply: &mut Vec<u8>) {
        let number = self.next;
        self.next += 1;
        self.nodes.insert(number, Node { mode, data: Vec::new() });
        self.names.insert((parent, name), number);
        self.entry(number, reply);
    }

    fn read(&self, node: u64, offset: u64, size: u32, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let data = &self.nodes.get(&node).ok_or(Errno::ENOENT)?.data;
        let start = (offset as usize).min(data.len());
        reply.extend(&data[start..(start + size as usize).min(data.len())]);
        Ok(())
    }

    fn write(&mut self, node: u64, request: &Request<'_>, reply: &mut Vec<u8>) -> Result<(), Errno> {
        let data = &mut self.nodes.get_mut(&node).ok_or(Errno::ENOENT)?.data;
        let offset = request.u64_at(REQUEST_HEADER + 8) as usize;
        let bytes = &request.0[REQUEST_HEADER + 40..];
        if data.len() < offset + bytes.len() {
            data.resize(offset + bytes.len(), 0);
        }
        data[offset..offset + bytes.len()].copy_from_slice(bytes);
        reply.extend((bytes.len() as u32).to_le_bytes());
        reply.extend([0; 4]);
        Ok(())
    }

    fn entry(&self, number: u64, reply: &mut Vec<u8>) {
        for word in [number, 1, VALID_S, VALID_S, 0] {
            reply.extend(word.to_le_bytes());
        }
        self.node_attributes(number, reply);
    }

    fn attributes(&self, number: u64, reply: &mut Vec<u8>) -> Result<(), Errno> {
        if !self.nodes.contains_key(&number) {
            return Err(Errno::ENOENT);
        }
        for word in [VALID_S, 0] {
            reply.extend(word.to_le_bytes());
        }
        self.node_attributes(number, reply);
        Ok(())
    }

    fn node_attributes(&self, number: u64, reply: &mut Vec<u8>) {
        let (size, mode) = self.nodes.get(&number).map_or((0, 0), |node| (node.data.len() as u64, node.mode));
        for word in [number, size, size.div_ceil(512), 0, 0, 0] {
            reply.extend(word.to_le_bytes());
        }
        for word in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
            reply.extend(word.to_le_bytes());
        }
    }
}

/// A name that is not there, to be remembered as such.
fn no_entry(reply: &mut Vec<u8>) {
    for word in [0, 0, VALID_S, 0, 0] {
        reply.extend(word.to_le_bytes());
    }
    reply.extend([0; 88]);
}

fn init(request: &Request<'_>, reply: &mut Vec<u8>) {
    let offered = request.u32_at(REQUEST_HEADER + 12);
    for word in [7, 31, MAX_WRITE, WANTED & offered] {
        reply.extend(word.to_le_bytes());
    }
    for half in [64_u16, 48] {
        reply.extend(half.to_le_bytes());
    }
    for word in [MAX_WRITE, 1] {
        reply.extend(word.to_le_bytes());
    }
    reply.extend(((MAX_WRITE / 4096) as u16).to_le_bytes());
    reply.resize(64, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; REQUEST_HEADER];
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[16..24].copy_from_slice(&node.to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn answer(files: &mut Files, bytes: &[u8]) -> Option<Result<Vec<u8>, Errno>> {
        let mut reply = Vec::new();
        let answered = files.answer(&Request(bytes), &mut reply)?;
        Some(answered.map(|()| reply))
    }

    #[test]
    fn answers_are_as_long_as_the_protocol_says() {
        let mut files = Files::new();
        let created = answer(&mut files, &request(CREATE, ROOT, &[&[0; 16][..], b"a\0"].concat()));
        assert_eq!(created.unwrap().unwrap().len(), 144);
        assert_eq!(answer(&mut files, &request(LOOKUP, ROOT, b"a\0")).unwrap().unwrap().len(), 128);
        assert_eq!(answer(&mut files, &request(LOOKUP, ROOT, b"b\0")).unwrap().unwrap().len(), 128);
        assert_eq!(answer(&mut files, &request(GETATTR, 2, &[0; 16])).unwrap().unwrap().len(), 104);
        assert_eq!(answer(&mut files, &request(INIT, 0, &[0; 16])).unwrap().unwrap().len(), 64);
        assert!(answer(&mut files, &request(FORGET, 2, &[0; 8])).is_none());
    }

    #[test]
    fn what_was_written_is_read_until_it_is_unlinked() {
        let mut files = Files::new();
        answer(&mut files, &request(CREATE, ROOT, &[&[0; 16][..], b"a\0"].concat())).unwrap().unwrap();
        let mut write = vec![0; 40];
        write[8..16].copy_from_slice(&5_u64.to_le_bytes());
        write.extend(b"hello");
        answer(&mut files, &request(WRITE, 2, &write)).unwrap().unwrap();
        let mut read = vec![0; 40];
        read[16..20].copy_from_slice(&64_u32.to_le_bytes());
        assert_eq!(answer(&mut files, &request(READ, 2, &read)).unwrap().unwrap(), b"\0\0\0\0\0hello");
        answer(&mut files, &request(UNLINK, ROOT, b"a\0")).unwrap().unwrap();
        assert_eq!(answer(&mut files, &request(READ, 2, &read)), Some(Err(Errno::ENOENT)));
    }
}
