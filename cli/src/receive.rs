//! `millpond receive`: prints messages and settles them, or runs a command for each.
//!
//! A message is acknowledged only when what was printed of it has left the process, so a closed pipe
//! or a kill loses none.

mod queue;
mod seen;
mod stream;

use std::time::Duration;

use clap::Args;
use millpond_client::{Client, ErrorCode, StartAt, SubscriptionMode};
use tokio::time::Instant;

use crate::args::Global;
use crate::connect::connect;
use crate::failure::Failure;
use crate::policy_args::{ModeArg, PolicyArgs};
use crate::signal::{Signals, Stop};
use crate::{duration, moment};

/// Prints messages as they come, the payload and a line feed each (with JSON an object a line), and
/// acknowledges them; or runs a command for each.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    topic: String,
    subscription: String,
    /// End after so many messages.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after this long without a message [default: wait for ever].
    #[arg(long, value_name = "D", value_parser = duration::parse)]
    timeout: Option<Duration>,
    #[command(flatten)]
    ending: EndingArgs,
    /// Create the subscription if it is missing.
    #[arg(long)]
    create: bool,
    /// The created one's mode [default: queue].
    #[arg(long, value_enum, requires = "create")]
    mode: Option<ModeArg>,
    /// Where the created one begins: `earliest`, `latest`, an offset, or a time [default: earliest].
    #[arg(long, value_name = "WHERE", value_parser = moment::parse_start, requires = "create")]
    from: Option<StartAt>,
    /// Run this by `sh -c` for each message, with the payload on its standard input and MILLPOND_OFFSET,
    /// MILLPOND_ATTEMPT, MILLPOND_KEY, MILLPOND_TOPIC, MILLPOND_SUBSCRIPTION and MILLPOND_HEADER_<NAME>
    /// in its environment. Exit 0 acknowledges; anything else is a nack with the last line of its
    /// standard error as the reason.
    #[arg(long, value_name = "COMMAND", conflicts_with = "ending")]
    exec: Option<String>,
    /// Commands at once.
    #[arg(long, value_name = "N", requires = "exec", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=CONCURRENCY_MAX))]
    concurrency: u32,
}

/// What becomes of messages that were printed.
#[derive(Clone, Debug, Args)]
#[group(id = "ending", multiple = false)]
struct EndingArgs {
    /// Acknowledge what was printed (the default).
    #[arg(long)]
    ack: bool,
    /// Nack what was printed: it comes again after its backoff.
    #[arg(long)]
    nack: bool,
    /// Hand everything back at the end, as if it had never been taken.
    #[arg(long)]
    release: bool,
}

/// What becomes of messages that were printed.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Ending {
    Ack,
    Nack,
    Release,
}

impl EndingArgs {
    const fn ending(&self) -> Ending {
        match (self.nack, self.release) {
            (true, _) => Ending::Nack,
            (_, true) => Ending::Release,
            _ => Ending::Ack,
        }
    }
}

/// Receives until the count, the timeout or a signal ends it.
pub async fn run(args: ReceiveArgs, global: &Global) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let opened = async {
        let client = connect(global).await?;
        let mode = mode(&args, &client).await?;
        Ok::<_, Failure>((client, mode))
    };
    let (client, mode) = tokio::select! {
        opened = Box::pin(opened) => opened?,
        stop = signals.asked() => return stopped(stop),
    };
    let pace = Pace::new(&args, signals);
    let result = match mode {
        SubscriptionMode::Queue => Box::pin(queue::run(&args, &client, pace, global.output)).await,
        SubscriptionMode::Stream => {
            Box::pin(stream::run(&args, &client, pace, global.output)).await
        }
    };
    client.close().await;
    result
}

async fn mode(args: &ReceiveArgs, client: &Client) -> Result<SubscriptionMode, Failure> {
    match client.subscription(&args.topic, &args.subscription).await {
        Ok(view) => Ok(view.config.mode),
        Err(error) if args.create && error.code() == Some(ErrorCode::UnknownSubscription) => {
            create(args, client).await
        }
        Err(error) => Err(error.into()),
    }
}

