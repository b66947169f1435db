//! The two directions of one stream, in one task.

use super::frames::StreamError;
use crate::mailbox;
use crate::shard::io::Output;

/// Runs both directions. What ends reading is told by the writing side, behind what it already has.
///
/// Boxed before anything is awaited: a future keeps what it was given by value beside what it made of it,
/// and thousands of streams are idle.
pub fn both(
    reading: impl Future<Output = Result<(), StreamError>>,
    own: mailbox::Sender<Output>,
    writing: impl Future<Output = Result<(), StreamError>>,
) -> impl Future<Output = Result<(), StreamError>> {
    let (reading, mut writing) = (Box::pin(reading), Box::pin(writing));
    async move {
        let read = tokio::select! {
            read = reading => read,
            written = &mut writing => return written,
        };
        match read {
            Ok(()) => Ok(()),
            Err(StreamError::Refused(error)) => {
                // The writing side is there: it is polled below.
                own.send(Output::End(error));
                writing.await
            }
            Err(error) => Err(error),
        }
    }
}
