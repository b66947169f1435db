//! Frames that a stream expects, and the memory for large ones: taken before their bytes are, given back
//! with the permit.
//!
//! Without it, frames that are begun and never ended could hold as many bytes as there are streams times
//! the largest frame. A small one costs less than its accounting.

use std::time::Duration;

use millpond_protocol::frame::{Frame, FrameType};
use millpond_protocol::{ErrorCode, WireError};
use millpond_wal::storage::Storage;
use tokio::time::timeout;

use super::Context;
use super::frames::{FrameReader, StreamError};
use crate::memory::{Class, Permit, Share};

/// Bytes of a frame's body up to which it is taken in without a permit.
pub const FREE_BYTES: usize = 1 << 10;
/// How long a frame may take to arrive once its memory is taken, when others want it: this, and a second
/// for so many bytes.
const ARRIVAL: Duration = Duration::from_millis(500);
const ARRIVAL_BYTES_PER_SECOND: u64 = 8 << 20;

/// The next frame and what pays for it; `None` at a clean end of the stream. Cancel-safe but for the
/// place in the queue for memory.
pub async fn take<S: Storage>(
    context: &Context<S>,
    reader: &mut FrameReader,
    share: &Share,
    kinds: &[FrameType],
) -> Result<Option<(Frame, Option<Permit>)>, StreamError> {
    let Some((_, length)) = reader.header_of(kinds).await? else {
        return Ok(None);
    };
    if length <= FREE_BYTES {
        let frame = reader.next().await?;
        return Ok(frame.map(|frame| (frame, None)));
    }
    // Boxed, because a stream that waits for its next frame would keep the size of this.
    let larger = Box::pin(async {
        let permit = room(context, length as u64, share).await?;
        let frame = arrive(context, reader, length as u64, share).await?;
        Ok(frame.map(|frame| (frame, Some(permit))))
    });
    larger.await
}

/// Memory for a frame, waited for if need be.
pub async fn room<S: Storage>(
    context: &Context<S>,
    bytes: u64,
    share: &Share,
) -> Result<Permit, WireError> {
    if let Some(permit) = context.memory.try_acquire(bytes, Class::Inbound, share) {
        return Ok(permit);
    }
    let began = tokio::time::Instant::now();
    let permit = context.memory.acquire(bytes, Class::Inbound, share).await;
    context
        .metrics
        .observe_credit_wait(ErrorCode::Memory, began.elapsed());
    Ok(permit?)
}

/// The frame whose header is there and whose memory is taken. While others wait for memory, it may
/// not keep its own without filling it.
pub async fn arrive<S: Storage>(
    context: &Context<S>,
    reader: &mut FrameReader,
    bytes: u64,
    share: &Share,
) -> Result<Option<Frame>, StreamError> {
    let in_time = ARRIVAL + Duration::from_millis(bytes * 1_000 / ARRIVAL_BYTES_PER_SECOND);
    loop {
        // What has been read stays in the reader.
        match timeout(in_time, reader.next()).await {
            Ok(frame) => return frame,
            Err(_) if !context.memory.is_wanted(share) => {}
            Err(_) => {
                let text = "a frame did not arrive in time while others waited for the memory that was kept for it; send it again";
                return Err(WireError::new(ErrorCode::Memory, text).into());
            }
        }
    }
}
