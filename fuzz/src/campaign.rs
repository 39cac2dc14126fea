//! Made-up inputs: random ones, and mutations of a corpus. Deterministic by seed.
//!
//! Owns: [`Campaign`], which gives the input of any number, and [`load_corpus`]. An input depends on seed, number and corpus
//! alone, so a failing one can be made again.
//!
//! Excludes: coverage. What finds new paths here is that targets read their bytes as decisions.

use std::fs;
use std::path::Path;

use reactor::random::Random;

/// Longest input made up.
const LONGEST: u64 = 768;
/// Bytes that mean something to many parsers.
const MAGIC: [u8; 8] = [0, 1, 0x7f, 0x80, 0xfe, 0xff, 0x20, b','];

/// A row of inputs.
pub struct Campaign {
    seed: u64,
    corpus: Vec<Vec<u8>>,
}

impl Campaign {
    /// A campaign over these inputs, which come first, as they are.
    pub fn new(seed: u64, corpus: Vec<Vec<u8>>) -> Self {
        Self { seed, corpus }
    }

    /// The input of that number.
    pub fn input(&self, number: u64) -> Vec<u8> {
        if let Some(input) = self.corpus.get(number as usize) {
            return input.clone();
        }
        let random = Random::new(self.seed, number);
        if self.corpus.is_empty() || random.below(4) == 0 {
            return made_up(&random);
        }
        let mut input = self.corpus[random.index(self.corpus.len())].clone();
        for _ in 0..=random.below(8) {
            self.mutate(&mut input, &random);
        }
        input
    }

    fn mutate(&self, input: &mut Vec<u8>, random: &Random) {
        if input.is_empty() {
            input.push(byte(random));
        }
        let at = random.index(input.len());
        match random.below(7) {
            0 => input[at] ^= 1 << random.below(8),
            1 => input[at] = byte(random),
            2 => input[at] = MAGIC[random.index(MAGIC.len())],
            3 => input.insert(at, byte(random)),
            4 => drop(input.remove(at)),
            5 => {
                let other = &self.corpus[random.index(self.corpus.len())];
                input.truncate(at);
                input.extend(other.iter().skip(random.below(other.len() as u64 + 1) as usize));
            }
            _ => input.extend((0..random.below(64)).map(|_| byte(random))),
        }
        input.truncate(LONGEST as usize);
    }
}

/// Random bytes, of which a random part are zeroes: nothing but misdeeds gets nowhere.
fn made_up(random: &Random) -> Vec<u8> {
    let zeroes = random.below(100);
    (0..random.below(LONGEST)).map(|_| if random.below(100) < zeroes { 0 } else { byte(random) }).collect()
}

fn byte(random: &Random) -> u8 {
    random.next() as u8
}

/// The inputs in a folder, by name; none if it is not there.
pub fn load_corpus(folder: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths.iter().filter_map(|path| fs::read(path).ok()).collect()
}
