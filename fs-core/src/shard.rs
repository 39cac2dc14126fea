//! A shard: an independent small filesystem that lives on one reactor.
//!
//! Owns: [`Shard`] (one tree, its allocation groups, its inodes and their cache), its two mailbox loops, and the
//! table of inodes in memory. The parts are in modules of their own:
//!
//! | module | holds |
//! |---|---|
//! | [`transact`] | plans and commits, space |
//! | [`epoch`] | when transactions are applied, the freeze |
//! | [`checkpoint`] | writing a frozen epoch |
//! | [`log`] | the records of an epoch, their replay |
//! | [`message`] | requests, calls between shards |
//! | [`relocate`] | emptying groups |
//! | [`scrub`] | verifying what lies on the device |
//! | `crate::data` | file contents |
//! | `crate::namespace` | names, inodes, transactions across shards |
//!
//! Invariants:
//! - everything here is `!Send` and used by one reactor; other threads reach a shard by its mailboxes, its delalloc
//!   queue and its space counter, all in [`crate::volume::ShardShared`];
//! - a request runs only after the delalloc queues were drained up to the tails seen at that moment, so whoever sends
//!   a request after a write was acknowledged sees that write;
//! - no tree node is evicted while a prepared transaction or a checkpoint needs it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use reactor::{Context, Receiver};

use crate::alloc::{Allocator, SpaceCounter};
use crate::data::read::Caching;
use crate::data::{DataState, FileData};
use crate::disk::VolumeDisk;
use crate::error::FsError;
use crate::format::node::zeroed_image;
use crate::locks::{InodeClass, MmapClass, RangeLock, WholeLock};
use crate::namespace::NamespaceState;
use crate::planted::{Bug, is_planted};
use crate::tree::{NODE_BLOCKS, NodeImage, Tree, TreeIdentity, TreeRoot};
use crate::types::{BlockCount, BlockNr, Epoch, InodeNr, ShardId};
use crate::volume::{ShardReport, VolumeShared};

use self::epoch::EpochGate;
use self::log::ShardLog;
use self::message::{PeerCall, PeerMessage, PeerReply, RequestMessage};
use self::signal::Signal;

pub(crate) mod checkpoint;
pub(crate) mod epoch;
pub(crate) mod log;
pub(crate) mod message;
pub(crate) mod relocate;
mod scrub;
pub(crate) mod signal;
pub(crate) mod transact;

/// Requests that a shard works on at once; more wait in the mailbox.
const MAX_RUNNING_REQUESTS: u32 = 1024;

/// How much a shard's mailboxes hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MailboxSlots {
    /// Requests; more wait with their senders.
    pub(crate) requests: usize,
    /// Calls of peers. This mailbox is emptied without waiting for anything.
    pub(crate) peers: usize,
}

impl Default for MailboxSlots {
    fn default() -> Self {
        Self { requests: 1024, peers: 4096 }
    }
}

/// The volatile state of an inode that is in use.
pub(crate) struct Inode {
    /// Number.
    pub(crate) nr: InodeNr,
    /// Excludes changes of the inode's attributes, names and size (the VFS's `i_rwsem`).
    pub(crate) lock: WholeLock<InodeClass>,
    /// Excludes stores through mappings.
    pub(crate) mmap_lock: WholeLock<MmapClass>,
    /// Byte ranges being read, written back or replaced.
    pub(crate) ranges: RangeLock,
    /// Contents in memory.
    pub(crate) data: RefCell<FileData>,
    /// Lookups that front ends hold.
    pub(crate) lookups: Cell<u64>,
}

/// One shard. See the module documentation.
pub(crate) struct Shard {
    pub(crate) id: ShardId,
    pub(crate) ctx: Context,
    pub(crate) disk: VolumeDisk,
    pub(crate) volume: Arc<VolumeShared>,
    pub(crate) counter: Arc<SpaceCounter>,
    pub(crate) tree: RefCell<Tree>,
    pub(crate) alloc: RefCell<Allocator>,
    pub(crate) epochs: EpochGate,
    pub(crate) log: ShardLog,
    pub(crate) data: Rc<DataState>,
    pub(crate) names: NamespaceState,
    pub(crate) next_inode: Cell<u64>,
    pub(crate) inode_count: Cell<u64>,
    last_root: Cell<TreeRoot>,
    inodes: RefCell<HashMap<InodeNr, Rc<Inode>>>,
    tree_memory_limit: usize,
    eviction_holds: Cell<u32>,
    running: Cell<u32>,
    served: Cell<u64>,
    slot_freed: Signal,
}

/// What a shard is built from.
pub(crate) struct ShardParts {
    pub(crate) id: ShardId,
    pub(crate) disk: VolumeDisk,
    pub(crate) volume: Arc<VolumeShared>,
    pub(crate) identity: TreeIdentity,
    pub(crate) root: TreeRoot,
    pub(crate) alloc: Allocator,
    pub(crate) epoch: Epoch,
    pub(crate) next_inode: u64,
    pub(crate) inodes: u64,
    pub(crate) tree_memory_limit: usize,
    pub(crate) page_memory_limit: usize,
}

