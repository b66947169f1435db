//! Reads a consumer's two streams: deliveries and notices on one, answers to settlements on the other.

use millpond_protocol::frame::{FrameError, FrameType};
use millpond_protocol::hot::decode_deliver;

use super::session::Session;
use crate::io::{FrameReader, StreamEnd};

/// Takes deliveries and notices in.
pub async fn receive(session: &Session, reader: &mut FrameReader) -> StreamEnd {
    loop {
        let frame = match reader.next().await {
            Ok(frame) => frame,
            Err(end) => return end,
        };
        let taken = match frame.kind {
            FrameType::Deliver => decode_deliver(&frame.body).map(|all| session.delivered(all)),
            FrameType::ConsumerNotice => frame.decode().map(|notice| session.notice(notice)),
            found => Err(FrameError::Unexpected { found }),
        };
        if let Err(error) = taken {
            return error.into();
        }
    }
}

/// Hears answers to settlements until the session is closed.
pub async fn hear(session: &Session, reader: &mut FrameReader) -> Result<(), StreamEnd> {
    loop {
        let frame = reader.next().await?;
        match frame.kind {
            FrameType::Settled => session
                .settled(&frame.decode()?)
                .map_err(StreamEnd::Malformed)?,
            FrameType::SessionClosed => return Ok(()),
            found => return Err(FrameError::Unexpected { found }.into()),
        }
    }
}
