//! Block-aligned buffers that are used again.
//!
//! Owns the memory in which entries are built, written past the page cache and then kept as
//! [`Bytes`]. Fresh memory costs a page fault per 4 KiB, more than the write itself for a large
//! entry, so a buffer goes back to its pool when the last slice of it is dropped.
//!
//! Invariants: `len <= capacity`; the first byte lies on a [`BLOCK_BYTES`] address; capacity is a
//! multiple of it; idle bytes of a pool never exceed its bound. A buffer grows by moving to the next
//! class, so an entry that is kept for long pins at most twice its bytes from 512 KiB on.
//!
//! It deliberately does not bound the buffers in use: those hold what callers were allowed to
//! put in, and their admission is bounded before.

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use crossbeam_queue::ArrayQueue;
use memmap2::{Advice, MmapMut};

use crate::storage::BLOCK_BYTES;

/// Hands out aligned buffers and takes them back. Clones share the idle ones.
#[derive(Clone)]
pub struct BufferPool {
    shelves: Arc<Shelves>,
}

struct Shelves {
    by_class: [ArrayQueue<Memory>; CLASSES],
    idle_bytes: AtomicUsize,
    idle_bytes_max: usize,
}

impl BufferPool {
    /// A pool that keeps at most `idle_bytes_max` of unused buffers.
    pub fn new(idle_bytes_max: usize) -> BufferPool {
        let shelf = |class: usize| {
            let buffers_max = idle_bytes_max / CLASS_BYTES[class];
            ArrayQueue::new(buffers_max.clamp(1, SHELF_BUFFERS_MAX))
        };
        BufferPool {
            shelves: Arc::new(Shelves {
                by_class: std::array::from_fn(shelf),
                idle_bytes: AtomicUsize::new(0),
                idle_bytes_max,
            }),
        }
    }

    /// An empty buffer with room for at least `capacity` bytes.
    pub fn take(&self, capacity: usize) -> AlignedBuf {
        let class = class_for(capacity);
        let memory = class.and_then(|class| self.shelves.take(class));
        let memory = memory.unwrap_or_else(|| {
            Memory::new(class.map_or(capacity.next_multiple_of(BLOCK_BYTES), |c| CLASS_BYTES[c]))
        });
        AlignedBuf {
            memory,
            len: 0,
            pool: self.clone(),
        }
    }

    /// A buffer of so many bytes that are about to be read into it; it shows old bytes until then. Only of
    /// a size that is kept for reuse and hardly larger than what is asked for.
    pub fn take_to_fill(&self, bytes: usize) -> Option<AlignedBuf> {
        let class = CLASS_BYTES[class_for(bytes)?];
        if bytes < FILLED_BYTES_MIN || bytes < class / 4 * 3 {
            return None;
        }
        Some(self.take_blocks(bytes))
    }

    /// A buffer of so many bytes, whatever its size; it too shows old bytes until it is read into.
    pub fn take_blocks(&self, bytes: usize) -> AlignedBuf {
        let mut buf = self.take(bytes);
        buf.len = bytes;
        buf
    }

    fn give_back(&self, memory: Memory) {
        if let Some(class) = CLASS_BYTES.iter().position(|&c| c == memory.capacity) {
            self.shelves.give_back(class, memory);
        }
    }

    #[cfg(test)]
    fn idle(&self) -> usize {
        self.shelves.by_class.iter().map(ArrayQueue::len).sum()
    }
}

impl Shelves {
    fn take(&self, class: usize) -> Option<Memory> {
        let memory = self.by_class[class].pop()?;
        self.idle_bytes
            .fetch_sub(memory.capacity, Ordering::Relaxed);
        Some(memory)
    }

