//! Binding on a machine made of files, with a kernel that reacts to what is written, and fails where a test wants it to.

use std::fs;
use std::path::Path;

use super::*;
use crate::pci::tests::FakeSystem;

const ADDRESS: &str = "0000:01:00.0";
const SECOND: &str = "0000:01:00.1";
const NVME: &str = "0x010802";

fn address() -> PciAddress {
    ADDRESS.parse().unwrap()
}

/// When an operation that fails does so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failing {
    Never,
    /// The operation of this number, without effect.
    Once(usize),
    /// The operation of this number, although it has its effect.
    OnceTooLate(usize),
    /// From this operation on.
    From(usize),
}

/// Something that happens behind the back of whoever binds.
type Meanwhile = Box<dyn FnOnce(&FakeSystem)>;

struct FakeKernel<'a> {
    system: &'a FakeSystem,
    failing: Failing,
    operations: usize,
    /// What was written, and held.
    log: Vec<String>,
    /// Block devices that somebody has claimed.
    claimed: Vec<&'static str>,
    /// Drivers that do not take anything.
    unwilling: Vec<&'static str>,
    after_override: Option<Meanwhile>,
}

impl<'a> FakeKernel<'a> {
    fn new(system: &'a FakeSystem) -> Self {
        let (failing, operations) = (Failing::Never, 0);
        let (log, claimed, unwilling) = (Vec::new(), Vec::new(), Vec::new());
        Self { system, failing, operations, log, claimed, unwilling, after_override: None }
    }

    fn failing(system: &'a FakeSystem, failing: Failing) -> Self {
        Self { failing, ..Self::new(system) }
    }

    /// Counts an operation, and says whether it has its effect and whether it reports success.
    fn next(&mut self) -> (bool, io::Result<()>) {
        let number = self.operations;
        self.operations += 1;
        let failed = Err(io::Error::from_raw_os_error(Errno::EIO as i32));
        match self.failing {
            Failing::Once(at) if at == number => (false, failed),
            Failing::OnceTooLate(at) if at == number => (true, failed),
            Failing::From(at) if at <= number => (false, failed),
            _ => (true, Ok(())),
        }
    }

    fn react(&mut self, path: &Path, value: &str) {
        let value = value.trim();
        match path.file_name().unwrap().to_str().unwrap() {
            "driver_override" => {
                assert!(path.exists(), "{}", path.display());
                fs::write(path, if value.is_empty() { "(null)\n".to_owned() } else { format!("{value}\n") })
                    .unwrap();
                if let Some(happens) = self.after_override.take() {
                    happens(self.system);
                }
            }
            "unbind" => {
                fs::remove_file(path.parent().unwrap()).expect("it is bound");
                let function = self.function(value);
                let _ = fs::rename(function.join("nvme"), function.join("unused"));
            }
            "drivers_probe" => self.probe(value),
            other => panic!("a write to {other}"),
        }
    }

    fn function(&self, address: &str) -> PathBuf {
        self.system.sysfs().function(address.parse().unwrap())
    }

    fn probe(&self, address: &str) {
        let function = self.function(address);
        if function.join("driver").exists() || fs::read_link(function.join("driver")).is_ok() {
            return;
        }
        let wanted = fs::read_to_string(function.join("driver_override")).unwrap();
        let name = match wanted.trim() {
            "" | "(null)" => "nvme",
            only => only,
        };
        let is_loaded = self.system.sysfs().sys("bus/pci/drivers").join(name).exists();
        if is_loaded && !self.unwilling.contains(&name) {
            std::os::unix::fs::symlink(format!("../../drivers/{name}"), function.join("driver")).unwrap();
            if name == "nvme" {
                let _ = fs::rename(function.join("unused"), function.join("nvme"));
            }
        }
    }
}

impl Hands for FakeKernel<'_> {
    fn write(&mut self, path: &Path, value: &str) -> io::Result<()> {
        let (acts, result) = self.next();
        let shown = self.system.inside(path);
        self.log.push(format!("{shown} ← {}", value.trim()));
        if acts {
            self.react(path, value);
        }
        result
    }

    fn hold(&mut self, node: &Path) -> io::Result<Option<File>> {
        let (_, result) = self.next();
        self.log.push(format!("hold {}", self.system.inside(node)));
        if self.claimed.iter().any(|claimed| node.ends_with(claimed)) {
            return Err(io::Error::from_raw_os_error(Errno::EBUSY as i32));
        }
        result.map(|()| None)
    }

    fn remember(&mut self, path: &Path, text: &str) -> io::Result<()> {
        let (acts, result) = self.next();
        if acts { System.remember(path, text).and(result) } else { result }
    }

    fn forget(&mut self, path: &Path) -> io::Result<()> {
        let (acts, result) = self.next();
        if acts { System.forget(path).and(result) } else { result }
    }
}

