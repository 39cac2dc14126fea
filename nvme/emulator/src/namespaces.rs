//! Which namespaces there are: a table that changes at run time, and each queue's own view of it.
//!
//! Invariants:
//! - the table is ascending by identifier and replaced as a whole;
//! - a queue takes the current table before each command, under its lock. Whoever publishes a table and then takes each
//!   submission queue's lock in turn ([`Core::wait_for_queues`]) knows that nobody uses the old one any more;
//! - `largest` never shrinks: an identifier that was valid once stays valid (NN of Identify Controller, §5.15.2.2).
//!
//! Memory ordering: `generation` is incremented with release order after the table changed, and loaded with acquire
//! order before each command.
//!
//! Excludes: what a namespace does (`namespace`), telling the host (`admin`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nvme_spec::{NamespaceId, StatusCode};

use crate::controller::Core;
use crate::locks::lock;
use crate::namespace::Namespace;

/// The namespaces at one time.
#[derive(Debug, Default)]
pub(crate) struct NamespaceList {
    /// Ascending by identifier.
    pub(crate) all: Vec<Arc<Namespace>>,
    /// Largest identifier that any had so far.
    pub(crate) largest: u32,
}

impl NamespaceList {
    /// The namespace with identifier `nsid`, or the status that says why there is none (§6.1).
    #[inline]
    pub(crate) fn find(&self, nsid: NamespaceId) -> Result<&Arc<Namespace>, StatusCode> {
        // Identifiers usually count from 1 without gaps.
        let guess = nsid.get().wrapping_sub(1) as usize;
        if let Some(namespace) = self.all.get(guess)
            && namespace.nsid() == nsid
        {
            return Ok(namespace);
        }
        match self.all.binary_search_by_key(&nsid, |n| n.nsid()) {
            Ok(index) => Ok(&self.all[index]),
            Err(_) if (1..=self.largest).contains(&nsid.get()) => Err(StatusCode::INVALID_FIELD), // inactive
            Err(_) => Err(StatusCode::INVALID_NAMESPACE_OR_FORMAT),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Namespace> {
        self.all.iter().map(|namespace| &**namespace)
    }
}

/// The table.
#[derive(Debug)]
pub(crate) struct NamespaceTable {
    generation: AtomicU64,
    current: Mutex<Arc<NamespaceList>>,
    changing: Mutex<()>,
}

impl NamespaceTable {
    pub(crate) fn new(mut all: Vec<Arc<Namespace>>) -> Self {
        all.sort_by_key(|namespace| namespace.nsid());
        let largest = all.last().map_or(0, |namespace| namespace.nsid().get());
        let current = Mutex::new(Arc::new(NamespaceList { all, largest }));
        Self { generation: AtomicU64::new(0), current, changing: Mutex::new(()) }
    }

    /// Keeps others from changes that take several steps. Taken after queue 0's lock, before any other.
    pub(crate) fn change_one_at_a_time(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }

    /// The namespaces now.
    pub(crate) fn list(&self) -> Arc<NamespaceList> {
        Arc::clone(&lock(&self.current))
    }

    /// Puts a namespace in place of the one with its identifier, or beside the others.
    pub(crate) fn put(&self, namespace: Arc<Namespace>) {
        self.change(|list| {
            let nsid = namespace.nsid();
            list.largest = list.largest.max(nsid.get());
            match list.all.binary_search_by_key(&nsid, |n| n.nsid()) {
                Ok(index) => list.all[index] = namespace,
                Err(index) => list.all.insert(index, namespace),
            }
        });
    }

    /// Takes the namespace `nsid` away; false if there is none.
    pub(crate) fn remove(&self, nsid: NamespaceId) -> bool {
        let mut found = false;
        self.change(|list| {
            let before = list.all.len();
            list.all.retain(|namespace| namespace.nsid() != nsid);
            found = list.all.len() != before;
        });
        found
    }

    fn change(&self, change: impl FnOnce(&mut NamespaceList)) {
        let mut current = lock(&self.current);
        let mut list = NamespaceList { all: current.all.clone(), largest: current.largest };
        change(&mut list);
        *current = Arc::new(list);
        // Release: partner of the acquire load in `NamespaceView::refresh`.
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// A queue's copy of the table: found without a lock.
#[derive(Debug)]
pub(crate) struct NamespaceView {
    generation: u64,
    list: Arc<NamespaceList>,
}

impl Default for NamespaceView {
    /// Of no table: takes the current one at the first refresh.
    fn default() -> Self {
        Self { generation: u64::MAX, list: Arc::default() }
    }
}

impl NamespaceView {
    /// Takes the current table if it changed, and returns it.
    #[inline]
    pub(crate) fn refresh(&mut self, table: &NamespaceTable) -> &NamespaceList {
        if table.generation.load(Ordering::Acquire) != self.generation {
            self.refresh_slow(table);
        }
        &self.list
    }

    #[cold]
    fn refresh_slow(&mut self, table: &NamespaceTable) {
        let current = lock(&table.current);
        // Changed only under the lock that is held, so table and generation belong together.
        self.generation = table.generation.load(Ordering::Relaxed);
        self.list = Arc::clone(&current);
    }
}

impl Core {
    /// The namespace with identifier `nsid`, or the status that says why there is none (§6.1). Off the I/O path only.
    pub(crate) fn namespace(&self, nsid: NamespaceId) -> Result<Arc<Namespace>, StatusCode> {
        self.namespaces.list().find(nsid).cloned()
    }

    /// Waits until every I/O command that was being executed has finished, and has every queue take the current table. The
    /// caller holds no I/O queue's lock; it may hold that of the admin submission queue.
    pub(crate) fn wait_for_queues(&self) {
        for slot in &self.submission[1..] {
            if let Some(queue) = lock(&slot.queue).as_mut() {
                queue.namespaces.refresh(&self.namespaces);
            }
        }
    }
}
