//! Every documented form, every malformed one, and that what parses is displayed so that it parses again.

use super::*;
use proptest::prelude::*;

fn spec(text: &str) -> DeviceSpec {
    let parsed: DeviceSpec = text.parse().unwrap();
    assert_eq!(parsed.to_string().parse::<DeviceSpec>().unwrap(), parsed, "{text}");
    parsed
}

fn problem(text: &str) -> String {
    text.parse::<DeviceSpec>().unwrap_err().to_string()
}

#[test]
fn every_documented_form_parses() {
    let file = spec("emu:/var/lib/p.img,size=4GiB,lba=512,queues=4,ns=2");
    assert_eq!((file.queues, file.namespace), (Some(4), Some(NamespaceId::new(2))));
    let Target::Emulated(emulated) = file.target else { panic!() };
    assert_eq!(emulated.backing, EmulatedBacking::File("/var/lib/p.img".into()));
    assert_eq!((emulated.size, emulated.lba), (Some(4 << 30), Some(LbaSize::B512)));

    let memory = spec("emu:mem,size=64m,mode=threaded,mdts=5");
    let Target::Emulated(emulated) = memory.target else { panic!() };
    assert_eq!(emulated.backing, EmulatedBacking::Memory);
    assert_eq!((emulated.mode, emulated.mdts), (Some(EmulatedMode::Threaded), Some(5)));

    for (text, us) in [("80us", 80), ("5ms", 5_000), ("10000ms", 10_000_000)] {
        let Target::Emulated(emulated) = spec(&format!("emu:x,latency={text}")).target else { panic!() };
        assert_eq!((emulated.latency, emulated.iops), (Some(Duration::from_micros(us)), None));
    }
    let text = "emu:mem,size=64MiB,latency=80us,iops=400000";
    let Target::Emulated(emulated) = spec(text).target else { panic!() };
    assert_eq!(emulated.iops, Some(400_000));
    assert_eq!(spec(text).to_string(), text);

    assert_eq!(spec("emu:./mem").to_string(), "emu:./mem");
    assert_eq!(spec("pci:0000:01:00.0").to_string(), "pci:0000:01:00.0");
    assert_eq!(spec("pci:01:00.0"), spec("pci:0000:01:00.0"));
    assert_eq!(spec("qtest:/tmp/q,queues=2").target, Target::Qtest("/tmp/q".into()));
    assert_eq!(spec("vfio-user:/run/x/cntrl,ns=3").namespace, Some(NamespaceId::new(3)));
}

#[test]
fn what_a_controller_offers_can_be_chosen() {
    let text = "emu:x,sgls=dword,shadow=on,cache=off,mpsmin=16k,dstrd=2,meta=8,ns7=1GiB,ns2=16MiB,ns=7";
    let parsed = spec(text);
    assert_eq!(parsed.namespace, Some(NamespaceId::new(7)));
    let Target::Emulated(emulated) = parsed.target else { panic!() };
    assert_eq!(emulated.sgls, Some(SglSupport::Dword));
    assert_eq!(emulated.shadow, Some(ShadowDoorbells::Offered));
    assert_eq!(emulated.cache, Some(WriteCache::Absent));
    assert_eq!((emulated.mpsmin, emulated.dstrd, emulated.metadata), (Some(2), Some(2), Some(8)));
    let more = [(NamespaceId::new(2), 16 << 20), (NamespaceId::new(7), 1 << 30)];
    assert_eq!(emulated.more_namespaces, more);
    for (text, again) in [("sgls=on", "sgls=on"), ("sgls=off", "sgls=off"), ("mpsmin=4096", "mpsmin=4KiB")] {
        assert_eq!(spec(&format!("emu:x,{text}")).to_string(), format!("emu:x,{again}"));
    }
    assert_eq!(namespace_path(Path::new("/d/x"), NamespaceId::new(7)), Path::new("/d/x.ns7"));
}

