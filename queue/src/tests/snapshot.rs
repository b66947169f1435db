use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::RestoreError;

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

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    // DESIGN 2: the rig folds every history again, whole and from a snapshot. Here also the chunks of
    // every delta, laid over one another, must be the whole snapshot.
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
        for (n, (what, a, b)) in steps.into_iter().enumerate() {
            step(&mut rig, subs, what, a, b);
            if n % 5 == 0 {
                let delta = rig.queue.snapshot();
                kept.extend(delta.dirty);
                for removed in delta.removed {
                    prop_assert!(kept.remove(&removed).is_some());
                }
            }
        }
        let delta = rig.queue.snapshot();
        kept.extend(delta.dirty);
        delta.removed.iter().for_each(|removed| { kept.remove(removed); });
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
    let delta = rig.queue.snapshot();
    held.extend(delta.dirty);
    for id in &delta.removed {
        held.remove(id);
    }
    let again = Queue::restore(Options::default(), held.into_iter()).unwrap();
    again.check_invariants();
    assert_eq!(again.subscription_view(sub, rig.now).unwrap().backlog, 0);
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
        let waits = |queue: &Queue| queue.subscriptions[&sub].retries.clone();
        assert_eq!(waits(&restored), waits(&rig.queue));
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
    let bytes = &chunks[&crate::state::dirty::retries(sub, 0)];
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, include_str!("snapshot/retries.txt").trim_end());
    let restored = Queue::restore(Options::default(), chunks.clone().into_iter()).unwrap();
    let retries = |queue: &Queue| queue.subscriptions[&sub].retries.clone();
    assert_eq!(retries(&restored), retries(&rig.queue));
    assert_eq!(BTreeMap::from_iter(restored.chunks()), chunks);
}
