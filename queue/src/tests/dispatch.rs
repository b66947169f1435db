use super::*;
use crate::record::LeaseRange;

// DESIGN 2
#[test]
fn nothing_is_proposed_twice() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 3);
    rig.consumer(sub, 1, 2);
    let first = rig.dispatch();
    assert_eq!(first.len(), 1);
    rig.grant(1, 5);
    let second = rig.dispatch();
    let mut got = Vec::new();
    for proposal in first.iter().chain(&second) {
        rig.enact(proposal, &mut got);
    }
    assert_eq!(
        got.iter().map(|got| got.offset).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    assert_eq!(rig.dispatch(), []);
    assert_eq!(rig.queue.subscriptions[&sub].hand.count, 0);
}

// SEMANTICS 1.10
#[test]
fn due_retries_are_at_most_half_while_new_messages_wait() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 20);
    rig.consumer(sub, 1, 10);
    rig.run();
    for offset in [3, 1, 0, 2, 4, 5, 6, 7, 8, 9] {
        rig.nack(sub, 1, offset, 1);
    }
    rig.wait(2_000);
    rig.grant(1, 4);
    assert_eq!(
        rig.offsets(),
        [3, 1, 10, 11],
        "by (due, offset), then by offset"
    );
    for expected in [0, 12, 2, 13] {
        rig.grant(1, 1);
        assert_eq!(rig.offsets(), [expected], "turn by turn");
    }
    rig.grant(1, 100);
    assert_eq!(rig.offsets().len(), 12);
}

// DESIGN 3
#[test]
fn consumers_take_turns_within_their_credit() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 30);
    rig.consumer(sub, 1, 100);
    rig.consumer(sub, 2, 100);
    rig.consumer(sub, 3, 2);
    let got = rig.run();
    let of = |session| got.iter().filter(|got| got.session == session).count();
    assert_eq!(got.len(), 30);
    assert_eq!(of(3), 2);
    assert!(of(1).abs_diff(of(2)) <= 8, "{} and {}", of(1), of(2));
}

// SEMANTICS 5
#[test]
fn byte_credit_is_reckoned_at_the_average_size_until_the_broker_knows() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    let messages: Vec<_> = (0..10).map(|_| Message::new(vec![0; 60])).collect();
    rig.publish_messages(topic, &messages);
    rig.open(sub, 1);
    let credit = ConsumerCredit {
        credit: Credit {
            max_messages: 100,
            max_bytes: 350,
        },
        begun: 0,
    };
    rig.queue.credit(SessionId(1), credit, rig.now);
    assert_eq!(rig.offsets(), [0, 1, 2, 3]);
    rig.queue.sent(SessionId(1), 4, 50);
    assert_eq!(rig.offsets(), [4, 5, 6]);
}

// SEMANTICS 5
#[test]
fn what_is_never_sent_costs_no_credit_and_is_not_counted_as_begun() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 12);
    rig.consumer(sub, 1, 6);
    assert_eq!(rig.offsets(), [0, 1, 2, 3, 4, 5]);
    let damaged = LeaseRange {
        offset: Offset(2),
        count: 2,
        delivery: Delivery(1),
    };
    rig.queue.dropped(SessionId(1), &[damaged]);
    assert_eq!(rig.offsets(), [6, 7], "as many more as were not sent");
    // The consumer has 0, 1, 4, 5, 6, 7 and has begun four of them.
    rig.say(1, 4);
    let leases = &rig.queue.subscriptions[&sub].leases;
    let begun = (0..8).filter(|&offset| leases.get(offset).unwrap().begun.is_some());
    assert_eq!(begun.collect::<Vec<_>>(), [0, 1, 4, 5]);
}

// SEMANTICS 5
#[test]
fn draining_hands_out_nothing() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 1);
    rig.consumer(sub, 1, 1);
    rig.queue.hold_leases(Some("the disk is full"));
    assert_eq!(rig.offsets(), [] as [u64; 0]);
    assert_eq!(rig.view(sub).stalled.as_deref(), Some("the disk is full"));
    rig.queue.hold_leases(None);
    rig.queue.drain();
    assert_eq!(rig.offsets(), [] as [u64; 0]);
    let wakeup = rig.queue.next_wakeup(rig.now);
    assert!(wakeup.is_none_or(|at| at > rig.now), "it does not spin");
}

// DESIGN 4
#[test]
fn first_deliveries_stop_when_retries_take_their_memory() {
    let mut rig = Rig::with(Options {
        retry_bytes_max: 2_000,
        ..Options::default()
    });
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 100);
    rig.consumer(sub, 1, 1_000);
    let config = millpond_protocol::policy::SubscriptionPatch {
        max_in_flight: Some(2),
        ..Default::default()
    };
    rig.apply(&Record::SubscriptionUpdate {
        subscription: sub,
        patch: config,
    });
    let mut delivered = 0;
    loop {
        let got = rig.run();
        if got.is_empty() {
            break;
        }
        delivered += got.len();
        for got in got {
            rig.nack(sub, 1, got.offset, got.delivery);
        }
    }
    assert!((2..20).contains(&delivered), "{delivered}");
    let stalled = rig.view(sub).stalled.unwrap();
    assert!(stalled.contains("memory"), "{stalled}");
    rig.wait(1_000);
    let got = rig.run();
    assert!(
        !got.is_empty() && got.iter().all(|got| got.attempt == 2),
        "retries go on"
    );
}

// DESIGN 10
#[test]
fn many_idle_subscriptions_cost_a_hand_out_nothing() {
    let mut rig = Rig::new();
    for n in 0..50 {
        let topic = rig.topic(&format!("t{n}"));
        let sub = rig.sub(topic, "s");
        rig.consumer(sub, n, 10);
    }
    rig.run();
    assert!(rig.queue.work.hot.is_empty());
    rig.publish(rig.queue.topic_id("t7").unwrap(), 1);
    assert_eq!(rig.queue.work.hot.len(), 1);
    assert_eq!(rig.run().len(), 1);
}

// SEMANTICS 1.10
#[test]
fn subscriptions_take_turns() {
    let mut rig = Rig::new();
    let mut subs = Vec::new();
    for n in 0..3 {
        let topic = rig.topic(&format!("t{n}"));
        let sub = rig.sub(topic, "s");
        rig.publish(topic, 3_000);
        rig.consumer(sub, n + 1, 10_000);
        subs.push(sub);
    }
    let mut out = Vec::new();
    assert!(
        rig.queue.dispatch(rig.now, 3_072, &mut out),
        "there is more"
    );
    let mut sessions: Vec<_> = out
        .iter()
        .map(|proposal| match proposal {
            Proposal::Lease { session, .. } => session.0,
            other => panic!("{other:?}"),
        })
        .collect();
    sessions.sort_unstable();
    assert_eq!(sessions, [1, 2, 3]);
}