/// A controller on `driver`, with a namespace if that is the kernel's, and the files that binding writes to.
fn system(driver: Option<&str>) -> FakeSystem {
    let system = FakeSystem::new();
    add_controller(&system, ADDRESS, driver, "nvme0");
    for driver in ["nvme", "pci-stub", VFIO_PCI] {
        system.write(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
    }
    system.write("sys/bus/pci/drivers_probe", "");
    fs::create_dir_all(system.sysfs().run("")).unwrap();
    system
}

fn add_controller(system: &FakeSystem, address: &str, driver: Option<&str>, name: &str) {
    system.function(address, NVME, driver, Some(7));
    if driver == Some("nvme") {
        system.write(&format!("sys/bus/pci/devices/{address}/nvme/{name}/{name}n1/size"), "8");
        system.write(&format!("sys/class/block/{name}n1/dev"), "259:0\n");
        system.write(&format!("sys/class/block/{name}n1/{name}n1p1/partition"), "1\n");
        system.write(&format!("sys/class/block/{name}n1p1/dev"), "259:1\n");
    }
    system.write(&format!("sys/bus/pci/devices/{address}/driver_override"), "(null)\n");
}

/// Driver, override, and whether there is a record.
type State = (Option<String>, Option<String>, bool);

fn state_of(system: &FakeSystem, text: &str) -> State {
    let (sysfs, address) = (system.sysfs(), text.parse().unwrap());
    let driver = driver(&sysfs.function(address));
    (driver, plan::override_of(&sysfs, address), record::path(&sysfs, address).exists())
}

fn state(system: &FakeSystem) -> State {
    state_of(system, ADDRESS)
}

fn bound_to(driver: Option<&str>) -> State {
    (driver.map(str::to_owned), None, false)
}

fn on_vfio() -> State {
    (Some(VFIO_PCI.to_owned()), Some(VFIO_PCI.to_owned()), true)
}

fn bind_with(system: &FakeSystem, kernel: &mut FakeKernel<'_>) -> Result<Outcome, BindError> {
    carry_out(&Plan::to_bind(&system.sysfs(), &[address()])?, &system.sysfs(), kernel)
}

fn unbind_with(system: &FakeSystem, kernel: &mut FakeKernel<'_>) -> Result<Outcome, BindError> {
    carry_out(&Plan::to_unbind(&system.sysfs(), &[address()])?, &system.sysfs(), kernel)
}

fn do_bind(system: &FakeSystem) {
    assert_eq!(bind_with(system, &mut FakeKernel::new(system)).unwrap().notes, [""; 0]);
    assert_eq!(state(system), on_vfio());
}

fn do_unbind(system: &FakeSystem) {
    unbind_with(system, &mut FakeKernel::new(system)).unwrap();
}

#[test]
fn controller_goes_to_vfio_and_back_to_the_driver_it_had() {
    for driver in [Some("nvme"), Some("pci-stub"), None] {
        let system = system(driver);
        do_bind(&system);
        // Whoever has loaded meanwhile: it goes back to where it was.
        do_unbind(&system);
        assert_eq!(state(&system), bound_to(driver));
    }
}

#[test]
fn controller_is_taken_only_after_it_was_reserved_held_and_looked_at_again() {
    let system = system(Some("nvme"));
    let mut kernel = FakeKernel::new(&system);
    bind_with(&system, &mut kernel).unwrap();
    let function = format!("sys/bus/pci/devices/{ADDRESS}");
    assert_eq!(
        kernel.log,
        [
            format!("{function}/driver_override ← vfio-pci"),
            "hold dev/nvme0n1".to_owned(),
            format!("{function}/driver/unbind ← {ADDRESS}"),
            format!("sys/bus/pci/drivers_probe ← {ADDRESS}"),
        ]
    );
}

#[test]
fn doing_it_twice_changes_nothing() {
    let system = system(Some("nvme"));
    do_unbind(&system);
    assert_eq!(state(&system), bound_to(Some("nvme")));
    do_bind(&system);
    let mut kernel = FakeKernel::new(&system);
    bind_with(&system, &mut kernel).unwrap();
    assert_eq!((kernel.operations, state(&system)), (0, on_vfio()));
    do_unbind(&system);
    let mut kernel = FakeKernel::new(&system);
    unbind_with(&system, &mut kernel).unwrap();
    assert_eq!((kernel.operations, state(&system)), (0, bound_to(Some("nvme"))));
}

#[test]
fn override_of_the_administrator_comes_back() {
    let system = system(Some("nvme"));
    let file = format!("sys/bus/pci/devices/{ADDRESS}/driver_override");
    system.write(&file, "nvme\n");
    do_bind(&system);
    do_unbind(&system);
    assert_eq!(state(&system), (Some("nvme".to_owned()), Some("nvme".to_owned()), false));
}

#[test]
fn without_record_the_kernel_chooses() {
    // Without /run.
    let bare = system(Some("nvme"));
    fs::remove_dir(bare.sysfs().run("")).unwrap();
    let outcome = bind_with(&bare, &mut FakeKernel::new(&bare)).unwrap();
    assert!(outcome.notes[0].contains("will let the kernel choose"), "{outcome:?}");
    do_unbind(&bare);
    assert_eq!(state(&bare), bound_to(Some("nvme")));

    // Bound by somebody else.
    let foreign = system(Some(VFIO_PCI));
    foreign.write(&format!("sys/bus/pci/devices/{ADDRESS}/driver_override"), "vfio-pci\n");
    do_unbind(&foreign);
    assert_eq!(state(&foreign), bound_to(Some("nvme")));

    // With nobody to choose.
    let lonely = system(Some(VFIO_PCI));
    fs::remove_dir_all(lonely.sysfs().sys("bus/pci/drivers/nvme")).unwrap();
    do_unbind(&lonely);
    assert_eq!(state(&lonely), bound_to(None));
}

#[test]
fn record_of_another_device_or_a_damaged_one_is_not_believed() {
    for text in [
        "pollux bind record 1\ndevice 8086:0001\ndriver pci-stub\ndriver_override -\n",
        "pollux bind record 2\ndevice 144d:a80a\ndriver pci-stub\ndriver_override -\n",
        "pollux bind record 1\ndevice 144d:a80a\ndriver ../../x\ndriver_override -\n",
        "pollux bind record 1\ndevice 144d:a80a\n",
        "",
    ] {
        let system = system(Some(VFIO_PCI));
        system.write(&format!("run/pollux/bind/{ADDRESS}"), text);
        do_unbind(&system);
        assert_eq!(state(&system), bound_to(Some("nvme")), "{text}");
    }
}

#[test]
fn driver_that_was_unloaded_meanwhile_leaves_the_choice_to_the_kernel() {
    let system = system(Some("pci-stub"));
    do_bind(&system);
    fs::remove_dir_all(system.sysfs().sys("bus/pci/drivers/pci-stub")).unwrap();
    do_unbind(&system);
    assert_eq!(state(&system), bound_to(Some("nvme")));
}

/// Makes use of a controller, and what is to be said of it.
type Use<'a> = (&'a dyn Fn(&FakeSystem), &'static str);

/// Everything that uses a controller is named, and nothing is written.
#[test]
fn what_is_used_is_left_alone() {
    let mount = |system: &FakeSystem| {
        system.write("proc/self/mountinfo", "1 0 259:1 / /home rw - ext4 /dev/root rw\n");
    };
    let swap = |system: &FakeSystem| {
        system.write("proc/swaps", "Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2\n");
    };
    let raid = |system: &FakeSystem| {
        system.write("sys/class/block/nvme0n1p1/holders/md127", "");
        system.write("sys/class/block/md127/md/level", "raid1\n");
    };
    let open = |node: &'static str| {
        move |system: &FakeSystem| {
            system.link("proc/41/fd/3", node);
            system.write("proc/41/comm", "fio\n");
        }
    };
    let cases: [Use<'_>; 8] = [
        (&mount, "nvme0n1p1 is mounted on /home"),
        (&swap, "nvme0n1p1 is swap space"),
        (&raid, "nvme0n1p1 is held by md127 (RAID array, raid1)"),
        (&open("/dev/nvme0n1"), "/dev/nvme0n1 is open in process 41 (fio)"),
        (&open("/dev/nvme0n1p1"), "/dev/nvme0n1p1 is open in process 41 (fio)"),
        (&open("/dev/nvme0"), "/dev/nvme0 is open in process 41 (fio)"),
        (&open("/dev/ng0n1"), "/dev/ng0n1 is open in process 41 (fio)"),
        (&open("/dev/vfio/7"), "/dev/vfio/7 is open in process 41 (fio)"),
    ];
    for (use_it, expected) in cases {
        let system = system(Some("nvme"));
        use_it(&system);
        let mut kernel = FakeKernel::new(&system);
        let error = bind_with(&system, &mut kernel).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!((kernel.operations, state(&system)), (0, bound_to(Some("nvme"))), "{expected}");
    }
    for node in ["/dev/vfio/7", "/dev/vfio/devices/vfio3"] {
        let system = system(Some(VFIO_PCI));
        system.write(&format!("sys/bus/pci/devices/{ADDRESS}/vfio-dev/vfio3/dev"), "511:3\n");
        open(node)(&system);
        let mut kernel = FakeKernel::new(&system);
        let error = unbind_with(&system, &mut kernel).unwrap_err().to_string();
        assert!(error.contains(&format!("{node} is open in process 41 (fio)")), "{error}");
        assert_eq!(kernel.operations, 0);
    }
}

