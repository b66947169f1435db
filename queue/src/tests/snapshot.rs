use std::collections::BTreeMap;

use millpond_protocol::control::RedriveTarget;
use proptest::prelude::*;

use super::*;
use crate::state::dirty::ENTRIES_SHIFT;
use crate::state::redelivery::Retry;
use crate::{RestoreError, SnapshotDelta};

// DESIGN 4
#[test]
fn a_small_change_is_a_small_delta() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 20_000);
    rig.consumer(sub, 1, 20_000);
    rig.run();
    for offset in (1..20_000).step_by(100) {
        rig.nack(sub, 1, offset, 1);
    }
    let whole = rig.queue.snapshot();
    rig.nack(sub, 1, 10_000, 1);
    let delta = rig.queue.snapshot();
    assert!(delta.dirty.len() <= 8, "{}", delta.dirty.len());
    assert!(whole.dirty.len() > 40);
    rig.log.clear();
    rig.queue = Queue::new(Options::default());
}

#[test]
fn a_snapshot_that_is_none_is_refused() {
    let restore = |chunks: Vec<(u64, Bytes)>| {
        Queue::restore(Options::default(), chunks.into_iter()).map(|_| ())
    };
    assert_eq!(restore(vec![]), Err(RestoreError::NoHeader));
    let newer = Bytes::from_static(&[9, 0]);
    assert_eq!(restore(vec![(0, newer)]), Err(RestoreError::Format(9)));
    let mut rig = Rig::new();
    rig.topic("t");
    let mut chunks = rig.queue.snapshot().dirty;
    chunks[1].1 = Bytes::from_static(b"\xff");
    let chunk = chunks[1].0;
    assert_eq!(restore(chunks), Err(RestoreError::Chunk { chunk }));
}

#[test]
fn leases_of_what_is_finished_are_refused() {
    let world = |acked: u64| {
        let mut rig = Rig::new();
        let topic = rig.topic("t");
        let sub = rig.sub(topic, "s");
        rig.publish(topic, 4);
        rig.consumer(sub, 1, 4);
        rig.run();
        for offset in 0..acked {
            rig.ack(sub, 1, offset, 1);
        }
        let chunks: BTreeMap<_, _> = rig.queue.snapshot().dirty.into_iter().collect();
        (chunks, crate::state::dirty::leases(sub, 0))
    };
    let (mut chunks, leases) = world(1);
    let (before, _) = world(0);
    let restore = |chunks: &BTreeMap<_, _>| {
        Queue::restore(Options::default(), chunks.clone().into_iter()).map(|_| ())
    };
    assert_eq!(restore(&chunks), Ok(()));
    chunks.insert(leases, before[&leases].clone());
    let refused = RestoreError::Contradiction("more is leased than is unfinished");
    assert_eq!(restore(&chunks), Err(refused));
}

