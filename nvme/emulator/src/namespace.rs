//! One namespace: logical blocks over a store.
//!
//! Owns: the checks of a command's range, the mapping of store errors to statuses, the namespace's identity.
//!
//! Invariants: every range handed to the store lies within the namespace.
//!
//! Excludes: the commands themselves (`io`), caching (`store`).

use nvme_spec::identify::{IdentifyNamespace, LbaFormat};
use nvme_spec::{NamespaceId, StatusCode};
use zerocopy::FromZeros;

use crate::config::{Backing, ControllerConfig, DEFAULT_LBA_SIZE, NamespaceConfig, WriteCache};
use crate::dma::Payload;
use crate::error::EmulatorError;
use crate::store::file::FileStore;
use crate::store::memory::MemoryStore;
use crate::store::write_cache::CachedStore;
use crate::store::{Durability, Store, StoreError};

/// DLFEAT: deallocated blocks read as zeroes, write zeroes may deallocate.
const DLFEAT: u8 = 0b0_1001;
/// NSFEAT: thinly provisioned.
const NSFEAT_THIN: u8 = 1;

/// A namespace.
pub(crate) struct Namespace {
    nsid: u32,
    lba_shift: u32,
    blocks: u64,
    store: Box<dyn Store>,
    /// Globally unique identifier, derived from the controller's serial number and the namespace identifier.
    nguid: [u8; 16],
}

/// A checked range of blocks, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ByteRange {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Namespace {
    /// Opens or creates the backing.
    pub(crate) fn open(config: &NamespaceConfig, of: &ControllerConfig) -> Result<Self, EmulatorError> {
        let (store, bytes): (Box<dyn Store>, u64) = match &config.backing {
            Backing::Memory => {
                let bytes = config.size_bytes.unwrap_or(0);
                (cached(MemoryStore::new(bytes), of.write_cache), bytes)
            }
            Backing::File { path, create } => {
                let (file, bytes) = FileStore::open(path, config.size_bytes, *create)?;
                (cached(file, of.write_cache), bytes)
            }
        };
        let lba_size = config.lba_size.unwrap_or_else(|| default_lba_size(bytes));
        if bytes == 0 || !bytes.is_multiple_of(u64::from(lba_size)) {
            return Err(match &config.backing {
                Backing::File { path, .. } => {
                    EmulatorError::BadLength { path: path.clone(), bytes, lba_size }
                }
                Backing::Memory => EmulatorError::Config(format!(
                    "namespace {}: size {bytes} is not a whole number of {lba_size}-byte blocks",
                    config.nsid
                )),
            });
        }
        let lba_shift = lba_size.trailing_zeros();
        let nguid = derive_nguid(&of.serial, config.nsid);
        Ok(Self { nsid: config.nsid, lba_shift, blocks: bytes >> lba_shift, store, nguid })
    }

    pub(crate) fn nsid(&self) -> NamespaceId {
        NamespaceId::new(self.nsid)
    }

    pub(crate) fn store(&self) -> &dyn Store {
        &*self.store
    }

    pub(crate) fn nguid(&self) -> [u8; 16] {
        self.nguid
    }

    pub(crate) fn eui64(&self) -> [u8; 8] {
        let mut eui = [0; 8];
        eui.copy_from_slice(&self.nguid[8..]);
        eui
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.blocks << self.lba_shift
    }

    /// `blocks` blocks from `slba` on, if they exist.
    #[inline]
    pub(crate) fn range(&self, slba: u64, blocks: u64) -> Result<ByteRange, StatusCode> {
        match slba.checked_add(blocks) {
            Some(end) if end <= self.blocks => {
                Ok(ByteRange { offset: slba << self.lba_shift, len: blocks << self.lba_shift })
            }
            _ => Err(StatusCode::LBA_OUT_OF_RANGE),
        }
    }

    /// Bytes of `blocks` blocks, wherever they are.
    #[inline]
    pub(crate) fn bytes_of(&self, blocks: u64) -> u64 {
        blocks << self.lba_shift
    }

    pub(crate) fn read(&self, range: ByteRange, into: Payload<'_>) -> Result<(), StatusCode> {
        self.store.read(range.offset, range.len as usize, &mut into.cursor()).map_err(|e| self.status(&e))
    }

    pub(crate) fn write(
        &self,
        range: ByteRange,
        from: Payload<'_>,
        when: Durability,
    ) -> Result<(), StatusCode> {
        let mut cursor = from.cursor();
        self.store.write(range.offset, range.len as usize, &mut cursor, when).map_err(|e| self.status(&e))
    }

    pub(crate) fn clear(&self, range: ByteRange, when: Durability) -> Result<(), StatusCode> {
        self.store.clear(range.offset, range.len, when).map_err(|e| self.status(&e))
    }

    pub(crate) fn flush(&self) -> Result<(), StatusCode> {
        self.store.flush().map_err(|e| self.status(&e))
    }

    /// Reads part of the range into host memory.
    pub(crate) fn peek(&self, offset: u64, dst: &mut [u8]) -> Result<(), StatusCode> {
        self.store.read_host(offset, dst).map_err(|e| self.status(&e))
    }

    #[cold]
    fn status(&self, error: &StoreError) -> StatusCode {
        tracing::error!(nsid = self.nsid, %error, "backing store failed");
        match error {
            StoreError::NoSpace => StatusCode::CAPACITY_EXCEEDED,
            StoreError::Read(_) => StatusCode::UNRECOVERED_READ_ERROR,
            StoreError::Write(_) => StatusCode::WRITE_FAULT,
        }
    }

    /// The Identify Namespace data structure (§5.15.2.1).
    pub(crate) fn identify(&self) -> IdentifyNamespace {
        let mut data = IdentifyNamespace::new_zeroed();
        data.nsze.set(self.blocks);
        data.ncap.set(self.blocks);
        let used = self.store.allocated().div_ceil(1 << self.lba_shift);
        data.nuse.set(used.min(self.blocks));
        data.nsfeat = NSFEAT_THIN;
        data.dlfeat = DLFEAT;
        data.nvmcap.set(u128::from(self.size_bytes()));
        data.nguid = self.nguid();
        data.eui64 = self.eui64();
        data.lbaf[0] = LbaFormat { lbads: self.lba_shift as u8, ..LbaFormat::default() };
        data.nsattr = u8::from(self.store.is_read_only());
        data
    }
}

fn cached<S: Store + 'static>(store: S, cache: WriteCache) -> Box<dyn Store> {
    match cache {
        WriteCache::Modelled { capacity } => Box::new(CachedStore::new(store, capacity)),
        WriteCache::Host | WriteCache::Absent => Box::new(store),
    }
}

fn default_lba_size(bytes: u64) -> u32 {
    if bytes.is_multiple_of(u64::from(DEFAULT_LBA_SIZE)) { DEFAULT_LBA_SIZE } else { 512 }
}

/// FNV-1a over serial number and identifier, twice with different starts; stable across runs.
fn derive_nguid(serial: &str, nsid: u32) -> [u8; 16] {
    let hash = |start: u64| {
        let bytes = serial.bytes().chain(nsid.to_be_bytes());
        bytes.fold(start, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    };
    let mut id = [0; 16];
    id[..8].copy_from_slice(&hash(0x6c62_272e_07bb_0142).to_be_bytes());
    id[8..].copy_from_slice(&hash(0xcbf2_9ce4_8422_2325).to_be_bytes());
    id
}
