use millpond_protocol::control::ProducerResume;
use millpond_protocol::hot::{AckKind, AckRow};
use millpond_protocol::policy::OnLimit;

use super::*;

fn publish(
    rig: &mut Rig,
    topic: TopicId,
    (producer, epoch): (ProducerKey, u32),
    previous: u64,
    sequences: &[u64],
) -> Outcome {
    let messages: Vec<_> = sequences.iter().map(|_| Message::new("x")).collect();
    let bytes = batch(&messages, sequences.iter().copied());
    rig.apply(&Record::Publish {
        topic,
        producer,
        epoch: Epoch(epoch),
        previous: Sequence(previous),
        count: sequences.len() as u32,
        messages: &bytes,
    })
}

fn rows(outcome: &Outcome) -> Vec<(u64, u64, u32, AckKind)> {
    let Outcome::Published { rows, .. } = outcome else {
        panic!("{outcome:?}");
    };
    let row = |row: &AckRow| (row.last_sequence.0, row.offset.0, row.count, row.kind);
    rows.iter().map(row).collect()
}

// SEMANTICS 4
#[test]
fn a_repeated_batch_is_answered_with_its_original_offsets() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, _, _) = rig.open_producer(topic, Some("p"));
    rig.publish(topic, 3);
    publish(&mut rig, topic, (key, 1), 0, &[1, 2]);
    publish(&mut rig, topic, (key, 1), 2, &[3]);
    let again = publish(&mut rig, topic, (key, 1), 0, &[1, 2]);
    assert_eq!(rows(&again), [(2, 3, 2, AckKind::Duplicate)]);
    assert_eq!(rig.queue.topic_view(topic).unwrap().next, Offset(6));
    assert_eq!(rig.queue.counters().dedup_hits, 2);
}

// SEMANTICS 4
#[test]
fn the_new_part_of_a_repeated_batch_is_appended() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, _, _) = rig.open_producer(topic, Some("p"));
    publish(&mut rig, topic, (key, 1), 0, &[1, 2]);
    let more = publish(&mut rig, topic, (key, 1), 0, &[1, 2, 3, 4]);
    let want = [(2, 0, 2, AckKind::Duplicate), (4, 2, 2, AckKind::Appended)];
    assert_eq!(rows(&more), want);
    let Outcome::Published { appended, .. } = more else {
        panic!();
    };
    let appended = appended.unwrap();
    assert_eq!(
        (appended.base, appended.count, appended.skip),
        (Offset(2), 2, 2)
    );
}

// SEMANTICS 4
#[test]
fn a_gap_is_refused_and_its_successors_too() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, _, _) = rig.open_producer(topic, Some("p"));
    publish(&mut rig, topic, (key, 1), 0, &[1]);
    for previous in [2, 3] {
        let outcome = publish(&mut rig, topic, (key, 1), previous, &[previous + 1]);
        assert_eq!(code(&outcome), Some(ErrorCode::SequenceGap));
        let Outcome::PublishRefused { last_accepted, .. } = outcome else {
            panic!();
        };
        assert_eq!(last_accepted, Sequence(1));
    }
    let good = publish(&mut rig, topic, (key, 1), 1, &[2]);
    assert_eq!(rows(&good), [(2, 1, 1, AckKind::Appended)]);
}

// SEMANTICS 4
#[test]
fn sequences_may_skip() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, _, _) = rig.open_producer(topic, Some("p"));
    publish(&mut rig, topic, (key, 1), 0, &[10, 20, 21, 50]);
    let good = publish(&mut rig, topic, (key, 1), 50, &[70]);
    assert_eq!(rows(&good), [(70, 4, 1, AckKind::Appended)]);
    let again = publish(&mut rig, topic, (key, 1), 10, &[20, 21, 50]);
    assert_eq!(rows(&again), [(50, 1, 3, AckKind::Duplicate)]);
}

// SEMANTICS 4
#[test]
fn offsets_are_known_for_the_last_1024_batches() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, _, _) = rig.open_producer(topic, Some("p"));
    for batch in 0..1_030u64 {
        publish(
            &mut rig,
            topic,
            (key, 1),
            2 * batch,
            &[2 * batch + 1, 2 * batch + 2],
        );
        rig.queue
            .topics
            .get_mut(&topic)
            .unwrap()
            .append(1, 1, rig.now, &mut rig.queue.dirty);
        rig.log.clear();
    }
    let known = publish(&mut rig, topic, (key, 1), 12, &[13]);
    assert_eq!(rows(&known), [(13, 18, 1, AckKind::Duplicate)]);
    let unknown = publish(&mut rig, topic, (key, 1), 10, &[11, 12]);
    assert_eq!(rows(&unknown), [(12, 0, 2, AckKind::DuplicateUnknown)]);
    rig.log.clear();
    rig.queue = Queue::new(Options::default());
}

// SEMANTICS 4
#[test]
fn a_new_incarnation_fences_the_old_one() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, epoch, _) = rig.open_producer(topic, Some("p"));
    publish(&mut rig, topic, (key, epoch.0), 0, &[1]);
    let (again, newer, last) = rig.open_producer(topic, Some("p"));
    assert_eq!((again, newer, last), (key, Epoch(2), 1));
    let fenced = Effect::ProducerFenced {
        producer: key,
        epoch: Epoch(2),
    };
    assert_eq!(rig.take_effects(), [fenced]);
    let old = publish(&mut rig, topic, (key, 1), 1, &[2]);
    assert_eq!(code(&old), Some(ErrorCode::ProducerFenced));
    let new = publish(&mut rig, topic, (key, 2), 1, &[2]);
    assert_eq!(rows(&new), [(2, 1, 1, AckKind::Appended)]);
}