/// Steps of a small world: one topic, two subscriptions, three sessions.
fn step(rig: &mut Rig, subs: [SubscriptionId; 2], what: u8, a: u64, b: u64) {
    let topic = rig.queue.topic_id("t").unwrap();
    let sub = subs[(a % 2) as usize];
    let session = 1 + a % 3;
    let leased = |rig: &Rig| {
        let runs: Vec<_> = rig.queue.subscriptions[&sub]
            .leases
            .iter()
            .copied()
            .collect();
        runs.get((b % 5) as usize).copied()
    };
    match what {
        0 | 1 => {
            let mut message = Message::new("m");
            message.delay_ms = [0, 0, 0, 700][(a % 4) as usize];
            message.ttl_ms = [0, 0, 5_000][(b % 3) as usize];
            let messages = vec![message; 1 + (b % 7) as usize];
            rig.try_publish(topic, &messages);
        }
        2 => {
            rig.open(sub, session);
            rig.grant(session, 10);
        }
        3 => {
            rig.grant(session, b % 9);
            rig.say(session, b % 20);
        }
        4 | 5 => {
            rig.run();
        }
        6 | 7 => {
            if let Some(run) = leased(rig) {
                let count = 1 + (b % (run.end - run.first)) as u32;
                rig.acks(sub, run.session.0, &[(run.first, run.delivery, count)]);
            }
        }
        8 => {
            if let Some(run) = leased(rig) {
                let verdict = [nack(), release(), reject()][(b % 3) as usize].clone();
                rig.settle(sub, run.session.0, run.end - 1, run.delivery, verdict);
            }
        }
        9 => {
            rig.run_for(b % 20_000);
        }
        10 => rig.queue.detach(SessionId(session), rig.now),
        11 => {
            rig.end(session);
        }
        12 => {
            rig.apply(&Record::SubscriptionSeek {
                subscription: sub,
                to: StartPosition::At(Offset(b % 50)),
            });
        }
        13 => {
            let dead = rig.queue.dead_topic("t", "a").unwrap();
            rig.apply(&Record::Redrive {
                topic: dead,
                source_topic: "t",
                subscription: "a",
                filter: Default::default(),
                rate_per_s: Some(50),
                target: if a == 0 {
                    millpond_protocol::control::RedriveTarget::Topic
                } else {
                    Default::default()
                },
            });
        }
        14 => {
            rig.apply(&Record::Start { recovery_epoch: 2 });
        }
        _ => {
            rig.apply(&Record::TopicPurge { topic });
        }
    }
}

/// What a snapshot is after this delta.
fn lay_over(chunks: &mut BTreeMap<u64, Bytes>, delta: SnapshotDelta) {
    chunks.extend(delta.dirty);
    for id in delta.removed {
        assert!(chunks.remove(&id).is_some(), "{id:#018x} was not there");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    // DESIGN 2: the rig folds every history again, whole and from a snapshot. Here also the chunks of
    // every delta, laid over one another, must be the whole snapshot as the state stood when the last delta
    // was begun, whatever has happened while it was told.
    #[test]
    fn any_history_folds_to_the_same_state(
        steps in proptest::collection::vec((0u8..18, 0u64..12, 0u64..1_000_000), 1..60),
    ) {
        let mut rig = Rig::new();
        let topic = rig.topic_with("t", TopicConfig {
            retention_ms: 3_000,
            ..Default::default()
        });
        let config = SubscriptionConfig { max_attempts: 3, max_age_ms: Some(60_000), ..plain() };
        let subs = [rig.sub_with(topic, "a", config), rig.sub(topic, "b")];
        let mut kept: BTreeMap<u64, Bytes> = BTreeMap::new();
        let mut want = Vec::new();
        for (n, (what, a, b)) in steps.into_iter().enumerate() {
            if n % 5 == 0 {
                want = rig.queue.chunks();
                rig.queue.begin_snapshot();
            }
            step(&mut rig, subs, what, a, b);
            let shelves = if n % 5 == 4 { usize::MAX } else { 1 };
            if let Some(delta) = rig.queue.tell_snapshot(shelves) {
                lay_over(&mut kept, delta);
                let told: Vec<_> = kept.iter().map(|(id, chunk)| (*id, chunk.clone())).collect();
                prop_assert_eq!(&told, &want);
            }
        }
        if let Some(delta) = rig.queue.tell_snapshot(usize::MAX) {
            lay_over(&mut kept, delta);
        }
        lay_over(&mut kept, rig.queue.snapshot());
        let want: BTreeMap<_, _> = whole(&mut rig.queue).into_iter().collect();
        let differ = |id: &&u64| kept.get(id) != want.get(id);
        let differing: Vec<_> = kept.keys().chain(want.keys()).filter(differ).collect();
        prop_assert!(differing.is_empty(), "chunks {:#018x?}", differing);
    }
}

#[test]
fn the_first_snapshot_after_a_restore_takes_away_what_is_gone() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 10_000);
    rig.consumer(sub, 1, 10_000);
    rig.run();
    rig.acks(sub, 1, &[(5_000, 1, 5_000)]);
    let mut held: BTreeMap<u64, Bytes> = rig.queue.snapshot().dirty.into_iter().collect();
    rig.queue = Queue::restore(Options::default(), held.clone().into_iter()).unwrap();
    rig.acks(sub, 1, &[(0, 1, 5_000)]);
    lay_over(&mut held, rig.queue.snapshot());
    let again = Queue::restore(Options::default(), held.into_iter()).unwrap();
    again.check_invariants();
    assert_eq!(again.subscription_view(sub, rig.now).unwrap().backlog, 0);
}

