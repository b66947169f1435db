//! The core against a model of it: whatever is done in whatever order, both must agree, and the
//! invariants that are named here must hold.
//!
//! I3 one append for each (producer, epoch, sequence), with the original offset for ever;
//! I4 offsets are gapless in append order; I5 nothing comes before it is due; I6 dead exactly once,
//! in the queue or in the dead-letter topic; I7 floors and consumer offsets move back by a seek
//! alone. `PROPTEST_CASES` sets how long it looks; a seed that fails becomes a named test below.

#![expect(
    clippy::unwrap_used,
    reason = "the model is test code: what is missing in it is a failed test"
)]

#[path = "model/dead.rs"]
mod dead;
#[path = "model/fold.rs"]
mod fold;
#[path = "model/judge.rs"]
mod judge;
#[path = "model/make.rs"]
mod make;
#[path = "model/ops.rs"]
mod ops;
#[path = "model/producers.rs"]
mod producers;
#[path = "model/rest.rs"]
mod rest;
#[path = "model/settle.rs"]
mod settle;
#[path = "model/state.rs"]
mod state;
#[path = "model/subscriptions.rs"]
mod subscriptions;
#[path = "model/told.rs"]
mod told;
#[path = "model/world.rs"]
mod world;

use millpond_protocol::policy::SubscriptionMode;
use ops::{Kind, Op};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use world::World;

/// Cases of each property unless the environment says otherwise: some 10 seconds each.
const CASES: u32 = 1_000;

/// Kinds of operations with how often they come.
type Profile = &'static [(u32, Kind)];

const CONSUMING: Profile = &[
    (12, Kind::Turn),
    (8, Kind::Advance),
    (8, Kind::Publish),
    (6, Kind::Ack),
    (10, Kind::Settle),
    (6, Kind::Credit),
    (2, Kind::SessionOpen),
    (3, Kind::Dispatch),
    (3, Kind::ApplyPending),
    (6, Kind::Late),
    (4, Kind::Wake),
    (2, Kind::Close),
    (4, Kind::Detach),
    (4, Kind::Attach),
    (2, Kind::Renew),
    (2, Kind::Extend),
    (1, Kind::Restart),
    (1, Kind::Snapshot),
    (1, Kind::SubUpdate),
    (1, Kind::Redrive),
];

const PUBLISHING: Profile = &[
    (20, Kind::Publish),
    (6, Kind::OpenProducer),
    (2, Kind::CloseProducer),
    (3, Kind::Turn),
    (3, Kind::Advance),
    (2, Kind::Ack),
    (1, Kind::TopicUpdate),
    (1, Kind::Restart),
    (1, Kind::Snapshot),
    (1, Kind::TopicPurge),
];

const STREAMING: Profile = &[
    (8, Kind::Turn),
    (6, Kind::Publish),
    (8, Kind::Commit),
    (6, Kind::Credit),
    (3, Kind::SessionOpen),
    (2, Kind::Close),
    (3, Kind::Detach),
    (3, Kind::Attach),
    (4, Kind::Advance),
    (1, Kind::Dispatch),
    (1, Kind::Wake),
    (1, Kind::Seek),
    (2, Kind::LetGo),
    (1, Kind::Pause),
    (1, Kind::Resume),
    (1, Kind::Restart),
    (1, Kind::TopicPurge),
    (1, Kind::TopicUpdate),
];

const ADMINISTERING: Profile = &[
    (12, Kind::Turn),
    (10, Kind::Publish),
    (5, Kind::Advance),
    (4, Kind::Ack),
    (10, Kind::Settle),
    (6, Kind::Credit),
    (3, Kind::SessionOpen),
    (2, Kind::OpenProducer),
    (2, Kind::Dispatch),
    (2, Kind::ApplyPending),
    (2, Kind::Late),
    (2, Kind::Wake),
    (1, Kind::Close),
    (2, Kind::Restart),
    (2, Kind::Snapshot),
    (1, Kind::Pause),
    (2, Kind::Resume),
    (2, Kind::Seek),
    (2, Kind::SubUpdate),
    (3, Kind::SubCreate),
    (1, Kind::SubDelete),
    (2, Kind::TopicCreate),
    (1, Kind::TopicUpdate),
    (1, Kind::TopicPurge),
    (1, Kind::TopicDelete),
    (4, Kind::Redrive),
    (1, Kind::RedriveCancel),
    (1, Kind::DeadPurge),
    (1, Kind::Damaged),
    (3, Kind::LetGo),
    (1, Kind::Token),
    (1, Kind::Hold),
];

fn ops(profile: Profile, most: usize) -> impl Strategy<Value = Vec<Op>> {
    let kinds = profile.iter().map(|(weight, kind)| (*weight, Just(*kind)));
    let kind = proptest::strategy::Union::new_weighted(kinds.collect());
    let op = (kind, any::<u8>(), any::<u8>(), any::<u8>());
    proptest::collection::vec(op.prop_map(|(kind, a, b, c)| Op(kind, a, b, c)), 1..most)
}

