//! Frames on QUIC streams: reading whole ones, and telling why a stream ended.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use millpond_protocol::control::RequestFrame;
use millpond_protocol::frame::{self, Frame, FrameError, FrameType, HEADER_BYTES};
use millpond_protocol::{ErrorCode, WireError};
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use serde::Serialize;

use crate::error::Error;
use crate::limits::READ_CHUNKS;

/// Why a stream is of no more use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The connection is gone, or the other side ended the stream; try on another one.
    Lost,
    /// The broker said why.
    Refused(WireError),
    /// The broker sent what the protocol does not allow.
    Malformed(String),
}

impl From<StreamEnd> for Error {
    fn from(end: StreamEnd) -> Self {
        match end {
            StreamEnd::Lost => Self::Connect("the connection to the broker was lost".to_owned()),
            StreamEnd::Refused(wire) => wire.into(),
            StreamEnd::Malformed(what) => Self::Protocol(what),
        }
    }
}

impl From<FrameError> for StreamEnd {
    fn from(error: FrameError) -> Self {
        Self::Malformed(error.to_string())
    }
}

impl From<WriteError> for StreamEnd {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => from_code(code),
            _ => Self::Lost,
        }
    }
}

impl From<ReadError> for StreamEnd {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => from_code(code),
            _ => Self::Lost,
        }
    }
}

/// A stream that was reset with one of the protocol's codes was refused; any other is just lost.
fn from_code(code: VarInt) -> StreamEnd {
    match u16::try_from(code.into_inner()).map(ErrorCode::from) {
        Ok(ErrorCode::Unknown(_)) | Err(_) => StreamEnd::Lost,
        Ok(code) => StreamEnd::Refused(WireError::new(
            code,
            format!("the broker ended the stream: {code:?}"),
        )),
    }
}

/// Takes whole frames off a stream. `next` is cancel-safe.
pub struct FrameReader {
    stream: RecvStream,
    /// The frame that is being put together; behind a small one also what came in the same chunk.
    buffer: BytesMut,
    chunks: Vec<Bytes>,
    /// Those that are not in the buffer yet.
    unread: Range<usize>,
}

impl FrameReader {
    pub fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            chunks: vec![Bytes::new(); READ_CHUNKS],
            unread: 0..0,
        }
    }

    /// The next frame. An `Error` frame, and the end of the stream, come as `StreamEnd`.
    pub async fn next(&mut self) -> Result<Frame, StreamEnd> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer)? {
                return match frame.kind {
                    FrameType::Error => Err(StreamEnd::Refused(frame.decode()?)),
                    _ => Ok(frame),
                };
            }
            self.fill().await?;
        }
    }

    /// Takes in a chunk, or of the chunks that are there what the frame at hand misses and nothing behind it:
    /// so a large frame lies in memory of its size, and nothing but the chunk that began it is copied twice.
    async fn fill(&mut self) -> Result<(), StreamEnd> {
        if self.unread.is_empty() {
            let Some(count) = self.stream.read_chunks(&mut self.chunks).await? else {
                return Err(StreamEnd::Lost);
            };
            self.unread = 0..count;
        }
        // The length in the header has been checked against the limit of its type.
        let mut missing = match frame::peek(&self.buffer)? {
            Some((_, length)) => HEADER_BYTES + length - self.buffer.len(),
            None => self.chunks[self.unread.start].len(),
        };
        self.buffer.reserve(missing);
        for nth in self.unread.clone() {
            let chunk = &mut self.chunks[nth];
            let part = chunk.split_to(chunk.len().min(missing));
            self.buffer.extend_from_slice(&part);
            missing -= part.len();
            if !chunk.is_empty() {
                break;
            }
            self.unread.start = nth + 1;
        }
        Ok(())
    }
}

/// Writes one control frame.
pub async fn write<T: Serialize>(
    stream: &mut SendStream,
    kind: FrameType,
    value: &T,
) -> Result<(), StreamEnd> {
    let bytes = frame::encode(kind, value)?;
    Ok(stream.write_chunk(bytes).await?)
}

/// Opens a stream with its first frame and awaits the answer.
pub async fn open<T: Serialize>(
    connection: &quinn::Connection,
    kind: FrameType,
    value: &T,
    answer: FrameType,
) -> Result<(SendStream, FrameReader, Frame), StreamEnd> {
    let opened = connection.open_bi().await;
    let (mut send, recv) = opened.map_err(|_| StreamEnd::Lost)?;
    write(&mut send, kind, value).await?;
    let mut reader = FrameReader::new(recv);
    let first = reader.next().await?.expect(answer)?;
    Ok((send, reader, first))
}

/// A control request as it is written.
pub fn request(frame: &RequestFrame) -> Result<Bytes, Error> {
    Ok(frame::encode(FrameType::Request, frame)?)
}
