//! One field of Identify data: its JSON value, how it is shown, and what it means in words.

use serde_json::{Value, json};

/// A field, under nvme-cli's name.
pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) value: Value,
    /// What stands after the name; `None` shows only the notes.
    pub(super) shown: Option<String>,
    /// A few words behind that.
    pub(super) meaning: Option<String>,
    /// Lines below.
    pub(super) notes: Vec<String>,
}

/// What the bits of a field say.
pub(super) type Bits = &'static [(u32, &'static str)];

impl Field {
    /// A number, shown in decimal.
    pub(super) fn number(name: &'static str, value: impl Into<u64>) -> Self {
        let value = value.into();
        Self::new(name, json!(value), Some(value.to_string()))
    }

    /// A number, shown in hexadecimal.
    pub(super) fn hex(name: &'static str, value: impl Into<u64>) -> Self {
        let value = value.into();
        Self::new(name, json!(value), Some(format!("{value:#x}")))
    }

    /// A set of bits, with a line for each that is known and set.
    pub(super) fn bits(name: &'static str, value: impl Into<u64>, meanings: Bits) -> Self {
        let value = value.into();
        let mut field = Self::hex(name, value);
        field.notes = meanings
            .iter()
            .filter(|(bit, _)| value >> bit & 1 != 0)
            .map(|(bit, meaning)| format!("[{bit}] {meaning}"))
            .collect();
        field
    }

    /// A 128-bit number: JSON numbers beyond 64 bits are not safe to read back.
    pub(super) fn wide(name: &'static str, value: u128) -> Self {
        let json = u64::try_from(value).map_or_else(|_| json!(value.to_string()), |small| json!(small));
        Self::new(name, json, Some(value.to_string()))
    }

    /// Text of a fixed field: printable ASCII, padding removed. Foreign bytes, so everything else is escaped.
    pub(super) fn text(name: &'static str, bytes: &[u8]) -> Self {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let text = bytes[..end].trim_ascii().escape_ascii().to_string();
        Self::new(name, json!(text), Some(text))
    }

    /// Bytes, in the order they have.
    pub(super) fn bytes(name: &'static str, bytes: &[u8]) -> Self {
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self::new(name, json!(text), Some(text))
    }

    /// A list, shown by `notes` alone.
    pub(super) fn list(name: &'static str, items: Vec<Value>, notes: Vec<String>) -> Self {
        Self { notes, ..Self::new(name, Value::Array(items), None) }
    }

    /// Says what the value means.
    pub(super) fn meaning(self, meaning: impl Into<String>) -> Self {
        Self { meaning: Some(meaning.into()), ..self }
    }

    fn new(name: &'static str, value: Value, shown: Option<String>) -> Self {
        Self { name, value, shown, meaning: None, notes: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_text_is_trimmed_and_foreign_bytes_are_escaped() {
        assert_eq!(Field::text("mn", b"Pollux  \0\0").value, json!("Pollux"));
        assert_eq!(Field::text("mn", b"a\x1b[2J\xff").value, json!("a\\x1b[2J\\xff"));
    }

    #[test]
    fn numbers_beyond_64_bits_become_text() {
        assert_eq!(Field::wide("tnvmcap", 7).value, json!(7));
        assert_eq!(Field::wide("tnvmcap", 1 << 64).value, json!("18446744073709551616"));
    }

    #[test]
    fn only_bits_that_are_set_are_explained() {
        let field = Field::bits("vwc", 0b101_u8, &[(0, "present"), (1, "absent"), (2, "flush")]);
        assert_eq!(field.notes, ["[0] present", "[2] flush"]);
        assert_eq!(field.value, json!(5));
    }
}