#[test]
fn who_comes_between_look_and_unbind_keeps_the_controller() {
    let late = system(Some("nvme"));
    let mut kernel = FakeKernel::new(&late);
    kernel.after_override = Some(Box::new(|system| {
        system.write("proc/self/mountinfo", "1 0 259:1 / /home rw - ext4 /dev/root rw\n");
    }));
    let error = bind_with(&late, &mut kernel).unwrap_err().to_string();
    assert!(error.contains("mounted on /home") && error.contains("as it was before"), "{error}");
    assert_eq!(state(&late), bound_to(Some("nvme")));
    assert!(!kernel.log.iter().any(|line| line.contains("unbind")), "{:?}", kernel.log);

    let hidden = system(Some("nvme"));
    let mut kernel = FakeKernel::new(&hidden);
    kernel.claimed = vec!["nvme0n1"];
    let error = bind_with(&hidden, &mut kernel).unwrap_err().to_string();
    assert!(error.contains("nvme0n1 is claimed") && error.contains("as it was before"), "{error}");
    assert_eq!(state(&hidden), bound_to(Some("nvme")));

    let moved = system(Some("nvme"));
    let mut kernel = FakeKernel::new(&moved);
    kernel.after_override = Some(Box::new(|system| {
        system.link(&format!("sys/bus/pci/devices/{ADDRESS}/driver"), "../../drivers/pci-stub");
    }));
    let error = bind_with(&moved, &mut kernel).unwrap_err().to_string();
    assert!(error.contains("another driver meanwhile (pci-stub)"), "{error}");
}

