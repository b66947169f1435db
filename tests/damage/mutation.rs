//! What can happen to the bytes of a store at rest, one thing at a time.

use std::fmt;
use std::sync::Arc;

use crate::disk::Contents;

#[derive(Clone, Debug)]
pub struct Mutation {
    pub file: String,
    pub what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Counted from the lowest bit of the first byte.
    FlippedBit(u64),
    /// The file's length afterwards.
    Truncated(u64),
    Removed,
}

impl Mutation {
    pub fn apply(&self, golden: &Contents) -> Contents {
        let mut contents = golden.clone();
        match self.what {
            What::FlippedBit(bit) => {
                let mut bytes = golden[&self.file].to_vec();
                bytes[bit as usize / 8] ^= 1 << (bit % 8);
                contents.insert(self.file.clone(), Arc::new(bytes));
            }
            What::Truncated(len) => {
                let bytes = golden[&self.file][..len as usize].to_vec();
                contents.insert(self.file.clone(), Arc::new(bytes));
            }
            What::Removed => {
                contents.remove(&self.file);
            }
        }
        contents
    }

    /// The stretch of the file that is not what it was.
    pub fn touched(&self) -> std::ops::Range<u64> {
        match self.what {
            What::FlippedBit(bit) => bit / 8..bit / 8 + 1,
            What::Truncated(len) => len..u64::MAX,
            What::Removed => 0..u64::MAX,
        }
    }
}

impl fmt::Display for Mutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::FlippedBit(bit) => write!(
                f,
                "{}: bit {} of byte {} flipped",
                self.file,
                bit % 8,
                bit / 8
            ),
            What::Truncated(len) => write!(f, "{}: truncated to {len} bytes", self.file),
            What::Removed => write!(f, "{}: removed", self.file),
        }
    }
}
