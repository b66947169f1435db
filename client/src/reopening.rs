//! When a producer or consumer opens its stream again after it has ended.
//!
//! A stream that went down with its connection says nothing about the stream: it is opened again as
//! soon as there is a connection, whose pace is the supervisor's business. However often that
//! happens, waiting longer each time would only use up the grace of the consumer's session. A stream
//! that ends by itself is opened again ever more slowly, and given up in the end.

use std::time::Duration;

use crate::backoff::Backoff;
use crate::connection::Link;
use crate::error::Error;
use crate::limits::STREAM_RETRIES_MAX;

/// How a stream ended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum StreamFate {
    /// Its connection is over, or the broker has asked to leave it.
    WithConnection,
    /// It ended by itself, but had been of use.
    Used,
    /// It ended by itself, and nothing had come of it.
    Useless,
}

impl StreamFate {
    pub fn of(link: &Link, was_of_use: bool) -> Self {
        if link.is_over() {
            Self::WithConnection
        } else if was_of_use {
            Self::Used
        } else {
            Self::Useless
        }
    }
}

/// The pace of one handle.
#[derive(Debug, Default)]
pub struct Reopening {
    backoff: Backoff,
}

impl Reopening {
    /// The wait before the stream is opened again.
    ///
    /// # Errors
    /// The broker ends it again and again, on a connection that is well.
    pub fn after(&mut self, fate: StreamFate, random: u64) -> Result<Duration, Error> {
        match fate {
            StreamFate::WithConnection => {
                self.backoff = Backoff::default();
                return Ok(Duration::ZERO);
            }
            StreamFate::Used => self.backoff = Backoff::default(),
            StreamFate::Useless if self.backoff.attempts() >= STREAM_RETRIES_MAX => {
                let what = "it ends this stream again and again";
                return Err(Error::Protocol(what.to_owned()));
            }
            StreamFate::Useless => {}
        }
        Ok(self.backoff.next(random))
    }
}

#[cfg(test)]
mod tests {
    use super::StreamFate::{Used, Useless, WithConnection};
    use super::*;

    #[test]
    fn a_stream_that_went_down_with_its_connection_is_opened_at_once_however_often() {
        let mut reopening = Reopening::default();
        for _ in 0..100 {
            assert_eq!(
                reopening.after(WithConnection, u64::MAX),
                Ok(Duration::ZERO)
            );
        }
    }

    #[test]
    fn a_stream_that_ends_by_itself_is_opened_ever_more_slowly_and_given_up() {
        let mut reopening = Reopening::default();
        let mut last = Duration::ZERO;
        for _ in 0..STREAM_RETRIES_MAX {
            let wait = reopening.after(Useless, 0).unwrap();
            assert!(wait > last, "{wait:?} after {last:?}");
            last = wait;
        }
        let end = reopening.after(Useless, 0);
        assert!(matches!(end, Err(Error::Protocol(_))), "{end:?}");
    }

    #[test]
    fn use_and_lost_connections_begin_the_count_anew() {
        for fate in [Used, WithConnection] {
            let mut reopening = Reopening::default();
            for _ in 0..3 * STREAM_RETRIES_MAX {
                reopening.after(Useless, 0).unwrap();
                reopening.after(Useless, 0).unwrap();
                reopening.after(fate, 0).unwrap();
            }
        }
    }
}