#[test]
fn controller_that_vfio_does_not_take_goes_back() {
    for driver in [Some("nvme"), Some("pci-stub"), None] {
        let system = system(driver);
        let mut kernel = FakeKernel::new(&system);
        kernel.unwilling = vec![VFIO_PCI];
        let error = bind_with(&system, &mut kernel).unwrap_err().to_string();
        assert!(error.contains("vfio-pci does not take it") && error.contains("as it was before"), "{error}");
        assert_eq!(state(&system), bound_to(driver));
    }
}

#[test]
fn driver_that_does_not_take_it_back_is_asked_again() {
    let system = system(Some("nvme"));
    do_bind(&system);
    let mut kernel = FakeKernel::new(&system);
    kernel.unwilling = vec!["nvme"];
    let error = unbind_with(&system, &mut kernel).unwrap_err().to_string();
    assert!(error.contains("nvme does not take it") && error.contains("tries again"), "{error}");
    do_unbind(&system);
    assert_eq!(state(&system), bound_to(Some("nvme")));
}

/// Runs `act` with a failure at each of its operations in turn, until none is met any more. Returns how many there were.
fn fail_at_each(driver: Option<&str>, prepare: fn(&FakeSystem), act: fn(&FakeSystem, Failing)) -> usize {
    for number in 0.. {
        let kinds = [Failing::Once(number), Failing::OnceTooLate(number), Failing::From(number)];
        for failing in kinds {
            let system = system(driver);
            prepare(&system);
            act(&system, failing);
            // Whatever was left behind: from there on everything works.
            do_unbind(&system);
            assert_eq!(state(&system), bound_to(driver), "{failing:?}");
            do_bind(&system);
            do_unbind(&system);
            assert_eq!(state(&system), bound_to(driver), "{failing:?}");
        }
        let system = system(driver);
        prepare(&system);
        let mut probe = FakeKernel::new(&system);
        let plan = if state(&system) == on_vfio() {
            Plan::to_unbind(&system.sysfs(), &[address()])
        } else {
            Plan::to_bind(&system.sysfs(), &[address()])
        };
        carry_out(&plan.unwrap(), &system.sysfs(), &mut probe).unwrap();
        if number >= probe.operations {
            return number;
        }
    }
    unreachable!("a plan has an end")
}

