//! Frames on QUIC streams: reading whole ones, and telling why a stream ended.

use bytes::{Buf, Bytes};
use millpond_protocol::control::RequestFrame;
use millpond_protocol::frame::{self, Frame, FrameError, FrameType, HEADER_BYTES};
use millpond_protocol::hot::{Delivered, decode_deliver};
use millpond_protocol::{ErrorCode, WireError};
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use serde::Serialize;

use crate::error::Error;
use crate::limits::READ_CHUNKS;
use crate::pieces::Pieces;

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

/// Takes whole frames off a stream. Every method is cancel-safe.
pub struct FrameReader {
    stream: RecvStream,
    /// Less than a frame, and a fill.
    pieces: Pieces,
    chunks: Vec<Bytes>,
}

impl FrameReader {
    pub fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            pieces: Pieces::default(),
            chunks: vec![Bytes::new(); READ_CHUNKS],
        }
    }

    /// The next frame. An `Error` frame, and the end of the stream, come as `StreamEnd`.
    pub async fn next(&mut self) -> Result<Frame, StreamEnd> {
        let (kind, length) = self.whole().await?;
        self.pieces.advance(HEADER_BYTES);
        let body = self.pieces.copy_to_bytes(length);
        let frame = Frame { kind, body };
        match kind {
            FrameType::Error => Err(StreamEnd::Refused(frame.decode()?)),
            _ => Ok(frame),
        }
    }

    /// As `next`, of a stream that brings deliveries: they are taken apart where they lie.
    pub async fn next_deliveries(&mut self) -> Result<Deliveries, StreamEnd> {
        let (kind, length) = self.whole().await?;
        if kind != FrameType::Deliver {
            return Ok(Deliveries::Other(self.next().await?));
        }
        self.pieces.advance(HEADER_BYTES);
        let mut body = (&mut self.pieces).take(length);
        let delivered = decode_deliver(&mut body)?;
        body.advance(body.remaining());
        Ok(Deliveries::Delivered(delivered))
    }

    /// Type and body length of the next frame, once all of it is there.
    async fn whole(&mut self) -> Result<(FrameType, usize), StreamEnd> {
        loop {
            if let Some(head) = self.pieces.first::<HEADER_BYTES>()
                && let Some((kind, length)) = frame::peek(&head)?
                && self.pieces.remaining() >= HEADER_BYTES + length
            {
                return Ok((kind, length));
            }
            let Some(count) = self.stream.read_chunks(&mut self.chunks).await? else {
                return Err(StreamEnd::Lost);
            };
            for chunk in &mut self.chunks[..count] {
                self.pieces.push(std::mem::take(chunk));
            }
        }
    }
}

/// What comes next on a delivery stream.
pub enum Deliveries {
    Delivered(Vec<Delivered>),
    Other(Frame),
}

/// Writes one control frame.
pub async fn write<T: Serialize>(
    stream: &mut SendStream,
    kind: FrameType,
    value: &T,
) -> Result<(), StreamEnd> {
    let bytes = encode(kind, value)?;
    Ok(stream.write_chunk(bytes).await?)
}

/// A control frame as it is written.
///
/// # Errors
/// `Refused` if it is too long: the broker would end the stream for it, with all who share it.
pub fn encode<T: Serialize>(kind: FrameType, value: &T) -> Result<Bytes, StreamEnd> {
    frame::encode(kind, value).map_err(|error| StreamEnd::Refused(error.into()))
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
    Ok(encode(FrameType::Request, frame)?)
}
