//! Reads a consumer's two streams: deliveries and notices on one, answers to settlements on the other.

use millpond_protocol::frame::{FrameError, FrameType};

use super::session::Session;
use crate::io::{Deliveries, FrameReader, StreamEnd};

/// Takes deliveries and notices in.
pub async fn receive(session: &Session, reader: &mut FrameReader) -> StreamEnd {
    loop {
        let frame = match reader.next_deliveries().await {
            Ok(Deliveries::Delivered(all)) => {
                session.delivered(all);
                continue;
            }
            Ok(Deliveries::Other(frame)) => frame,
            Err(end) => return end,
        };
        let taken = match frame.kind {
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
