use millpond_protocol::SubscriptionMode;

use super::*;
use crate::OffsetRun;

fn let_go(rig: &mut Rig, topic: TopicId, ranges: Vec<OffsetRun>) {
    assert_eq!(rig.apply(&Record::LetGo { topic, ranges }), Outcome::Done);
}

fn run(offset: u64, count: u32) -> OffsetRun {
    OffsetRun {
        offset: Offset(offset),
        count,
    }
}

/// What may go of the topic's first ten messages.
fn unneeded(rig: &Rig, topic: TopicId) -> Vec<OffsetRun> {
    rig.queue
        .unneeded_between(topic, Offset(0), Offset(10), usize::MAX)
}

/// Ten messages, of which one subscription has finished 2, 3, 4 and 7.
fn with_holes() -> (Rig, TopicId, SubscriptionId) {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 10);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.acks(sub, 1, &[(2, 1, 3), (7, 1, 1)]);
    (rig, topic, sub)
}

#[test]
fn what_everybody_has_finished_is_let_go_and_stays_so() {
    let (mut rig, topic, sub) = with_holes();
    assert_eq!(unneeded(&rig, topic), [run(2, 3), run(7, 1)]);
    let_go(&mut rig, topic, vec![run(0, 10)]);
    assert_eq!(unneeded(&rig, topic), []);
    assert!(rig.queue.is_let_go(topic, Offset(2), Offset(5)));
    assert!(!rig.queue.is_let_go(topic, Offset(2), Offset(6)));
    rig.apply(&Record::SubscriptionSeek {
        subscription: sub,
        to: StartPosition::At(Offset(0)),
    });
    rig.grant(1, 200);
    assert_eq!(rig.offsets(), [0, 1, 5, 6, 8, 9]);
}

#[test]
fn what_somebody_needs_is_not_let_go_whatever_was_proposed() {
    let (mut rig, topic, sub) = with_holes();
    let proposed = unneeded(&rig, topic);
    rig.apply(&Record::SubscriptionSeek {
        subscription: sub,
        to: StartPosition::At(Offset(3)),
    });
    let_go(&mut rig, topic, proposed);
    // The seek has finished what lies below its target, and wants the rest again.
    assert_eq!(rig.queue.first_kept(topic), Offset(3));
    assert!(!rig.queue.is_let_go(topic, Offset(3), Offset(4)));
    rig.grant(1, 200);
    assert_eq!(rig.offsets(), [3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn a_subscription_that_comes_late_passes_over_what_was_let_go() {
    let (mut rig, topic, sub) = with_holes();
    let_go(&mut rig, topic, vec![run(0, 10)]);
    // Also when nobody is left who knew of it.
    rig.apply(&Record::SubscriptionDelete { subscription: sub });
    let stream = SubscriptionConfig {
        mode: SubscriptionMode::Stream,
        ..plain()
    };
    let queue = rig.sub(topic, "queue");
    let stream = rig.sub_with(topic, "stream", stream);
    assert_eq!(rig.view(queue).backlog, 6);
    assert_eq!(rig.view(stream).backlog, 6);
    rig.consumer(queue, 2, 100);
    assert_eq!(rig.offsets(), [0, 1, 5, 6, 8, 9]);
    rig.consumer(stream, 3, 100);
    assert_eq!(rig.offsets(), [0, 1, 5, 6, 8, 9]);
    rig.apply(&Record::Commit {
        subscription: stream,
        session: SessionId(3),
        next: Offset(2),
    });
    assert_eq!(rig.view(stream).floor, Offset(5));
}

#[test]
fn a_dead_message_keeps_its_body() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 4);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.acks(sub, 1, &[(1, 1, 1)]);
    rig.settle(sub, 1, 2, 1, reject());
    assert_eq!(unneeded(&rig, topic), [run(1, 1)]);
}
