//! Bytes read as a row of decisions.
//!
//! Invariants: past its end a script gives zeroes, and zero is the harmless decision everywhere: whoever follows a script to
//! its end behaves well from then on.

/// The bytes of an input, taken from the front.
#[derive(Debug)]
pub struct Script {
    bytes: Vec<u8>,
    at: usize,
}

impl Script {
    /// A script of these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, at: 0 }
    }

    /// Whether only zeroes follow.
    pub fn is_over(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some(&byte) = self.bytes.get(self.at) else { return 0 };
        self.at += 1;
        byte
    }

    /// The next two bytes, little-endian.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The next eight bytes, little-endian.
    pub fn long(&mut self) -> u64 {
        (0..8).fold(0, |value, at| value | u64::from(self.byte()) << (8 * at))
    }

    /// One of `choices`, the first if the script is over.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }

    /// Up to `most` bytes, less if the script ends.
    pub fn bytes(&mut self, most: usize) -> Vec<u8> {
        let end = self.bytes.len().min(self.at + most);
        let taken = self.bytes[self.at..end].to_vec();
        self.at = end;
        taken
    }
}
