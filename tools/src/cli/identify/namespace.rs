//! Identify Namespace (NVMe 1.4 §5.15.2.1, with 2.0's additions), field by field in the order of the specification.

use nvme_spec::identify::{IdentifyNamespace, LbaFormat};
use serde_json::{Value, json};

use super::fields::{Bits, Field};
use crate::quantity::show_size;

const NSFEAT: Bits = &[
    (0, "thin provisioning"),
    (1, "atomicity fields of its own"),
    (2, "error for deallocated or unwritten blocks"),
    (3, "NGUID and EUI64 are never used again"),
    (4, "preferred granularities and alignments"),
];
const MC: Bits = &[(0, "metadata within the data"), (1, "metadata in a buffer of its own")];
const DPC: Bits = &[
    (0, "protection type 1"),
    (1, "protection type 2"),
    (2, "protection type 3"),
    (3, "protection in the first bytes of metadata"),
    (4, "protection in the last bytes of metadata"),
];
const RESCAP: Bits = &[
    (0, "persist through power loss"),
    (1, "write exclusive"),
    (2, "exclusive access"),
    (3, "write exclusive, registrants only"),
    (4, "exclusive access, registrants only"),
    (5, "write exclusive, all registrants"),
    (6, "exclusive access, all registrants"),
    (7, "ignore existing key of 1.3"),
];

/// All fields.
pub(super) fn fields(data: &IdentifyNamespace) -> Vec<Field> {
    let mut fields = sizes(data);
    fields.extend(limits(data));
    fields.push(formats(data));
    fields
}

fn sizes(data: &IdentifyNamespace) -> Vec<Field> {
    let format = data.lbaf.get(data.format_index());
    let blocks = |name, count: u64| {
        let bytes = format.and_then(block_bytes).and_then(|block| block.checked_mul(count));
        let field = Field::hex(name, count);
        match bytes {
            Some(bytes) => field.meaning(show_size(bytes)),
            None => field,
        }
    };
    vec![
        blocks("nsze", data.nsze.get()),
        blocks("ncap", data.ncap.get()),
        blocks("nuse", data.nuse.get()),
        Field::bits("nsfeat", data.nsfeat, NSFEAT),
        Field::number("nlbaf", data.nlbaf_z).meaning(format!("{} formats", u32::from(data.nlbaf_z) + 1)),
        Field::hex("flbas", data.flbas).meaning(format!("format {}", data.format_index())),
        Field::bits("mc", data.mc, MC),
        Field::bits("dpc", data.dpc, DPC),
        Field::hex("dps", data.dps).meaning(match data.dps & 7 {
            0 => "no protection".to_owned(),
            kind => format!("protection type {kind}"),
        }),
        Field::bits("nmic", data.nmic, &[(0, "may be attached to several controllers")]),
        Field::bits("rescap", data.rescap, RESCAP),
        Field::hex("fpi", data.fpi),
        Field::bits(
            "dlfeat",
            data.dlfeat,
            &[(3, "deallocation in write zeroes"), (4, "guard of deallocated blocks")],
        )
        .meaning(match data.dlfeat & 7 {
            0 => "what deallocated blocks read as is not told",
            1 => "deallocated blocks read as zeroes",
            2 => "deallocated blocks read as ones",
            _ => "reserved",
        }),
    ]
}

fn limits(data: &IdentifyNamespace) -> Vec<Field> {
    vec![
        Field::number("nawun", data.nawun_z.get()),
        Field::number("nawupf", data.nawupf_z.get()),
        Field::number("nacwu", data.nacwu_z.get()),
        Field::number("nabsn", data.nabsn_z.get()),
        Field::number("nabo", data.nabo.get()),
        Field::number("nabspf", data.nabspf_z.get()),
        Field::number("noiob", data.noiob.get()),
        Field::wide("nvmcap", data.nvmcap.get()),
        Field::number("npwg", data.npwg_z.get()),
        Field::number("npwa", data.npwa_z.get()),
        Field::number("npdg", data.npdg_z.get()),
        Field::number("npda", data.npda_z.get()),
        Field::number("nows", data.nows_z.get()),
        Field::number("mssrl", data.mssrl.get()),
        Field::number("mcl", data.mcl.get()),
        Field::number("msrc", data.msrc_z),
        Field::number("anagrpid", data.anagrpid.get()),
        Field::bits("nsattr", data.nsattr, &[(0, "write protected")]),
        Field::number("nvmsetid", data.nvmsetid.get()),
        Field::number("endgid", data.endgid.get()),
        Field::bytes("nguid", &data.nguid),
        Field::bytes("eui64", &data.eui64),
    ]
}

fn formats(data: &IdentifyNamespace) -> Field {
    let count = (usize::from(data.nlbaf_z) + 1).min(data.lbaf.len());
    let used = data.format_index();
    let offered = || data.lbaf.iter().take(count).enumerate();
    let items: Vec<Value> = offered()
        .map(|(index, format)| {
            json!({ "ms": format.ms.get(), "ds": format.lbads, "rp": format.rp & 3, "in_use": index == used })
        })
        .collect();
    let notes = offered().map(|(index, format)| format_line(index, format, index == used)).collect();
    Field::list("lbafs", items, notes)
}

fn format_line(index: usize, format: &LbaFormat, used: bool) -> String {
    let bytes = block_bytes(format).map_or_else(|| "unused".to_owned(), |bytes| format!("{bytes} bytes"));
    let performance = ["best", "better", "good", "degraded"][usize::from(format.rp & 3)];
    let used = if used { " (in use)" } else { "" };
    format!(
        "lbaf {index:>2} : ms:{:<3} lbads:{:<2} rp:{:#x} {bytes}, {performance}{used}",
        format.ms.get(),
        format.lbads,
        format.rp & 3
    )
}

/// Bytes of a block; `None` for what cannot be.
fn block_bytes(format: &LbaFormat) -> Option<u64> {
    (format.lbads > 0).then(|| 1_u64.checked_shl(format.lbads.into())).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromBytes, FromZeros};

    #[test]
    fn values_without_sense_are_shown_and_do_not_panic() {
        let foreign = [0xff; size_of::<IdentifyNamespace>()];
        let data = IdentifyNamespace::read_from_bytes(&foreign).unwrap();
        assert!(!fields(&data).is_empty());
    }

    #[test]
    fn format_in_use_is_marked() {
        let mut data = IdentifyNamespace::new_zeroed();
        data.nlbaf_z = 1;
        data.flbas = 1;
        data.lbaf[0].lbads = 9;
        data.lbaf[1].lbads = 12;
        let field = formats(&data);
        assert_eq!(field.value.as_array().unwrap().len(), 2);
        assert_eq!(field.value[0]["in_use"], false);
        assert_eq!(field.value[1]["in_use"], true);
        assert!(
            field.notes[1].contains("4096 bytes") && field.notes[1].ends_with("(in use)"),
            "{:?}",
            field.notes
        );
    }
}