/// Each of them may change a shelf, or take it away, while a snapshot waits to tell it.
#[test]
fn a_snapshot_tells_retries_as_they_stood_when_it_was_begun() {
    for what in 0..6 {
        let mut rig = Rig::new();
        let topic = rig.topic("t");
        let sub = rig.sub(topic, "s");
        rig.publish(topic, 2_000);
        rig.consumer(sub, 1, 2_000);
        rig.run();
        for offset in (0..1_900).step_by(50) {
            rig.nack(sub, 1, offset, 1);
        }
        let want = rig.queue.chunks();
        rig.queue.begin_snapshot();
        let outcome = match what {
            0 => rig.nack(sub, 1, 1_925, 1),
            1 => {
                // They come back, and one of them is finished.
                rig.run_for(60_000);
                rig.acks(sub, 1, &[(50, 2, 1)])
            }
            2 => rig.end(1),
            3 => rig.apply(&Record::SubscriptionDelete { subscription: sub }),
            4 => rig.apply(&Record::TopicPurge { topic }),
            _ => rig.apply(&Record::SubscriptionSeek {
                subscription: sub,
                to: StartPosition::At(Offset(0)),
            }),
        };
        assert!(!matches!(outcome, Outcome::Error(_)), "{outcome:?}");
        let told = rig.queue.tell_snapshot(usize::MAX).unwrap();
        assert!(told.removed.is_empty());
        assert_eq!(told.dirty, want, "{what}");
    }
}

#[test]
fn many_retries_come_back_as_they_were() {
    const MESSAGES: u64 = 40_000;
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let subs = [rig.sub(topic, "a"), rig.sub(topic, "b")];
    rig.publish(topic, MESSAGES);
    for (session, sub) in (1..).zip(subs) {
        rig.consumer(sub, session, MESSAGES);
        rig.run();
        for offset in (0..MESSAGES).step_by(200) {
            rig.nack(sub, session, offset, 1);
        }
    }
    let chunks = rig.queue.chunks();
    // More than one thread reads them.
    assert!(chunks.len() > 128, "{}", chunks.len());
    let restored = Queue::restore(Options::default(), chunks.clone().into_iter()).unwrap();
    restored.check_invariants();
    assert_eq!(restored.chunks(), chunks);
    for sub in subs {
        assert_eq!(retries_of(&restored, sub), retries_of(&rig.queue, sub));
    }
    rig.log.clear();
    rig.queue = Queue::new(Options::default());
}

#[test]
fn retries_that_stand_in_another_chunk_are_refused() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 600);
    rig.consumer(sub, 1, 600);
    rig.run();
    for offset in [0, 599] {
        rig.nack(sub, 1, offset, 1);
    }
    let mut chunks: BTreeMap<_, _> = rig.queue.chunks().into_iter().collect();
    let [low, high] = [0, 599].map(|at| crate::state::dirty::retries(sub, at));
    let twice = chunks[&low].clone();
    chunks.insert(high, twice);
    let restored = Queue::restore(Options::default(), chunks.into_iter());
    let refused = RestoreError::Contradiction("retries are out of order");
    assert_eq!(restored.map(|_| ()), Err(refused));
}

