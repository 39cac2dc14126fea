//! [`PciAddress`]: where a function sits, and how people write that.
//!
//! Excludes: whether anything is there.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Address of a PCI function: domain, bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl PciAddress {
    /// The domain (segment); 0 on most machines.
    pub fn domain(self) -> u32 {
        self.domain
    }

    /// The bus.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// The device on the bus, below 32.
    pub fn device(self) -> u8 {
        self.device
    }

    /// The function of the device, below 8.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    /// As sysfs names it: `0000:01:00.0`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

/// Not the address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{text}` is not a PCI address such as `0000:01:00.0` or `01:00.0`: {problem}")]
pub struct PciAddressError {
    /// What was written.
    pub text: String,
    /// What is wrong with it.
    pub problem: PciAddressProblem,
}

/// What is wrong with a PCI address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PciAddressProblem {
    /// Too few or too many colons.
    #[error("it needs bus and device, with the domain before them if it is not 0000")]
    Fields,
    /// No dot in the last field.
    #[error("the function is missing: `.0` after the device")]
    NoFunction,
    /// A field that is not of the right number of hexadecimal digits.
    #[error("the {field} `{value}` is not {digits} hexadecimal digits")]
    Digits {
        /// Name of the field.
        field: &'static str,
        /// What was written.
        value: String,
        /// How many are expected.
        digits: &'static str,
    },
    /// A field beyond its range.
    #[error("the {field} {value:#x} is beyond {last:#x}")]
    Range {
        /// Name of the field.
        field: &'static str,
        /// What was written.
        value: u32,
        /// Largest value.
        last: u32,
    },
}

impl FromStr for PciAddress {
    type Err = PciAddressError;

    /// Reads `0000:01:00.0`, or `01:00.0` in domain 0.
    fn from_str(text: &str) -> Result<Self, PciAddressError> {
        parse(text).map_err(|problem| PciAddressError { text: text.to_owned(), problem })
    }
}

fn parse(text: &str) -> Result<PciAddress, PciAddressProblem> {
    let fields: Vec<&str> = text.split(':').collect();
    let (domain, bus, rest) = match fields[..] {
        [domain, bus, rest] => (domain, bus, rest),
        [bus, rest] => ("0000", bus, rest),
        _ => return Err(PciAddressProblem::Fields),
    };
    let (device, function) = rest.split_once('.').ok_or(PciAddressProblem::NoFunction)?;
    Ok(PciAddress {
        domain: hex("domain", domain, 4..=8, "4 to 8", u32::MAX)?,
        bus: hex("bus", bus, 2..=2, "2", 0xff)? as u8,
        device: hex("device", device, 2..=2, "2", 0x1f)? as u8,
        function: hex("function", function, 1..=1, "1", 7)? as u8,
    })
}

fn hex(
    field: &'static str,
    text: &str,
    lengths: std::ops::RangeInclusive<usize>,
    digits: &'static str,
    last: u32,
) -> Result<u32, PciAddressProblem> {
    let malformed = || PciAddressProblem::Digits { field, value: text.to_owned(), digits };
    if !lengths.contains(&text.len()) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(malformed());
    }
    let value = u32::from_str_radix(text, 16).map_err(|_| malformed())?;
    if value > last { Err(PciAddressProblem::Range { field, value, last }) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn problem(text: &str) -> PciAddressProblem {
        let error = text.parse::<PciAddress>().unwrap_err();
        assert!(error.to_string().starts_with(&format!("`{text}`")), "{error}");
        error.problem
    }

    #[test]
    fn long_and_short_forms_name_the_same_function() {
        let long: PciAddress = "0000:3a:1f.7".parse().unwrap();
        assert_eq!("3A:1f.7".parse(), Ok(long));
        assert_eq!(long.to_string(), "0000:3a:1f.7");
        assert_eq!((long.domain(), long.bus(), long.device(), long.function()), (0, 0x3a, 0x1f, 7));
        assert_eq!("10000:01:00.0".parse::<PciAddress>().unwrap().domain(), 0x10000);
    }

    #[test]
    fn every_malformed_address_says_which_field() {
        assert_eq!(problem(""), PciAddressProblem::Fields);
        assert_eq!(problem("01"), PciAddressProblem::Fields);
        assert_eq!(problem("0:0000:01:00.0"), PciAddressProblem::Fields);
        assert_eq!(problem("01:00"), PciAddressProblem::NoFunction);
        for (text, name) in [
            ("00:01:00.0", "domain"),
            ("000000000:01:00.0", "domain"),
            ("1:00.0", "bus"),
            ("+1:00.0", "bus"),
            ("0000:g1:00.0", "bus"),
            ("01:0.0", "device"),
            ("01:00.", "function"),
            ("01:00.00", "function"),
            ("01:00.0 ", "function"),
        ] {
            let PciAddressProblem::Digits { field, .. } = problem(text) else { panic!("{text}") };
            assert_eq!(field, name, "{text}");
        }
        assert_eq!(problem("01:20.0"), PciAddressProblem::Range { field: "device", value: 0x20, last: 0x1f });
        assert_eq!(problem("01:00.8"), PciAddressProblem::Range { field: "function", value: 8, last: 7 });
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_round_trips(text in "[0-9a-g:.]{0,16}|\\PC{0,12}") {
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }
}
