//! A consumer that fails again and again while the broker is killed: what it was told of its failures
//! is compared with the attempts and the times at which messages come back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use millpond_client::{Client, Delivery, Error, Nack, Subscription};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::common::Broker;
use crate::{lines, rounds};

const MESSAGES: u64 = 200;
const BACKOFF: Duration = Duration::from_millis(300);
/// Deliveries between two kills; no multiple of `MESSAGES`, so that kills hit every phase.
const KILL_EVERY: u64 = 347;
/// Longest that nothing may come.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a stamp, in microseconds and slewed, may differ from this process's clock.
const CLOCK_SLACK: Duration = Duration::from_millis(1);

#[test]
fn killed_while_retrying_attempts_rise_by_the_failures_and_no_retry_is_early() {
    let mut broker = Broker::fresh();
    let input = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(input.path(), lines(0, MESSAGES)).unwrap();
    broker.good("topic create orders");
    broker.good(
        "subscription create orders work --max-attempts 60000 --max-deliveries 60000 \
         --backoff-list 300ms --jitter none",
    );
    broker.good(&format!("send orders --file {}", input.path().display()));
    let runtime = Runtime::new().unwrap();
    let told = runtime.block_on(fail_and_kill(&mut broker));
    assert_eq!(told.messages.len() as u64, MESSAGES);
    let left = broker.json("subscription show orders work");
    for (name, expected) in [("backlog", 0), ("dead", 0), ("floor", MESSAGES)] {
        assert_eq!(left[name], expected, "{name} in {left}");
    }
}

/// Nacks everything until the last kill is survived, then acknowledges everything.
async fn fail_and_kill(broker: &mut Broker) -> Told {
    let client = Client::builder().ca_file(broker.data.join("tls/ca.pem"));
    let url = format!("millpond://{}", broker.listen);
    let client = client.connect(&url).await.unwrap();
    let mut subscription = client.subscribe("orders", "work").open().await.unwrap();
    let (mut told, mut came) = (Told::default(), 0);
    let mut nacking = FuturesUnordered::new();
    while told.kills < rounds() || came % KILL_EVERY != 0 {
        let delivery = tokio::select! {
            biased;
            Some((ticket, answer)) = nacking.next() => {
                told.answered(ticket, answer);
                continue;
            }
            delivery = next(&mut subscription) => delivery,
        };
        let ticket = told.delivered(&delivery);
        let receipt = delivery.nack_later(Nack::new("no"));
        nacking.push(async move { (ticket, receipt.await) });
        came += 1;
        if came % KILL_EVERY == 0 && told.kills < rounds() {
            tokio::task::block_in_place(|| {
                broker.kill();
                broker.restart();
            });
            told.kills += 1;
            told.restarted_at = Some(Instant::now());
        }
    }
    while let Some((ticket, answer)) = nacking.next().await {
        told.answered(ticket, answer);
    }
    for _ in 0..MESSAGES {
        let delivery = next(&mut subscription).await;
        told.delivered(&delivery);
        delivery.ack().await.unwrap();
    }
    subscription.close().await;
    client.close().await;
    told
}

async fn next(subscription: &mut Subscription) -> Delivery {
    let next = timeout(PATIENCE, subscription.next()).await;
    next.expect("a retry is overdue").unwrap().unwrap()
}

/// What the consumer knows.
#[derive(Default)]
struct Told {
    kills: u64,
    restarted_at: Option<Instant>,
    /// Kills that the client has survived: its connection is a newer one.
    survived: u64,
    /// By offset, the last delivery and what was told of its nack.
    messages: BTreeMap<u64, (Ticket, Word)>,
}

/// A delivery that was nacked as soon as it came.
#[derive(Copy, Clone, Debug)]
struct Ticket {
    offset: u64,
    delivery: u32,
    attempt: u32,
    /// Not after the nack was on its way.
    sent_at: Instant,
    /// Kills survived before.
    survived: u64,
}

/// What a consumer was told of a nack.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Word {
    Nothing,
    Counted,
    /// The lease was lost with a killed broker, or the nack had been counted before it was repeated
    /// and the message was handed out again meanwhile.
    Refused,
}

impl Told {
    fn delivered(&mut self, delivery: &Delivery) -> Ticket {
        let mut ticket = Ticket {
            offset: delivery.offset().0,
            delivery: delivery.delivery(),
            attempt: delivery.attempt(),
            sent_at: Instant::now(),
            survived: self.survived,
        };
        let mut told = Word::Nothing;
        match self.messages.get(&ticket.offset).copied() {
            None => assert_eq!(ticket.attempt, 1, "nothing has failed: {ticket:?}"),
            Some((last, answer)) if last.delivery == ticket.delivery => {
                // Its hand-out died with the broker and was made again under the same name: one nack
                // counts for both.
                assert_eq!(ticket.attempt, last.attempt, "{ticket:?} after {last:?}");
                assert!(last.survived < self.kills, "{ticket:?} again");
                told = answer;
                if answer != Word::Refused {
                    ticket.sent_at = last.sent_at;
                }
            }
            Some((last, answer)) => self.follows(&ticket, &last, answer),
        }
        self.messages.insert(ticket.offset, (ticket, told));
        ticket
    }

    /// Checks a delivery against the one before it.
    fn follows(&self, ticket: &Ticket, last: &Ticket, answer: Word) {
        let why = || format!("{ticket:?} after {last:?}, whose nack was {answer:?}");
        let in_doubt = answer != Word::Counted;
        assert!(!in_doubt || last.survived < self.kills, "{}", why());
        if in_doubt && ticket.attempt == last.attempt {
            return;
        }
        assert_eq!(ticket.attempt, last.attempt + 1, "{}", why());
        let waited = ticket.sent_at - last.sent_at;
        assert!(waited + CLOCK_SLACK >= BACKOFF, "early: {}", why());
    }

    fn answered(&mut self, ticket: Ticket, answer: Result<(), Error>) {
        if answer.is_ok() && self.restarted_at.is_some_and(|at| ticket.sent_at > at) {
            self.survived = self.kills;
        }
        let told = match answer {
            Ok(()) => Word::Counted,
            Err(Error::LeaseLost { .. }) if ticket.survived < self.kills => Word::Refused,
            Err(error) => panic!("the nack of {ticket:?}: {error}"),
        };
        // What has come again since is judged by itself.
        if let Some((last, known)) = self.messages.get_mut(&ticket.offset)
            && last.delivery == ticket.delivery
            && *known != Word::Counted
        {
            *known = told;
            last.sent_at = last.sent_at.min(ticket.sent_at);
        }
    }
}
