use millpond_protocol::control::{DeadFilter, DeadReason, RedriveTarget};

use super::*;

fn config(max_attempts: u32) -> SubscriptionConfig {
    SubscriptionConfig {
        max_attempts,
        ..plain()
    }
}

/// A topic of three messages of which the first two are dead.
fn two_dead(rig: &mut Rig) -> (TopicId, SubscriptionId) {
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 3);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.settle(sub, 1, 0, 1, reject());
    rig.settle(sub, 1, 1, 1, reject());
    rig.ack(sub, 1, 2, 1);
    (topic, sub)
}

pub(super) fn redrive_all(rig: &mut Rig) {
    let target = RedriveTarget::Subscription;
    redrive(rig, DeadFilter::default(), None, target);
}

pub(super) fn redrive(
    rig: &mut Rig,
    filter: DeadFilter,
    rate: Option<u32>,
    target: RedriveTarget,
) -> u64 {
    let dead = rig.queue.dead_topic("t", "s").unwrap();
    let outcome = rig.apply(&Record::Redrive {
        topic: dead,
        source_topic: "t",
        subscription: "s",
        filter,
        rate_per_s: rate,
        target,
    });
    match outcome {
        Outcome::Redrive(view) => view.job,
        other => panic!("{other:?}"),
    }
}

// SEMANTICS 3
#[test]
fn every_queue_subscription_has_a_dead_letter_topic_from_birth() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    assert_eq!(rig.view(sub).dead_letter, "t.s.dead");
    assert!(rig.queue.topic_id("t.s.dead").is_some());
}

// SEMANTICS 1 table, 3
#[test]
fn a_message_dies_after_max_attempts_and_tells_its_story() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub_with(topic, "s", config(3));
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 100);
    for delivery in 1..=3 {
        rig.run();
        rig.say(1, u64::from(delivery));
        rig.wait(250);
        rig.nack(sub, 1, 0, delivery);
        rig.wait(600_000);
        rig.queue.renew(SessionId(1), rig.now);
    }
    let letters = rig.letters("t", "s");
    let (offset, letter) = &letters[0];
    assert_eq!(
        (*offset, letter.source, letter.source_offset),
        (0, topic, Offset(0))
    );
    assert_eq!(letter.reason, DeadReason::MaxAttempts);
    assert_eq!(
        (letter.failures, letter.deliveries, letter.releases),
        (3, 3, 0)
    );
    assert!(rig.queue.record_is_pinned(letter.place));
    let logged = rig
        .log
        .iter()
        .find(|logged| logged.place == letter.place)
        .unwrap();
    let Ok(Record::Settle { items, .. }) = Record::decode(logged.kind, &logged.bytes) else {
        panic!("the letter points to its last settlement");
    };
    assert_eq!(items[0].history.len(), 3, "this failure included");
    assert_eq!(items[0].history[0].consumer, "consumer-1");
    assert_eq!(items[0].history[0].duration_ms, 250);
    assert!(items[0].begun_at.is_some());
    assert!(rig.queue.is_live(topic, Offset(0)), "its body stays");
    assert_eq!(rig.view(sub).backlog, 0);
}

// SEMANTICS 1.2
#[test]
fn many_releases_end_at_max_deliveries() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        max_deliveries: 4,
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 100);
    for delivery in 1..=4 {
        assert_eq!(rig.run().len(), 1);
        rig.settle(sub, 1, 0, delivery, release());
    }
    let letters = rig.letters("t", "s");
    assert_eq!(letters[0].1.reason, DeadReason::MaxDeliveries);
    assert_eq!((letters[0].1.failures, letters[0].1.releases), (0, 4));
}

// SEMANTICS 3
#[test]
fn a_dead_letter_topic_has_none_of_its_own_and_what_fails_there_stays() {
    let mut rig = Rig::new();
    two_dead(&mut rig);
    let dead = rig.queue.topic_id("t.s.dead").unwrap();
    let sub = rig.sub_with(dead, "readers", config(1));
    assert_eq!(rig.view(sub).dead_letter, "");
    rig.consumer(sub, 2, 100);
    assert_eq!(rig.offsets(), [0, 1]);
    rig.nack(sub, 2, 0, 1);
    rig.ack(sub, 2, 1, 1);
    let view = rig.view(sub);
    assert_eq!((view.dead, view.backlog), (1, 0));
    assert!(rig.queue.letter(dead, Offset(0)).is_some());
    assert_eq!(rig.queue.first_kept(dead), Offset(0));
}