fn config() -> ProptestConfig {
    let config = ProptestConfig::default();
    let is_told = std::env::var_os("PROPTEST_CASES").is_some();
    ProptestConfig {
        cases: if is_told { config.cases } else { CASES },
        failure_persistence: None,
        ..config
    }
}

fn run(mode: SubscriptionMode, shape: u8, ops: &[Op]) -> World {
    let mut world = World::new();
    world.set_up(mode, shape);
    world.run(ops);
    world.settle_down();
    world
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn consumers_get_what_the_model_says(shape: u8, ops in ops(CONSUMING, 80)) {
        run(SubscriptionMode::Queue, shape, &ops);
    }

    #[test]
    fn producers_get_what_the_model_says(shape: u8, ops in ops(PUBLISHING, 60)) {
        run(SubscriptionMode::Queue, shape, &ops);
    }

    #[test]
    fn streams_are_read_as_the_model_says(shape: u8, ops in ops(STREAMING, 60)) {
        run(SubscriptionMode::Stream, shape, &ops);
    }

    #[test]
    fn operators_get_what_the_model_says(shape: u8, ops in ops(ADMINISTERING, 80)) {
        run(SubscriptionMode::Queue, shape, &ops);
    }
}

/// What is looked at must happen: a model of a queue in which nothing goes on would always agree.
#[test]
fn random_operations_reach_every_part() {
    let mut runner = TestRunner::deterministic();
    let mut seen = [0; 12];
    for profile in [CONSUMING, PUBLISHING, ADMINISTERING] {
        let strategy = (any::<u8>(), ops(profile, 80));
        for _ in 0..60 {
            let tree = strategy.new_tree(&mut runner).unwrap();
            let (shape, ops) = tree.current();
            let counts = run(SubscriptionMode::Queue, shape, &ops).model.counts;
            let all = [
                counts.published,
                counts.dedup_hits,
                counts.delivered,
                counts.acked,
                counts.released,
                counts.failures,
                counts.dead,
                counts.redriven,
                counts.purged,
                counts.fenced,
                counts.gaps,
                counts.late,
            ];
            seen.iter_mut()
                .zip(all)
                .for_each(|(seen, count)| *seen += count);
        }
    }
    assert!(
        seen.iter().all(|seen| *seen > 0),
        "nothing to see of some: {seen:?}"
    );
}

#[test]
fn the_hole_of_a_letter_that_was_redriven_may_go_while_another_letter_has_its_body() {
    let ops = [
        Op(Kind::SubCreate, 0, 100, 187),
        Op(Kind::Publish, 0, 120, 33),
        Op(Kind::SubCreate, 55, 0, 43),
        Op(Kind::SubUpdate, 87, 150, 0),
        Op(Kind::Publish, 0, 60, 17),
        Op(Kind::Wake, 0, 0, 0),
        Op(Kind::Settle, 0, 48, 64),
        Op(Kind::Settle, 0, 189, 145),
        Op(Kind::Redrive, 109, 20, 0),
        Op(Kind::Advance, 161, 0, 0),
        Op(Kind::Turn, 0, 0, 0),
        Op(Kind::LetGo, 163, 0, 16),
    ];
    run(SubscriptionMode::Queue, 0, &ops);
}

#[test]
fn what_was_let_go_beyond_the_end_of_a_range_is_passed_over() {
    let ops = [
        Op(Kind::Publish, 0, 12, 48),
        Op(Kind::Publish, 0, 108, 70),
        Op(Kind::Turn, 0, 0, 0),
        Op(Kind::Settle, 0, 3, 0),
        Op(Kind::Publish, 0, 36, 44),
        Op(Kind::Redrive, 0, 66, 129),
        Op(Kind::Turn, 0, 0, 0),
        Op(Kind::Ack, 0, 12, 0),
        Op(Kind::LetGo, 62, 5, 229),
    ];
    run(SubscriptionMode::Queue, 0, &ops);
}

#[test]
fn a_commit_passes_over_what_was_let_go_behind_it() {
    let ops = [
        Op(Kind::Publish, 0, 204, 71),
        Op(Kind::Turn, 0, 0, 0),
        Op(Kind::Ack, 0, 0, 0),
        Op(Kind::LetGo, 50, 0, 48),
        Op(Kind::SubCreate, 254, 100, 12),
        Op(Kind::TopicCreate, 0, 0, 0),
    ];
    run(SubscriptionMode::Queue, 0, &ops);
}

#[test]
fn what_is_finished_behind_a_dropped_message_is_let_go_too() {
    let ops = [
        Op(Kind::Turn, 0, 0, 0),
        Op(Kind::Publish, 0, 120, 12),
        Op(Kind::Advance, 161, 0, 0),
        Op(Kind::TopicUpdate, 12, 109, 17),
        Op(Kind::Turn, 0, 0, 0),
        Op(Kind::Redrive, 0, 42, 108),
        Op(Kind::Publish, 0, 216, 189),
    ];
    run(SubscriptionMode::Queue, 0, &ops);
}
