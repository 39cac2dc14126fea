//! The transport against a QEMU that is not one: what a socket can say, and what a directory can lack.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;

const PATIENT: Duration = Duration::from_secs(30);

fn pair(timeout: Duration) -> (Arc<Connection>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Arc::new(Connection::on("qtest:x".into(), ours, timeout).unwrap()), theirs)
}

/// Answers each line by `answer`, until the other side ends.
fn serve(
    stream: UnixStream,
    mut answer: impl FnMut(&str) -> String + Send + 'static,
) -> JoinHandle<Vec<String>> {
    std::thread::spawn(move || {
        let mut lines = Vec::new();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut writer = stream;
        let mut line = String::new();
        while reader.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            let answer = answer(line.trim_end());
            lines.push(std::mem::take(&mut line).trim_end().to_owned());
            if writer.write_all(answer.as_bytes()).is_err() {
                break;
            }
        }
        lines
    })
}

fn is_readable(descriptor: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(descriptor, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
}

#[test]
fn answers_of_posted_writes_are_not_taken_for_that_of_a_read() {
    let (connection, theirs) = pair(PATIENT);
    let mut count = 0;
    let server = serve(theirs, move |line| {
        count += 1;
        if line.starts_with("readl") { format!("OK 0x{count:016x}\n") } else { "OK\n".to_owned() }
    });
    for round in 0..500 {
        connection.post(0x1000 + 8 * round, 7);
    }
    let value = connection.read("readl", 0x1c).unwrap();
    assert_eq!(value, 501, "the read is the 501st command, behind every doorbell");
    assert_eq!(connection.write("writel", 0x14, 0), Ok(()));
    connection.close();
    assert_eq!(server.join().unwrap().len(), 502);
}

#[test]
fn a_doorbell_never_waits_for_a_peer_that_does_not_read_and_its_latest_value_arrives() {
    let (connection, theirs) = pair(PATIENT);
    for value in 0..100_000 {
        connection.post(0x1000 + 4 * u64::from(value % 8), value);
    }
    assert!(connection.has_waiting());
    let server = serve(theirs, |_| "OK\n".to_owned());
    assert_eq!(connection.write("writel", 0x14, 1), Ok(()));
    assert!(!connection.has_waiting());
    connection.close();
    let lines = server.join().unwrap();
    for doorbell in 0..8_u64 {
        let address = format!("writel {:#x} ", 0x1000 + 4 * doorbell);
        let last = lines.iter().rfind(|line| line.starts_with(&address)).unwrap();
        assert_eq!(*last, format!("{address}{:#x}", 99_992 + doorbell));
    }
    assert_eq!(lines.last().unwrap(), "writel 0x14 0x1");
}

#[test]
fn a_peer_that_talks_nonsense_counts_as_removed_for_ever() {
    for (answer, says) in [
        ("{\"QMP\": {}}\n", "is the socket QEMU's `-qtest`?"),
        ("OK 0xzz\n", "the value `0xzz`"),
        ("OK\n", "the value ``"),
        ("\n", "no answer of qtest"),
        (&"O".repeat(100_000), "more than 256 bytes"),
    ] {
        let (connection, theirs) = pair(PATIENT);
        let answer = answer.to_owned();
        let server = serve(theirs, move |_| answer.clone());
        let error = connection.read("readl", 0).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(connection.read("readl", 0), Err(error), "the reason stays");
        assert!(is_readable(connection.removal_event()));
        connection.post(0x1000, 1);
        server.join().unwrap();
    }
}

#[test]
fn a_refusal_is_an_error_and_the_connection_lives() {
    let (connection, theirs) = pair(PATIENT);
    let server =
        serve(
            theirs,
            |line| if line.starts_with("outl") { "FAIL Unknown\n".into() } else { "OK 0x5\n".into() },
        );
    let error = connection.write("outl", 0xcf8, 1).unwrap_err();
    assert_eq!(error.to_string(), "QEMU answers `outl 0xcf8 0x1` with `FAIL Unknown`");
    assert_eq!(connection.read("inl", 0xcfc), Ok(5));
    assert!(!is_readable(connection.removal_event()));
    connection.close();
    server.join().unwrap();
}

#[test]
fn silence_has_a_deadline_and_an_end_is_seen_at_once() {
    let (connection, theirs) = pair(Duration::from_millis(50));
    let error = connection.read("readl", 0).unwrap_err();
    assert!(error.to_string().contains("no answer to `readl 0x0` within 50ms"), "{error}");
    assert!(!connection.peer_has_ended(), "nothing is known of a peer that is silent");
    drop(theirs);

    let (connection, theirs) = pair(PATIENT);
    assert!(!is_readable(connection.removal_event()));
    drop(theirs);
    assert!(is_readable(connection.removal_event()));
    assert!(connection.peer_has_ended());
    assert!(matches!(connection.read("readl", 0), Err(RequestError::Gone(_))));
    assert!(connection.peer_has_ended());
}

fn open_error(directory: &Path) -> String {
    QtestTransport::open(directory, PATIENT).err().expect("nothing usable is there").to_string()
}

#[test]
fn what_a_directory_lacks_is_named_with_what_to_do() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path();
    assert!(open_error(&directory.join("none")).contains("is the directory with QEMU's socket `qtest`"));
    assert!(open_error(directory).contains("start QEMU with `-object memory-backend-file"));
    fs::write(directory.join(RAM_NAME), [0; 4096]).unwrap();
    assert!(open_error(directory).contains("it has 4096 bytes, at least"));
    fs::File::create(directory.join(RAM_NAME)).unwrap().set_len(64 << 20).unwrap();
    assert!(open_error(directory).contains("qtest,server=on,wait=off`"), "{}", open_error(directory));
    let listener = UnixListener::bind(directory.join(SOCKET_NAME)).unwrap();
    drop(listener);
    assert!(open_error(directory).contains("Connection refused"));

    let ram = Ram::open(&directory.join(RAM_NAME)).unwrap();
    let error = open_error(directory);
    assert!(error.contains("in use by another process"), "{error}");
    drop(ram);
}