#[test]
fn binding_that_fails_anywhere_is_undone() {
    for driver in [Some("nvme"), Some("pci-stub"), None] {
        let operations = fail_at_each(
            driver,
            |_| {},
            |system, failing| {
                let before = state(system);
                match (bind_with(system, &mut FakeKernel::failing(system, failing)), failing) {
                    // The record is the only thing that may fail.
                    (Ok(outcome), Failing::Once(0) | Failing::OnceTooLate(0)) => {
                        assert_eq!((outcome.notes.len(), state(system).0.as_deref()), (1, Some(VFIO_PCI)));
                        if before.0.as_deref() != Some("nvme") && failing == Failing::Once(0) {
                            // Without a record `unbind` gives it to the kernel; that is not this test.
                            System.remember(
                            &record::path(&system.sysfs(), address()),
                            &format!(
                                "pollux bind record 1\ndevice 144d:a80a\ndriver {}\ndriver_override -\n",
                                before.0.as_deref().unwrap_or("-")
                            ),
                        )
                        .unwrap();
                        }
                    }
                    (Ok(_), _) => assert_eq!(state(system), on_vfio(), "{failing:?}"),
                    (Err(error), Failing::Once(_) | Failing::OnceTooLate(_)) => {
                        assert!(error.to_string().contains("as it was before"), "{failing:?}: {error}");
                        assert_eq!(state(system), before, "{failing:?}: {error}");
                    }
                    (Err(error), _) => {
                        let (said, now) = (error.to_string(), state(system).0);
                        let now = now.map_or("no driver".to_owned(), |now| format!("driver {now}"));
                        assert!(said.contains(&now), "{failing:?}: {said}, but it has {now}");
                        assert!(
                            said.contains("as it was before") || said.contains("tries again"),
                            "{failing:?}: {said}"
                        );
                    }
                }
            },
        );
        assert!(operations >= 3, "{operations}");
    }
}

/// A process that binds is killed, and binding is tried again: `unbind` still goes back to where it began.
#[test]
fn binding_that_was_cut_off_is_finished_by_the_next() {
    for driver in [Some("nvme"), Some("pci-stub"), None] {
        // After the record: without it nothing is known.
        for number in 1..6 {
            let system = system(driver);
            let _ = bind_with(&system, &mut FakeKernel::failing(&system, Failing::From(number)));
            do_bind(&system);
            do_unbind(&system);
            assert_eq!(state(&system), bound_to(driver), "{number}");
        }
    }
}

#[test]
fn unbinding_that_fails_anywhere_can_be_repeated() {
    for driver in [Some("nvme"), Some("pci-stub"), None] {
        let operations = fail_at_each(driver, do_bind, |system, failing| {
            if let Err(error) = unbind_with(system, &mut FakeKernel::failing(system, failing)) {
                let said = error.to_string();
                let now = state(system).0.map_or("no driver".to_owned(), |now| format!("driver {now}"));
                assert!(said.contains(&now) && said.contains("tries again"), "{failing:?}: {said}");
            }
        });
        assert!(operations >= 3, "{operations}");
    }
}

#[test]
fn controllers_of_one_group_are_bound_together_or_not_at_all() {
    let both = [address(), SECOND.parse().unwrap()];
    let crowded = || {
        let system = system(Some("nvme"));
        add_controller(&system, SECOND, Some("nvme"), "nvme1");
        system
    };
    let alone = bind_with(&crowded(), &mut FakeKernel::new(&crowded())).unwrap_err().to_string();
    assert!(alone.contains("`pollux bind 0000:01:00.0 0000:01:00.1`"), "{alone}");

    let system = crowded();
    let plan = Plan::to_bind(&system.sysfs(), &both).unwrap();
    let mut kernel = FakeKernel::new(&system);
    carry_out(&plan, &system.sysfs(), &mut kernel).unwrap();
    assert_eq!((state(&system), state_of(&system, SECOND)), (on_vfio(), on_vfio()));
    let plan = Plan::to_unbind(&system.sysfs(), &both).unwrap();
    carry_out(&plan, &system.sysfs(), &mut FakeKernel::new(&system)).unwrap();

    for number in 0..kernel.operations {
        let system = crowded();
        let plan = Plan::to_bind(&system.sysfs(), &both).unwrap();
        let mut kernel = FakeKernel::failing(&system, Failing::Once(number));
        if carry_out(&plan, &system.sysfs(), &mut kernel).is_err() {
            let now = (state(&system), state_of(&system, SECOND));
            assert_eq!(now, (bound_to(Some("nvme")), bound_to(Some("nvme"))), "{number}");
        }
    }
}

