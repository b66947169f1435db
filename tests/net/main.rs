//! Real clients and a real broker over a network that is as bad as networks get, and an oracle that says
//! whether anybody was told or given something wrong.
//!
//! Each test is one kind of bad network for a few seconds, then a good one until everything is finished.

#![allow(clippy::unwrap_used, reason = "a helper's failure is its test's")]
#![allow(clippy::print_stdout, reason = "figures for who runs it")]

mod load;
mod oracle;
mod proxy;
mod rng;
mod world;

use std::time::Duration;

use crate::proxy::Faults;
use crate::rng::Rng;
use crate::world::{Step, run, seed};

const GOOD: Faults = Faults {
    lost: 0,
    repeated: 0,
    damaged: 0,
    reordered: 0,
    reorder_ms: 0,
    delay_ms: (0, 0),
    cut_up: false,
    cut_down: false,
};

/// How long a fault lasts that has no natural length. In seconds, from the environment, for longer runs.
fn length() -> Duration {
    let given = std::env::var("MILLPOND_NET_SECONDS").ok();
    let seconds = given.map_or(4, |text| {
        text.parse().expect("MILLPOND_NET_SECONDS is a number")
    });
    Duration::from_secs(seconds)
}

fn lost(permille: u32) -> Vec<Step> {
    let faults = Faults {
        lost: permille,
        delay_ms: (1, 3),
        ..GOOD
    };
    vec![Step::For(length(), faults)]
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A second of good network, a cut, a second of good network.
fn cut(seconds: u64, up: bool, down: bool) -> Vec<Step> {
    let cut = Faults {
        cut_up: up,
        cut_down: down,
        ..GOOD
    };
    vec![
        Step::For(secs(1), GOOD),
        Step::For(secs(seconds), cut),
        Step::For(secs(1), GOOD),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loss_of_1_percent() {
    run("loss_1", &lost(10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loss_of_10_percent() {
    run("loss_10", &lost(100)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loss_of_30_percent() {
    run("loss_30", &lost(300)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_that_come_twice_late_and_out_of_order() {
    let faults = Faults {
        repeated: 200,
        reordered: 300,
        reorder_ms: 30,
        delay_ms: (5, 40),
        ..GOOD
    };
    run("disorder", &[Step::For(length(), faults)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_that_are_damaged() {
    let faults = Faults {
        damaged: 100,
        ..GOOD
    };
    run("damage", &[Step::For(length(), faults)]).await;
}

/// Shorter than a connection may be silent: it goes on where it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_partition() {
    run("cut_short", &cut(3, true, true)).await;
}

/// Longer than that, and shorter than a session waits: new connections, the old sessions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_connections_do_not_survive() {
    run("cut_connections", &cut(8, true, true)).await;
}

/// Longer than both: the broker takes every lease away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_sessions_do_not_survive() {
    run("cut_sessions", &cut(18, true, true)).await;
}

/// The broker hears nothing and is heard.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_of_what_clients_say() {
    run("cut_up", &cut(8, true, false)).await;
}

/// The broker hears everything, and none of its acknowledgements arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_of_what_the_broker_says() {
    run("cut_down", &cut(8, false, true)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_whose_address_changes() {
    let faults = Faults {
        lost: 20,
        delay_ms: (1, 5),
        ..GOOD
    };
    let each = [Step::For(Duration::from_millis(700), faults), Step::Move];
    let times = length().as_millis().div_ceil(700) as usize;
    run("moves", &each.repeat(times)).await;
}

/// All of it, in an order and in amounts that the seed decides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_at_once() {
    let mut rng = Rng::new(seed());
    let mut plan = Vec::new();
    let mut left_ms = 3 * length().as_millis() as u64;
    while left_ms > 0 {
        let ms = (100 + rng.below(1_500)).min(left_ms);
        left_ms -= ms;
        let least = rng.below(10);
        let faults = Faults {
            lost: rng.below(300) as u32,
            repeated: rng.below(100) as u32,
            damaged: rng.below(50) as u32,
            reordered: rng.below(200) as u32,
            reorder_ms: rng.below(50),
            delay_ms: (least, least + rng.below(30)),
            cut_up: rng.permille(150),
            cut_down: rng.permille(150),
        };
        plan.push(Step::For(Duration::from_millis(ms), faults));
        if rng.permille(300) {
            plan.push(Step::Move);
        }
    }
    run("storm", &plan).await;
}
