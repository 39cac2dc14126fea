//! `pollux identify`: what a controller and its namespaces say about themselves, in nvme-cli's field names.
//!
//! Excludes: the fields themselves (`controller`, `namespace`).

use clap::Args;
use serde_json::{Map, Value, json};

use super::print_json;
use crate::device::{self, DeviceSpec};
use crate::failure::Failure;
use crate::output::outln;
use fields::Field;

mod controller;
mod fields;
mod namespace;

/// Show what the controller and its active namespaces say about themselves (field names of nvme-cli)
#[derive(Args)]
#[command(after_help = "\
JSON: {device, controller: {vid, sn, mn, ...}, namespaces: [{nsid, nsze, ..., lbafs: [{ms, ds, rp, in_use}], problem}]};
`problem` says why a namespace cannot be used, or is null.

Example:
  pollux identify --device emu:mem,size=1GiB --json")]
pub(super) struct Identify {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Identify {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let identity = device::identify(&self.device)?;
        let controller = controller::fields(&identity.controller, identity.smallest_page);
        if self.json {
            let namespaces: Vec<Value> = identity
                .namespaces
                .iter()
                .map(|entry| {
                    let mut object = object(&namespace::fields(&entry.data));
                    object.insert("nsid".into(), json!(entry.nsid));
                    object.insert("problem".into(), json!(entry.problem));
                    Value::Object(object)
                })
                .collect();
            return print_json(&json!({
                "device": self.device.to_string(),
                "controller": object(&controller),
                "namespaces": namespaces,
            }));
        }
        outln!("{}", self.device);
        print_fields(&controller);
        for entry in &identity.namespaces {
            outln!("namespace {}", entry.nsid);
            if let Some(problem) = &entry.problem {
                outln!("  cannot be used: {problem}");
            }
            print_fields(&namespace::fields(&entry.data));
        }
        if identity.namespaces.is_empty() {
            outln!("no active namespaces");
        }
        Ok(())
    }
}

fn object(fields: &[Field]) -> Map<String, Value> {
    fields.iter().map(|field| (field.name.to_owned(), field.value.clone())).collect()
}

fn print_fields(fields: &[Field]) {
    for field in fields {
        if let Some(shown) = &field.shown {
            let meaning = field.meaning.as_ref().map(|text| format!(" ({text})")).unwrap_or_default();
            outln!("  {:<10}: {shown}{meaning}", field.name);
        }
        for note in &field.notes {
            outln!("    {note}");
        }
    }
}
