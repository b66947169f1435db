use millpond_protocol::control::MessageState;
use millpond_protocol::policy::{Backoff, SubscriptionPatch};

use super::*;

// SEMANTICS 1, table
#[test]
fn a_message_is_handed_out_acknowledged_and_gone() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 3);
    rig.consumer(sub, 1, 10);
    assert_eq!(rig.offsets(), [0, 1, 2]);
    assert_eq!(rig.view(sub).in_flight, 3);
    assert_eq!(rig.acks(sub, 1, &[(0, 1, 3)]), settled(3));
    let view = rig.view(sub);
    assert_eq!(
        (view.backlog, view.in_flight, view.floor),
        (0, 0, Offset(3))
    );
    assert_eq!(rig.queue.first_kept(topic), Offset(3));
    assert!(!rig.queue.is_live(topic, Offset(2)));
}

// SEMANTICS 1, table
#[test]
fn acks_in_any_order_move_the_floor_when_the_gap_closes() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 5);
    rig.consumer(sub, 1, 10);
    rig.run();
    for (offset, floor) in [(3, 0), (1, 0), (0, 2), (4, 2), (2, 5)] {
        assert_eq!(rig.ack(sub, 1, offset, 1), settled(1));
        assert_eq!(rig.view(sub).floor, Offset(floor));
    }
}

// SEMANTICS 1.1, 2
#[test]
fn a_nacked_message_comes_again_after_its_backoff_and_not_before() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 10);
    rig.run();
    assert_eq!(rig.nack(sub, 1, 0, 1), settled(1));
    assert_eq!(rig.view(sub).scheduled, 1);
    let due = rig.view(sub).next_due.unwrap();
    assert_eq!(due, rig.now.plus_ms(1_000));
    assert_eq!(
        rig.queue.next_wakeup(rig.now),
        Some(rig.now),
        "a look, as credit came"
    );
    assert_eq!(rig.offsets(), [] as [u64; 0]);
    rig.now = Stamp(due.0 - 2);
    assert_eq!(rig.offsets(), [] as [u64; 0]);
    assert_eq!(rig.queue.next_wakeup(rig.now), Some(due));
    rig.now = due;
    let got = rig.run();
    assert_eq!((got[0].delivery, got[0].attempt), (2, 2));
}

// SEMANTICS 1.2, 2
#[test]
fn failures_lengthen_the_backoff_and_releases_do_not() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 100);
    for delivery in 1..=5 {
        rig.run();
        rig.settle(sub, 1, 0, delivery, release());
    }
    let mut waits = Vec::new();
    for delivery in 6..=8 {
        rig.run();
        rig.nack(sub, 1, 0, delivery);
        let due = rig.view(sub).next_due.unwrap();
        waits.push(due.ms_since(rig.now));
        rig.now = due;
    }
    assert_eq!(waits, [1_000, 2_000, 4_000]);
}

// SEMANTICS 2
#[test]
fn a_nacks_own_delay_wins_and_is_clamped_to_thirty_days() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 2);
    rig.consumer(sub, 1, 100);
    rig.run();
    for (offset, delay_ms, wait) in [(0, 5, 5), (1, u64::MAX, 30 * 24 * 3_600_000)] {
        let nack = Verdict::Nack {
            delay_ms: Some(delay_ms),
            code: 0,
            reason: String::new(),
        };
        rig.settle(sub, 1, offset, 1, nack);
        let due = rig.queue.subscriptions[&sub]
            .retries
            .get(offset)
            .unwrap()
            .due();
        assert_eq!(due, Some(rig.now.plus_ms(wait)));
    }
}

// SEMANTICS 2
#[test]
fn a_message_may_bring_its_own_attempts_and_first_wait() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    let mut message = Message::new("x");
    (message.max_attempts, message.backoff_initial_ms) = (2, 40);
    rig.publish_messages(topic, &[message]);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.nack(sub, 1, 0, 1);
    assert_eq!(rig.view(sub).next_due, Some(rig.now.plus_ms(40)));
    rig.wait(40);
    rig.run();
    rig.nack(sub, 1, 0, 2);
    assert_eq!(rig.letters("t", "s")[0].1.failures, 2);
}