impl Shard {
    /// Builds a shard on the reactor of `ctx`.
    pub(crate) fn new(ctx: Context, parts: ShardParts) -> Rc<Self> {
        let shared = parts.volume.shard(parts.id);
        let counter = Arc::clone(&shared.counter);
        let data = DataState::new(Arc::clone(&shared.delalloc), parts.page_memory_limit);
        Rc::new(Self {
            id: parts.id,
            ctx,
            disk: parts.disk,
            counter,
            tree: RefCell::new(Tree::open(parts.identity, parts.root)),
            alloc: RefCell::new(parts.alloc),
            epochs: EpochGate::new(parts.epoch),
            log: ShardLog::default(),
            data,
            names: NamespaceState::default(),
            next_inode: Cell::new(parts.next_inode),
            inode_count: Cell::new(parts.inodes),
            last_root: Cell::new(parts.root),
            inodes: RefCell::new(HashMap::new()),
            tree_memory_limit: parts.tree_memory_limit,
            eviction_holds: Cell::new(0),
            running: Cell::new(0),
            served: Cell::new(0),
            slot_freed: Signal::default(),
            volume: parts.volume,
        })
    }

    /// Serves front ends until the mailbox closes.
    pub(crate) async fn serve_requests(self: Rc<Self>, mut mailbox: Receiver<RequestMessage>) {
        while let Some(RequestMessage::Serve(request, reply)) = mailbox.recv().await {
            while self.running.get() >= MAX_RUNNING_REQUESTS {
                self.slot_freed.wait().await;
            }
            self.running.set(self.running.get() + 1);
            if !is_planted(Bug::DrainSkipped) {
                self.drain();
            }
            let shard = Rc::clone(&self);
            let task = async move {
                reply(shard.serve(request).await);
                shard.running.set(shard.running.get() - 1);
                shard.served.set(shard.served.get() + 1);
                shard.slot_freed.notify();
            };
            if let Err(error) = self.ctx.spawn(task) {
                // The task, and with it the reply, is gone: the front end sees its reply channel closed.
                self.running.set(self.running.get() - 1);
                tracing::error!(shard = %self.id, %error, "request dropped");
            }
        }
    }

    /// Serves the other shards and the coordinator until the mailbox closes.
    pub(crate) async fn serve_peers(self: Rc<Self>, mut mailbox: Receiver<PeerMessage>) {
        while let Some(PeerMessage { call, reply }) = mailbox.recv().await {
            let stop = matches!(call, PeerCall::Stop);
            // What gives something back needs no task, so that it cannot fail for want of one.
            let call = match call {
                PeerCall::Namespace(call) => match self.answer_namespace_now(call) {
                    Ok(answer) => {
                        let _abandoned = reply.send(answer.map(PeerReply::Namespace));
                        continue;
                    }
                    Err(call) => PeerCall::Namespace(call),
                },
                call => call,
            };
            let shard = Rc::clone(&self);
            let is_of_two = matches!(call, PeerCall::Namespace(_) | PeerCall::Lending(_));
            let task = async move { drop(reply.send(shard.answer(call).await)) };
            if is_planted(Bug::PeersAnsweredInLine) && is_of_two {
                task.await;
                continue;
            }
            if let Err(error) = self.ctx.spawn(task) {
                tracing::error!(shard = %self.id, %error, "call of a peer dropped");
            }
            if stop {
                break;
            }
        }
    }

    async fn answer(self: &Rc<Self>, call: PeerCall) -> Result<PeerReply, FsError> {
        match call {
            PeerCall::Checkpoint(epoch) => Ok(PeerReply::Frozen(self.checkpoint(epoch).await?)),
            PeerCall::CutLog(epoch) => Ok(PeerReply::Cut(self.take_cut(epoch).await)),
            PeerCall::MakeLog(blocks) => Ok(PeerReply::Log(self.make_log(blocks).await)),
            PeerCall::MoveLog(segment, blocks) => Ok(PeerReply::LogMoved(self.move_log(segment, blocks)?)),
            PeerCall::Replay(sections) => {
                self.replay(sections).await?;
                Ok(PeerReply::Done)
            }
            PeerCall::Durable(epoch) => {
                self.epoch_is_durable(epoch).await;
                Ok(PeerReply::Done)
            }
            PeerCall::Read(inode, offset, length) => {
                self.drain();
                Ok(PeerReply::Data(self.read(inode, offset, length, Caching::Cached).await?))
            }
            PeerCall::FlushData => {
                self.drain();
                self.flush_all().await?;
                Ok(PeerReply::Done)
            }
            PeerCall::FinishDeletions => {
                self.finish_deletions().await;
                self.finish_returns().await;
                Ok(PeerReply::Done)
            }
            PeerCall::SurrenderGroup(limit) => {
                Ok(PeerReply::Transfer(self.alloc.borrow_mut().surrender(limit)))
            }
            PeerCall::Resize(step) => Ok(PeerReply::Resized(self.resize_volume(step))),
            PeerCall::Recover => {
                self.recover_orphans().await?;
                // What an earlier mount left.
                self.note_returns();
                Ok(PeerReply::Done)
            }
            PeerCall::Report => Ok(PeerReply::Report(Box::new(self.report()))),
            PeerCall::Stop => {
                self.stop_data();
                Ok(PeerReply::Done)
            }
            PeerCall::Namespace(call) => Ok(PeerReply::Namespace(self.answer_namespace(call).await?)),
            PeerCall::Lending(call) => Ok(PeerReply::Lending(self.answer_lending(call).await?)),
        }
    }