// SEMANTICS 4
#[test]
fn an_anonymous_producers_state_lives_as_long_as_its_stream() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, epoch, _) = rig.open_producer(topic, None);
    publish(&mut rig, topic, (key, 1), 0, &[1]);
    let resume = |last_known| ProducerResume {
        producer: key,
        epoch,
        last_known: Sequence(last_known),
    };
    let open = |resume| Record::OpenProducer {
        topic,
        producer_id: None,
        resume: Some(resume),
        owner: 7,
    };
    let resumed = rig.apply(&open(resume(1)));
    assert!(
        matches!(
            resumed,
            Outcome::ProducerOpened {
                epoch: Epoch(2),
                ..
            }
        ),
        "{resumed:?}"
    );
    assert_eq!(
        code(&rig.apply(&open(resume(1)))),
        Some(ErrorCode::ProducerFenced)
    );
    rig.apply(&Record::CloseProducer {
        producer: key,
        epoch: Epoch(1),
    });
    assert!(
        rig.queue.producers.get(key).is_some(),
        "an old epoch closes nothing"
    );
    rig.apply(&Record::CloseProducer {
        producer: key,
        epoch: Epoch(2),
    });
    assert_eq!(
        code(&rig.apply(&open(resume(1)))),
        Some(ErrorCode::ProducerStateExpired)
    );
}

// SEMANTICS 4
#[test]
fn a_producer_idle_for_seven_days_is_forgotten() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, _, _) = rig.open_producer(topic, Some("p"));
    publish(&mut rig, topic, (key, 1), 0, &[1]);
    rig.wait(7 * 24 * 3_600_000 - 10);
    rig.run();
    assert!(rig.queue.producers.get(key).is_some());
    rig.wait(20);
    rig.run();
    let outcome = publish(&mut rig, topic, (key, 1), 1, &[2]);
    assert_eq!(code(&outcome), Some(ErrorCode::ProducerStateExpired));
    assert_eq!(rig.take_effects(), [Effect::ProducerGone { producer: key }]);
}

// SEMANTICS 4
#[test]
fn the_dedup_table_is_bounded_and_forgets_the_idlest() {
    let mut rig = Rig::with(Options {
        dedup_bytes_max: 2_000,
        ..Options::default()
    });
    let topic = rig.topic("t");
    let keys: Vec<_> = (0..20)
        .map(|n| rig.open_producer(topic, Some(&format!("p{n}"))).0)
        .collect();
    assert!(rig.queue.producers.bytes() <= 2_000);
    assert!(rig.queue.producers.get(keys[0]).is_none());
    assert!(rig.queue.producers.get(keys[19]).is_some());
}

// SEMANTICS 4
#[test]
fn a_malformed_batch_changes_nothing() {
    let mut rig = Rig::new();
    let topic = rig.topic("t");
    let (key, _, _) = rig.open_producer(topic, Some("p"));
    for sequences in [&[2, 1][..], &[1, 1], &[0]] {
        let outcome = publish(&mut rig, topic, (key, 1), 0, sequences);
        assert_eq!(code(&outcome), Some(ErrorCode::Malformed));
    }
    assert_eq!(rig.queue.topic_view(topic).unwrap().next, Offset(0));
}

// SEMANTICS 6
#[test]
fn a_topic_at_its_limit_refuses_until_consumers_catch_up() {
    let mut rig = Rig::new();
    let config = TopicConfig {
        max_messages: Some(2),
        retention_ms: 1_000_000,
        ..Default::default()
    };
    let topic = rig.topic_with("t", config);
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 2);
    let outcome = rig.try_publish(topic, &[Message::new("x")]);
    assert_eq!(code(&outcome), Some(ErrorCode::BacklogLimit));
    rig.consumer(sub, 1, 10);
    rig.run();
    rig.ack(sub, 1, 0, 1);
    assert_eq!(
        rig.publish(topic, 1),
        2,
        "what is only kept for replay makes room"
    );
}

// SEMANTICS 6
#[test]
fn over_its_limit_a_topic_may_drop_the_oldest() {
    let mut rig = Rig::new();
    let config = TopicConfig {
        max_messages: Some(3),
        on_limit: OnLimit::Drop,
        ..Default::default()
    };
    let topic = rig.topic_with("t", config);
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 2);
    rig.consumer(sub, 1, 1);
    rig.run();
    rig.publish(topic, 3);
    rig.run();
    let view = rig.view(sub);
    assert_eq!(
        (view.floor, view.backlog, view.in_flight, view.dead),
        (Offset(2), 3, 0, 0)
    );
    assert!(matches!(
        rig.take_effects()[..],
        [Effect::LeasesLost { .. }]
    ));
}

// SEMANTICS 6
#[test]
fn over_its_limit_a_topic_may_dead_letter_the_oldest() {
    let mut rig = Rig::new();
    let config = TopicConfig {
        max_bytes: Some(100),
        on_limit: OnLimit::DeadLetter,
        ..Default::default()
    };
    let topic = rig.topic_with("t", config);
    let sub = rig.sub(topic, "s");
    rig.publish(topic, 5);
    rig.run();
    assert_eq!(rig.view(sub).dead, 3, "two messages of 41 bytes fit");
    let letters = rig.letters("t", "s");
    assert_eq!(
        letters[0].1.reason,
        millpond_protocol::control::DeadReason::Expired
    );
    assert!(
        rig.queue.is_live(topic, Offset(0)),
        "a letter keeps its body"
    );
}
