//! What the fuzz targets share: taking an input apart, and making checksums right again.
//!
//! Every format here is guarded by checksums, which no fuzzer guesses. So most targets know two ways: bytes
//! as they come, which must be refused, and the same with the checksums put right, which gets behind the
//! guard. `targets.txt` names the targets and how often CI runs each.

pub mod reseal;
pub mod store;

/// Takes an input apart from its front. At its end everything is empty or zero.
pub struct Cut<'a>(pub &'a [u8]);

impl<'a> Cut<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// At most `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// A piece whose length stands before it, in two bytes.
    pub fn piece(&mut self) -> &'a [u8] {
        let length = self.u16();
        self.bytes(length.into())
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let bytes = self.bytes(N);
        out[..bytes.len()].copy_from_slice(bytes);
        out
    }
}

/// Puts together what [`Cut::piece`] takes apart.
pub fn put_piece(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).expect("a seed is small");
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
}
