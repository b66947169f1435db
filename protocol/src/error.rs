//! Stable error codes, their classes, and the error as it crosses the wire.
//!
//! A code is never reused: a gap in the list is a retired one.

use serde::{Deserialize, Serialize};

/// Who must act on an error, and how.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// Try the same again, after `retry_after` if it is given.
    Retriable,
    /// The broker slows the sender down; wait.
    Backpressure,
    /// Sent, no answer: safe to send again with a producer id.
    Ambiguous,
    /// This producer or session is over; open a new one.
    HandleFatal,
    /// The request is wrong and stays wrong; change it.
    RequestFatal,
    /// The lease that was named is gone; the work may be done by another.
    LeaseLost,
    /// Stored bytes are damaged; the range is named.
    Corrupt,
    /// The two sides speak no common version.
    Version,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $class:ident;)*) => {
        /// What went wrong, as a stable number.
        #[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(into = "u16", from = "u16")]
        pub enum ErrorCode {
            $($(#[$doc])* $name,)*
            /// A code of a newer peer; treated as `RequestFatal`.
            Unknown(u16),
        }

        impl ErrorCode {
            /// The code's class.
            #[must_use]
            pub const fn class(self) -> ErrorClass {
                match self {
                    $(Self::$name => ErrorClass::$class,)*
                    Self::Unknown(_) => ErrorClass::RequestFatal,
                }
            }
        }

        impl From<u16> for ErrorCode {
            fn from(code: u16) -> Self {
                match code {
                    $($code => Self::$name,)*
                    other => Self::Unknown(other),
                }
            }
        }

        impl From<ErrorCode> for u16 {
            fn from(code: ErrorCode) -> Self {
                match code {
                    $(ErrorCode::$name => $code,)*
                    ErrorCode::Unknown(other) => other,
                }
            }
        }
    };
}

codes! {
    /// The broker is doing too much; try again.
    Busy = 1, Retriable;
    /// The broker is starting.
    Recovering = 2, Retriable;
    /// The broker is shutting down; reconnect.
    Draining = 3, Retriable;
    /// Commits cannot keep up.
    CommitQueue = 10, Backpressure;
    /// The memory budget is used up.
    Memory = 11, Backpressure;
    /// A share of a token, connection or topic is used up.
    Quota = 12, Backpressure;
    /// The disk is nearly full.
    DiskLow = 13, Backpressure;
    /// The topic has reached its limit.
    BacklogLimit = 14, Backpressure;
    /// Sent, but the answer never came.
    Ambiguous = 20, Ambiguous;
    /// A newer incarnation of this producer id exists.
    ProducerFenced = 30, HandleFatal;
    /// The broker has forgotten this producer's sequences.
    ProducerStateExpired = 31, HandleFatal;
    /// The session has ended.
    SessionEnded = 32, HandleFatal;
    /// Messages before this one are missing: `previous` is not the last accepted sequence.
    SequenceGap = 33, HandleFatal;
    /// The subscription or topic was deleted.
    Deleted = 34, HandleFatal;
    /// Another consumer became the active one of this stream subscription.
    NotActive = 35, HandleFatal;
    UnknownTopic = 40, RequestFatal;
    UnknownSubscription = 41, RequestFatal;
    AlreadyExists = 42, RequestFatal;
    TooLarge = 43, RequestFatal;
    Unauthorized = 44, RequestFatal;
    ReservedHeader = 45, RequestFatal;
    InvalidName = 46, RequestFatal;
    InvalidPolicy = 47, RequestFatal;
    Malformed = 48, RequestFatal;
    WrongMode = 49, RequestFatal;
    OffsetOutOfRange = 50, RequestFatal;
    CreditOverrun = 51, RequestFatal;
    DeadLetterCycle = 52, RequestFatal;
    NotEmpty = 53, RequestFatal;
    ReadOnly = 54, RequestFatal;
    LimitReached = 55, RequestFatal;
    UnknownToken = 56, RequestFatal;
    /// The lease was lost; the state says to what.
    LeaseLost = 60, LeaseLost;
    Corrupt = 70, Corrupt;
    Version = 80, Version;
}

/// An error as it crosses the wire: code, sentence, and when to try again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    pub code: ErrorCode,
    /// One clear sentence that says what to do.
    pub message: String,
    /// Milliseconds after which to try again.
    pub retry_after_ms: Option<u32>,
}

impl WireError {
    /// An error without a time to try again.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retry_after_ms: None,
        }
    }

    /// The same with a time to try again.
    #[must_use]
    pub fn retry_after(mut self, ms: u32) -> Self {
        self.retry_after_ms = Some(ms);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for code in 0..=u16::MAX {
            assert_eq!(u16::from(ErrorCode::from(code)), code);
        }
    }

    #[test]
    fn an_unknown_code_is_fatal_to_the_request() {
        assert_eq!(ErrorCode::from(9_999).class(), ErrorClass::RequestFatal);
    }
}