// SEMANTICS 3
#[test]
fn a_cycle_of_dead_letter_topics_is_refused() {
    let mut rig = Rig::new();
    let a = rig.topic("a");
    let b = rig.topic("b");
    rig.sub(b, "s");
    let create = |topic, dead: &str| Record::SubscriptionCreate {
        topic,
        name: "x",
        config: SubscriptionConfig {
            dead_letter: Some(dead.into()),
            ..plain()
        },
        start: StartPosition::Earliest,
    };
    for (topic, dead) in [
        (a, "a"),
        (a, "b"),
        (rig.queue.topic_id("b.s.dead").unwrap(), "b"),
    ] {
        let outcome = rig.apply(&create(topic, dead));
        assert_eq!(code(&outcome), Some(ErrorCode::DeadLetterCycle));
    }
}

// SEMANTICS 3
#[test]
fn deleting_a_subscription_keeps_its_letters() {
    let mut rig = Rig::new();
    let (topic, sub) = two_dead(&mut rig);
    rig.apply(&Record::SubscriptionDelete { subscription: sub });
    assert_eq!(rig.letters("t", "s").len(), 2);
    assert!(rig.queue.is_live(topic, Offset(1)));
    rig.apply(&Record::TopicDelete { topic });
    assert_eq!(rig.letters("t", "s").len(), 2);
    assert!(
        rig.queue.is_live(topic, Offset(1)),
        "bodies outlive their topic"
    );
    assert!(!rig.queue.is_live(topic, Offset(2)));
}

// SEMANTICS 3
#[test]
fn a_redriven_message_starts_anew_in_its_subscription_only() {
    let mut rig = Rig::new();
    let (topic, sub) = two_dead(&mut rig);
    let other = rig.sub(topic, "other");
    let job = redrive(
        &mut rig,
        DeadFilter::default(),
        None,
        RedriveTarget::Subscription,
    );
    let got = rig.run();
    assert_eq!(got.iter().map(|got| got.offset).collect::<Vec<_>>(), [0, 1]);
    assert!(got.iter().all(|got| (got.attempt, got.delivery) == (1, 2)));
    let view = rig.queue.redrive_view(job).unwrap();
    assert_eq!((view.total, view.done, view.finished), (2, 2, true));
    assert_eq!(rig.letters("t", "s").len(), 0);
    assert_eq!(
        rig.view(sub).floor,
        Offset(3),
        "the floor does not move back"
    );
    assert_eq!(rig.view(other).backlog, 0);
    assert!(rig.queue.is_live(topic, Offset(0)));
    rig.ack(sub, 1, 0, 2);
    assert!(!rig.queue.is_live(topic, Offset(0)));
    rig.settle(sub, 1, 1, 2, reject());
    let letters = rig.letters("t", "s");
    assert_eq!(
        (letters[0].0, letters[0].1.redrives, letters[0].1.failures),
        (2, 1, 1)
    );
}

// SEMANTICS 3
#[test]
fn a_message_redriven_to_its_topic_is_new_for_every_subscription() {
    let mut rig = Rig::new();
    let (topic, sub) = two_dead(&mut rig);
    let other = rig.sub(topic, "other");
    redrive(&mut rig, DeadFilter::default(), None, RedriveTarget::Topic);
    assert_eq!(rig.offsets(), [3, 4]);
    assert_eq!(rig.view(other).backlog, 2);
    assert_eq!(rig.queue.body_of(topic, Offset(3)), (topic, Offset(0)));
    rig.settle(sub, 1, 3, 1, reject());
    assert_eq!(rig.letters("t", "s")[0].1.body, (topic, Offset(0)));
}

// SEMANTICS 3
#[test]
fn a_redrive_keeps_its_pace_and_stops_half_way_without_a_loss() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 100);
    rig.consumer(sub, 1, 1_000);
    rig.run();
    for offset in 0..100 {
        rig.settle(sub, 1, offset, 1, reject());
    }
    let job = redrive(
        &mut rig,
        DeadFilter::default(),
        Some(20),
        RedriveTarget::Subscription,
    );
    let got = rig.run_for(2_000);
    assert!(
        (38..=44).contains(&got.len()),
        "about 20 a second: {}",
        got.len()
    );
    let Outcome::Redrive(view) = rig.apply(&Record::RedriveCancel { job }) else {
        panic!();
    };
    assert!(view.finished && view.cancelled);
    assert_eq!(rig.run_for(5_000).len(), 0);
    assert_eq!(rig.letters("t", "s").len() + got.len(), 100);
}