#[test]
fn nothing_is_planned_where_vfio_could_not_use_it() {
    let refused = |system: &FakeSystem| Plan::to_bind(&system.sysfs(), &[address()]).unwrap_err();
    let lonely = FakeSystem::new();
    lonely.function(ADDRESS, NVME, Some("nvme"), None);
    assert!(matches!(refused(&lonely), BindError::NoGroup { .. }));

    let open = system(Some("nvme"));
    open.write("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
    assert!(matches!(refused(&open), BindError::WithoutIommu { .. }));

    let crowded = system(Some("nvme"));
    crowded.function(SECOND, "0x020000", Some("e1000e"), Some(7));
    let error = refused(&crowded).to_string();
    for said in ["0000:01:00.1, bound to the driver e1000e (a network controller)", "driver/unbind", "slot"] {
        assert!(error.contains(said), "{error}");
    }

    let unloaded = system(Some("nvme"));
    fs::remove_dir_all(unloaded.sysfs().sys("bus/pci/drivers/vfio-pci")).unwrap();
    assert!(refused(&unloaded).to_string().contains("modprobe vfio-pci"));

    let other = system(Some("uio_pci_generic"));
    let error = refused(&other).to_string();
    assert!(error.contains("uio_pci_generic") && error.contains("driver/unbind"), "{error}");

    let network = system(None);
    network.function(ADDRESS, "0x020000", Some("e1000e"), Some(7));
    assert!(refused(&network).to_string().contains("not an NVMe controller"));
    assert!(refused(&FakeSystem::new()).to_string().contains("no such PCI device"));
}

#[test]
fn a_plan_shows_each_write_and_why() {
    let system = system(Some("nvme"));
    let plan = Plan::to_bind(&system.sysfs(), &[address()]).unwrap();
    let (_, steps) = plan.steps().next().unwrap();
    let lines: Vec<String> = steps.iter().map(ToString::to_string).collect();
    for (line, expected) in lines.iter().zip([
        "run/pollux/bind/0000:01:00.0 ← device 144d:a80a, driver nvme, driver_override -",
        "devices/0000:01:00.0/driver_override ← vfio-pci  (no other driver may take it from now on)",
        "dev/nvme0n1 is opened exclusively",
        "looked up again",
        "devices/0000:01:00.0/driver/unbind ← 0000:01:00.0  (nvme lets go of it)",
        "drivers_probe ← 0000:01:00.0  (vfio-pci takes it)",
        "has to be vfio-pci",
    ]) {
        assert!(line.contains(expected), "{line}\n{expected}");
    }
    assert_eq!(lines.len(), 7);
    assert_eq!(state(&system), bound_to(Some("nvme")));
}

#[test]
fn refusals_of_the_system_say_what_to_do() {
    struct Refusing(Errno);
    impl Hands for Refusing {
        fn write(&mut self, _: &Path, _: &str) -> io::Result<()> {
            Err(self.0.into())
        }
        fn hold(&mut self, _: &Path) -> io::Result<Option<File>> {
            Err(self.0.into())
        }
        fn remember(&mut self, _: &Path, _: &str) -> io::Result<()> {
            Err(self.0.into())
        }
        fn forget(&mut self, _: &Path) -> io::Result<()> {
            Err(self.0.into())
        }
    }
    let system = system(Some("nvme"));
    let plan = Plan::to_bind(&system.sysfs(), &[address()]).unwrap();
    let said = |errno| carry_out(&plan, &system.sysfs(), &mut Refusing(errno)).unwrap_err().to_string();
    assert!(said(Errno::EACCES).ends_with("only root may bind drivers"), "{}", said(Errno::EACCES));
    assert!(said(Errno::EROFS).contains("do it on the host"), "{}", said(Errno::EROFS));
    assert!(said(Errno::EIO).contains("Input/output error"), "{}", said(Errno::EIO));
}
