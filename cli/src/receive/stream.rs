//! Receiving from a stream subscription: in order, and what has been printed is committed.

use millpond_client::{Client, Error, ErrorCode, StreamMessage};

use super::seen::Seen;
use super::{EXEC_GRACE, Ending, Pace, ReceiveArgs, Turn, stopped};
use crate::exec::{self, Ended};
use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Format};

/// Prints or runs until the pace says that it is over.
pub async fn run(
    args: &ReceiveArgs,
    client: &Client,
    mut pace: Pace,
    format: Format,
) -> Result<(), Failure> {
    let ending = args.ending.ending();
    if ending == Ending::Nack || args.concurrency > 1 {
        return Err(Failure::StreamMode);
    }
    let mut subscription = client
        .subscribe(&args.topic, &args.subscription)
        .open_stream()
        .await?;
    let result = loop {
        if pace.is_over() {
            break Ok(());
        }
        let message = match pace.turn(subscription.next()).await {
            Turn::Next(Some(Ok(message))) => message,
            Turn::Next(Some(Err(damage @ Error::Corrupt { .. }))) => {
                output::note(format!("warning: {damage}"));
                continue;
            }
            Turn::Next(Some(Err(error))) => break Err(error.into()),
            Turn::Next(None) | Turn::Idle => break Ok(()),
            Turn::Stopped(stop) => break stopped(stop),
        };
        pace.took(1);
        // A command that outlasts the grace is killed as it is dropped; its message comes again.
        match pace
            .finish(Box::pin(handle(args, &message, format)), EXEC_GRACE)
            .await
        {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => break Err(failure),
            Err(stop) => break stopped(stop),
        }
        if ending != Ending::Release {
            let next = message.offset().next();
            match subscription.commit(next).await {
                Ok(()) => {}
                Err(error) if is_overtaken(&error) => output::note(format!(
                    "warning: offset {} was handled but not committed: {error}; it comes again",
                    message.offset()
                )),
                Err(error) => break Err(error.into()),
            }
        }
    };
    subscription.close().await;
    result
}

/// The session was lost, or another consumer has taken over: this one goes on, as active one or
/// standing by, from what was committed last.
fn is_overtaken(error: &Error) -> bool {
    matches!(error, Error::LeaseLost { .. }) || error.code() == Some(ErrorCode::NotActive)
}

async fn handle(
    args: &ReceiveArgs,
    message: &StreamMessage,
    format: Format,
) -> Result<(), Failure> {
    let seen = seen(message);
    let Some(command) = &args.exec else {
        let mut out = Vec::new();
        seen.put(format, &mut out);
        return output::bytes(&out);
    };
    let job = seen.job(&args.topic, &args.subscription);
    match exec::run(command, job).await {
        Ended::Well => Ok(()),
        Ended::Badly { reason, .. } => Err(Failure::Command {
            offset: message.offset().0,
            reason,
        }),
    }
}

fn seen(message: &StreamMessage) -> Seen<'_> {
    Seen {
        offset: message.offset().0,
        attempt: 1,
        published_at: moment::rfc3339(message.published_at()),
        key: message.key(),
        headers: message.headers().collect(),
        payload: message.payload(),
    }
}