// SEMANTICS 3
#[test]
fn a_filter_chooses_letters_by_offset_reason_and_number() {
    let mut rig = Rig::new();
    two_dead(&mut rig);
    let filter = DeadFilter {
        reason: Some(DeadReason::MaxAge),
        ..Default::default()
    };
    let job = redrive(&mut rig, filter, None, RedriveTarget::Subscription);
    assert!(
        rig.queue.redrive_view(job).unwrap().finished,
        "there is none"
    );
    let filter = DeadFilter {
        offsets: vec![Offset(1)],
        ..Default::default()
    };
    redrive(&mut rig, filter, None, RedriveTarget::Subscription);
    assert_eq!(rig.offsets(), [1]);
    let dead = rig.queue.dead_topic("t", "s").unwrap();
    let purged = rig.apply(&Record::DeadPurge {
        topic: dead,
        source_topic: "t",
        subscription: "s",
        filter: DeadFilter {
            limit: Some(5),
            ..Default::default()
        },
    });
    assert_eq!(purged, Outcome::Purged { count: 1 });
    assert!(rig.letters("t", "s").is_empty());
}

// SEMANTICS 3
#[test]
fn offsets_choose_letters_in_any_order_once_each() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 6);
    rig.consumer(sub, 1, 100);
    rig.run();
    for offset in 0..6 {
        rig.settle(sub, 1, offset, 1, reject());
    }
    let filter = DeadFilter {
        offsets: [4, 1, 4, 9, 2].map(Offset).to_vec(),
        ..Default::default()
    };
    let job = redrive(&mut rig, filter, None, RedriveTarget::Subscription);
    assert_eq!(rig.queue.redrive_view(job).unwrap().total, 3);
    assert_eq!(rig.offsets(), [1, 2, 4]);
    let view = rig.queue.redrive_view(job).unwrap();
    assert!((view.finished, view.done) == (true, 3), "{view:?}");
    let purged = rig.apply(&Record::DeadPurge {
        topic: rig.queue.dead_topic("t", "s").unwrap(),
        source_topic: "t",
        subscription: "s",
        filter: DeadFilter {
            offsets: [5, 0, 5, 3].map(Offset).to_vec(),
            limit: Some(2),
            ..Default::default()
        },
    });
    assert_eq!(purged, Outcome::Purged { count: 2 });
    let left = rig.letters("t", "s");
    assert!(left.iter().map(|(offset, _)| *offset).eq([5]), "{left:?}");
}

// SEMANTICS 3
#[test]
fn purging_a_topic_spares_the_bodies_of_dead_letters() {
    let mut rig = Rig::new();
    let (topic, sub) = two_dead(&mut rig);
    rig.publish(topic, 2);
    rig.run();
    assert_eq!(
        rig.apply(&Record::TopicPurge { topic }),
        Outcome::Purged { count: 2 }
    );
    assert_eq!(rig.view(sub).backlog, 0);
    assert!(rig.queue.is_live(topic, Offset(0)));
    assert!(!rig.queue.is_live(topic, Offset(3)));
    assert_eq!(rig.publish(topic, 1), 5, "offsets go on");
}

// SEMANTICS 1 table
#[test]
fn a_damaged_body_is_filed_as_damaged() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 3);
    rig.consumer(sub, 1, 1);
    rig.run();
    rig.apply(&Record::Damaged {
        topic,
        ranges: vec![crate::OffsetRun {
            offset: Offset(0),
            count: 2,
        }],
    });
    let reasons: Vec<_> = rig
        .letters("t", "s")
        .iter()
        .map(|(_, l)| l.reason)
        .collect();
    assert_eq!(reasons, [DeadReason::Damaged; 2]);
    rig.grant(1, 5);
    assert_eq!(rig.offsets(), [2]);
}

// DESIGN 4
#[test]
fn what_was_redriven_and_finished_leaves_nothing_behind() {
    for target in [RedriveTarget::Subscription, RedriveTarget::Topic] {
        let mut rig = Rig::new();
        let (topic, sub) = two_dead(&mut rig);
        redrive(&mut rig, DeadFilter::default(), None, target);
        for got in rig.run() {
            rig.ack(sub, 1, got.offset, got.delivery);
        }
        for offset in 0..rig.queue.topics[&topic].next {
            assert!(
                !rig.queue.is_live(topic, Offset(offset)),
                "{offset} {target:?}"
            );
        }
        // Once more by way of both.
        rig.publish(topic, 1);
        for (target, _) in [(RedriveTarget::Topic, 0), (RedriveTarget::Subscription, 1)] {
            for got in rig.run() {
                rig.settle(sub, 1, got.offset, got.delivery, reject());
            }
            redrive(&mut rig, DeadFilter::default(), None, target);
        }
        for got in rig.run() {
            rig.ack(sub, 1, got.offset, got.delivery);
        }
        for offset in 0..rig.queue.topics[&topic].next {
            assert!(
                !rig.queue.is_live(topic, Offset(offset)),
                "{offset} {target:?}"
            );
        }
    }
}

