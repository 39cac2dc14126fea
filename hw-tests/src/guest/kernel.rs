//! The guest's kernel: Debian's package, unpacked into a cache, never installed.
//!
//! Owns: [`Kernel`], where it comes from, and [`Kernel::modules`], which says what is loaded in which order.
//!
//! Invariants: nothing outside of the cache is written to; a cache that was left half made is not used; what is missing is
//! told with the command that helps.
//!
//! Modules are taken with what they depend on, as their own `.modinfo` says: the package has no `modules.dep`, which the
//! installation would make.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// The metapackage whose dependency is the newest kernel.
const METAPACKAGE: &str = "linux-image-amd64";

/// An unpacked kernel package to use instead, as `dpkg-deb -x` leaves it.
const OWN_KERNEL: &str = "POLLUX_GUEST_KERNEL";

/// Loaded when the guest starts, in this order, each after what it depends on.
const WANTED: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "fuse",
    "vfio_virqfd",
    "vfio_iommu_type1",
    "vfio_pci",
    // The kernel's NVMe driver asks for these by name while it is loaded, which nobody would answer.
    "crct10dif_generic",
    "crc64_rocksoft_generic",
    "nvme",
    "crc32c_generic",
    "ext4",
];

/// Not loaded when the guest starts: a step does that.
const AT_HAND: &[&str] = &["e1000", "raid1", "dm_mod"];

/// A kernel and its modules, unpacked.
pub(super) struct Kernel {
    /// The image that QEMU loads.
    pub(super) image: PathBuf,
    modules: Vec<Module>,
}

/// A module of the kernel.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// Its name, with underscores.
    pub(super) name: String,
    /// The object, not compressed.
    pub(super) object: Vec<u8>,
    /// Whether it is loaded when the guest starts.
    pub(super) at_start: bool,
}

impl Kernel {
    /// The kernel from the cache, or else from Debian's archive.
    ///
    /// # Errors
    /// It cannot be had; says what to do.
    pub(super) fn obtain(cache: &Path) -> Result<Self> {
        let tree = match std::env::var_os(OWN_KERNEL) {
            Some(tree) => PathBuf::from(tree),
            None => cached(cache)?,
        };
        Self::of_tree(&tree).with_context(|| format!("the kernel package unpacked in {}", tree.display()))
    }

    /// What the guest takes along, in the order of loading.
    pub(super) fn modules(&self) -> &[Module] {
        &self.modules
    }

    fn of_tree(tree: &Path) -> Result<Self> {
        let image = only(&tree.join("boot"), "vmlinuz-")?;
        // Where /lib is a link to /usr/lib the package may say so.
        let modules = [tree.join("lib/modules"), tree.join("usr/lib/modules")]
            .into_iter()
            .find(|path| path.is_dir())
            .context("no lib/modules in it")?;
        let mut files = Vec::new();
        walk(&modules, &mut files)?;
        let mut chosen = Vec::new();
        for (names, at_start) in [(WANTED, true), (AT_HAND, false)] {
            for name in names {
                take(name, at_start, &files, &mut chosen)?;
            }
        }
        Ok(Self { image, modules: chosen })
    }
}

/// The unpacked package below `cache`, fetched if it is not there.
fn cached(cache: &Path) -> Result<PathBuf> {
    let tree = cache.join("kernel");
    if tree.is_dir() {
        return Ok(tree);
    }
    fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    // Another process may do the same: each in a directory of its own, and the last step is a rename.
    let work = tempfile::Builder::new().prefix("fetching-").tempdir_in(cache)?;
    let package = fetch(work.path())?;
    let unpacked = work.path().join("tree");
    let outcome = said(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
    ensure!(
        outcome.is_ok(),
        "dpkg-deb cannot unpack {}: {}",
        package.display(),
        outcome.unwrap_or_else(|e| e)
    );
    trim(&unpacked)?;
    match fs::rename(&unpacked, &tree) {
        Ok(()) => {}
        Err(_) if tree.is_dir() => {}
        Err(error) => return Err(error).with_context(|| format!("moving the kernel to {}", tree.display())),
    }
    Ok(tree)
}

/// Downloads the package into `directory`.
fn fetch(directory: &Path) -> Result<PathBuf> {
    let name = newest()?;
    let outcome = said(Command::new("apt-get").args(["download", &name]).current_dir(directory))?;
    if let Err(text) = outcome {
        bail!("apt-get cannot download {name} (`apt-get update` may help): {}", text.trim());
    }
    only(directory, "linux-image-")
}

/// Name of the package that the metapackage stands for now.
fn newest() -> Result<String> {
    let listing = match said(Command::new("apt-cache").args(["depends", METAPACKAGE]))? {
        Ok(listing) => listing,
        Err(text) => bail!("apt does not know {METAPACKAGE} (`apt-get update` may help): {}", text.trim()),
    };
    let depended = listing.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let name = depended.map(str::trim).find(|name| name.starts_with("linux-image-"));
    name.map(str::to_owned)
        .with_context(|| format!("{METAPACKAGE} depends on no kernel (`apt-get update` may help)"))
}

/// Standard output of a program, or its words if it failed.
fn said(command: &mut Command) -> Result<std::result::Result<String, String>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| {
        format!("cannot run {program}; the guest's kernel comes from Debian's archive, or from {OWN_KERNEL}")
    })?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

