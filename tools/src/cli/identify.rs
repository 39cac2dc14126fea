//! `pollux identify`: what a controller and its namespaces say about themselves, in nvme-cli's field names.

use clap::Args;
use nvme_spec::identify::{IdentifyController, IdentifyNamespace};
use serde_json::{Map, Value, json};

use super::print_json;
use crate::device::{self, DeviceSpec};
use crate::failure::Failure;
use crate::output::outln;

/// Show what the controller and its active namespaces say about themselves (field names of nvme-cli)
#[derive(Args)]
#[command(after_help = "Example:\n  pollux identify --device emu:mem,size=1GiB --json")]
pub(super) struct Identify {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// Print one JSON document: {device, controller: {...}, namespaces: [{nsid, ...}]}
    #[arg(long)]
    json: bool,
}

/// Fields in the order of the specification.
type Fields = Vec<(&'static str, Value)>;

impl Identify {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let identity = device::identify(&self.device)?;
        let controller = controller_fields(&identity.controller);
        let namespaces = identity.namespaces.iter().map(|(nsid, data)| (*nsid, namespace_fields(data)));
        if self.json {
            let namespaces: Vec<Value> = namespaces
                .map(|(nsid, fields)| {
                    let mut object = object(fields);
                    object.insert("nsid".into(), json!(nsid));
                    Value::Object(object)
                })
                .collect();
            return print_json(&json!({
                "device": self.device.to_string(),
                "controller": object(controller),
                "namespaces": namespaces,
            }));
        }
        outln!("{}", self.device);
        print_fields(&controller);
        for (nsid, fields) in namespaces {
            outln!("namespace {nsid}");
            print_fields(&fields);
        }
        Ok(())
    }
}

fn object(fields: Fields) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn print_fields(fields: &Fields) {
    for (name, value) in fields {
        match value {
            Value::String(text) => outln!("  {name:<10}: {text}"),
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    outln!("  {:<10}: {item}", format!("{name}[{index}]"));
                }
            }
            other => outln!("  {name:<10}: {other}"),
        }
    }
}

/// Text of a fixed field: printable ASCII, padding removed. Foreign bytes, so everything else is escaped.
fn text(bytes: &[u8]) -> Value {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    json!(bytes[..end].trim_ascii().escape_ascii().to_string())
}