fn seek(rig: &mut Rig, sub: SubscriptionId, offset: u64) {
    rig.apply(&Record::SubscriptionSeek {
        subscription: sub,
        to: StartPosition::At(Offset(offset)),
    });
}

// SEMANTICS 3
#[test]
fn where_a_letter_was_taken_away_nobody_is_given_a_hole() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 6);
    rig.consumer(sub, 1, 100);
    for got in rig.run() {
        rig.settle(sub, 1, got.offset, 1, reject());
    }
    let dead = rig.queue.dead_topic("t", "s").unwrap();
    let stream = SubscriptionConfig {
        mode: millpond_protocol::SubscriptionMode::Stream,
        ..plain()
    };
    let stream = rig.sub_with(dead, "stream", stream);
    let old = rig.sub(dead, "old");
    rig.consumer(old, 2, 100);
    assert_eq!(rig.offsets(), [0, 1, 2, 3, 4, 5]);
    rig.acks(old, 2, &[(0, 1, 6)]);
    let filter = |offsets: &[u64]| DeadFilter {
        offsets: offsets.iter().copied().map(Offset).collect(),
        ..Default::default()
    };
    redrive(&mut rig, filter(&[1, 2]), None, RedriveTarget::Subscription);
    rig.run();
    rig.apply(&Record::DeadPurge {
        topic: dead,
        source_topic: "t",
        subscription: "s",
        filter: filter(&[3]),
    });
    rig.consumer(stream, 3, 100);
    assert_eq!(rig.offsets(), [0, 4, 5], "of a stream that is behind");
    let new = rig.sub(dead, "new");
    assert_eq!(rig.view(new).backlog, 3);
    rig.consumer(new, 4, 100);
    assert_eq!(
        rig.offsets(),
        [0, 4, 5],
        "of a subscription that comes late"
    );
    seek(&mut rig, old, 0);
    assert_eq!(rig.offsets(), [0, 4, 5], "of one that goes back");
    rig.apply(&Record::Commit {
        subscription: stream,
        session: SessionId(3),
        next: Offset(1),
    });
    assert_eq!(rig.view(stream).floor, Offset(4));
}

// SEMANTICS 3
#[test]
fn letters_that_no_subscription_has_come_to_stay() {
    for mode in [
        millpond_protocol::SubscriptionMode::Queue,
        millpond_protocol::SubscriptionMode::Stream,
    ] {
        let mut rig = Rig::new();
        let (topic, sub) = two_dead(&mut rig);
        let dead = rig.queue.dead_topic("t", "s").unwrap();
        rig.apply(&Record::SubscriptionCreate {
            topic: dead,
            name: "latest",
            config: SubscriptionConfig { mode, ..plain() },
            start: StartPosition::Latest,
        });
        assert_eq!(rig.letters("t", "s").len(), 2);
        redrive(
            &mut rig,
            DeadFilter::default(),
            None,
            RedriveTarget::Subscription,
        );
        for got in rig.run() {
            rig.settle(sub, 1, got.offset, got.delivery, reject());
        }
        // They are gone, and hold back nothing.
        assert_eq!(rig.queue.first_kept(dead), Offset(2));
        assert_eq!(rig.letters("t", "s").len(), 2);
        assert!(rig.queue.is_live(topic, Offset(1)));
        let SubscriptionConfig { mode, .. } = plain();
        let all = rig.sub_with(dead, "all", SubscriptionConfig { mode, ..plain() });
        rig.consumer(all, 2, 100);
        assert_eq!(rig.offsets(), [2, 3]);
        rig.acks(all, 2, &[(2, 1, 2)]);
        assert_eq!(rig.letters("t", "s").len(), 2, "the other is still to come");
    }
}

// SEMANTICS 6
#[test]
fn a_limit_that_makes_room_takes_letters_that_no_subscription_has_come_to() {
    let mut rig = Rig::new();
    two_dead(&mut rig);
    let dead = rig.queue.dead_topic("t", "s").unwrap();
    rig.apply(&Record::SubscriptionCreate {
        topic: dead,
        name: "latest",
        config: plain(),
        start: StartPosition::Latest,
    });
    rig.apply(&Record::TopicUpdate {
        topic: dead,
        patch: millpond_protocol::policy::TopicPatch {
            max_messages: Some(Some(1)),
            on_limit: Some(millpond_protocol::policy::OnLimit::Drop),
            ..Default::default()
        },
    });
    rig.run();
    assert_eq!(rig.queue.first_kept(dead), Offset(1));
    assert_eq!(rig.letters("t", "s").len(), 1);
}
