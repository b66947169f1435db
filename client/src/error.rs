//! The client's error: what happened, who must act, and how.
//!
//! Promise for publishes: an error whose class is not `Ambiguous` means that the message was not
//! appended. Every error is cheap to clone, because one event may fail many messages.

use std::time::Duration;

use millpond_protocol::control::MessageState;
use millpond_protocol::frame::FrameError;
use millpond_protocol::{ErrorClass, ErrorCode, MessageError, Offset, Sequence, WireError};

/// Why something that was asked of Millpond did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The broker slows this producer down, or too much is unacknowledged. Nothing was appended.
    #[error("the broker takes no more messages now ({}); try again in {retry_after:?}", reason_text(*.reason))]
    Backpressure {
        reason: ErrorCode,
        retry_after: Duration,
    },
    /// Sent, but the answer never came.
    #[error("the outcome is unknown: it was sent, but the answer never came")]
    Ambiguous,
    /// A newer incarnation of the producer id exists.
    #[error("another producer with the same id has been opened; this one is over")]
    Fenced,
    /// The broker has forgotten the producer's sequences.
    #[error("the broker no longer knows this producer's sequences; open a new producer")]
    SequenceExpired,
    /// A sequence given by the user does not rise.
    #[error("sequence {given} does not rise above {last}, the last one used by this producer")]
    SequenceNotRising { last: Sequence, given: Sequence },
    /// The consumer was ended; what it held is delivered again.
    #[error("the consumer's session has ended; its messages are delivered again")]
    SessionEnded,
    /// The lease is gone: the work may be done by another. Without a state, the session that held it
    /// was lost before the broker answered, and the consumer goes on in a new one: the message is
    /// delivered again, unless this settlement was the last thing that the broker heard.
    #[error("the lease was lost, {}", state_text(*.state))]
    LeaseLost { state: Option<MessageState> },
    /// The broker refused the request.
    #[error("{0}")]
    Rejected(WireError),
    /// Stored messages are damaged; reading goes on at `next`.
    #[error("the stored messages from offset {first} to before {next} are damaged")]
    Corrupt { first: Offset, next: Offset },
    /// The two sides speak no common version.
    #[error("client and broker speak no common version: {0}")]
    Version(String),
    /// No connection could be made; the sentence says why.
    #[error("{0}")]
    Connect(String),
    /// Too many failures in a row; nothing was sent.
    #[error("the broker has failed repeatedly; the next attempt is made in {retry_after:?}")]
    CircuitOpen { retry_after: Duration },
    /// Nothing was sent, or it changes nothing: safe to try again.
    #[error("{what} took too long")]
    Timeout { what: &'static str },
    /// The client, producer or subscription was closed.
    #[error("it has been closed")]
    Closed,
    /// The broker's identity could not be verified.
    #[error("{0}")]
    Tls(String),
    #[error("{url:?} is no broker address: {why}; write millpond://HOST:PORT")]
    InvalidUrl { url: String, why: String },
    /// A name or an id is longer than the broker takes; nothing was sent.
    #[error("the {what} has {found} bytes; it may have at most {max}")]
    TooLong {
        what: &'static str,
        found: usize,
        max: usize,
    },
    /// The message breaks a limit.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The broker said something that the protocol does not allow.
    #[error("the broker broke the protocol: {0}")]
    Protocol(String),
}