#[test]
fn the_bytes_of_retries_stay_what_they_are() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        max_attempts: 50,
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 5);
    rig.consumer(sub, 1, 100);
    let soon = Verdict::Nack {
        delay_ms: Some(1_000),
        code: 5,
        reason: String::new(),
    };
    for _ in 0..13 {
        for Got {
            offset, delivery, ..
        } in rig.run()
        {
            match (offset, delivery) {
                (0, _) | (1, 1) | (3, 1..=2) => rig.settle(sub, 1, offset, delivery, soon.clone()),
                (2, 1) => rig.settle(sub, 1, offset, delivery, release()),
                (4, 1) => rig.settle(sub, 1, offset, delivery, reject()),
                // The last lease of the message stays.
                _ => continue,
            };
        }
        rig.wait(2_000);
        rig.queue.renew(SessionId(1), rig.now);
    }
    super::dead::redrive_all(&mut rig);
    rig.run();
    let chunks: BTreeMap<_, _> = rig.queue.chunks().into_iter().collect();
    let chunk = crate::state::dirty::retries(sub, 0);
    let hex: String = chunks[&chunk].iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, include_str!("snapshot/retries.txt").trim_end());
    // As the format before this one had them.
    let mut before = chunks.clone();
    let meta = before[&crate::state::dirty::META].slice(1..);
    before.insert(crate::state::dirty::META, [&[1], &meta[..]].concat().into());
    let retries = of_hex(include_str!("snapshot/retries_format_1.txt").trim_end());
    before.insert(chunk, [&retries[..], &[0]].concat().into());
    let restored = Queue::restore(Options::default(), before.clone().into_iter());
    assert_eq!(restored.map(|_| ()), Err(RestoreError::Chunk { chunk }));
    before.insert(chunk, retries.into());
    for told in [before, chunks.clone()] {
        let restored = Queue::restore(Options::default(), told.into_iter()).unwrap();
        assert_eq!(retries_of(&restored, sub), retries_of(&rig.queue, sub));
        assert_eq!(BTreeMap::from_iter(restored.chunks()), chunks);
    }
}

fn of_hex(hex: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(byte).collect()
}

const SHELF: u64 = 1 << ENTRIES_SHIFT;
const STEP: u64 = 8;

/// Of so many messages every eighth waits for a retry.
fn waits(rig: &mut Rig, count: u64, delay_ms: impl Fn(u64) -> u64) -> SubscriptionId {
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, count);
    fail_every_eighth(rig, sub, count, delay_ms);
    sub
}

/// Hands out so many messages, and has the others acknowledged.
fn fail_every_eighth(
    rig: &mut Rig,
    sub: SubscriptionId,
    count: u64,
    delay_ms: impl Fn(u64) -> u64,
) {
    rig.consumer(sub, 1, count);
    rig.run();
    for offset in (0..count).step_by(STEP as usize) {
        rig.settle(sub, 1, offset, 1, later(delay_ms(offset)));
        rig.acks(sub, 1, &[(offset + 1, 1, STEP as u32 - 1)]);
    }
}

/// The queue that a start makes of this one.
fn started(queue: &Queue) -> Queue {
    Queue::restore(Options::default(), queue.chunks().into_iter()).unwrap()
}

fn start(rig: &mut Rig) {
    rig.queue = started(&rig.queue);
    rig.apply(&Record::Start { recovery_epoch: 2 });
}

fn is_closed(queue: &Queue, sub: SubscriptionId, shelf: u64) -> bool {
    queue.subscriptions[&sub].retries.is_closed(shelf * SHELF)
}

#[test]
fn a_start_opens_a_shelf_when_an_entry_of_it_changes() {
    let mut rig = Rig::new();
    let sub = waits(&mut rig, 3 * SHELF, |_| 60_000);
    let started = started(&rig.queue);
    let unopened = started.chunks();
    assert!((0..3).all(|shelf| is_closed(&started, sub, shelf)));
    let before = std::mem::replace(&mut rig.queue, started);
    // Late, and accepted, since the message waits for its next attempt.
    rig.ack(sub, 1, SHELF, 1);
    assert_eq!(
        [0, 1, 2].map(|shelf| is_closed(&rig.queue, sub, shelf)),
        [true, false, true]
    );
    rig.queue.check_invariants();
    assert_eq!(
        retries_of(&rig.queue, sub).len() as u64,
        3 * SHELF / STEP - 1
    );
    assert_eq!(before.chunks(), unopened);
}

