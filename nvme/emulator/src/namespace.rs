//! One namespace: logical blocks over a store.
//!
//! Owns: the checks of a command's range, the mapping of store errors to statuses, the namespace's identity.
//!
//! Invariants: every range handed to the store lies within the namespace. A namespace never changes: formatting and
//! resizing make another one over the same store and put it in the table (`namespaces`).
//!
//! Excludes: the commands themselves (`io`), caching (`store`).

use std::fmt;
use std::sync::Arc;

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
/// Smallest logical block as a power of two; the formats without metadata follow each other from there.
const MIN_LBA_SHIFT: u8 = 9;
/// Formats without metadata: 512, 1024, 2048, 4096 bytes.
const PLAIN_FORMATS: u8 = 4;
/// MC: metadata is a buffer of its own.
const MC_SEPARATE: u8 = 0b10;
/// MSSRL: blocks of the largest source range of a copy.
pub(crate) const COPY_RANGE_BLOCKS: u16 = 512;
/// MCL: blocks of the largest copy.
pub(crate) const COPY_BLOCKS: u32 = 2048;
/// MSRC: source ranges of a copy, less one.
pub(crate) const COPY_RANGES_Z: u8 = 31;

/// Whether a namespace serves commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// It does.
    Ready,
    /// It is being formatted.
    Formatting,
    /// It is being resized.
    Resizing,
}

/// A namespace.
#[derive(Clone)]
pub(crate) struct Namespace {
    nsid: u32,
    lba_shift: u32,
    blocks: u64,
    /// Bytes of the store.
    capacity: u64,
    store: Arc<dyn Store>,
    /// Globally unique identifier, derived from the controller's serial number and the namespace identifier.
    nguid: [u8; 16],
    /// Metadata bytes of the format that has them; 0 if there is none.
    offered_metadata: u16,
    /// Block size of that format as a power of two.
    metadata_shift: u8,
    /// It is formatted with them.
    has_metadata: bool,
    noiob: u16,
    service: Service,
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namespace")
            .field("nsid", &self.nsid)
            .field("blocks", &self.blocks)
            .finish_non_exhaustive()
    }
}

/// A checked range of blocks, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteRange {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Namespace {
    /// Opens or creates the backing.
    pub(crate) fn open(config: &NamespaceConfig, of: &ControllerConfig) -> Result<Self, EmulatorError> {
        let (store, bytes): (Arc<dyn Store>, u64) = match &config.backing {
            Backing::Memory => {
                let bytes = config.size_bytes.unwrap_or(0);
                let store = MemoryStore::new(bytes).map_err(|error| {
                    EmulatorError::Config(format!("namespace {}: no memory for it: {error}", config.nsid))
                })?;
                (cached(store, of.write_cache), bytes)
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
        Ok(Self {
            nsid: config.nsid,
            lba_shift,
            blocks: bytes >> lba_shift,
            capacity: bytes,
            store,
            nguid: derive_nguid(&of.serial, config.nsid),
            offered_metadata: config.metadata,
            metadata_shift: lba_shift as u8,
            has_metadata: config.metadata != 0,
            noiob: config.optimal_boundary,
            service: Service::Ready,
        })
    }

    /// The same, serving commands or not.
    pub(crate) fn in_service(&self, service: Service) -> Arc<Self> {
        Arc::new(Self { service, ..self.clone() })
    }

    /// The same with LBA format `index`, if there is such a format. Blocks that do not fill up are left out.
    pub(crate) fn with_format(&self, index: u8) -> Option<Arc<Self>> {
        let format = self.format(index)?;
        let lba_shift = u32::from(format.lbads);
        let has_metadata = format.ms.get() != 0;
        Some(Arc::new(Self {
            lba_shift,
            blocks: self.capacity >> lba_shift,
            has_metadata,
            service: Service::Ready,
            ..self.clone()
        }))
    }

    /// The same with `bytes` bytes; the store has them already.
    pub(crate) fn with_size(&self, bytes: u64) -> Arc<Self> {
        let blocks = bytes >> self.lba_shift;
        Arc::new(Self { capacity: bytes, blocks, service: Service::Ready, ..self.clone() })
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

    /// Bytes of the store.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(crate) fn lba_bytes(&self) -> u64 {
        1 << self.lba_shift
    }

    /// Refuses commands for data that cannot be served now.
    #[inline]
    pub(crate) fn check_service(&self) -> Result<(), StatusCode> {
        match self.service {
            Service::Formatting => Err(StatusCode::FORMAT_IN_PROGRESS),
            Service::Resizing => Err(StatusCode::NAMESPACE_NOT_READY),
            Service::Ready if self.has_metadata => Err(StatusCode::INVALID_NAMESPACE_OR_FORMAT),
            Service::Ready => Ok(()),
        }
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

    /// Writes part of the range from host memory.
    pub(crate) fn poke(&self, offset: u64, src: &[u8], when: Durability) -> Result<(), StatusCode> {
        self.store.write_host(offset, src).map_err(|e| self.status(&e))?;
        if when == Durability::Durable { self.flush() } else { Ok(()) }
    }

    #[cold]
    pub(crate) fn status(&self, error: &StoreError) -> StatusCode {
        tracing::error!(nsid = self.nsid, %error, "backing store failed");
        match error {
            StoreError::NoSpace => StatusCode::CAPACITY_EXCEEDED,
            StoreError::Read(_) => StatusCode::UNRECOVERED_READ_ERROR,
            StoreError::Write(_) => StatusCode::WRITE_FAULT,
        }
    }

    /// LBA format `index`: the plain ones, then the one with metadata if it is offered.
    fn format(&self, index: u8) -> Option<LbaFormat> {
        let mut format = LbaFormat::default();
        if index < PLAIN_FORMATS {
            format.lbads = MIN_LBA_SHIFT + index;
        } else if index == PLAIN_FORMATS && self.offered_metadata != 0 {
            format.lbads = self.metadata_shift;
            format.ms.set(self.offered_metadata);
        } else {
            return None;
        }
        Some(format)
    }

    fn format_index(&self) -> u8 {
        if self.has_metadata { PLAIN_FORMATS } else { self.lba_shift as u8 - MIN_LBA_SHIFT }
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
        data.noiob.set(self.noiob);
        data.nvmcap.set(u128::from(self.size_bytes()));
        data.mssrl.set(COPY_RANGE_BLOCKS);
        data.mcl.set(COPY_BLOCKS);
        data.msrc_z = COPY_RANGES_Z;
        data.nguid = self.nguid();
        data.eui64 = self.eui64();
        let formats = (0..).map_while(|index| self.format(index));
        let mut count = 0;
        for (slot, format) in data.lbaf.iter_mut().zip(formats) {
            *slot = format;
            count += 1;
        }
        data.nlbaf_z = count - 1;
        data.flbas = self.format_index();
        data.mc = if self.offered_metadata == 0 { 0 } else { MC_SEPARATE };
        data.nsattr = u8::from(self.store.is_read_only());
        data
    }
}

fn cached<S: Store + 'static>(store: S, cache: WriteCache) -> Arc<dyn Store> {
    match cache {
        WriteCache::Modelled { capacity } => Arc::new(CachedStore::new(store, capacity)),
        WriteCache::Host | WriteCache::Absent => Arc::new(store),
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
