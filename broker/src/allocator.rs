//! How much freed memory the C library keeps at hand.
//!
//! A frame is allocated when it arrives and freed when it is durable, so under load the top of a thread's heap
//! grows and shrinks by megabytes all the time. glibc gives whatever is free there above 128 KiB back to the
//! system, and each page of it that is used again costs a page fault: 31,000 to 45,000 a second at 570,000 messages of
//! 1 KiB, 8 % of the broker's CPU.

use std::hint::black_box;

/// Bytes of the block that is freed; each heap keeps up to twice as many free ones at its top.
const BLOCK_BYTES: usize = 4 << 20;

/// Lets the C library keep more of what is freed. glibc takes the size of the largest block that it has mapped
/// and unmapped for the bound above which it maps blocks, and twice that for what it keeps: `mallopt(3)`,
/// `M_MMAP_THRESHOLD`. Nothing comes of it with another C library, or where these bounds are set from outside.
pub fn keep_freed_memory() {
    drop(black_box(Vec::<u8>::with_capacity(BLOCK_BYTES)));
}
