//! Mapped memory that vanishes: a load or store to a mapped BAR raises SIGBUS once the device is gone, or while its memory
//! space is off; so does one to a file that its owner has shrunk. Here it becomes a read of all ones and a write that is
//! lost, as on a bus.
//!
//! The first [`Watch`] installs a handler for the process. It looks the address up among the watched mappings. If it lies
//! in one, the page is replaced by a private one full of ones, the watch is marked [gone](Watch::is_gone), and the
//! instruction is tried again. Where a single page cannot be replaced (huge pages), all of the mapping is. Any other SIGBUS goes to the handler that was there before, or ends the process as it
//! would have.
//!
//! Invariants:
//! - the handler calls nothing but `mmap`, `sigaction` and `raise`, takes no lock and allocates nothing;
//! - a slot names a range only while its mapping exists, and only that mapping's owner can end it.
//!
//! *Memory ordering*: a slot's `end` is stored before its `start` (release) and cleared after it; the handler reads `start`
//! first (acquire). `gone` is stored (release) before the faulting instruction runs again, on the thread that runs it.
//!
//! Excludes: a handler that is installed later and does not pass on what it does not know: then registers are not
//! protected any more.
#![allow(unsafe_code)] // Signal handling and mapping pages by address.

use std::io;
use std::os::fd::IntoRawFd;
use std::ptr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Mappings that can be watched at a time: a device has one or two, the client of a server up to 1,024.
const SLOTS: usize = 4096;
/// Bytes of the pages that are replaced.
const PAGE: usize = 4096;

struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    gone: AtomicBool,
}

static WATCHED: [Slot; SLOTS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), gone: AtomicBool::new(false) } };
        SLOTS];

/// A file of one page of ones; -1 until the handler is installed.
static ONES: AtomicI32 = AtomicI32::new(-1);
/// The action that was there before; never freed, since a handler may be using it.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());
/// Held while a slot is taken or the handler is installed.
static TAKING: Mutex<()> = Mutex::new(());

/// A mapping that SIGBUS in does not end the process. Must be dropped before the mapping is.
#[derive(Debug)]
pub struct Watch {
    slot: usize,
}

impl Watch {
    /// Watches `bytes` from `start` on, both multiples of the page size.
    ///
    /// # Errors
    /// All slots are in use, or the system refuses the handler.
    pub fn new(start: usize, bytes: usize) -> io::Result<Self> {
        debug_assert!(start.is_multiple_of(PAGE) && bytes.is_multiple_of(PAGE) && start != 0);
        let _taking = TAKING.lock().unwrap_or_else(PoisonError::into_inner);
        install()?;
        let slot = WATCHED
            .iter()
            .position(|slot| slot.start.load(Ordering::Acquire) == 0)
            .ok_or_else(|| io::Error::other(format!("more than {SLOTS} mapped regions")))?;
        let place = &WATCHED[slot];
        place.gone.store(false, Ordering::Relaxed);
        place.end.store(start + bytes, Ordering::Release);
        // Release: whoever sees the start also sees the end.
        place.start.store(start, Ordering::Release);
        Ok(Self { slot })
    }

    /// Whether an access of it has failed since it was watched or [mapped anew](Self::mapped_anew).
    pub fn is_gone(&self) -> bool {
        // Acquire: pairs with the handler, which may have run on another thread.
        WATCHED[self.slot].gone.load(Ordering::Acquire)
    }

    /// The owner put the device's pages back.
    pub fn mapped_anew(&self) {
        WATCHED[self.slot].gone.store(false, Ordering::Release);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHED[self.slot].end.store(0, Ordering::Release);
        WATCHED[self.slot].start.store(0, Ordering::Release);
    }
}

