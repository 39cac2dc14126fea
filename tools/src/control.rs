//! Talking to a running daemon: a Unix socket, one JSON document a line.
//!
//! Owns: the protocol ([`protocol`]), where sockets lie ([`location`]), the daemon's side ([`server`]) and the
//! command line's ([`client`]).

pub mod client;
pub mod location;
pub mod protocol;
pub mod server;

#[cfg(test)]
mod tests;