// SEMANTICS 2
#[test]
fn a_changed_policy_applies_at_the_next_failure() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.nack(sub, 1, 0, 1);
    let patch = SubscriptionPatch {
        max_attempts: Some(1),
        backoff: Some(Backoff::Fixed { wait_ms: 7 }),
        ..Default::default()
    };
    rig.apply(&Record::SubscriptionUpdate {
        subscription: sub,
        patch,
    });
    assert_eq!(rig.view(sub).dead, 0, "nothing dies of a policy alone");
    rig.wait(1_000);
    rig.run();
    rig.nack(sub, 1, 0, 2);
    assert_eq!(rig.view(sub).dead, 1);
}

// SEMANTICS 1.5
#[test]
fn a_late_ack_counts_while_the_message_waits() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 2);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.nack(sub, 1, 0, 1);
    assert_eq!(rig.ack(sub, 1, 0, 1), settled(1));
    rig.end(1);
    assert_eq!(rig.ack(sub, 1, 1, 1), settled(1), "its session may be over");
    assert_eq!(rig.view(sub).backlog, 0);
    rig.consumer(sub, 2, 100);
    rig.wait(10_000);
    assert_eq!(rig.offsets(), [] as [u64; 0]);
}

// SEMANTICS 1.5
#[test]
fn a_late_ack_does_not_touch_a_newer_lease() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 1);
    rig.run();
    rig.end(1);
    rig.consumer(sub, 2, 1);
    assert_eq!(rig.run()[0].delivery, 2);
    assert_eq!(rig.ack(sub, 1, 0, 1), late(MessageState::Leased));
    assert_eq!(rig.view(sub).in_flight, 1);
    assert_eq!(rig.ack(sub, 2, 0, 2), settled(1));
}

// SEMANTICS 1.5
#[test]
fn an_ack_for_what_was_never_leased_is_refused() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.open(sub, 1);
    assert_eq!(rig.ack(sub, 1, 0, 1), late(MessageState::Ready));
    assert_eq!(rig.ack(sub, 1, 7, 1), late(MessageState::Gone));
    assert_eq!(rig.view(sub).backlog, 1);
}

// SEMANTICS 1.5
#[test]
fn a_stale_nack_changes_nothing() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.say(1, 1);
    rig.wait(20_000);
    rig.queue.renew(SessionId(1), rig.now);
    for _ in 0..20 {
        rig.wait(20_000);
        rig.queue.renew(SessionId(1), rig.now);
        rig.run();
    }
    let failures = |rig: &Rig| {
        rig.queue.subscriptions[&sub]
            .retries
            .get(0)
            .unwrap()
            .failures
    };
    assert_eq!(failures(&rig), 1, "the processing timeout was charged");
    assert_eq!(rig.nack(sub, 1, 0, 1), late(MessageState::Leased));
    assert_eq!(failures(&rig), 1);
}

// SEMANTICS 1.5
#[test]
fn repeating_a_settlement_is_fine() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 4);
    rig.consumer(sub, 1, 100);
    rig.run();
    for _ in 0..2 {
        assert_eq!(rig.ack(sub, 1, 0, 1), settled(1));
        assert_eq!(rig.nack(sub, 1, 1, 1), settled(1));
        assert_eq!(rig.settle(sub, 1, 2, 1, reject()), settled(1));
        assert_eq!(
            rig.settle(sub, 1, 3, 1, Verdict::Release { delay_ms: Some(9) }),
            settled(1)
        );
    }
    let retries = &rig.queue.subscriptions[&sub].retries;
    assert_eq!(retries.get(1).unwrap().failures, 1);
    assert_eq!(retries.get(3).unwrap().releases, 1);
    assert_eq!(rig.letters("t", "s").len(), 1);
}

// SEMANTICS 1.5
#[test]
fn refused_settlements_are_told_by_their_ordinal() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 4);
    rig.consumer(sub, 1, 2);
    rig.run();
    let outcome = rig.acks(sub, 1, &[(0, 1, 1), (1, 9, 1), (1, 1, 2)]);
    let refusal = |ordinal, state| Refusal {
        ordinal,
        code: ErrorCode::LeaseLost,
        state,
    };
    let refused = vec![
        refusal(1, MessageState::Leased),
        refusal(3, MessageState::Ready),
    ];
    assert_eq!(outcome, Outcome::Settled { count: 4, refused });
}

