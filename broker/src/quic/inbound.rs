//! Frames that a stream expects, and the memory for large ones: taken before their bytes are, given back
//! with the permit.
//!
//! Without it, frames that are begun and never ended could hold as many bytes as there are streams times
//! the largest frame. A small one costs less than its accounting.

use millpond_protocol::frame::{Frame, FrameType};
use millpond_wal::storage::Storage;

use super::Context;
use super::frames::{FrameReader, StreamError};
use super::producer::{arrive, room};
use crate::memory::{Permit, Share};

/// Bytes of a frame's body up to which it is taken in without a permit.
const FREE_BYTES: usize = 1 << 10;

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
    let permit = room(context, length as u64, share).await?;
    let frame = arrive(context, reader, length as u64, share).await?;
    Ok(frame.map(|frame| (frame, Some(permit))))
}
