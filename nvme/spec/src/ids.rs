//! Identifiers that both sides of the wire pass around: queues, commands, namespaces.

use core::fmt;

macro_rules! id {
    ($(#[$meta:meta])* $Name:ident($raw:ty)) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $Name($raw);

        impl $Name {
            /// The identifier `value`.
            pub const fn new(value: $raw) -> Self {
                Self(value)
            }

            /// The identifier as the wire carries it.
            pub const fn get(self) -> $raw {
                self.0
            }
        }

        impl fmt::Display for $Name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A queue identifier; submission and completion queues are numbered separately (§1.6).
    QueueId(u16)
);
id!(
    /// A command identifier: unique among the outstanding commands of its submission queue (§4.2).
    CommandId(u16)
);
id!(
    /// A namespace identifier (§1.6).
    NamespaceId(u32)
);

impl QueueId {
    /// The admin queue pair.
    pub const ADMIN: Self = Self(0);
}

impl NamespaceId {
    /// No namespace: what commands that do not use the field carry.
    pub const NONE: Self = Self(0);
    /// All active namespaces.
    pub const BROADCAST: Self = Self(u32::MAX);
}