/// Installs the handler, once. The caller holds `TAKING`.
fn install() -> io::Result<()> {
    if ONES.load(Ordering::Acquire) >= 0 {
        return Ok(());
    }
    let ones = memfd_create("pollux-ones", MFdFlags::MFD_CLOEXEC)?;
    nix::unistd::write(&ones, &[0xff; PAGE])?;
    // SAFETY: all zeroes is a valid `sigaction`: no flags, an empty mask, the default action.
    let mut previous: Box<libc::sigaction> = Box::new(unsafe { std::mem::zeroed() });
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_sigbus as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // Asked for first: the handler must find it from the first moment.
    // SAFETY: both pointers are valid; nothing is changed.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut *previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    PREVIOUS.store(Box::into_raw(previous), Ordering::Release);
    ONES.store(ones.into_raw_fd(), Ordering::Release);
    // SAFETY: the handler keeps to what a handler may do (see the module), and `action` is valid.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } != 0 {
        let error = io::Error::last_os_error();
        ONES.store(-1, Ordering::Release);
        return Err(error);
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t` with SA_SIGINFO.
    let details = unsafe { &*info };
    let code = details.si_code;
    // SAFETY: any bits are an address, which is looked up, and looked at only if the code says that it is one.
    let address = unsafe { details.si_addr() } as usize;
    // Positive codes come from the kernel: an access. Others were sent by a program.
    if code > 0 && replace(address) {
        return;
    }
    pass_on(signal, code, info, context);
}

/// Puts a page of ones where an access failed. `false` if the address is not watched.
fn replace(address: usize) -> bool {
    let found = WATCHED.iter().find(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        start != 0 && start <= address && address < slot.end.load(Ordering::Acquire)
    });
    let Some(slot) = found else { return false };
    let errno = Errno::last_raw();
    let page = (address & !(PAGE - 1)) as *mut libc::c_void;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    // SAFETY: the page lies in a mapping whose owner watches it and so leaves it in place, and who accesses it by
    // volatile loads and stores only, which any contents suit.
    let mapped = unsafe { libc::mmap(page, PAGE, protection, flags, ONES.load(Ordering::Acquire), 0) }
        == page
        || replace_all(slot, protection, flags);
    Errno::set_raw(errno);
    if mapped {
        slot.gone.store(true, Ordering::Release);
    }
    mapped
}

/// Puts zeroes in place of a whole mapping, whose pages are too large to be replaced one by one.
fn replace_all(slot: &Slot, protection: libc::c_int, flags: libc::c_int) -> bool {
    let start = slot.start.load(Ordering::Acquire);
    let Some(bytes) = slot.end.load(Ordering::Acquire).checked_sub(start) else { return false };
    let start = start as *mut libc::c_void;
    let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: as for one page: the mapping's owner watches it and leaves it in place, and any contents suit.
    unsafe { libc::mmap(start, bytes, protection, flags, -1, 0) == start }
}

/// Does what would have been done without this module.
fn pass_on(signal: libc::c_int, code: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: set before the handler was installed, and never freed.
    let previous = unsafe { &*PREVIOUS.load(Ordering::Acquire) };
    match previous.sa_sigaction {
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: all zeroes is the default action.
            let default: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: `default` is valid.
            unsafe { libc::sigaction(signal, &raw const default, ptr::null_mut()) };
            if code <= 0 {
                // SAFETY: sends this thread a signal, which takes effect when this handler returns.
                unsafe { libc::raise(signal) };
            }
            // Otherwise the access is tried again, and now ends the process.
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: SA_SIGINFO says that it is such a function.
            let handler: Handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
            handler(signal, info, context);
        }
        handler => {
            type Handler = extern "C" fn(libc::c_int);
            // SAFETY: without SA_SIGINFO it is such a function.
            let handler: Handler = unsafe { std::mem::transmute::<usize, Handler>(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::process::Command;

    use nix::unistd::ftruncate;

    /// A file whose pages vanish when it is cut off, mapped.
    struct Vanishing {
        file: OwnedFd,
        start: *mut u8,
    }

    const BYTES: usize = 2 * PAGE;

    impl Vanishing {
        fn new() -> Self {
            let file = memfd_create("vanishing", MFdFlags::MFD_CLOEXEC).unwrap();
            ftruncate(&file, BYTES as i64).unwrap();
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let raw = std::os::fd::AsRawFd::as_raw_fd(&file);
            // SAFETY: a new mapping.
            let start = unsafe { libc::mmap(ptr::null_mut(), BYTES, protection, libc::MAP_SHARED, raw, 0) };
            assert_ne!(start, libc::MAP_FAILED);
            Self { file, start: start.cast() }
        }

        fn vanish(&self) {
            ftruncate(&self.file, 0).unwrap();
        }

        fn register(&self, offset: usize) -> *mut u32 {
            assert!(offset + 4 <= BYTES);
            self.start.wrapping_add(offset).cast()
        }

        fn read(&self, offset: usize) -> u32 {
            // SAFETY: inside the mapping, which lives as long as `self`.
            unsafe { self.register(offset).read_volatile() }
        }

        fn write(&self, offset: usize, value: u32) {
            // SAFETY: inside the mapping, which lives as long as `self`.
            unsafe { self.register(offset).write_volatile(value) };
        }
    }

    impl Drop for Vanishing {
        fn drop(&mut self) {
            // SAFETY: mapped by `new`, and nobody else has the address.
            unsafe { libc::munmap(self.start.cast(), BYTES) };
        }
    }

    #[test]
    fn vanished_registers_read_as_all_ones_and_swallow_writes() {
        let registers = Vanishing::new();
        let watch = Watch::new(registers.start as usize, BYTES).unwrap();
        registers.write(8, 7);
        assert_eq!((registers.read(8), watch.is_gone()), (7, false));
        registers.vanish();
        assert_eq!((registers.read(8), watch.is_gone()), (u32::MAX, true));
        // The second page is still the file's, and vanishes under a write.
        registers.write(PAGE + 16, 1);
        assert_eq!(registers.read(PAGE), u32::MAX);
        watch.mapped_anew();
        assert!(!watch.is_gone());
    }

    #[test]
    fn every_thread_survives() {
        let registers = Vanishing::new();
        let watch = Watch::new(registers.start as usize, BYTES).unwrap();
        registers.vanish();
        let start = registers.start as usize;
        std::thread::scope(|scope| {
            for thread in 0..8 {
                scope.spawn(move || {
                    let register = (start + thread % 2 * PAGE) as *const u32;
                    // SAFETY: inside the mapping, which outlives the scope.
                    assert_eq!(unsafe { register.read_volatile() }, u32::MAX);
                });
            }
        });
        assert!(watch.is_gone());
    }

    #[test]
    fn a_slot_is_free_again_after_its_watch() {
        for _ in 0..2 * SLOTS {
            let registers = Vanishing::new();
            let _watch = Watch::new(registers.start as usize, BYTES).unwrap();
        }
    }

    /// Not a test of its own: what [`an_unwatched_fault_still_ends_the_process`] runs in a process of its own.
    #[test]
    #[ignore = "ends its process"]
    fn fault_outside_of_any_watch() {
        let (watched, unwatched) = (Vanishing::new(), Vanishing::new());
        let _watch = Watch::new(watched.start as usize, BYTES).unwrap();
        unwatched.vanish();
        let _ = unwatched.read(0);
    }

    #[test]
    fn an_unwatched_fault_still_ends_the_process() {
        use std::os::unix::process::ExitStatusExt;
        let name = "tests::fault_outside_of_any_watch";
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", name, "--test-threads=1"])
            .output()
            .unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
    }
}