impl Error {
    /// Who must act.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Backpressure { .. } => ErrorClass::Backpressure,
            Self::Ambiguous => ErrorClass::Ambiguous,
            Self::Fenced | Self::SequenceExpired | Self::SessionEnded | Self::Closed => {
                ErrorClass::HandleFatal
            }
            Self::LeaseLost { .. } => ErrorClass::LeaseLost,
            Self::Rejected(wire) => wire.code.class(),
            Self::Corrupt { .. } => ErrorClass::Corrupt,
            Self::Version(_) => ErrorClass::Version,
            Self::Connect(_) | Self::CircuitOpen { .. } | Self::Timeout { .. } => {
                ErrorClass::Retriable
            }
            Self::SequenceNotRising { .. }
            | Self::Tls(_)
            | Self::InvalidUrl { .. }
            | Self::TooLong { .. }
            | Self::Message(_)
            | Self::Protocol(_) => ErrorClass::RequestFatal,
        }
    }

    /// True if the same call may succeed later. An ambiguous publish is safe to repeat only with a
    /// producer id and the same sequence.
    #[must_use]
    pub fn is_retriable(&self) -> bool {
        matches!(
            self.class(),
            ErrorClass::Retriable | ErrorClass::Backpressure | ErrorClass::Ambiguous
        )
    }

    /// What to do, in one sentence.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self.class() {
            ErrorClass::Retriable => "try again later",
            ErrorClass::Backpressure => "wait, then send again; nothing was appended",
            ErrorClass::Ambiguous => {
                "send again with the same producer id and sequence; a copy is recognised"
            }
            ErrorClass::HandleFatal => "open a new producer or subscription",
            ErrorClass::RequestFatal => "change the request; it would fail again",
            ErrorClass::LeaseLost => "drop the work: the message is handled elsewhere",
            ErrorClass::Corrupt => "restore the range from elsewhere, or go on behind it",
            ErrorClass::Version => "use client and broker of neighbouring versions",
        }
    }

    /// The stable code, if the error has one.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Backpressure { reason, .. } => Some(*reason),
            Self::Ambiguous => Some(ErrorCode::Ambiguous),
            Self::Fenced => Some(ErrorCode::ProducerFenced),
            Self::SequenceExpired => Some(ErrorCode::ProducerStateExpired),
            Self::SessionEnded => Some(ErrorCode::SessionEnded),
            Self::LeaseLost { .. } => Some(ErrorCode::LeaseLost),
            Self::Rejected(wire) => Some(wire.code),
            Self::Corrupt { .. } => Some(ErrorCode::Corrupt),
            Self::Version(_) => Some(ErrorCode::Version),
            Self::TooLong { .. } => Some(ErrorCode::InvalidName),
            Self::Message(MessageError::ReservedHeader(_)) => Some(ErrorCode::ReservedHeader),
            Self::Message(MessageError::Checksum) => Some(ErrorCode::Corrupt),
            Self::Message(_) => Some(ErrorCode::TooLarge),
            _ => None,
        }
    }
}

impl From<WireError> for Error {
    fn from(wire: WireError) -> Self {
        match (wire.code, wire.code.class()) {
            (ErrorCode::ProducerFenced, _) => Self::Fenced,
            (ErrorCode::ProducerStateExpired, _) => Self::SequenceExpired,
            (ErrorCode::SessionEnded, _) => Self::SessionEnded,
            (ErrorCode::Ambiguous, _) => Self::Ambiguous,
            (ErrorCode::Version, _) => Self::Version(wire.message),
            (reason, ErrorClass::Backpressure) => Self::Backpressure {
                reason,
                retry_after: crate::backoff::retry_after(wire.retry_after_ms),
            },
            _ => Self::Rejected(wire),
        }
    }
}

impl From<FrameError> for Error {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error.to_string())
    }
}

fn reason_text(reason: ErrorCode) -> &'static str {
    match reason {
        ErrorCode::CommitQueue => "commits cannot keep up",
        ErrorCode::Memory => "its memory budget is used up",
        ErrorCode::Quota => "this client's share is used up",
        ErrorCode::DiskLow => "its disk is nearly full",
        ErrorCode::BacklogLimit => "the topic has reached its limit",
        _ => "it is busy",
    }
}

fn state_text(state: Option<MessageState>) -> &'static str {
    match state {
        None => "because its session was lost",
        Some(MessageState::Ready) => "the message is waiting for its next delivery",
        Some(MessageState::Leased) => "the message is leased to another delivery",
        Some(MessageState::Scheduled) => "the message is scheduled for a retry",
        Some(MessageState::Acked) => "the message is acknowledged already",
        Some(MessageState::Dead) => "the message is in the dead-letter topic",
        Some(MessageState::Gone) => "the message is no longer in the subscription",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backpressure_code_becomes_backpressure_with_its_wait() {
        let error = Error::from(WireError::new(ErrorCode::DiskLow, "low").retry_after(250));
        assert_eq!(
            error,
            Error::Backpressure {
                reason: ErrorCode::DiskLow,
                retry_after: Duration::from_millis(250),
            }
        );
        assert!(error.is_retriable());
        assert!(error.to_string().contains("disk is nearly full"));
    }

    #[test]
    fn an_unknown_topic_is_fatal_to_the_request() {
        let error = Error::from(WireError::new(ErrorCode::UnknownTopic, "no such topic"));
        assert_eq!(error.class(), ErrorClass::RequestFatal);
        assert!(!error.is_retriable());
        assert_eq!(error.code(), Some(ErrorCode::UnknownTopic));
    }
}