// SEMANTICS 1.4
#[test]
fn waiting_retries_use_up_neither_credit_nor_max_in_flight() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        max_in_flight: 2,
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 6);
    rig.consumer(sub, 1, 100);
    for round in 0..3 {
        assert_eq!(rig.offsets(), [2 * round, 2 * round + 1]);
        rig.nack(sub, 1, 2 * round, 1);
        rig.nack(sub, 1, 2 * round + 1, 1);
    }
    assert_eq!(rig.view(sub).scheduled, 6);
}

// SEMANTICS 1.11
#[test]
fn pause_stops_hand_outs_and_charges_nothing() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 100);
    rig.apply(&Record::SubscriptionPause { subscription: sub });
    assert_eq!(rig.offsets(), [] as [u64; 0]);
    assert_eq!(
        rig.view(sub).stalled.as_deref(),
        Some("the subscription is paused")
    );
    rig.apply(&Record::SubscriptionResume { subscription: sub });
    assert_eq!(rig.run()[0].attempt, 1);
}

// SEMANTICS 1.11
#[test]
fn seek_acks_below_readies_above_and_revokes_leases() {
    let mut rig = Rig::new();
    let topic = rig.topic_with(
        "t",
        TopicConfig {
            retention_ms: 1_000_000,
            ..Default::default()
        },
    );
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 6);
    rig.consumer(sub, 1, 4);
    rig.run();
    rig.ack(sub, 1, 2, 1);
    rig.nack(sub, 1, 3, 1);
    rig.take_effects();
    rig.apply(&Record::SubscriptionSeek {
        subscription: sub,
        to: StartPosition::At(Offset(1)),
    });
    let lost = Effect::LeasesLost {
        session: SessionId(1),
        leases: vec![lease(0, 1), lease(1, 1)],
        reason: millpond_protocol::control::LostReason::Seek,
    };
    assert_eq!(rig.take_effects(), [lost]);
    assert_eq!(rig.view(sub).backlog, 5);
    rig.grant(1, 100);
    let got = rig.run();
    assert_eq!(
        got.iter().map(|got| got.offset).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5]
    );
    assert!(
        got.iter().all(|got| got.attempt == 1 && got.delivery == 3),
        "{got:?}"
    );
    assert_eq!(
        rig.ack(sub, 1, 1, 1),
        late(MessageState::Leased),
        "an old number is no lease"
    );
}

// SEMANTICS 1.11, 3
#[test]
fn seek_does_not_bring_back_what_is_in_the_dead_letter_topic() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 3);
    rig.consumer(sub, 1, 3);
    rig.run();
    rig.settle(sub, 1, 1, 1, reject());
    rig.apply(&Record::SubscriptionSeek {
        subscription: sub,
        to: StartPosition::Earliest,
    });
    rig.grant(1, 100);
    assert_eq!(rig.offsets(), [0, 2]);
}

// SEMANTICS 1.5: the hand-out left, the broker died before its lease was durable
#[test]
fn an_ack_counts_although_the_lease_was_lost_in_a_crash() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 3);
    rig.open(sub, 1);
    assert_eq!(
        rig.ack(sub, 1, 0, 1),
        late(MessageState::Ready),
        "nothing crashed yet"
    );
    rig.apply(&Record::Start { recovery_epoch: 1 });
    assert_eq!(rig.acks(sub, 1, &[(0, 1, 2)]), settled(2));
    assert_eq!(rig.view(sub).floor, Offset(2));
    assert_eq!(
        rig.ack(sub, 9, 2, 1),
        late(MessageState::Ready),
        "no such session"
    );
    assert_eq!(
        rig.ack(sub, 1, 2, 2),
        late(MessageState::Ready),
        "a number never given"
    );
    assert_eq!(
        rig.ack(sub, 1, 3, 1),
        late(MessageState::Gone),
        "no such message"
    );
    rig.consumer(sub, (1 << 32) | 2, 10);
    assert_eq!(rig.offsets(), [2]);
    assert_eq!(
        rig.ack(sub, 1, 2, 1),
        late(MessageState::Leased),
        "a newer lease is untouched"
    );
}
