//! Identify Controller (NVMe 1.4 §5.15.2.2, with 2.0's additions), field by field in the order of the specification.

use nvme_spec::identify::IdentifyController;
use serde_json::{Value, json};

use super::fields::{Bits, Field};
use crate::cli::smart::temperature;
use crate::quantity::show_size;

const CMIC: Bits = &[
    (0, "several ports"),
    (1, "several controllers"),
    (2, "controller of a virtual function"),
    (3, "asymmetric namespace access"),
];
const OAES: Bits = &[
    (8, "namespace attribute notices"),
    (9, "firmware activation notices"),
    (11, "asymmetric namespace access change notices"),
    (12, "predictable latency event notices"),
    (13, "LBA status information notices"),
    (14, "endurance group event notices"),
    (27, "zone descriptor changed notices"),
    (31, "discovery log change notices"),
];
const CTRATT: Bits = &[
    (0, "128-bit host identifier"),
    (1, "non-operational power state permissive mode"),
    (2, "NVM sets"),
    (3, "read recovery levels"),
    (4, "endurance groups"),
    (5, "predictable latency mode"),
    (6, "traffic based keep alive"),
    (7, "namespace granularity"),
    (8, "SQ associations"),
    (9, "UUID list"),
];
const OACS: Bits = &[
    (0, "security send and receive"),
    (1, "format NVM"),
    (2, "firmware commit and download"),
    (3, "namespace management and attachment"),
    (4, "device self-test"),
    (5, "directives"),
    (6, "NVMe-MI send and receive"),
    (7, "virtualization management"),
    (8, "doorbell buffer config"),
    (9, "get LBA status"),
    (10, "command and feature lockdown"),
];
const FRMW: Bits = &[(0, "slot 1 is read-only"), (4, "activation without reset")];
const LPA: Bits = &[
    (0, "SMART log for each namespace"),
    (1, "commands supported and effects log"),
    (2, "extended data for get log page"),
    (3, "telemetry logs"),
    (4, "persistent event log"),
    (5, "supported log pages and related logs"),
    (6, "telemetry data area 4"),
];
const ONCS: Bits = &[
    (0, "compare"),
    (1, "write uncorrectable"),
    (2, "dataset management"),
    (3, "write zeroes"),
    (4, "save and select in set and get features"),
    (5, "reservations"),
    (6, "timestamp"),
    (7, "verify"),
    (8, "copy"),
];
const FNA: Bits = &[
    (0, "format applies to all namespaces"),
    (1, "secure erase applies to all namespaces"),
    (2, "cryptographic erase"),
    (3, "no format of the broadcast namespace"),
];
const SGLS: Bits = &[
    (2, "keyed data blocks"),
    (16, "bit buckets"),
    (17, "byte aligned metadata buffer"),
    (18, "SGLs longer than the data"),
    (19, "metadata pointer to an SGL"),
    (20, "offsets in the address field"),
    (21, "transport data blocks"),
];

/// All fields. `smallest_page` is CAP.MPSMIN in bytes, the unit of MDTS.
pub(super) fn fields(data: &IdentifyController, smallest_page: u64) -> Vec<Field> {
    let mut fields = capabilities(data, smallest_page);
    fields.extend(admin_attributes(data));
    fields.extend(nvm_attributes(data));
    fields.push(power_states(data));
    fields
}

fn capabilities(data: &IdentifyController, smallest_page: u64) -> Vec<Field> {
    let version = data.ver.get();
    vec![
        Field::hex("vid", data.vid.get()),
        Field::hex("ssvid", data.ssvid.get()),
        Field::text("sn", &data.sn),
        Field::text("mn", &data.mn),
        Field::text("fr", &data.fr),
        Field::number("rab", data.rab).meaning(format!("burst of {}", power(data.rab))),
        organisation(data.ieee),
        Field::bits("cmic", data.cmic, CMIC),
        Field::number("mdts", data.mdts).meaning(largest_transfer(data.mdts, smallest_page)),
        Field::hex("cntlid", data.cntlid.get()),
        Field::hex("ver", version).meaning(format!(
            "{}.{}.{}",
            version >> 16,
            version >> 8 & 0xff,
            version & 0xff
        )),
        Field::hex("rtd3r", data.rtd3r.get()).meaning(format!("{} us", data.rtd3r.get())),
        Field::hex("rtd3e", data.rtd3e.get()).meaning(format!("{} us", data.rtd3e.get())),
        Field::bits("oaes", data.oaes.get(), OAES),
        Field::bits("ctratt", data.ctratt.get(), CTRATT),
        Field::hex("rrls", data.rrls.get()),
        Field::number("cntrltype", data.cntrltype).meaning(controller_type(data.cntrltype)),
        Field::bytes("fguid", &data.fguid),
        Field::number("crdt1", data.crdt[0].get()),
        Field::number("crdt2", data.crdt[1].get()),
        Field::number("crdt3", data.crdt[2].get()),
        Field::number("nvmsr", data.nvmsr),
        Field::number("vwci", data.vwci),
        Field::number("mec", data.mec),
    ]
}