fn hex(bytes: &[u8]) -> Value {
    json!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// A 128-bit number: JSON numbers beyond 64 bits are not safe to read back.
fn wide(value: u128) -> Value {
    u64::try_from(value).map_or_else(|_| json!(value.to_string()), |small| json!(small))
}

fn controller_fields(data: &IdentifyController) -> Fields {
    let ieee = [data.ieee[2], data.ieee[1], data.ieee[0]];
    vec![
        ("vid", json!(data.vid.get())),
        ("ssvid", json!(data.ssvid.get())),
        ("sn", text(&data.sn)),
        ("mn", text(&data.mn)),
        ("fr", text(&data.fr)),
        ("rab", json!(data.rab)),
        ("ieee", hex(&ieee)),
        ("cmic", json!(data.cmic)),
        ("mdts", json!(data.mdts)),
        ("cntlid", json!(data.cntlid.get())),
        ("ver", json!(data.ver.get())),
        ("rtd3r", json!(data.rtd3r.get())),
        ("rtd3e", json!(data.rtd3e.get())),
        ("oaes", json!(data.oaes.get())),
        ("ctratt", json!(data.ctratt.get())),
        ("rrls", json!(data.rrls.get())),
        ("cntrltype", json!(data.cntrltype)),
        ("fguid", hex(&data.fguid)),
        ("crdt1", json!(data.crdt[0].get())),
        ("crdt2", json!(data.crdt[1].get())),
        ("crdt3", json!(data.crdt[2].get())),
        ("nvmsr", json!(data.nvmsr)),
        ("vwci", json!(data.vwci)),
        ("mec", json!(data.mec)),
        ("oacs", json!(data.oacs.get())),
        ("acl", json!(data.acl_z)),
        ("aerl", json!(data.aerl_z)),
        ("frmw", json!(data.frmw)),
        ("lpa", json!(data.lpa)),
        ("elpe", json!(data.elpe_z)),
        ("npss", json!(data.npss_z)),
        ("avscc", json!(data.avscc)),
        ("apsta", json!(data.apsta)),
        ("wctemp", json!(data.wctemp.get())),
        ("cctemp", json!(data.cctemp.get())),
        ("mtfa", json!(data.mtfa.get())),
        ("hmpre", json!(data.hmpre.get())),
        ("hmmin", json!(data.hmmin.get())),
        ("tnvmcap", wide(data.tnvmcap.get())),
        ("unvmcap", wide(data.unvmcap.get())),
        ("rpmbs", json!(data.rpmbs.get())),
        ("edstt", json!(data.edstt.get())),
        ("dsto", json!(data.dsto)),
        ("fwug", json!(data.fwug)),
        ("kas", json!(data.kas.get())),
        ("hctma", json!(data.hctma.get())),
        ("mntmt", json!(data.mntmt.get())),
        ("mxtmt", json!(data.mxtmt.get())),
        ("sanicap", json!(data.sanicap.get())),
        ("hmminds", json!(data.hmminds.get())),
        ("hmmaxd", json!(data.hmmaxd.get())),
        ("nsetidmax", json!(data.nsetidmax.get())),
        ("endgidmax", json!(data.endgidmax.get())),
        ("anatt", json!(data.anatt)),
        ("anacap", json!(data.anacap)),
        ("anagrpmax", json!(data.anagrpmax.get())),
        ("nanagrpid", json!(data.nanagrpid.get())),
        ("pels", json!(data.pels.get())),
        ("domainid", json!(data.domainid.get())),
        ("megcap", wide(data.megcap.get())),
        ("sqes", json!(data.sqes)),
        ("cqes", json!(data.cqes)),
        ("maxcmd", json!(data.maxcmd.get())),
        ("nn", json!(data.nn.get())),
        ("oncs", json!(data.oncs.get())),
        ("fuses", json!(data.fuses.get())),
        ("fna", json!(data.fna)),
        ("vwc", json!(data.vwc)),
        ("awun", json!(data.awun_z.get())),
        ("awupf", json!(data.awupf_z.get())),
        ("icsvscc", json!(data.nvscc)),
        ("nwpc", json!(data.nwpc)),
        ("acwu", json!(data.acwu_z.get())),
        ("ocfs", json!(data.cdfs.get())),
        ("sgls", json!(data.sgls.get())),
        ("mnan", json!(data.mnan.get())),
        ("maxdna", wide(data.maxdna.get())),
        ("maxcna", json!(data.maxcna.get())),
        ("subnqn", text(&data.subnqn)),
    ]
}

fn namespace_fields(data: &IdentifyNamespace) -> Fields {
    let formats = usize::from(data.nlbaf_z) + 1;
    let formats: Vec<Value> = data
        .lbaf
        .iter()
        .take(formats)
        .map(|format| json!({ "ms": format.ms.get(), "ds": format.lbads, "rp": format.rp & 3 }))
        .collect();
    vec![
        ("nsze", json!(data.nsze.get())),
        ("ncap", json!(data.ncap.get())),
        ("nuse", json!(data.nuse.get())),
        ("nsfeat", json!(data.nsfeat)),
        ("nlbaf", json!(data.nlbaf_z)),
        ("flbas", json!(data.flbas)),
        ("mc", json!(data.mc)),
        ("dpc", json!(data.dpc)),
        ("dps", json!(data.dps)),
        ("nmic", json!(data.nmic)),
        ("rescap", json!(data.rescap)),
        ("fpi", json!(data.fpi)),
        ("dlfeat", json!(data.dlfeat)),
        ("nawun", json!(data.nawun_z.get())),
        ("nawupf", json!(data.nawupf_z.get())),
        ("nacwu", json!(data.nacwu_z.get())),
        ("nabsn", json!(data.nabsn_z.get())),
        ("nabo", json!(data.nabo.get())),
        ("nabspf", json!(data.nabspf_z.get())),
        ("noiob", json!(data.noiob.get())),
        ("nvmcap", wide(data.nvmcap.get())),
        ("npwg", json!(data.npwg_z.get())),
        ("npwa", json!(data.npwa_z.get())),
        ("npdg", json!(data.npdg_z.get())),
        ("npda", json!(data.npda_z.get())),
        ("nows", json!(data.nows_z.get())),
        ("mssrl", json!(data.mssrl.get())),
        ("mcl", json!(data.mcl.get())),
        ("msrc", json!(data.msrc_z)),
        ("anagrpid", json!(data.anagrpid.get())),
        ("nsattr", json!(data.nsattr)),
        ("nvmsetid", json!(data.nvmsetid.get())),
        ("endgid", json!(data.endgid.get())),
        ("nguid", hex(&data.nguid)),
        ("eui64", hex(&data.eui64)),
        ("lbafs", json!(formats)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_text_is_trimmed_and_foreign_bytes_are_escaped() {
        assert_eq!(text(b"Pollux  \0\0"), json!("Pollux"));
        assert_eq!(text(b"a\x1b[2J\xff"), json!("a\\x1b[2J\\xff"));
    }

    #[test]
    fn numbers_beyond_64_bits_become_text() {
        assert_eq!(wide(7), json!(7));
        assert_eq!(wide(1 << 64), json!("18446744073709551616"));
    }
}
