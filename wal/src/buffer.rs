//! Block-aligned buffers that are used again.
//!
//! Owns the memory in which entries are built, written past the page cache and then kept as
//! [`Bytes`]. Fresh memory costs a page fault per 4 KiB, more than the write itself for a large
//! entry, so a buffer goes back to its pool when the last slice of it is dropped.
//!
//! Invariants: `len <= capacity`; the first byte lies on a [`BLOCK_BYTES`] address; capacity is a
//! multiple of it; idle bytes of a pool never exceed its bound. A buffer grows by moving to the next
//! class, so a small entry that is kept for long pins little memory.
//!
//! It deliberately does not bound the buffers in use: those hold what callers were allowed to
//! put in, and their admission is bounded before.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytes::Bytes;
use crossbeam_queue::ArrayQueue;

use crate::storage::BLOCK_BYTES;

/// Hands out aligned buffers and takes them back. Clones share the idle ones.
#[derive(Clone)]
pub struct BufferPool {
    shelves: Arc<[Shelf; CLASSES]>,
}

impl BufferPool {
    /// A pool that keeps at most `idle_bytes_max` of unused buffers, the same share for each class.
    pub fn new(idle_bytes_max: usize) -> BufferPool {
        let share = idle_bytes_max / CLASSES;
        let shelf = |class: usize| {
            let buffers_max = share / CLASS_BYTES[class];
            Shelf {
                idle: (buffers_max > 0).then(|| ArrayQueue::new(buffers_max)),
            }
        };
        BufferPool {
            shelves: Arc::new(std::array::from_fn(shelf)),
        }
    }

    /// An empty buffer with room for at least `capacity` bytes.
    pub fn take(&self, capacity: usize) -> AlignedBuf {
        let class = class_for(capacity);
        let memory = class
            .and_then(|class| self.shelves[class].idle.as_ref()?.pop())
            .unwrap_or_else(|| {
                Memory::new(
                    class.map_or(capacity.next_multiple_of(BLOCK_BYTES), |c| CLASS_BYTES[c]),
                )
            });
        AlignedBuf {
            memory,
            len: 0,
            pool: self.clone(),
        }
    }

    fn give_back(&self, memory: Memory) {
        if let Some(class) = CLASS_BYTES.iter().position(|&c| c == memory.capacity)
            && let Some(idle) = &self.shelves[class].idle
        {
            // A full shelf hands the buffer back, and it is freed here.
            drop(idle.push(memory));
        }
    }

    #[cfg(test)]
    fn idle(&self) -> usize {
        let count = |shelf: &Shelf| shelf.idle.as_ref().map_or(0, ArrayQueue::len);
        self.shelves.iter().map(count).sum()
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BufferPool")
    }
}

/// A growing byte buffer on a block address.
pub struct AlignedBuf {
    memory: Memory,
    len: usize,
    pool: BufferPool,
}

impl AlignedBuf {
    /// Makes room for `additional` bytes more; moves the content if the buffer is too small.
    pub fn reserve(&mut self, additional: usize) {
        let needed = self.len + additional;
        if needed <= self.memory.capacity {
            return;
        }
        // Beyond the largest class growth must still be by a factor, or pushing would be quadratic.
        let mut larger = self.pool.take(needed.max(self.memory.capacity * 2));
        larger.extend_from_slice(self);
        *self = larger;
    }

    pub fn extend_from_slice(&mut self, data: &[u8]) {
        self.reserve(data.len());
        let end = self.len + data.len();
        self.memory.bytes_mut()[self.len..end].copy_from_slice(data);
        self.len = end;
    }

    /// Cuts to `len`, or extends to it with zeros.
    pub fn resize(&mut self, len: usize) {
        if len > self.len {
            self.reserve(len - self.len);
            // A used buffer comes back with its old bytes.
            self.memory.bytes_mut()[self.len..len].fill(0);
        }
        self.len = len;
    }

    /// Extends with zeros to the next multiple of [`BLOCK_BYTES`].
    pub fn pad_to_block(&mut self) {
        self.resize(self.len.next_multiple_of(BLOCK_BYTES));
    }

