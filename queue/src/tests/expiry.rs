use millpond_protocol::control::DeadReason;

use super::*;
use crate::Expired;

fn delayed(ms: u64) -> Message {
    let mut message = Message::new("x");
    message.delay_ms = ms;
    message
}

fn living(ms: u64) -> Message {
    let mut message = Message::new("x");
    message.ttl_ms = ms;
    message
}

// SEMANTICS 1.10
#[test]
fn a_delayed_message_is_never_early_and_holds_up_nobody() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish_messages(topic, &[delayed(5_000), Message::new("y"), delayed(1_000)]);
    rig.consumer(sub, 1, 10);
    assert_eq!(rig.view(sub).scheduled, 2);
    let got = rig.run_for(6_000);
    let got: Vec<_> = got
        .iter()
        .map(|(at, got)| (*at, got.offset, got.attempt))
        .collect();
    assert_eq!(got, [(0, 1, 1), (999, 2, 1), (4_999, 0, 1)]);
    rig.acks(sub, 1, &[(0, 1, 3)]);
    assert_eq!(rig.view(sub).backlog, 0);
}

// DESIGN 4
#[test]
fn a_delayed_message_reaches_subscriptions_that_come_later() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let first = rig.sub(topic, "first");
    rig.publish_messages(topic, &[delayed(2_000), Message::new("y")]);
    rig.consumer(first, 1, 10);
    rig.run_for(1_000);
    let second = rig.sub(topic, "second");
    rig.consumer(second, 2, 10);
    let got = rig.run_for(3_000);
    let mut got: Vec<_> = got
        .iter()
        .map(|(_, got)| (got.session, got.offset))
        .collect();
    got.sort_unstable();
    assert_eq!(got, [(1, 0), (2, 0), (2, 1)]);
}

// SEMANTICS 1 table
#[test]
fn a_message_that_outlives_its_time_is_dead_as_expired() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish_messages(topic, &[living(1_000), living(3_000), Message::new("x")]);
    rig.run_for(1_100);
    assert_eq!(rig.letters("t", "s").len(), 1);
    rig.consumer(sub, 1, 1);
    assert_eq!(rig.offsets(), [1]);
    rig.run_for(3_000);
    assert_eq!(
        rig.view(sub).in_flight,
        1,
        "what is being worked on is left alone"
    );
    rig.nack(sub, 1, 1, 1);
    let letters = rig.letters("t", "s");
    assert_eq!(letters[1].1.reason, DeadReason::Expired);
    assert_eq!(letters[1].1.failures, 1);
    assert_eq!(rig.view(sub).backlog, 1);
}

// SEMANTICS 1 table
#[test]
fn a_topics_time_to_live_holds_for_messages_that_name_none() {
    let mut rig = Rig::new();
    let config = TopicConfig {
        ttl_ms: Some(10_000),
        ..Default::default()
    };
    let topic = rig.topic_with("t", config);
    let sub = rig.sub(topic, "s");
    rig.publish_messages(
        topic,
        &[Message::new("x"), living(60_000), Message::new("x")],
    );
    rig.run_for(9_900);
    assert_eq!(rig.view(sub).dead, 0, "never early");
    rig.run_for(1_200);
    assert_eq!(rig.view(sub).dead, 2);
    assert_eq!(rig.view(sub).backlog, 1);
    rig.publish(topic, 1);
    rig.run_for(11_200);
    assert_eq!(rig.view(sub).dead, 3);
}

#[test]
fn an_age_beyond_the_end_of_the_topic_reaches_to_its_end() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 2);
    rig.apply(&Record::Expire(Expired::MaxAge {
        subscription: sub,
        below: Offset(5),
    }));
    assert_eq!(rig.view(sub).dead, 2);
    // What comes later is none of its business.
    rig.publish(topic, 4);
    assert_eq!((rig.view(sub).dead, rig.view(sub).backlog), (2, 4));
}

// SEMANTICS 2
#[test]
fn an_unfinished_message_dies_at_max_age() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        max_age_ms: Some(20_000),
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 2);
    rig.consumer(sub, 1, 1);
    rig.run();
    rig.nack(sub, 1, 0, 1);
    rig.run_for(19_000);
    assert_eq!(rig.view(sub).dead, 0);
    rig.run_for(2_500);
    let letters = rig.letters("t", "s");
    assert_eq!(letters.len(), 2);
    assert!(
        letters
            .iter()
            .all(|(_, letter)| letter.reason == DeadReason::MaxAge)
    );
    assert_eq!(letters[0].1.failures, 1);
}

// SEMANTICS 6
#[test]
fn finished_messages_are_kept_for_replay_as_long_as_configured() {
    let mut rig = Rig::new();
    let config = TopicConfig {
        retention_ms: 60_000,
        ..Default::default()
    };
    let topic = rig.topic_with("t", config);
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 2);
    rig.consumer(sub, 1, 1);
    rig.run();
    rig.ack(sub, 1, 0, 1);
    rig.run_for(59_000);
    assert_eq!(rig.queue.first_kept(topic), Offset(0));
    rig.run_for(2_500);
    assert_eq!(
        rig.queue.first_kept(topic),
        Offset(1),
        "what is not finished stays"
    );
    rig.grant(1, 1);
    rig.run();
    rig.ack(sub, 1, 1, 1);
    rig.run_for(100);
    assert_eq!(rig.queue.first_kept(topic), Offset(2));
}

// DESIGN 4
#[test]
fn without_subscriptions_nothing_is_finished() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    rig.publish(topic, 3);
    rig.run_for(100_000);
    assert_eq!(rig.queue.first_kept(topic), Offset(0));
    let sub = rig.sub(topic, "s");
    assert_eq!(rig.view(sub).backlog, 3);
}
