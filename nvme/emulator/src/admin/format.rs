//! Format NVM (§5.23): another LBA format, and no contents.
//!
//! Commands that are being executed finish first; those that come meanwhile get Format in Progress. An image keeps its
//! length; blocks of the new format that it does not fill up are left out.

use nvme_spec::format::SecureErase;
use nvme_spec::{NamespaceId, StatusCode, SubmissionEntry};

use crate::controller::{Core, Outcome};
use crate::namespace::Service;
use crate::store::Durability;

impl Core {
    /// Format NVM of one namespace, or of all of them.
    pub(super) fn format_nvm(&self, entry: &SubmissionEntry) -> Result<Outcome, StatusCode> {
        let wanted = entry.format_view();
        // Erasing user data is what formatting does in any case; there are no keys to throw away.
        if SecureErase(wanted.ses()) > SecureErase::USER_DATA {
            return Err(StatusCode::INVALID_FIELD);
        }
        if wanted.pi() != 0 || wanted.mset() {
            return Err(StatusCode::INVALID_FORMAT);
        }
        let _one_at_a_time = self.namespaces.change_one_at_a_time();
        let list = self.namespaces.list();
        let olds = match entry.namespace_id() {
            NamespaceId::BROADCAST => list.all.clone(),
            nsid => vec![list.find(nsid)?.clone()],
        };
        let mut news = Vec::with_capacity(olds.len());
        for old in &olds {
            news.push(old.with_format(wanted.format_index()).ok_or(StatusCode::INVALID_FORMAT)?);
        }
        for old in &olds {
            self.namespaces.put(old.in_service(Service::Formatting));
        }
        self.wait_for_queues();
        let mut result = Ok(Outcome::Done(0));
        for (old, new) in olds.into_iter().zip(news) {
            let changed = old.lba_bytes() != new.lba_bytes();
            let nsid = old.nsid().get();
            match old.store().clear(0, old.capacity(), Durability::Durable) {
                Ok(()) => self.namespaces.put(new),
                Err(error) => {
                    result = Err(old.status(&error));
                    self.namespaces.put(old);
                    continue;
                }
            }
            if changed {
                self.namespace_changed(nsid);
            }
        }
        result
    }
}
