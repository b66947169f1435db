//! Whole frames in and out of QUIC streams.

use std::pin::Pin;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use millpond_protocol::frame::{self, Frame, FrameError, FrameType, HEADER_BYTES};
use millpond_protocol::{ErrorCode, WireError};
use quinn::{RecvStream, SendStream, VarInt};
use tokio::io::AsyncReadExt;

/// Bytes that are read beyond the frame that is wanted, so that small frames come many at once. A frame
/// whose memory is waited for has at most this much in the buffer already.
pub const READ_AHEAD_BYTES: usize = 16 << 10;

/// Pieces up to here are written as they are.
const WHOLE_BYTES_MAX: usize = 512 << 10;
/// Larger ones are copied in bits of this size.
const BIT_BYTES: usize = 64 << 10;

/// Why a stream is over.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other side broke the protocol, or asked for what it may not have; it is told.
    #[error(transparent)]
    Refused(#[from] WireError),
    /// The connection or the stream is gone.
    #[error("the stream is gone: {0}")]
    Gone(String),
    /// The broker stops.
    #[error(transparent)]
    Stopped(#[from] crate::shard_thread::Stopped),
}

impl From<FrameError> for StreamError {
    fn from(error: FrameError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<quinn::WriteError> for StreamError {
    fn from(error: quinn::WriteError) -> Self {
        Self::Gone(error.to_string())
    }
}

/// Reads whole frames. What has been read stays in the buffer, so every method but `skip` is
/// cancel-safe.
pub struct FrameReader {
    stream: RecvStream,
    buffer: BytesMut,
}

impl FrameReader {
    pub fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
        }
    }

    /// Type and body length of the next frame; `None` at a clean end of the stream.
    pub async fn header(&mut self) -> Result<Option<(FrameType, usize)>, StreamError> {
        loop {
            if let Some(header) = frame::peek(&self.buffer)? {
                return Ok(Some(header));
            }
            if !self.fill(READ_AHEAD_BYTES).await? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(cut())
                };
            }
        }
    }

    /// The beginning of the body of the frame whose header is there: so many bytes, if it has them.
    pub async fn beginning(&mut self, bytes: usize) -> Result<&[u8], StreamError> {
        let length = match self.header().await? {
            Some((_, length)) => length.min(bytes),
            None => return Ok(&[]),
        };
        while self.buffer.len() < HEADER_BYTES + length {
            if !self.fill(READ_AHEAD_BYTES).await? {
                return Err(cut());
            }
        }
        Ok(&self.buffer[HEADER_BYTES..HEADER_BYTES + length])
    }

    /// Passes over the frame whose header is there, keeping nothing of it.
    pub async fn skip(&mut self) -> Result<(), StreamError> {
        let Some((_, length)) = self.header().await? else {
            return Ok(());
        };
        let mut left = HEADER_BYTES + length;
        while left > 0 {
            if self.buffer.is_empty() && !self.fill(READ_AHEAD_BYTES).await? {
                return Err(cut());
            }
            let here = left.min(self.buffer.len());
            self.buffer.advance(here);
            left -= here;
        }
        Ok(())
    }

    /// Type and body length of the next frame, which must be of one of these types: another is
    /// refused by its header, before anything is kept of it.
    pub async fn header_of(
        &mut self,
        kinds: &[FrameType],
    ) -> Result<Option<(FrameType, usize)>, StreamError> {
        match self.header().await? {
            Some((found, _)) if !kinds.contains(&found) => {
                Err(FrameError::Unexpected { found }.into())
            }
            header => Ok(header),
        }
    }

    /// The next frame, whole, if it is of one of these types.
    pub async fn next_of(&mut self, kinds: &[FrameType]) -> Result<Option<Frame>, StreamError> {
        match self.header_of(kinds).await? {
            Some(_) => self.next().await,
            None => Ok(None),
        }
    }

    /// The next frame, whole; `None` at a clean end of the stream. Whoever calls it has looked at its
    /// header.
    pub async fn next(&mut self) -> Result<Option<Frame>, StreamError> {
        let Some((_, length)) = self.header().await? else {
            return Ok(None);
        };
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            let missing = (HEADER_BYTES + length).saturating_sub(self.buffer.len());
            if !self.fill(missing.max(READ_AHEAD_BYTES)).await? {
                return Err(cut());
            }
        }
    }

    /// Reads at most `room` bytes more; false at the end of the stream.
    async fn fill(&mut self, room: usize) -> Result<bool, StreamError> {
        let gone = |error: String| StreamError::Gone(error);
        if !self.buffer.is_empty() {
            self.buffer.reserve(room);
            let mut room = (&mut self.buffer).limit(room);
            let read = self.stream.read_buf(&mut room).await;
            return read.map(|read| read > 0).map_err(|e| gone(e.to_string()));
        }
        // While nothing comes, an idle stream holds no buffer: thousands of them are idle.
        self.buffer = BytesMut::new();
        let chunk = self.stream.read_chunk(room, true).await;
        let Some(chunk) = chunk.map_err(|e| gone(e.to_string()))? else {
            return Ok(false);
        };
        self.buffer.extend_from_slice(&chunk.bytes);
        Ok(true)
    }
}