    /// Keeps it if there is room; else it is freed.
    fn give_back(&self, class: usize, memory: Memory) {
        let bytes = memory.capacity;
        // Counted before it is put there, so that the bound holds for all threads together.
        let idle = self.idle_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if idle > self.idle_bytes_max || self.by_class[class].push(memory).is_err() {
            self.idle_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
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
        let grown = self.memory.capacity + self.memory.capacity / 8;
        let mut larger = self.pool.take(needed.max(grown));
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

/// Bytes on a block address.
#[derive(Default)]
struct Memory {
    raw: Raw,
    start: usize,
    capacity: usize,
}

enum Raw {
    Heap(Box<[u8]>),
    Map(MmapMut),
}

impl Memory {
    fn new(capacity: usize) -> Memory {
        assert!(
            capacity.is_multiple_of(BLOCK_BYTES),
            "capacity in whole blocks"
        );
        if capacity >= HUGE_PAGE_BYTES
            && let Ok(memory) = Memory::of_huge_pages(capacity)
        {
            return memory;
        }
        // One block more than the capacity, so that an aligned start exists without `unsafe`.
        let raw = vec![0; capacity + BLOCK_BYTES].into_boxed_slice();
        Memory {
            start: up_to_next(raw.as_ptr(), BLOCK_BYTES),
            raw: Raw::Heap(raw),
            capacity,
        }
    }

    /// Huge pages, where the system has some: a transfer past the page cache then names a few long pieces
    /// of memory instead of one for each 4 KiB. One huge page more than the capacity is asked for; what lies
    /// around the aligned part is never touched.
    fn of_huge_pages(capacity: usize) -> io::Result<Memory> {
        let raw = MmapMut::map_anon(capacity.next_multiple_of(HUGE_PAGE_BYTES) + HUGE_PAGE_BYTES)?;
        // Only advice: without it a transfer takes longer.
        let _ = raw.advise(Advice::HugePage);
        Ok(Memory {
            start: up_to_next(raw.as_ptr(), HUGE_PAGE_BYTES),
            raw: Raw::Map(raw),
            capacity,
        })
    }

    fn bytes(&self) -> &[u8] {
        &self.raw[self.start..self.start + self.capacity]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.start..self.start + self.capacity]
    }
}

/// Bytes from an address to the next multiple of `align`.
fn up_to_next(address: *const u8, align: usize) -> usize {
    address.addr().next_multiple_of(align) - address.addr()
}

impl Default for Raw {
    fn default() -> Raw {
        Raw::Heap(Box::default())
    }
}

impl Deref for Raw {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Raw::Heap(bytes) => bytes,
            Raw::Map(bytes) => bytes,
        }
    }
}

impl DerefMut for Raw {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Raw::Heap(bytes) => bytes,
            Raw::Map(bytes) => bytes,
        }
    }
}

fn class_for(capacity: usize) -> Option<usize> {
    CLASS_BYTES.iter().position(|&class| capacity <= class)
}

const CLASSES: usize = 7;

/// Capacities that are kept for reuse; larger buffers are made to measure and freed. The odd one is for
/// a record of a quarter of a megabyte of messages and what is around them.
const CLASS_BYTES: [usize; CLASSES] = [
    8 << 10,
    64 << 10,
    256 << 10,
    272 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
];

/// Of x86-64, and of most else. Buffers from this size on are made of them.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Less is allocated at little cost.
const FILLED_BYTES_MIN: usize = 128 << 10;

/// Most idle buffers of one class.
const SHELF_BUFFERS_MAX: usize = 256;

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
    fn a_large_buffer_begins_on_a_huge_page() {
        let pool = BufferPool::new(POOL_BYTES);
        for capacity in [2 << 20, 4 << 20, (4 << 20) + 1] {
            let mut buf = pool.take(capacity);
            buf.resize(capacity);
            assert_eq!(address(&buf) % HUGE_PAGE_BYTES, 0);
            assert!(buf.iter().all(|&byte| byte == 0));
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
    fn a_buffer_to_be_filled_is_about_as_large_as_what_goes_in() {
        let pool = BufferPool::new(POOL_BYTES);
        for bytes in [256 << 10, (256 << 10) + 1_100, 1 << 20] {
            let buf = pool.take_to_fill(bytes).unwrap();
            assert_eq!(buf.len(), bytes);
            assert!(buf.capacity() / 4 * 3 <= bytes);
        }
        for bytes in [0, 64 << 10, 140 << 10, 300 << 10, (4 << 20) + 1] {
            assert!(pool.take_to_fill(bytes).is_none(), "{bytes}");
        }
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
        let pool = BufferPool::new(3 * (64 << 10));
        let buffers: Vec<_> = (0..4).map(|_| pool.take(64 << 10)).collect();
        drop(buffers);
        assert_eq!(pool.idle(), 3);
        drop(pool.take(8 << 10));
        assert_eq!(pool.idle(), 3, "of whatever size");
        drop((pool.take(64 << 10), pool.take(1 << 20)));
        assert_eq!(
            pool.idle(),
            3,
            "one was taken and came back, the large one has no room"
        );
    }
}