fn admin_attributes(data: &IdentifyController) -> Vec<Field> {
    vec![
        Field::bits("oacs", data.oacs.get(), OACS),
        Field::number("acl", data.acl_z).meaning(count(data.acl_z, "abort")),
        Field::number("aerl", data.aerl_z).meaning(count(data.aerl_z, "event request")),
        Field::bits("frmw", data.frmw, FRMW).meaning(format!("slots: {}", data.frmw >> 1 & 7)),
        Field::bits("lpa", data.lpa, LPA),
        Field::number("elpe", data.elpe_z).meaning(count(data.elpe_z, "log slot")),
        Field::number("npss", data.npss_z).meaning(count(data.npss_z, "power state")),
        Field::hex("avscc", data.avscc),
        Field::hex("apsta", data.apsta),
        Field::number("wctemp", data.wctemp.get()).meaning(temperature(data.wctemp.get())),
        Field::number("cctemp", data.cctemp.get()).meaning(temperature(data.cctemp.get())),
        Field::number("mtfa", data.mtfa.get()),
        Field::number("hmpre", data.hmpre.get()),
        Field::number("hmmin", data.hmmin.get()),
        Field::wide("tnvmcap", data.tnvmcap.get()).meaning(size(data.tnvmcap.get())),
        Field::wide("unvmcap", data.unvmcap.get()).meaning(size(data.unvmcap.get())),
        Field::hex("rpmbs", data.rpmbs.get()),
        Field::number("edstt", data.edstt.get()),
        Field::number("dsto", data.dsto),
        Field::number("fwug", data.fwug),
        Field::number("kas", data.kas.get()),
        Field::hex("hctma", data.hctma.get()),
        Field::number("mntmt", data.mntmt.get()).meaning(temperature(data.mntmt.get())),
        Field::number("mxtmt", data.mxtmt.get()).meaning(temperature(data.mxtmt.get())),
        Field::hex("sanicap", data.sanicap.get()),
        Field::number("hmminds", data.hmminds.get()),
        Field::number("hmmaxd", data.hmmaxd.get()),
        Field::number("nsetidmax", data.nsetidmax.get()),
        Field::number("endgidmax", data.endgidmax.get()),
        Field::number("anatt", data.anatt),
        Field::number("anacap", data.anacap),
        Field::number("anagrpmax", data.anagrpmax.get()),
        Field::number("nanagrpid", data.nanagrpid.get()),
        Field::number("pels", data.pels.get()),
        Field::number("domainid", data.domainid.get()),
        Field::wide("megcap", data.megcap.get()),
    ]
}

fn nvm_attributes(data: &IdentifyController) -> Vec<Field> {
    vec![
        Field::hex("sqes", data.sqes).meaning(entry_sizes(data.sqes)),
        Field::hex("cqes", data.cqes).meaning(entry_sizes(data.cqes)),
        Field::number("maxcmd", data.maxcmd.get()),
        Field::number("nn", data.nn.get()),
        Field::bits("oncs", data.oncs.get(), ONCS),
        Field::bits("fuses", data.fuses.get(), &[(0, "compare and write")]),
        Field::bits("fna", data.fna, FNA),
        Field::bits("vwc", data.vwc, &[(0, "volatile write cache")]).meaning(flush_all(data.vwc)),
        Field::number("awun", data.awun_z.get()).meaning(count(data.awun_z.get(), "block")),
        Field::number("awupf", data.awupf_z.get()).meaning(count(data.awupf_z.get(), "block")),
        Field::number("icsvscc", data.nvscc),
        Field::number("nwpc", data.nwpc),
        Field::number("acwu", data.acwu_z.get()).meaning(count(data.acwu_z.get(), "block")),
        Field::hex("ocfs", data.cdfs.get()),
        Field::bits("sgls", data.sgls.get(), SGLS).meaning(match data.sgls.get() & 3 {
            0 => "not supported",
            1 => "supported, any alignment",
            2 => "supported, dword aligned",
            _ => "reserved",
        }),
        Field::number("mnan", data.mnan.get()),
        Field::wide("maxdna", data.maxdna.get()),
        Field::number("maxcna", data.maxcna.get()),
        Field::text("subnqn", &data.subnqn),
    ]
}

/// The OUI: a number in JSON, as nvme-cli gives it, and six digits for people.
fn organisation(ieee: [u8; 3]) -> Field {
    let number = u32::from_le_bytes([ieee[0], ieee[1], ieee[2], 0]);
    Field { shown: Some(format!("{number:06x}")), ..Field::number("ieee", number) }
}

