//! The macro behind open enumerations: newtypes over the wire's integer with a name for each known value.

/// Defines a newtype over an integer with named constants, `name()`, `Debug` and `Display`.
macro_rules! open_enum {
    (
        $(#[$meta:meta])*
        pub struct $Name:ident($raw:ty) {
            $( $(#[$vmeta:meta])* $VALUE:ident = $value:expr, $text:literal; )*
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash,
            ::zerocopy::FromBytes, ::zerocopy::IntoBytes, ::zerocopy::Immutable, ::zerocopy::KnownLayout,
        )]
        #[repr(transparent)]
        pub struct $Name(pub $raw);

        impl $Name {
            $( $(#[$vmeta])* #[doc = concat!("(", stringify!($value), ": ", $text, ").")] pub const $VALUE: Self = Self($value); )*

            /// The specification's name of the value, if this crate knows it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $( $value => Some($text), )*
                    _ => None,
                }
            }
        }

        impl ::core::fmt::Display for $Name {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($Name), " {:#x}"), self.0),
                }
            }
        }

        impl ::core::fmt::Debug for $Name {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                write!(f, concat!(stringify!($Name), "({:#x}: {})"), self.0, self.name().unwrap_or("unknown"))
            }
        }
    };
}

pub(crate) use open_enum;