    /// The volatile state of `inode`, made if it is not in use. Whether the inode exists is the tree's matter.
    pub(crate) fn inode(&self, inode: InodeNr) -> Rc<Inode> {
        assert_eq!(inode.shard(), self.id, "an inode's state lives on its own shard");
        let mut table = self.inodes.borrow_mut();
        let entry = table.entry(inode).or_insert_with(|| {
            Rc::new(Inode {
                nr: inode,
                lock: WholeLock::new(inode),
                mmap_lock: WholeLock::new(inode),
                ranges: RangeLock::new(inode),
                data: RefCell::default(),
                lookups: Cell::new(0),
            })
        });
        Rc::clone(entry)
    }

    /// The volatile state of `inode`, if it is in use.
    pub(crate) fn inode_in_use(&self, inode: InodeNr) -> Option<Rc<Inode>> {
        self.inodes.borrow().get(&inode).map(Rc::clone)
    }

    /// Forgets the volatile state of `inode` if nobody needs it any more.
    pub(crate) fn release_inode(&self, inode: InodeNr) {
        let mut table = self.inodes.borrow_mut();
        let idle = table.get(&inode).is_some_and(|state| {
            let locked = !(state.lock.is_idle() && state.mmap_lock.is_idle() && state.ranges.is_idle());
            Rc::strong_count(state) == 1
                && state.lookups.get() == 0
                && !locked
                && state.data.borrow().is_empty()
        });
        if idle {
            table.remove(&inode);
        }
    }

    /// Every inode in use, in the order of their numbers.
    pub(crate) fn inodes_in_use(&self) -> Vec<Rc<Inode>> {
        let mut inodes: Vec<Rc<Inode>> = self.inodes.borrow().values().map(Rc::clone).collect();
        // Not in the table's order: that differs from run to run, and what is done in it must not.
        inodes.sort_unstable_by_key(|inode| inode.nr);
        inodes
    }

    /// A number for a new inode of this shard; never given twice, also across mounts.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] if all 2⁵⁶ were given.
    pub(crate) fn new_inode_number(&self) -> Result<InodeNr, FsError> {
        let sequence = self.next_inode.get();
        let inode = InodeNr::from_parts(self.id, sequence).ok_or(FsError::NoSpace)?;
        self.next_inode.set(sequence + 1);
        Ok(inode)
    }

    /// Reads one tree node; its contents are not verified here.
    pub(crate) async fn read_node(&self, address: BlockNr) -> Result<Box<NodeImage>, FsError> {
        let bytes = self.disk.read(address, BlockCount::new(NODE_BLOCKS)).await?;
        let mut image = zeroed_image();
        image.copy_from_slice(&bytes);
        Ok(image)
    }

    /// Drops tree nodes from memory while that is allowed and needed.
    pub(crate) fn relieve_tree_memory(&self) {
        if self.eviction_holds.get() > 0 {
            return;
        }
        let tree = self.tree.borrow();
        if tree.resident_bytes() > self.tree_memory_limit {
            // One bounded round; the next load goes on where it ends.
            let _outcome = tree.evict(self.tree_memory_limit / 8 * 7);
        }
    }

    /// Keeps every tree node that is in memory there, as long as the guard lives.
    pub(crate) fn hold_nodes(self: &Rc<Self>) -> NodeHold {
        self.begin_node_hold();
        NodeHold { shard: Rc::clone(self) }
    }

    /// Keeps every tree node that is in memory there, until [`end_node_hold`](Self::end_node_hold).
    pub(crate) fn begin_node_hold(&self) {
        self.eviction_holds.set(self.eviction_holds.get() + 1);
    }

    /// Ends what [`begin_node_hold`](Self::begin_node_hold) began.
    pub(crate) fn end_node_hold(&self) {
        self.eviction_holds.set(self.eviction_holds.get() - 1);
    }

    fn report(&self) -> ShardReport {
        ShardReport {
            shard: self.id.get(),
            requests: self.served.get(),
            running_requests: self.running.get(),
            inodes: self.inode_count.get(),
            inodes_in_memory: self.inodes.borrow().len() as u64,
            tree_height: u32::from(self.tree.borrow().height()),
            tree_memory_bytes: self.tree.borrow().resident_bytes() as u64,
            free_blocks: self.counter.free(),
            available_blocks: self.counter.available(),
            pinned_blocks: self.counter.pinned(),
            data: self.data.report(),
        }
    }
}

/// Keeps every tree node of a shard that is in memory there.
pub(crate) struct NodeHold {
    shard: Rc<Shard>,
}

impl Drop for NodeHold {
    fn drop(&mut self) {
        self.shard.end_node_hold();
    }
}