fn largest_transfer(mdts: u8, smallest_page: u64) -> String {
    if mdts == 0 {
        return "no limit".to_owned();
    }
    match 1_u64.checked_shl(mdts.into()).and_then(|pages| pages.checked_mul(smallest_page)) {
        Some(bytes) => show_size(bytes),
        None => "beyond 64 bits".to_owned(),
    }
}

fn power(exponent: u8) -> String {
    1_u64.checked_shl(exponent.into()).map_or_else(|| format!("2^{exponent}"), |value| value.to_string())
}

fn entry_sizes(value: u8) -> String {
    let (required, maximum) = (1_u32 << (value & 0xf), 1_u32 << (value >> 4));
    if required == maximum { format!("{required} bytes") } else { format!("{required} to {maximum} bytes") }
}

/// A zero-based count in words.
fn count(zero_based: impl Into<u32>, thing: &str) -> String {
    match zero_based.into() + 1 {
        1 => format!("1 {thing}"),
        several => format!("{several} {thing}s"),
    }
}

fn size(bytes: u128) -> String {
    u64::try_from(bytes).map_or_else(|_| "beyond 64 bits".to_owned(), show_size)
}

fn controller_type(value: u8) -> &'static str {
    match value {
        0 => "not reported",
        1 => "I/O controller",
        2 => "discovery controller",
        3 => "administrative controller",
        _ => "reserved",
    }
}

fn flush_all(vwc: u8) -> &'static str {
    match vwc >> 1 & 3 {
        0 => "flush of all namespaces not told",
        2 => "no flush of all namespaces",
        3 => "flush of all namespaces",
        _ => "reserved",
    }
}

/// Power state descriptors (§5.15.2.2, figure "Power State Descriptor Data Structure").
fn power_states(data: &IdentifyController) -> Field {
    let states = usize::from(data.npss_z).min(data.psd.len() - 1) + 1;
    let mut items = Vec::new();
    let mut notes = Vec::new();
    for (number, raw) in data.psd.iter().take(states).enumerate() {
        let word = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let double = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        let (max_power, fine) = (word(0), raw[3] & 1);
        let operational = raw[3] & 2 == 0;
        items.push(json!({
            "max_power": max_power,
            "max_power_scale": fine,
            "non-operational_state": u8::from(!operational),
            "entry_lat": double(4),
            "exit_lat": double(8),
            "read_tput": raw[12] & 0x1f,
            "read_lat": raw[13] & 0x1f,
            "write_tput": raw[14] & 0x1f,
            "write_lat": raw[15] & 0x1f,
            "idle_power": word(16),
            "idle_scale": raw[18] >> 6,
            "active_power": word(20),
            "active_power_work": raw[22] & 7,
            "active_scale": raw[22] >> 6,
        }));
        let watts = f64::from(max_power) * if fine == 1 { 0.0001 } else { 0.01 };
        let kind = if operational { "operational" } else { "non-operational" };
        let (enter, leave) = (double(4), double(8));
        notes.push(format!(
            "ps {number:>2}: at most {watts:.2} W, {kind}, enter {enter} us, leave {leave} us"
        ));
    }
    let items: Vec<Value> = items;
    Field::list("psds", items, notes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromBytes, FromZeros};

    #[test]
    fn values_without_sense_are_shown_and_do_not_panic() {
        let foreign = [0xff; size_of::<IdentifyController>()];
        let data = IdentifyController::read_from_bytes(&foreign).unwrap();
        for field in fields(&data, u64::MAX) {
            assert!(!field.name.is_empty());
        }
    }

    #[test]
    fn transfer_limit_is_said_in_bytes() {
        assert_eq!(largest_transfer(5, 4096), "128 KiB");
        assert_eq!(largest_transfer(0, 4096), "no limit");
        assert_eq!(largest_transfer(255, 4096), "beyond 64 bits");
    }

    #[test]
    fn power_states_are_as_many_as_reported() {
        let mut data = IdentifyController::new_zeroed();
        data.npss_z = 1;
        data.psd[1][0] = 100;
        data.psd[1][3] = 2;
        let field = power_states(&data);
        assert_eq!(field.value.as_array().unwrap().len(), 2);
        assert_eq!(field.value[1]["non-operational_state"], 1);
        assert!(field.notes[1].contains("1.00 W"), "{}", field.notes[1]);
    }

    #[test]
    fn oui_is_a_number_in_json_and_hexadecimal_for_people() {
        let mut data = IdentifyController::new_zeroed();
        data.ieee = [0xe4, 0xd2, 0x5c];
        let fields = fields(&data, 4096);
        let field = fields.iter().find(|field| field.name == "ieee").unwrap();
        assert_eq!(field.value, json!(0x5c_d2e4));
        assert_eq!(field.shown.as_deref(), Some("5cd2e4"));
    }
}