/// A peer that is gone leaves no clean end, so this one is told.
fn cut() -> StreamError {
    FrameError::Body("the stream ended in the middle of it").into()
}

/// Writes whole frames.
pub struct FrameWriter {
    stream: SendStream,
}

impl FrameWriter {
    pub fn new(stream: SendStream) -> Self {
        Self { stream }
    }

    /// The stream itself.
    pub fn into_inner(self) -> SendStream {
        self.stream
    }

    /// Writes an encoded frame, or several.
    pub async fn write(&mut self, frames: Bytes) -> Result<(), StreamError> {
        Ok(self.stream.write_chunk(frames).await?)
    }

    /// Writes frames that lie in pieces, without copying them together. A large piece is copied bit by
    /// bit: it is gone once it is written, and not only when its last byte is acknowledged.
    pub async fn write_pieces(&mut self, pieces: &mut [Bytes]) -> Result<(), StreamError> {
        if pieces.iter().all(|piece| piece.len() <= WHOLE_BYTES_MAX) {
            return Ok(self.stream.write_all_chunks(pieces).await?);
        }
        for bit in pieces.iter().flat_map(|piece| piece.chunks(BIT_BYTES)) {
            self.stream.write_chunk(Bytes::copy_from_slice(bit)).await?;
        }
        Ok(())
    }

    /// Encodes and writes a control frame.
    pub async fn write_control<T: serde::Serialize>(
        &mut self,
        kind: FrameType,
        value: &T,
    ) -> Result<(), StreamError> {
        self.write(frame::encode(kind, value)?).await
    }

    /// Says why the stream is over, and ends it.
    ///
    /// Boxed, because every stream has an end, and would have room for it from the start.
    pub fn end(mut self, error: &WireError) -> Pin<Box<impl Future<Output = ()>>> {
        Box::pin(async move {
            // Whoever is not there any more need not be told.
            if self.write_control(FrameType::Error, error).await.is_err()
                || self.stream.finish().is_err()
            {
                let _ = self.stream.reset(code(error.code));
            }
        })
    }

    /// Breaks the stream off, perhaps in the middle of a frame.
    pub fn reset(&mut self, error: ErrorCode) {
        // A stream that is gone needs no end.
        let _ = self.stream.reset(code(error));
    }

    /// Ends the stream as its session ended: cleanly, with a reason, or, if it is gone, not at all. Boxed
    /// as `end` is.
    pub fn conclude(
        self,
        result: Result<(), StreamError>,
        what: &'static str,
    ) -> Pin<Box<impl Future<Output = ()>>> {
        Box::pin(async move {
            match result {
                Ok(()) => self.finish(),
                Err(StreamError::Refused(error)) => self.end(&error).await,
                Err(error) => tracing::debug!(%error, "{what} stream ended"),
            }
        })
    }

    /// Ends the stream cleanly.
    pub fn finish(mut self) {
        // A stream that is gone needs no end.
        let _ = self.stream.finish();
    }
}

/// An error code as QUIC carries it.
#[must_use]
pub fn code(code: ErrorCode) -> VarInt {
    VarInt::from_u32(u32::from(u16::from(code)))
}
