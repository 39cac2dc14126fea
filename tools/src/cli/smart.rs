//! `pollux smart`: the SMART / Health log page (NVMe 1.4 §5.14.1.2), in nvme-cli's names and units.

use clap::Args;
use nvme_spec::log::{CriticalWarning, SmartLog};
use serde_json::{Map, Value, json};

use super::print_json;
use crate::device::{self, DeviceSpec};
use crate::failure::{During, Failure};
use crate::output::outln;

/// Bytes of a data unit: 1,000 blocks of 512 bytes.
const DATA_UNIT: u128 = 512_000;

/// What each critical warning means.
const WARNINGS: [(CriticalWarning, &str); 6] = [
    (CriticalWarning::SPARE, "available spare is below its threshold"),
    (CriticalWarning::TEMPERATURE, "temperature is beyond a threshold"),
    (CriticalWarning::RELIABILITY, "reliability is degraded"),
    (CriticalWarning::READ_ONLY, "the medium is read-only"),
    (CriticalWarning::BACKUP, "backup of the volatile memory has failed"),
    (CriticalWarning::PMR, "the persistent memory region is read-only or unreliable"),
];

/// Show the SMART / health log of the controller (field names of nvme-cli)
#[derive(Args)]
#[command(after_help = "\
JSON: nvme-cli's keys at the top level, temperatures in kelvins, and `device`.

Example:
  pollux smart --device emu:mem,size=1GiB --json")]