#[test]
fn a_start_tells_of_retries_what_was_told_before() {
    let mut rig = Rig::new();
    // One shelf is due in a second, one over some minutes, one in an hour.
    let delays = |offset: u64| match offset / SHELF {
        0 => 1_000,
        1 => 1_000 * (offset - SHELF + 1),
        _ => 3_600_000,
    };
    let sub = waits(&mut rig, 3 * SHELF, delays);
    let started = started(&rig.queue);
    for ms in [
        0, 500, 1_000, 1_500, 100_000, 512_000, 1_000_000, 3_599_000, 4_000_000,
    ] {
        let now = rig.now.plus_ms(ms);
        let view = |queue: &Queue| queue.subscription_view(sub, now);
        assert_eq!(view(&started), view(&rig.queue), "after {ms} ms");
        started.check_invariants();
    }
    assert!((0..3).all(|shelf| is_closed(&started, sub, shelf)));
}

#[test]
fn what_waited_at_a_start_comes_when_it_is_due_and_in_its_order() {
    let mut rig = Rig::new();
    let count = 4 * SHELF;
    // Every shelf has something for every second.
    let delay = |offset: u64| 1_000 * (1 + offset * 7 % 20);
    let sub = waits(&mut rig, count, delay);
    start(&mut rig);
    rig.consumer(sub, 2, count);
    let mut got = 0;
    for second in 1..=20 {
        rig.wait(1_000);
        let all = (0..count).step_by(STEP as usize);
        let due: Vec<_> = all.filter(|at| delay(*at) == 1_000 * second).collect();
        assert_eq!(rig.offsets(), due, "in second {second}");
        got += due.len() as u64;
    }
    assert_eq!(got, count / STEP);
    rig.queue.check_invariants();
}

#[test]
fn what_is_overdue_at_a_start_is_opened_by_and_by() {
    const SHELVES: u64 = 24;
    // One shelf after the other, and all among one another.
    let orders: [fn(u64) -> u64; 2] =
        [|offset| 1 + offset / SHELF, |offset| 1 + offset * 7 % 1_000];
    for (nth, delay_ms) in orders.into_iter().enumerate() {
        let mut rig = Rig::new();
        let count = SHELVES * SHELF;
        let sub = waits(&mut rig, count, delay_ms);
        start(&mut rig);
        rig.wait(60_000);
        let closed = |rig: &Rig| {
            (0..SHELVES)
                .filter(|at| is_closed(&rig.queue, sub, *at))
                .count()
        };
        assert_eq!(closed(&rig) as u64, SHELVES);
        rig.consumer(sub, 2, 20);
        assert_eq!(rig.run().len(), 20);
        assert!(
            nth == 1 || closed(&rig) as u64 == SHELVES - 1,
            "no more than are needed"
        );
        rig.consumer(sub, 3, 20);
        rig.grant(2, count);
        rig.grant(3, count);
        assert_eq!(rig.run().len() as u64, count / STEP - 20);
        assert_eq!(closed(&rig), 0);
        rig.queue.check_invariants();
    }
}

// Found by the simulator (I11, seeds 7010941 and 7024095): the shelf was opened by an acknowledgement, and no timer
// knew what else was on it.
#[test]
fn what_stands_beside_a_message_that_is_acknowledged_after_a_start_comes_too() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 3);
    rig.consumer(sub, 1, 3);
    rig.run();
    // It has an entry on the shelf, and is leased.
    rig.settle(sub, 1, 1, 1, later(1));
    rig.grant(1, 1);
    rig.wait(100);
    assert_eq!(rig.offsets(), [1]);
    for (offset, delay_ms) in [(0, 1_000), (2, 60_000)] {
        rig.settle(sub, 1, offset, 1, later(delay_ms));
    }
    start(&mut rig);
    rig.wait(2_000);
    assert!(rig.run().is_empty());
    let due = rig.view(sub).next_due.unwrap();
    rig.ack(sub, 1, 1, 2);
    assert!(!is_closed(&rig.queue, sub, 0));
    rig.consumer(sub, 2, 10);
    assert_eq!(rig.offsets(), [0]);
    rig.ack(sub, 2, 0, 2);
    let due = due.ms_since(rig.now);
    let came = rig.run_for(due + 1_000);
    let came: Vec<_> = came.iter().map(|(ms, got)| (*ms, got.offset)).collect();
    assert_eq!(came, [(due, 2)]);
}

