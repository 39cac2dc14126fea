//! Lists of a file's extents as tools show them, and as the mount hands them out.
//!
//! Owns: the value of the attribute `pollux.extents.OFFSET`, which every file on a mount has and no listing shows:
//!
//! ```text
//! {"rows":[[offset,length,physical,flags],…],"next":offset}
//! ```
//!
//! All numbers are bytes; `physical` is null where nothing lies on the device, `next` at the end. The flags are a sum:
//! 1 preallocated, 2 hole, 4 queued, 8 shared, 16 lent. And the table that `pollux dump --extents` prints.
//!
//! Excludes: where the rows come from.

use std::io::{self, Write};

use fs_core::request::{ExtentList, ExtentRow, ExtentState, Sharing};
use serde::{Deserialize, Serialize};

/// Begins the names of attributes with lists; the offset to begin at follows, in decimal.
pub(crate) const LIST_ATTRIBUTE: &str = "pollux.extents.";

/// Bytes of a value at most: the kernel's limit for attributes.
pub(crate) const VALUE_LIMIT: usize = 1 << 16;

const PREALLOCATED: u8 = 1;
const HOLE: u8 = 2;
const QUEUED: u8 = 4;
const SHARED: u8 = 8;
const LENT: u8 = 16;

#[derive(Serialize, Deserialize)]
struct Value {
    rows: Vec<(u64, u64, Option<u64>, u8)>,
    next: Option<u64>,
}

fn flags_of(sharing: Sharing) -> u8 {
    u8::from(sharing.shared) * SHARED + u8::from(sharing.lent) * LENT
}

/// A list as the value of an attribute.
pub(crate) fn encode(list: &ExtentList) -> Vec<u8> {
    let row = |row: &ExtentRow| {
        let (physical, flags) = match row.state {
            ExtentState::Data { physical, sharing } => (Some(physical), flags_of(sharing)),
            ExtentState::Preallocated { physical, sharing } => {
                (Some(physical), PREALLOCATED + flags_of(sharing))
            }
            ExtentState::Hole => (None, HOLE),
            ExtentState::Queued => (None, QUEUED),
        };
        (row.offset, row.length, physical, flags)
    };
    let value = Value { rows: list.rows.iter().map(row).collect(), next: list.next };
    serde_json::to_vec(&value).unwrap_or_default()
}

/// The list that a value is. What does not fit together is refused.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn decode(value: &[u8]) -> Result<ExtentList, String> {
    let value: Value = serde_json::from_slice(value).map_err(|error| error.to_string())?;
    let row = |(offset, length, physical, flags): (u64, u64, Option<u64>, u8)| {
        let sharing = Sharing { shared: flags & SHARED != 0, lent: flags & LENT != 0 };
        let state = match (physical, flags & (PREALLOCATED | HOLE | QUEUED)) {
            (Some(physical), 0) => ExtentState::Data { physical, sharing },
            (Some(physical), PREALLOCATED) => ExtentState::Preallocated { physical, sharing },
            (None, HOLE) => ExtentState::Hole,
            (None, QUEUED) => ExtentState::Queued,
            _ => return Err(format!("impossible flags {flags} at byte {offset}")),
        };
        Ok(ExtentRow { offset, length, state })
    };
    let rows: Result<Vec<ExtentRow>, String> = value.rows.into_iter().map(row).collect();
    Ok(ExtentList { rows: rows?, next: value.next })
}

/// A table being printed, row by row.
pub(crate) struct Table<W> {
    out: W,
    extents: u64,
    shared: u64,
}

impl<W: Write> Table<W> {
    /// Prints the head of a table.
    ///
    /// # Errors
    /// The output's.
    pub(crate) fn new(mut out: W) -> io::Result<Self> {
        writeln!(out, "{:>16} {:>16} {:>16}  flags", "offset", "length", "physical")?;
        Ok(Self { out, extents: 0, shared: 0 })
    }

    /// Prints a row.
    ///
    /// # Errors
    /// The output's.
    pub(crate) fn row(&mut self, row: &ExtentRow) -> io::Result<()> {
        let (physical, word, sharing) = match row.state {
            ExtentState::Data { physical, sharing } => (Some(physical), None, sharing),
            ExtentState::Preallocated { physical, sharing } => (Some(physical), Some("prealloc"), sharing),
            ExtentState::Hole => (None, Some("hole"), Sharing::default()),
            ExtentState::Queued => (None, Some("queued"), Sharing::default()),
        };
        self.extents += u64::from(physical.is_some());
        self.shared += u64::from(sharing.shared);
        let words = [word, sharing.shared.then_some("shared"), sharing.lent.then_some("lent")];
        let words: Vec<&str> = words.into_iter().flatten().collect();
        let words = if words.is_empty() { "-".to_owned() } else { words.join(",") };
        let physical = physical.map_or_else(|| "-".to_owned(), |physical| physical.to_string());
        writeln!(self.out, "{:>16} {:>16} {physical:>16}  {words}", row.offset, row.length)
    }

    /// Prints the foot.
    ///
    /// # Errors
    /// The output's.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        writeln!(self.out, "{} extents, {} shared", self.extents, self.shared)?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> ExtentList {
        let sharing = Sharing { shared: true, lent: true };
        let states = [
            ExtentState::Data { physical: 81_920, sharing: Sharing::default() },
            ExtentState::Data { physical: 40_960, sharing },
            ExtentState::Preallocated { physical: 4_096, sharing: Sharing { shared: true, lent: false } },
            ExtentState::Hole,
            ExtentState::Queued,
        ];
        let rows = states.into_iter().zip(0..);
        let rows = rows.map(|(state, at)| ExtentRow { offset: at * 4096, length: 4096, state }).collect();
        ExtentList { rows, next: Some(5 * 4096) }
    }

    #[test]
    fn value_says_what_the_list_does() {
        assert_eq!(decode(&encode(&example())), Ok(example()));
        assert!(decode(br#"{"rows":[[0,4096,null,0]],"next":null}"#).unwrap_err().contains("impossible"));
        assert!(decode(br#"{"rows":[[0,4096,8192,6]],"next":null}"#).is_err());
        assert!(decode(b"{}").is_err());
    }

    #[test]
    fn longest_list_fits_into_an_attribute() {
        let sharing = Sharing { shared: true, lent: true };
        let state = ExtentState::Preallocated { physical: u64::MAX, sharing };
        let rows = vec![ExtentRow { offset: u64::MAX, length: u64::MAX, state }; fs_core::LISTED_EXTENTS];
        assert!(encode(&ExtentList { rows, next: Some(u64::MAX) }).len() <= VALUE_LIMIT);
    }

    #[test]
    fn table_has_a_line_for_each_row() {
        let mut text = Vec::new();
        let mut table = Table::new(&mut text).unwrap();
        example().rows.iter().for_each(|row| table.row(row).unwrap());
        table.finish().unwrap();
        let text = String::from_utf8(text).unwrap();
        let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["offset", "length", "physical", "flags"]);
        assert_eq!(words[1], ["0", "4096", "81920", "-"]);
        assert_eq!(words[2], ["4096", "4096", "40960", "shared,lent"]);
        assert_eq!(words[3], ["8192", "4096", "4096", "prealloc,shared"]);
        assert_eq!(words[4], ["12288", "4096", "-", "hole"]);
        assert_eq!(words[5], ["16384", "4096", "-", "queued"]);
        assert_eq!(text.lines().last(), Some("3 extents, 2 shared"));
    }
}