pub(super) struct Smart {
    /// The device
    #[arg(long, value_name = "SPEC", value_parser = device::parse)]
    device: DeviceSpec,

    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl Smart {
    pub(super) fn run(&self) -> Result<(), Failure> {
        let controller = device::open(&self.device)?;
        let log = controller.smart_log();
        let shut = controller.shutdown().during(format_args!("{} did not shut down", self.device));
        let log = log.during(format_args!("cannot read the SMART log of {}", self.device))?;
        shut?;
        if self.json {
            let mut object = document(&log);
            object.insert("device".into(), json!(self.device.to_string()));
            return print_json(&object);
        }
        outln!("{}", self.device);
        for line in lines(&log) {
            outln!("  {line}");
        }
        Ok(())
    }
}

/// A 128-bit counter: JSON numbers beyond 64 bits are not safe to read back.
fn wide(value: u128) -> Value {
    u64::try_from(value).map_or_else(|_| json!(value.to_string()), |small| json!(small))
}

fn document(log: &SmartLog) -> Map<String, Value> {
    let fields = [
        ("critical_warning", json!(log.critical_warning)),
        ("temperature", json!(log.temperature.get())),
        ("avail_spare", json!(log.available_spare)),
        ("spare_thresh", json!(log.spare_threshold)),
        ("percent_used", json!(log.percentage_used)),
        ("endurance_grp_critical_warning_summary", json!(log.endurance_warning)),
        ("data_units_read", wide(log.data_units_read.get())),
        ("data_units_written", wide(log.data_units_written.get())),
        ("host_read_commands", wide(log.host_reads.get())),
        ("host_write_commands", wide(log.host_writes.get())),
        ("controller_busy_time", wide(log.busy_minutes.get())),
        ("power_cycles", wide(log.power_cycles.get())),
        ("power_on_hours", wide(log.power_on_hours.get())),
        ("unsafe_shutdowns", wide(log.unsafe_shutdowns.get())),
        ("media_errors", wide(log.media_errors.get())),
        ("num_err_log_entries", wide(log.error_entries.get())),
        ("warning_temp_time", json!(log.warning_temperature_minutes.get())),
        ("critical_comp_time", json!(log.critical_temperature_minutes.get())),
        ("thm_temp1_trans_count", json!(log.thermal_1_count.get())),
        ("thm_temp2_trans_count", json!(log.thermal_2_count.get())),
        ("thm_temp1_total_time", json!(log.thermal_1_seconds.get())),
        ("thm_temp2_total_time", json!(log.thermal_2_seconds.get())),
    ];
    let mut object: Map<String, Value> =
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    for (number, kelvins) in sensors(log) {
        object.insert(format!("temperature_sensor_{number}"), json!(kelvins));
    }
    object
}

/// Sensors that are there, by number from 1.
fn sensors(log: &SmartLog) -> impl Iterator<Item = (usize, u16)> {
    let kelvins = log.temperature_sensors;
    (1..).zip(kelvins).map(|(number, sensor)| (number, sensor.get())).filter(|&(_, kelvins)| kelvins != 0)
}

fn lines(log: &SmartLog) -> Vec<String> {
    let mut lines = vec![line("critical_warning", &format!("{:#x}", log.critical_warning))];
    let warning = CriticalWarning::from_bits_retain(log.critical_warning);
    lines.extend(
        WARNINGS
            .iter()
            .filter(|(bit, _)| warning.contains(*bit))
            .map(|(_, meaning)| format!("  warning: {meaning}")),
    );
    let unit = |units: u128| format!("{} ({})", grouped(units), decimal_bytes(units));
    let text = [
        ("temperature", temperature(log.temperature.get())),
        ("available_spare", format!("{}%", log.available_spare)),
        ("available_spare_threshold", format!("{}%", log.spare_threshold)),
        ("percentage_used", format!("{}%", log.percentage_used)),
        ("endurance group critical warning summary", format!("{:#x}", log.endurance_warning)),
        ("Data Units Read", unit(log.data_units_read.get())),
        ("Data Units Written", unit(log.data_units_written.get())),
        ("host_read_commands", grouped(log.host_reads.get())),
        ("host_write_commands", grouped(log.host_writes.get())),
        ("controller_busy_time", format!("{} minutes", grouped(log.busy_minutes.get()))),
        ("power_cycles", grouped(log.power_cycles.get())),
        ("power_on_hours", grouped(log.power_on_hours.get())),
        ("unsafe_shutdowns", grouped(log.unsafe_shutdowns.get())),
        ("media_errors", grouped(log.media_errors.get())),
        ("num_err_log_entries", grouped(log.error_entries.get())),
        ("Warning Temperature Time", format!("{} minutes", log.warning_temperature_minutes.get())),
        (
            "Critical Composite Temperature Time",
            format!("{} minutes", log.critical_temperature_minutes.get()),
        ),
    ];
    lines.extend(text.iter().map(|(name, value)| line(name, value)));
    lines.extend(
        sensors(log)
            .map(|(number, kelvins)| line(&format!("Temperature Sensor {number}"), &temperature(kelvins))),
    );
    let thermal = [
        ("Thermal Management T1 Trans Count", log.thermal_1_count.get().to_string()),
        ("Thermal Management T2 Trans Count", log.thermal_2_count.get().to_string()),
        ("Thermal Management T1 Total Time", format!("{} s", log.thermal_1_seconds.get())),
        ("Thermal Management T2 Total Time", format!("{} s", log.thermal_2_seconds.get())),
    ];
    lines.extend(thermal.iter().map(|(name, value)| line(name, value)));
    lines
}

fn line(name: &str, value: &str) -> String {
    format!("{name:<40} : {value}")
}

/// Degrees Celsius and kelvins, as nvme-cli shows them. 0 is "not reported".
pub(super) fn temperature(kelvins: u16) -> String {
    if kelvins == 0 {
        return "not reported".to_owned();
    }
    format!("{} °C ({kelvins} K)", i32::from(kelvins) - 273)
}

/// A number with its thousands set apart.
fn grouped(value: u128) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Data units in decimal bytes, as drives are sold.
fn decimal_bytes(units: u128) -> String {
    let mut bytes = units as f64 * DATA_UNIT as f64;
    let mut unit = "B";
    for larger in ["kB", "MB", "GB", "TB", "PB", "EB"] {
        if bytes < 1000.0 {
            break;
        }
        (bytes, unit) = (bytes / 1000.0, larger);
    }
    format!("{bytes:.2} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn warnings_are_said_in_words() {
        let mut log = SmartLog::new_zeroed();
        log.critical_warning = 0b1001;
        let text = lines(&log).join("\n");
        assert!(text.contains("spare is below") && text.contains("read-only"), "{text}");
        assert!(!text.contains("backup"), "{text}");
    }

    #[test]
    fn only_sensors_that_exist_are_shown() {
        let mut log = SmartLog::new_zeroed();
        log.temperature_sensors[2].set(300);
        let object = document(&log);
        assert_eq!(object["temperature_sensor_3"], 300);
        assert!(!object.contains_key("temperature_sensor_1"));
        assert!(
            lines(&log).iter().any(|line| line.contains("Temperature Sensor 3") && line.contains("27 °C"))
        );
    }

    #[test]
    fn units_of_counters() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(123_456), "123,456");
        assert_eq!(decimal_bytes(2), "1.02 MB");
        assert_eq!(temperature(310), "37 °C (310 K)");
        assert_eq!(wide(u128::MAX), json!(u128::MAX.to_string()));
        assert!(!grouped(u128::MAX).is_empty() && !decimal_bytes(u128::MAX).is_empty());
    }
}