    pub fn capacity(&self) -> usize {
        self.memory.capacity
    }

    /// Gives the content away as shared slices, without a copy; the memory returns to the pool when
    /// the last slice is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory.bytes()[..self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes_mut()[..self.len]
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.memory));
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.len, self.capacity())
    }
}

/// Idle buffers of one class; none are kept where the pool's bound is too small for one.
struct Shelf {
    idle: Option<ArrayQueue<Memory>>,
}

/// One block more than the capacity, so that an aligned start exists without `unsafe`.
#[derive(Default)]
struct Memory {
    raw: Box<[u8]>,
    start: usize,
    capacity: usize,
}

impl Memory {
    fn new(capacity: usize) -> Memory {
        assert!(
            capacity.is_multiple_of(BLOCK_BYTES),
            "capacity in whole blocks"
        );
        let raw = vec![0; capacity + BLOCK_BYTES].into_boxed_slice();
        let start = raw.as_ptr().addr().next_multiple_of(BLOCK_BYTES) - raw.as_ptr().addr();
        Memory {
            raw,
            start,
            capacity,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.raw[self.start..self.start + self.capacity]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.start..self.start + self.capacity]
    }
}

fn class_for(capacity: usize) -> Option<usize> {
    CLASS_BYTES.iter().position(|&class| capacity <= class)
}

const CLASSES: usize = 5;

/// Capacities that are kept for reuse; larger buffers are made to measure and freed.
const CLASS_BYTES: [usize; CLASSES] = [8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

#[cfg(test)]
mod tests {
    use super::*;

    const POOL_BYTES: usize = 32 << 20;

    fn address(buf: &[u8]) -> usize {
        buf.as_ptr().addr()
    }

    #[test]
    fn every_buffer_begins_on_a_block_and_starts_empty() {
        let pool = BufferPool::new(POOL_BYTES);
        for capacity in [0, 1, 5000, 70_000, 1 << 20, (4 << 20) + 1] {
            let mut buf = pool.take(capacity);
            assert!(buf.is_empty() && buf.capacity() >= capacity);
            buf.extend_from_slice(b"x");
            assert_eq!(address(&buf) % BLOCK_BYTES, 0);
        }
    }

    #[test]
    fn memory_returns_when_the_last_slice_is_dropped() {
        let pool = BufferPool::new(POOL_BYTES);
        let mut buf = pool.take(100);
        buf.extend_from_slice(b"hello world");
        let place = address(&buf);
        let whole = buf.freeze();
        let slice = whole.slice(6..);
        drop(whole);
        assert_eq!(pool.idle(), 0);
        assert_eq!(&slice[..], b"world");
        drop(slice);
        assert_eq!(pool.idle(), 1);

        let mut again = pool.take(100);
        again.extend_from_slice(b"y");
        assert_eq!(address(&again), place);
    }

    #[test]
    fn a_used_buffer_shows_none_of_its_old_bytes() {
        let pool = BufferPool::new(POOL_BYTES);
        let mut buf = pool.take(10);
        buf.extend_from_slice(&[7; 5000]);
        drop(buf);
        let mut buf = pool.take(10);
        buf.extend_from_slice(&[1]);
        buf.pad_to_block();
        assert_eq!(buf.len(), BLOCK_BYTES);
        assert!(buf[1..].iter().all(|&b| b == 0));
    }

    #[test]
    fn growing_keeps_the_content() {
        let pool = BufferPool::new(POOL_BYTES);
        let mut buf = pool.take(0);
        let mut expected = Vec::new();
        for i in 0..3000_u32 {
            buf.extend_from_slice(&i.to_le_bytes().repeat(500));
            expected.extend_from_slice(&i.to_le_bytes().repeat(500));
        }
        assert_eq!(&buf[..], &expected[..]);
    }

    #[test]
    fn idle_memory_stays_within_the_bound() {
        let pool = BufferPool::new(5 * (64 << 10));
        let buffers: Vec<_> = (0..4).map(|_| pool.take(64 << 10)).collect();
        drop(buffers);
        assert_eq!(pool.idle(), 1);
        drop(pool.take(1 << 20));
        assert_eq!(pool.idle(), 1);
    }
}