/// Removes the bulk that no guest here needs.
fn trim(tree: &Path) -> Result<()> {
    let mut files = Vec::new();
    walk(tree, &mut files)?;
    let bulky =
        ["/kernel/drivers/gpu/", "/kernel/drivers/media/", "/kernel/sound/", "/kernel/drivers/staging/"];
    let bulky_too = ["/kernel/drivers/net/wireless/", "/boot/System.map", "/kernel/drivers/infiniband/"];
    for file in files {
        let shown = file.to_string_lossy();
        if bulky.iter().chain(&bulky_too).any(|part| shown.contains(part)) {
            fs::remove_file(&file).with_context(|| file.display().to_string())?;
        }
    }
    Ok(())
}

/// The only file in `directory` whose name begins with `prefix`.
fn only(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("looking into {}", directory.display()))?;
    let found = entries
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .with_context(|| format!("no {prefix}* in {}", directory.display()))?;
    Ok(found.path())
}

fn walk(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Adds the module `name` behind what it depends on.
fn take(name: &str, at_start: bool, files: &[PathBuf], chosen: &mut Vec<Module>) -> Result<()> {
    if chosen.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let file = files.iter().find(|file| module_name(file).as_deref() == Some(name));
    // What is not there as a module is taken to be built in; what needs it and is not right fails when it is loaded.
    let Some(file) = file else { return Ok(()) };
    let object = read(file)?;
    for needed in dependencies(&object) {
        take(&needed, at_start, files, chosen)?;
    }
    chosen.push(Module { name: name.to_owned(), object, at_start });
    Ok(())
}

/// Name of the module in `file`, such as `vfio_pci` for `vfio-pci.ko.xz`.
fn module_name(file: &Path) -> Option<String> {
    let name = file.file_name()?.to_str()?;
    let (stem, _) = name.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

/// The object in `file`, unpacked if need be.
fn read(file: &Path) -> Result<Vec<u8>> {
    let unpacker = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(file).with_context(|| file.display().to_string()),
    };
    let output = Command::new(unpacker).arg("-dc").arg(file).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{unpacker} is missing: `apt-get install {unpacker}`"))?;
    ensure!(output.status.success(), "{unpacker} cannot unpack {}", file.display());
    Ok(output.stdout)
}

/// What a module's `.modinfo` says it depends on.
fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = object[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(depends: &str) -> Vec<u8> {
        format!("\x7fELF…\0license=GPL\0depends={depends}\0name=x\0").into_bytes()
    }

    fn tree(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        let directory = tree.path().join("lib/modules/6.1.0-1-amd64/kernel/drivers");
        fs::create_dir_all(&directory).unwrap();
        fs::create_dir(tree.path().join("boot")).unwrap();
        fs::write(tree.path().join("boot/vmlinuz-6.1.0-1-amd64"), "").unwrap();
        for (file, depends) in modules {
            fs::write(directory.join(file), object(depends)).unwrap();
        }
        tree
    }

    #[test]
    fn modules_come_after_what_they_depend_on_and_once() {
        let tree = tree(&[
            ("vfio-pci.ko", "vfio-pci-core,vfio"),
            ("vfio-pci-core.ko", "vfio,irqbypass"),
            ("vfio.ko", ""),
            ("irqbypass.ko", ""),
            ("e1000.ko", ""),
            ("unrelated.ko", ""),
        ]);
        let kernel = Kernel::of_tree(tree.path()).unwrap();
        let names: Vec<&str> = kernel.modules().iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["vfio", "irqbypass", "vfio_pci_core", "vfio_pci", "e1000"]);
        assert!(!kernel.modules()[4].at_start, "a step loads it");
    }

    #[test]
    fn a_package_without_a_kernel_is_told_with_its_place() {
        let tree = tree(&[]);
        fs::remove_file(tree.path().join("boot/vmlinuz-6.1.0-1-amd64")).unwrap();
        let error = format!("{:#}", Kernel::of_tree(tree.path()).err().unwrap());
        assert!(error.contains("no vmlinuz-*"), "{error}");
    }
}
