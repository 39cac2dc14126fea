//! The control socket under honest, clumsy and hostile clients.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use fs_core::relocate::RelocateScope;
use serde_json::{Value, json};

use super::client::{ask, ask_and_watch};
use super::protocol::{Command, Progress, REQUEST_LIMIT, SharedRange};
use super::server::{CLIENT_LIMIT, ControlServer, Handler, Tell};

struct Fake;

impl Handler for Fake {
    fn handle(&self, command: Command, progress: Tell<'_>) -> Result<Value, String> {
        match command {
            Command::Status => Ok(json!({ "volume": "fine" })),
            Command::Sync => Err("the device is gone".into()),
            Command::Scrub => {
                for done in 0..3 {
                    progress(Progress { done, total: 3 }).map_err(|error| error.to_string())?;
                }
                Ok(json!("done"))
            }
            Command::Relocate(scope) => Ok(json!(format!("{scope:?}"))),
            Command::Grow(_) | Command::Shrink(_) => Ok(json!(format!("{command:?}"))),
            Command::Dedupe(range) => Ok(json!(range)),
        }
    }
}

struct Fixture {
    scratch: tempfile::TempDir,
    server: Option<ControlServer>,
}

impl Fixture {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let server = ControlServer::start(&scratch.path().join("c.sock"), None, Arc::new(Fake)).unwrap();
        Self { scratch, server: Some(server) }
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path().join("c.sock")
    }

    fn send(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        // The server may answer and hang up before it has read all of a line that is too long.
        let _hung_up = stream.write_all(bytes);
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        answer
    }
}

#[test]
fn command_gets_its_result_or_its_error() {
    let fixture = Fixture::new();
    assert_eq!(ask(&fixture.socket(), Command::Status).unwrap(), json!({ "volume": "fine" }));
    let failure = ask(&fixture.socket(), Command::Sync).unwrap_err().to_string();
    assert!(failure.contains("the device is gone"), "{failure}");
}

#[test]
fn progress_comes_before_the_answer() {
    let fixture = Fixture::new();
    let mut seen = Vec::new();
    let answer = ask_and_watch(&fixture.socket(), Command::Scrub, &mut |progress| seen.push(progress.done));
    assert_eq!((answer.unwrap(), seen), (json!("done"), vec![0, 1, 2]));
    assert_eq!(ask(&fixture.socket(), Command::Scrub).unwrap(), json!("done"));
}

#[test]
fn relocation_is_asked_for_with_its_group_or_for_all_groups() {
    let fixture = Fixture::new();
    for scope in [RelocateScope::All, RelocateScope::Group(0), RelocateScope::Group(77)] {
        let answer = ask(&fixture.socket(), Command::Relocate(scope)).unwrap();
        assert_eq!(answer, json!(format!("{scope:?}")));
    }
}

#[test]
fn size_is_asked_for_in_bytes() {
    let fixture = Fixture::new();
    for command in [Command::Grow(None), Command::Grow(Some(1 << 30)), Command::Shrink(1 << 29)] {
        assert_eq!(ask(&fixture.socket(), command).unwrap(), json!(format!("{command:?}")));
    }
    let parsed = Command::parse(b"{\"version\":1,\"command\":\"shrink\"}");
    assert_eq!(parsed, Err("shrink needs a number of bytes".to_owned()));
}

#[test]
fn deduplication_is_asked_for_with_its_range() {
    let fixture = Fixture::new();
    let range = SharedRange { source: 9, source_offset: 0, target: 10, target_offset: 4096, length: 8192 };
    assert_eq!(ask(&fixture.socket(), Command::Dedupe(range)).unwrap(), json!(range));
    let parsed = Command::parse(b"{\"version\":1,\"command\":\"dedupe\"}");
    assert_eq!(parsed, Err("dedupe needs a range".to_owned()));
}

#[test]
fn one_connection_carries_several_requests() {
    let fixture = Fixture::new();
    let mut stream = UnixStream::connect(fixture.socket()).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    for _ in 0..3 {
        stream.write_all(b"{\"version\":1,\"command\":\"status\"}\n").unwrap();
        let mut answer = String::new();
        reader.read_line(&mut answer).unwrap();
        assert_eq!(answer, "{\"version\":1,\"result\":{\"volume\":\"fine\"}}\n");
    }
}

#[test]
fn malformed_requests_are_answered_and_end_the_connection() {
    let fixture = Fixture::new();
    let cases: [(&[u8], &str); 6] = [
        (b"\n", "not a request"),
        (b"\xff\xfe\n", "not a request"),
        (b"[[[[[[\n", "not a request"),
        (b"{\"version\":1}\n", "not a request"),
        (b"{\"version\":2,\"command\":\"status\"}\n", "speaks version 1"),
        (b"{\"version\":1,\"command\":\"fly\"}\n", "unknown command"),
    ];
    for (line, expected) in cases {
        let answer = fixture.send(line);
        assert!(answer.contains(expected), "{answer}");
    }
}

#[test]
fn endless_line_is_cut_off() {
    let fixture = Fixture::new();
    let answer = fixture.send(&vec![b'x'; usize::try_from(REQUEST_LIMIT).unwrap() * 4]);
    assert!(answer.contains("at most"), "{answer}");
}

#[test]
fn one_client_too_many_is_told_so() {
    let fixture = Fixture::new();
    let mut clients = Vec::new();
    for _ in 0..CLIENT_LIMIT {
        let mut stream = UnixStream::connect(fixture.socket()).unwrap();
        // An answer proves that the client was admitted.
        stream.write_all(b"{\"version\":1,\"command\":\"status\"}\n").unwrap();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
        clients.push(stream);
    }
    let mut answer = String::new();
    UnixStream::connect(fixture.socket()).unwrap().read_to_string(&mut answer).unwrap();
    assert!(answer.contains("try again later"), "{answer}");
}

#[test]
fn stopping_ends_waiting_clients_and_removes_the_socket() {
    let mut fixture = Fixture::new();
    let mut silent = UnixStream::connect(fixture.socket()).unwrap();
    silent.write_all(b"{\"version\":1,\"command\":\"status\"}\n").unwrap();
    BufReader::new(silent.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
    fixture.server = None;
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
    assert!(!fixture.socket().exists());
}

#[test]
fn socket_is_for_its_user_alone() {
    let fixture = Fixture::new();
    let mode = std::fs::metadata(fixture.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn living_socket_is_respected_and_dead_one_replaced() {
    let fixture = Fixture::new();
    let taken = ControlServer::start(&fixture.socket(), None, Arc::new(Fake)).err().unwrap().to_string();
    assert!(taken.contains("another daemon"), "{taken}");
    let dead = fixture.scratch.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let server = ControlServer::start(&dead, None, Arc::new(Fake)).unwrap();
    assert!(ask(&dead, Command::Status).is_ok());
    drop(server);
    std::fs::write(&dead, "mine").unwrap();
    assert!(ControlServer::start(&dead, None, Arc::new(Fake)).is_err());
    assert_eq!(std::fs::read(&dead).unwrap(), b"mine");
}

#[test]
fn link_leads_to_a_socket_elsewhere() {
    let scratch = tempfile::tempdir().unwrap();
    let (socket, link) = (scratch.path().join("c.sock"), scratch.path().join("0-1.sock"));
    std::os::unix::fs::symlink("/nowhere", &link).unwrap();
    let server = ControlServer::start(&socket, Some(&link), Arc::new(Fake)).unwrap();
    assert!(ask(&link, Command::Status).is_ok());
    drop(server);
    assert!(std::fs::symlink_metadata(&link).is_err());
}
