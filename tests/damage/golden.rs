//! The golden store: a small folder with something of everything in it, made by a real shard that is
//! driven by hand, always the same.
//!
//! What it consists of: a cleaned segment; whole ones below, between and above two snapshots, sealed; one
//! that is being written, whose last entry nothing vouches for yet; a manifest that tells of starts, cuts,
//! snapshots, a cleaning and a removal; and in them finished and unfinished messages, delayed ones, retries
//! that wait, dead letters, a redrive, dedup state of two producers, tokens, a stream subscription.

use millpond_broker::shard::io::ResolvedRequest;
use millpond_protocol::control::{
    DeadFilter, LeaseName, Outcome, RedriveTarget, RejectKind, Request, SettleItem,
};
use millpond_protocol::policy::{Backoff, Jitter, StartAt};
use millpond_protocol::{Message, Sequence, SubscriptionConfig, SubscriptionMode, TopicConfig};
use millpond_queue::StartPosition;

use crate::disk::{Contents, Disk};
use crate::life::{Consumer, Life, NO_SNAPSHOT};

/// Bytes of records after which a snapshot is taken: [`filler`] makes that come true.
const SNAPSHOT_EVERY: u64 = 4_800;

/// The store and what was acknowledged while it was made.
pub struct Golden {
    pub contents: Contents,
    pub accepted: Vec<millpond_broker::shard::io::Fresh>,
}

/// The minute in which the next life of the store begins.
pub const NEXT_MINUTE: u64 = 10;

pub fn make() -> Golden {
    let disk = Disk::default();
    let mut life = Life::begin(&disk, 0, SNAPSHOT_EVERY);
    set_up(&mut life);
    let [mut shop, mut web] = life.producers([("orders", "shop"), ("audit", "web")]);
    life.publish(&mut shop, &messages("first", 12));
    life.publish(&mut web, &messages("seen", 3));
    let mut worker = life.consumer("orders", "billing", 100);
    let reader = life.consumer("audit", "reader", 100);
    life.commit(&reader, 3);
    let done = worker.take(|at| at != 3 && at != 7);
    life.ack(&mut worker, done);
    fail(&mut life, &mut worker, 3, 7);
    life.publish(&mut shop, &[filler()]);

    life.publish(&mut shop, &messages("second", 6));
    let done = worker.take(|at| at % 2 == 0);
    life.ack(&mut worker, done);
    fail(&mut life, &mut worker, 13, 15);
    life.publish(&mut web, &[filler()]);
    // Letting go, removal and cleaning, now that both snapshots cover the beginning.
    for _ in 0..3 {
        life.pass(2_000_000);
    }

    life.publish(&mut shop, &messages("third", 3));
    life.publish(
        &mut web,
        &[Message {
            delay_ms: 3_600_000,
            ..Message::new("later")
        }],
    );
    life.ask(vec![ResolvedRequest::Plain(Request::DeadRedrive {
        topic: "orders".to_owned(),
        subscription: "billing".to_owned(),
        filter: DeadFilter {
            limit: Some(1),
            ..DeadFilter::default()
        },
        rate_per_s: None,
        target: RedriveTarget::Subscription,
    })]);
    let mut accepted = std::mem::take(&mut life.accepted);
    drop(life);

    let mut life = Life::begin(&disk, 5, NO_SNAPSHOT);
    let [mut shop] = life.producers([("orders", "shop")]);
    life.publish_from(&shop, Sequence(20), &messages("third", 5));
    shop.last = Sequence(25);
    life.vouch();
    life.publish(&mut shop, &messages("fourth", 2));
    life.vouch();
    life.publish(&mut shop, &messages("last", 1));
    accepted.append(&mut life.accepted);
    drop(life);
    Golden {
        contents: disk.contents(),
        accepted,
    }
}

fn set_up(life: &mut Life) {
    let topic = |name: &str| {
        ResolvedRequest::Plain(Request::TopicCreate {
            name: name.to_owned(),
            config: TopicConfig::default(),
        })
    };
    let token = ResolvedRequest::TokenAdd {
        name: "ops".to_owned(),
        hash: [7; 32],
    };
    life.ask(vec![topic("orders"), topic("audit"), token]);
    let subscription = |topic: &str, name: &str, config| {
        let request = Request::SubscriptionCreate {
            topic: topic.to_owned(),
            name: name.to_owned(),
            config,
            start: StartAt::Earliest,
        };
        ResolvedRequest::At(request, StartPosition::Earliest)
    };
    let billing = SubscriptionConfig {
        backoff: Backoff::Fixed { wait_ms: 3_600_000 },
        jitter: Jitter::None,
        ..SubscriptionConfig::default()
    };
    let reader = SubscriptionConfig {
        mode: SubscriptionMode::Stream,
        ..SubscriptionConfig::default()
    };
    life.ask(vec![
        subscription("orders", "billing", billing),
        subscription("audit", "reader", reader),
    ]);
}

/// One message waits for its next attempt, one is dead.
fn fail(life: &mut Life, worker: &mut Consumer, nacked: u64, rejected: u64) {
    let item = |lease: LeaseName, outcome| SettleItem { lease, outcome };
    let nack = |lease| {
        item(
            lease,
            Outcome::Nack {
                delay_ms: None,
                code: 7,
                reason: "not yet".to_owned(),
            },
        )
    };
    let reject = |lease| {
        item(
            lease,
            Outcome::Reject {
                kind: RejectKind::Rejected,
                code: 9,
                reason: "never".to_owned(),
            },
        )
    };
    let nacked = worker.take(|at| at == nacked).into_iter().map(nack);
    let rejected = worker.take(|at| at == rejected).into_iter().map(reject);
    life.settle(worker, Vec::new(), nacked.chain(rejected).collect());
}

fn messages(name: &str, count: u64) -> Vec<Message> {
    let message = |nth| Message::new(format!("{name} {nth} {}", "x".repeat(30 + nth as usize)));
    (0..count).map(message).collect()
}

/// One message that is large enough for the next snapshot to be due.
fn filler() -> Message {
    let bytes: Vec<u8> = (0..SNAPSHOT_EVERY)
        .map(|at| (at * 31 % 251) as u8)
        .collect();
    Message::new(bytes)
}
