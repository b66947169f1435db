//! Receiving from a queue subscription: every message is settled by itself.

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use millpond_client::{Client, Delivery, Error, Nack, Subscription};

use super::seen::Seen;
use super::{
    EXEC_GRACE, Ending, PREFETCH_MAX, PRINT_BYTES, PRINT_MESSAGES, Pace, ReceiveArgs, Turn, stopped,
};
use crate::exec::{self, Ended};
use crate::failure::Failure;
use crate::moment;
use crate::output::{self, Format};

/// Prints or runs until the pace says that it is over.
pub async fn run(
    args: &ReceiveArgs,
    client: &Client,
    pace: Pace,
    format: Format,
) -> Result<(), Failure> {
    let most = match args.exec {
        Some(_) => args.concurrency,
        None => PREFETCH_MAX,
    };
    let prefetch = u32::try_from(pace.left).unwrap_or(most).min(most);
    let mut subscription = client
        .subscribe(&args.topic, &args.subscription)
        .prefetch(prefetch)
        .at_most(pace.left)
        .open()
        .await?;
    let result = match &args.exec {
        Some(command) => execute(args, command, &mut subscription, pace).await,
        None => print(args.ending.ending(), &mut subscription, pace, format).await,
    };
    subscription.close().await;
    result
}

type Settled = Result<(), Error>;

async fn print(
    ending: Ending,
    subscription: &mut Subscription,
    mut pace: Pace,
    format: Format,
) -> Result<(), Failure> {
    let mut settling = FuturesUnordered::new();
    // Messages to be handed back are kept to the end, so that none comes twice.
    let mut held = Vec::new();
    let mut late = Late::default();
    let mut result = Ok(());
    while !pace.is_over() && held.len() < HELD_MAX {
        let next = async {
            tokio::select! {
                biased;
                Some(settled) = settling.next() => Came::Settled(settled),
                next = subscription.next(), if settling.len() < SETTLING_MAX => Came::Message(next),
            }
        };
        let first = match pace.turn(next).await {
            Turn::Next(Came::Settled(settled)) => {
                late.judge(settled)?;
                continue;
            }
            Turn::Next(Came::Message(Some(first))) => first?,
            Turn::Next(Came::Message(None)) | Turn::Idle => break,
            Turn::Stopped(stop) => {
                result = stopped(stop);
                break;
            }
        };
        let batch = gather(first, subscription, pace.left)?;
        pace.took(batch.len());
        if let Err(failure) = show(&batch, format) {
            held.extend(batch);
            result = Err(failure);
            break;
        }
        match ending {
            Ending::Release => held.extend(batch),
            _ => settling.extend(batch.into_iter().map(|delivery| settle(delivery, ending))),
        }
    }
    settling.extend(
        held.into_iter()
            .map(|delivery| settle(delivery, Ending::Release)),
    );
    while let Some(settled) = settling.next().await {
        late.judge(settled)?;
    }
    result
}

/// Settlements that came too late. They change nothing and are no reason to end; they are told
/// together at the end.
#[derive(Default)]
struct Late {
    count: u64,
}

impl Late {
    fn judge(&mut self, settled: Settled) -> Result<(), Failure> {
        match settled {
            Err(Error::LeaseLost { .. }) => {
                self.count += 1;
                Ok(())
            }
            other => Ok(other?),
        }
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        if self.count > 0 {
            output::note(format!(
                "warning: {} leases were lost before their messages were settled; those messages \
                 are delivered again unless another has settled them",
                self.count
            ));
        }
    }
}

enum Came {
    Settled(Settled),
    Message(Option<Result<Delivery, Error>>),
}

/// The first message and those that are there already, up to what is wanted and fits.
fn gather(
    first: Delivery,
    subscription: &mut Subscription,
    wanted: u64,
) -> Result<Vec<Delivery>, Error> {
    let mut bytes = first.payload().len();
    let mut batch = vec![first];
    while (batch.len() as u64) < wanted && batch.len() < PRINT_MESSAGES && bytes < PRINT_BYTES {
        let Some(Some(next)) = subscription.next().now_or_never() else {
            break;
        };
        let next = next?;
        bytes += next.payload().len();
        batch.push(next);
    }
    Ok(batch)
}

fn show(batch: &[Delivery], format: Format) -> Result<(), Failure> {
    let mut out = Vec::new();
    for delivery in batch {
        seen(delivery).put(format, &mut out);
    }
    output::bytes(&out)
}

fn seen(delivery: &Delivery) -> Seen<'_> {
    Seen {
        offset: delivery.offset().0,
        attempt: delivery.attempt(),
        published_at: moment::rfc3339(delivery.published_at()),
        key: delivery.key(),
        headers: delivery.headers().collect(),
        payload: delivery.payload(),
    }
}

async fn settle(delivery: Delivery, ending: Ending) -> Settled {
    match ending {
        Ending::Ack => delivery.ack().await,
        Ending::Nack => {
            delivery
                .nack(nack(0, "nacked by millpond receive".to_owned()))
                .await
        }
        Ending::Release => delivery.release(None).await,
    }
}

const fn nack(code: u32, reason: String) -> Nack {
    Nack {
        delay: None,
        code,
        reason,
    }
}

async fn execute(
    args: &ReceiveArgs,
    command: &str,
    subscription: &mut Subscription,
    mut pace: Pace,
) -> Result<(), Failure> {
    let mut running = FuturesUnordered::new();
    let concurrency = args.concurrency as usize;
    let mut late = Late::default();
    let result = loop {
        if pace.is_over() && running.is_empty() {
            return Ok(());
        }
        let takes = !pace.is_over() && running.len() < concurrency;
        if !running.is_empty() {
            // A command that runs is no idleness.
            pace.rest();
        }
        let next = async {
            tokio::select! {
                biased;
                Some(settled) = running.next() => Came::Settled(settled),
                next = subscription.next(), if takes => Came::Message(next),
                else => std::future::pending().await,
            }
        };
        match pace.turn(next).await {
            Turn::Next(Came::Settled(settled)) => late.judge(settled)?,
            Turn::Next(Came::Message(Some(delivery))) => {
                pace.took(1);
                running.push(handle(args, command, delivery?));
            }
            Turn::Idle if !running.is_empty() => {}
            Turn::Next(Came::Message(None)) | Turn::Idle => break Ok(()),
            Turn::Stopped(stop) => break stopped(stop),
        }
    };
    // Commands that outlast the grace are killed as they are dropped; their messages come again.
    let finish = async {
        while let Some(settled) = running.next().await {
            late.judge(settled)?;
        }
        Ok(())
    };
    match tokio::time::timeout(EXEC_GRACE, finish).await {
        Ok(finished) => finished.and(result),
        Err(_) => result,
    }
}

async fn handle(args: &ReceiveArgs, command: &str, delivery: Delivery) -> Settled {
    let job = seen(&delivery).job(&args.topic, &args.subscription);
    match exec::run(command, job).await {
        Ended::Well => delivery.ack().await,
        Ended::Badly { code, reason } => delivery.nack(nack(code, reason)).await,
    }
}

/// Most settlements that are on their way at once.
const SETTLING_MAX: usize = 8_192;
/// Most messages that are looked at and handed back by one command.
const HELD_MAX: usize = 10_000;