#[test]
fn what_is_too_old_hides_nothing_that_waited_at_a_start() {
    let mut rig = Rig::new();
    let config = TopicConfig {
        ttl_ms: Some(10_000),
        ..TopicConfig::default()
    };
    let topic = rig.topic_with("t", config);
    let sub = rig.sub(topic, "s");
    rig.publish(topic, SHELF);
    rig.wait(8_000);
    rig.publish(topic, SHELF);
    fail_every_eighth(&mut rig, sub, 2 * SHELF, |offset| 1 + offset);
    start(&mut rig);
    rig.wait(5_000);
    rig.consumer(sub, 2, 10);
    let first = SHELF..SHELF + 10 * STEP;
    assert_eq!(rig.offsets(), Vec::from_iter(first.step_by(STEP as usize)));
}

fn later(delay_ms: u64) -> Verdict {
    Verdict::Nack {
        delay_ms: Some(delay_ms),
        code: 1,
        reason: String::new(),
    }
}

fn retries_of(queue: &Queue, sub: SubscriptionId) -> Vec<(u64, Retry)> {
    let all = queue.subscriptions[&sub].retries.iter();
    all.map(|(offset, retry)| (offset, retry.clone())).collect()
}

// SEMANTICS 3
#[test]
fn a_message_reopened_far_below_its_topics_first_keeps_its_body_over_a_restart() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 10_000);
    rig.run();
    rig.settle(sub, 1, 0, 1, reject());
    super::dead::redrive(&mut rig, Default::default(), None, RedriveTarget::Topic);
    assert_eq!(rig.offsets(), [1]);
    rig.settle(sub, 1, 1, 1, reject());
    rig.publish(topic, 3 * SHELF);
    rig.run();
    rig.acks(sub, 1, &[(2, 1, 3 * SHELF as u32)]);
    assert_eq!(rig.queue.first_kept(topic), Offset(2 + 3 * SHELF));
    let mut kept: BTreeMap<_, _> = rig.queue.snapshot().dirty.into_iter().collect();
    super::dead::redrive_all(&mut rig);
    assert_eq!(rig.offsets(), [1]);
    let body = (topic, Offset(0));
    lay_over(&mut kept, rig.queue.snapshot());
    for chunks in [kept.clone(), rig.queue.chunks().into_iter().collect()] {
        let restored = Queue::restore(Options::default(), chunks.into_iter()).unwrap();
        restored.check_invariants();
        assert_eq!(restored.body_of(topic, Offset(1)), body);
        assert!(restored.is_live(topic, Offset(0)));
    }
    // Once it is finished, nothing of it is left.
    rig.ack(sub, 1, 1, 2);
    lay_over(&mut kept, rig.queue.snapshot());
    assert_eq!(kept, rig.queue.chunks().into_iter().collect());
    assert!(!rig.queue.is_live(topic, Offset(0)));
}

#[test]
fn a_row_that_began_in_the_chunk_before_is_told_as_it_stands() {
    let edge = 1 << crate::state::dirty::ROWS_SHIFT;
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    rig.queue.give_up(&crate::Loss {
        from: LogIndex(1),
        to: LogIndex(1),
        appended: Some(vec![crate::LostRun {
            topic,
            first: Offset(0),
            end: Offset(edge - 1),
        }]),
        messages_max: 0,
    });
    assert_eq!(rig.publish(topic, 1), edge - 1);
    let mut kept: BTreeMap<_, _> = rig.queue.snapshot().dirty.into_iter().collect();
    rig.wait(10);
    assert_eq!(rig.publish(topic, 1), edge);
    lay_over(&mut kept, rig.queue.snapshot());
    assert_eq!(kept, rig.queue.chunks().into_iter().collect());
    rig.log.clear();
    rig.queue = Queue::new(Options::default());
}