#[test]
fn a_qemu_without_an_nvme_function_is_told_to_have_one() {
    let scratch = tempfile::tempdir().unwrap();
    fs::File::create(scratch.path().join(RAM_NAME)).unwrap().set_len(64 << 20).unwrap();
    let listener = UnixListener::bind(scratch.path().join(SOCKET_NAME)).unwrap();
    let (send, receive) = mpsc::channel();
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        // Everything is there and nothing is NVMe.
        let lines =
            serve(
                stream,
                |line| if line.starts_with("inl") { "OK 0x12345678\n".into() } else { "OK\n".into() },
            );
        send.send(lines.join().unwrap()).unwrap();
    });
    assert!(open_error(scratch.path()).contains("add `-device nvme,…` to its command line"));
    server.join().unwrap();
    assert!(
        receive.recv().unwrap().iter().all(|line| line.starts_with("outl 0xcf8") || line.starts_with("inl"))
    );
}

#[test]
fn regions_are_zeroed_apart_from_each_other_and_above_the_first_megabyte() {
    use vm_memory::Bytes;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join(RAM_NAME);
    fs::write(&path, vec![0xaa; 20 << 20]).unwrap();
    let ram = Ram::open(&path).unwrap();
    let (first, second) = (ram.allocate(5000).unwrap(), ram.allocate(4096).unwrap());
    assert_eq!((first.iova(), first.slice().len(), second.iova()), (1 << 20, 8192, (1 << 20) + 8192));
    let mut bytes = vec![1; 8192];
    first.slice().read_slice(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    second.slice().write_slice(&[7; 16], 4080).unwrap();
    let mut seen = [0; 16];
    let mut file = fs::File::open(&path).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(second.iova() + 4080)).unwrap();
    file.read_exact(&mut seen).unwrap();
    assert_eq!(seen, [7; 16], "what QEMU sees of it");
    drop(first);
    assert_eq!(ram.allocate(8192).unwrap().iova(), 1 << 20);
    let error = ram.allocate(64 << 20).err().unwrap().to_string();
    assert!(error.contains("QEMU's RAM is used up"), "{error}");
}
