use millpond_protocol::SubscriptionMode;

use super::*;

fn stream(rig: &mut Rig) -> (TopicId, SubscriptionId) {
    let topic = rig.topic("t");
    let config = SubscriptionConfig {
        mode: SubscriptionMode::Stream,
        ..plain()
    };
    let sub = rig.sub_with(topic, "s", config);
    rig.publish(topic, 5);
    (topic, sub)
}

fn commit(rig: &mut Rig, subscription: SubscriptionId, session: u64, next: u64) -> Outcome {
    rig.apply(&Record::Commit {
        subscription,
        session: SessionId(session),
        next: Offset(next),
    })
}

// DESIGN 3
#[test]
fn one_consumer_reads_in_order_and_the_others_stand_by() {
    let mut rig = Rig::new();
    let (_, sub) = stream(&mut rig);
    assert!(matches!(
        rig.open(sub, 1),
        Outcome::SessionOpened { active: true, .. }
    ));
    assert!(matches!(
        rig.open(sub, 2),
        Outcome::SessionOpened { active: false, .. }
    ));
    rig.grant(1, 3);
    rig.grant(2, 3);
    let got = rig.run();
    assert!(got.iter().all(|got| got.session == 1 && got.delivery == 0));
    assert_eq!(
        got.iter().map(|got| got.offset).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    assert_eq!(
        code(&commit(&mut rig, sub, 2, 1)),
        Some(ErrorCode::NotActive)
    );
    assert_eq!(
        commit(&mut rig, sub, 1, 2),
        Outcome::Committed { next: Offset(2) }
    );
    assert_eq!(
        commit(&mut rig, sub, 1, 1),
        Outcome::Committed { next: Offset(2) }
    );
    assert_eq!(
        code(&commit(&mut rig, sub, 1, 9)),
        Some(ErrorCode::OffsetOutOfRange)
    );
    rig.take_effects();
    rig.end(1);
    let active = Effect::Active {
        session: SessionId(2),
        from: Offset(2),
    };
    assert_eq!(rig.take_effects(), [active]);
    assert_eq!(rig.offsets(), [2, 3, 4]);
}

// DESIGN 3
#[test]
fn a_standby_takes_over_when_the_active_one_does_not_come_back() {
    let mut rig = Rig::new();
    let (_, sub) = stream(&mut rig);
    rig.consumer(sub, 1, 10);
    rig.consumer(sub, 2, 10);
    rig.run_for(100_000);
    assert_eq!(
        rig.queue.subscriptions[&sub].active,
        Some(SessionId(1)),
        "it need not renew"
    );
    rig.queue.detach(SessionId(1), rig.now);
    rig.run_for(9_000);
    assert_eq!(rig.queue.subscriptions[&sub].active, Some(SessionId(1)));
    let got = rig.run_for(2_000);
    assert_eq!(got.len(), 5);
    assert!(got.iter().all(|(_, got)| got.session == 2));
}

// DESIGN 3
#[test]
fn a_resumed_stream_reads_on_from_the_committed_offset() {
    let mut rig = Rig::new();
    let (_, sub) = stream(&mut rig);
    rig.consumer(sub, 1, 10);
    assert_eq!(rig.offsets(), [0, 1, 2, 3, 4]);
    commit(&mut rig, sub, 1, 3);
    rig.queue.detach(SessionId(1), rig.now);
    let attached = rig.queue.attach(SessionId(1), 101, rig.now).unwrap();
    assert_eq!((attached.position, attached.active), (Offset(3), true));
    rig.say(1, 0);
    assert_eq!(rig.offsets(), [3, 4]);
}

// SEMANTICS 3, 6
#[test]
fn committed_messages_go_and_delays_do_not_reorder_a_stream() {
    let mut rig = Rig::new();
    let (topic, sub) = stream(&mut rig);
    let mut delayed = Message::new("x");
    delayed.delay_ms = 60_000;
    rig.publish_messages(topic, &[delayed, Message::new("y")]);
    rig.consumer(sub, 1, 10);
    assert_eq!(rig.offsets(), [0, 1, 2, 3, 4, 5, 6]);
    commit(&mut rig, sub, 1, 6);
    assert_eq!(rig.queue.first_kept(topic), Offset(6));
}

// DESIGN 3
#[test]
fn seek_moves_the_reader() {
    let mut rig = Rig::new();
    let (topic, sub) = stream(&mut rig);
    rig.consumer(sub, 1, 100);
    rig.run();
    rig.apply(&Record::SubscriptionSeek {
        subscription: sub,
        to: StartPosition::At(Offset(2)),
    });
    assert_eq!(rig.offsets(), [2, 3, 4]);
    assert_eq!(rig.queue.first_kept(topic), Offset(2));
}

// SEMANTICS 1
#[test]
fn settlements_and_commits_are_for_their_modes() {
    let mut rig = Rig::new();
    let (topic, sub) = stream(&mut rig);
    rig.consumer(sub, 1, 1);
    assert_eq!(code(&rig.ack(sub, 1, 0, 1)), Some(ErrorCode::WrongMode));
    let queue = rig.sub(topic, "q");
    rig.consumer(queue, 2, 1);
    assert_eq!(
        code(&commit(&mut rig, queue, 2, 1)),
        Some(ErrorCode::WrongMode)
    );
}