async fn create(args: &ReceiveArgs, client: &Client) -> Result<SubscriptionMode, Failure> {
    let mode = args.mode.unwrap_or_default();
    let config = PolicyArgs::default().config(mode);
    let start = args.from.unwrap_or_default();
    let created = client
        .create_subscription(&args.topic, &args.subscription, config, start)
        .await;
    match created {
        Ok(view) => Ok(view.config.mode),
        // Another was faster; its mode counts.
        Err(error) if error.code() == Some(ErrorCode::AlreadyExists) => {
            let view = client.subscription(&args.topic, &args.subscription).await?;
            Ok(view.config.mode)
        }
        Err(error) => Err(error.into()),
    }
}

/// A wish to end is success for whoever sends SIGTERM, and Ctrl-C's own code for the terminal.
const fn stopped(stop: Stop) -> Result<(), Failure> {
    match stop {
        Stop::Terminate => Ok(()),
        Stop::Interrupt => Err(Failure::Stopped(stop)),
    }
}

/// When to end: how many messages are still wanted, and how long to wait for the next.
struct Pace {
    signals: Signals,
    left: u64,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
}

/// What came first.
enum Turn<T> {
    Next(T),
    Idle,
    Stopped(Stop),
}

impl Pace {
    fn new(args: &ReceiveArgs, signals: Signals) -> Self {
        let mut pace = Self {
            signals,
            left: args.count.unwrap_or(u64::MAX),
            timeout: args.timeout,
            deadline: None,
        };
        pace.rest();
        pace
    }

    /// Something has happened: the timeout begins again.
    fn rest(&mut self) {
        self.deadline = self
            .timeout
            .and_then(|wait| Instant::now().checked_add(wait));
    }

    const fn is_over(&self) -> bool {
        self.left == 0
    }

    fn took(&mut self, count: usize) {
        self.left = self.left.saturating_sub(count as u64);
        self.rest();
    }

    /// Waits for `next`, a signal, or the end of the timeout.
    async fn turn<T>(&mut self, next: impl Future<Output = T>) -> Turn<T> {
        let deadline = self.deadline;
        let idle = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            stop = self.signals.asked() => Turn::Stopped(stop),
            next = next => Turn::Next(next),
            () = idle => Turn::Idle,
        }
    }

    /// Waits for what has begun; once a signal asks for the end, no longer than `grace`.
    async fn finish<T>(
        &mut self,
        begun: impl Future<Output = T>,
        grace: Duration,
    ) -> Result<T, Stop> {
        let mut begun = std::pin::pin!(begun);
        tokio::select! {
            biased;
            ended = &mut begun => Ok(ended),
            stop = self.signals.asked() => {
                tokio::time::timeout(grace, begun).await.map_err(|_| stop)
            }
        }
    }
}

/// Most commands at once.
const CONCURRENCY_MAX: i64 = 1_000;
/// Most messages taken before the broker is asked for more.
const PREFETCH_MAX: u32 = 1_000;
/// Most messages printed together.
const PRINT_MESSAGES: usize = 256;
/// Bytes of payload after which no more messages are printed together.
const PRINT_BYTES: usize = 1 << 20;
/// How long running commands may take after the end was asked for.
const EXEC_GRACE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_has_begun_ends_within_its_grace_or_not_at_all() {
        let mut pace = Pace {
            signals: Signals::that_asked(Stop::Terminate),
            left: 1,
            timeout: None,
            deadline: None,
        };
        let hangs = pace.finish(std::future::pending::<()>(), Duration::from_millis(1));
        assert_eq!(hangs.await, Err(Stop::Terminate));
        let ends = async {
            tokio::task::yield_now().await;
            7
        };
        assert_eq!(pace.finish(ends, EXEC_GRACE).await, Ok(7));
    }
}