#[test]
fn every_malformed_spec_says_what_to_do() {
    for (text, says) in [
        ("", "must begin with"),
        ("disk.img", "must begin with"),
        ("nvme:x", "must begin with"),
        ("emu:", "a file or `mem`"),
        ("emu:,size=1GiB", "a file or `mem`"),
        ("emu:mem", "write `emu:mem,size=1GiB`"),
        ("emu:x,", "`` is not of the form `option=value`"),
        ("emu:x,size", "`size` is not of the form"),
        ("emu:x,size=", "such as 4096"),
        ("emu:x,size=0", "must not be 0"),
        ("emu:x,size=-1", "such as 4096"),
        ("emu:x,size=4 GiB", "` GiB` is not a unit"),
        ("emu:x,size=99999999999999999999", "too large"),
        ("emu:x,size=9999999TiB", "exceeds"),
        ("emu:x,size=1000", "not a multiple of the block size of 512"),
        ("emu:x,size=512,lba=4096", "not a multiple of the block size of 4096"),
        ("emu:x,lba=1024", "expected 512 or 4096"),
        ("emu:x,mode=fast", "expected inline or threaded"),
        ("emu:x,latency=80", "as 80us or 5ms"),
        ("emu:x,latency=0us", "as 80us or 5ms"),
        ("emu:x,latency=+1us", "as 80us or 5ms"),
        ("emu:x,latency=10001ms", "up to 10 s"),
        ("emu:x,latency=1us,mode=inline", "needs `mode=threaded`"),
        ("emu:x,iops=400000", "needs `latency`"),
        ("emu:x,latency=1us,iops=0", "from 1 to 100000000"),
        ("emu:x,queues=0", "from 1 to 65534"),
        ("emu:x,queues=65535", "from 1 to 65534"),
        ("emu:x,ns=0", "from 1 to 4294967294"),
        ("emu:x,ns=1,ns=2", "`ns` is given twice"),
        ("emu:x,speed=9", "those are size, lba, mode, mdts, latency, iops, sgls, shadow"),
        ("emu:x,sgls=byte", "expected on, dword or off"),
        ("emu:x,shadow=yes", "expected on or off"),
        ("emu:x,cache=", "expected on or off"),
        ("emu:x,cache=on,cache=off", "`cache` is given twice"),
        ("emu:x,mpsmin=2k", "expected 4KiB"),
        ("emu:x,mpsmin=12k", "expected 4KiB"),
        ("emu:x,mpsmin=128k", "expected 4KiB"),
        ("emu:x,dstrd=11", "from 0 to 10"),
        ("emu:x,meta=129", "from 0 to 128"),
        ("emu:x,ns1=1MiB", "the size of namespace 1 is `size`"),
        ("emu:x,ns02=1MiB", "identifiers of further namespaces are 2 to 65535"),
        ("emu:x,ns65536=1MiB", "identifiers of further namespaces are 2 to 65535"),
        ("emu:x,ns2=0", "must not be 0"),
        ("emu:x,ns2=1MiB,ns2=2MiB", "`ns2` is given twice"),
        ("emu:x,ns2=1536,lba=4096", "`ns2=1536` is not a multiple of the block size of 4096"),
        ("emu:x,nsx=1", "`nsx` is not an option"),
        ("pci:0000:01:00.0,ns2=1MiB", "those are queues, ns"),
        ("pci:", "such as `0000:01:00.0`"),
        ("pci:01:00", "the function is missing"),
        ("pci:0000:01:20.0", "`pollux list`"),
        ("pci:0000:01:00.8", "`pollux list`"),
        ("pci:0000:01:00.0,size=1GiB", "those are queues, ns"),
        ("pci:0000:+1:00.0", "`pollux list`"),
        ("vfio-user:", "the path of a socket"),
        ("qtest:", "the directory with QEMU's socket"),
        ("qtest:/tmp/q,size=1GiB", "those are queues, ns"),
    ] {
        let message = problem(text);
        assert!(message.contains(says), "{text}: {message}");
        assert!(message.starts_with(&format!("device spec `{text}`")), "{message}");
    }
}

#[test]
fn suffixes_are_those_of_fio() {
    for (text, bytes) in
        [("1k", 1024), ("1KiB", 1024), ("1kB", 1000), ("3G", 3 << 30), ("7", 7), ("2TiB", 2 << 40)]
    {
        assert_eq!(parse_size(text), Ok(bytes), "{text}");
    }
}

proptest! {
    #[test]
    fn any_options_that_parse_round_trip(options in prop::collection::vec((
        prop::sample::select(vec!["size", "lba", "mode", "mdts", "latency", "iops", "sgls", "shadow", "cache", "mpsmin",
            "dstrd", "meta", "ns", "ns2", "ns7", "ns65535", "ns65536", "queues"]),
        prop::sample::select(vec!["on", "off", "dword", "0", "1", "2", "8", "512", "4096", "4k", "8KiB", "64k",
            "1MiB", "inline", "threaded", "80us"]),
    ), 0..5)) {
        let options: String = options.iter().map(|(key, value)| format!(",{key}={value}")).collect();
        if let Ok(parsed) = format!("emu:x{options}").parse::<DeviceSpec>() {
            prop_assert_eq!(parsed.to_string().parse::<DeviceSpec>().unwrap(), parsed);
        }
    }

    #[test]
    fn no_string_panics_and_what_parses_round_trips(text in "(emu|pci|vfio-user|qtest)?:?[a-z0-9:.,=/GiB]{0,40}") {
        if let Ok(parsed) = text.parse::<DeviceSpec>() {
            prop_assert_eq!(parsed.to_string().parse::<DeviceSpec>().unwrap(), parsed);
        }
    }
}
