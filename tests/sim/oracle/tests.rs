//! The judge judged: a good history passes, and each way of spoiling it is named.

use millpond_protocol::control::DeadReason;

use super::{Invariant, judge};
use crate::history::*;

const SECOND: u64 = 1_000_000;

fn sent(n: u64) -> Sent {
    Sent {
        sequence: n,
        digest: 1_000 + n,
        delay_ms: 0,
        ttl_ms: 0,
    }
}

fn producer() -> Identity {
    Identity { key: 1, epoch: 1 }
}

fn send(messages: &[u64]) -> Event {
    Event::Send {
        producer: producer(),
        topic: 0,
        messages: messages.iter().map(|n| sent(*n)).collect(),
    }
}

fn taken(messages: &[u64], at: u64) -> Event {
    let messages = messages.iter().map(|n| sent(*n)).collect();
    Event::SendTaken { messages, at }
}

/// Sequence n stands at offset n - 1.
fn accepted(messages: &[u64]) -> Event {
    let placed = |n: &u64| Placed {
        sequence: *n,
        digest: sent(*n).digest,
        offset: Some(n - 1),
        is_duplicate: false,
    };
    Event::Accepted {
        producer: producer(),
        topic: 0,
        messages: messages.iter().map(placed).collect(),
    }
}

fn seen(messages: &[u64]) -> Vec<TopicSeen> {
    let one = |n: &u64| Seen {
        offset: n - 1,
        sequence: *n,
        digest: sent(*n).digest,
    };
    vec![TopicSeen {
        topic: 0,
        from: 0,
        first_kept: 0,
        next: messages.len() as u64,
        messages: messages.iter().map(one).collect(),
    }]
}

fn started(messages: &[u64]) -> Event {
    Event::Started {
        at: 0,
        topics: seen(messages),
    }
}

fn delivered(n: u64, delivery: u32, attempt: u32, at: u64) -> Event {
    Event::Delivered(Delivery {
        sub: 0,
        session: 5,
        offset: n - 1,
        delivery,
        attempt,
        digest: Some(sent(n).digest),
        at,
    })
}

fn settle(id: u64, n: u64, delivery: u32, how: How, at: u64) -> [Event; 2] {
    let item = Settling {
        offset: n - 1,
        delivery,
        how,
    };
    let taken = Event::SettleTaken {
        id,
        sub: 0,
        session: 5,
        items: vec![item],
        at,
    };
    let refused = Vec::new();
    [taken, Event::Settled { id, refused }]
}

fn begun(n: u64, delivery: u32) -> Event {
    Event::Begun {
        sub: 0,
        offset: n - 1,
        delivery,
    }
}

/// Three messages: the first acknowledged, the second after one failure, the third dead after two.
fn good() -> History {
    let nack = How::Nack { delay_ms: None };
    let mut events = vec![
        started(&[]),
        Event::Floor { sub: 0, floor: 0 },
        send(&[1, 2, 3]),
        taken(&[1, 2, 3], 0),
        accepted(&[1, 2, 3]),
        delivered(1, 1, 1, SECOND),
        delivered(2, 1, 1, SECOND),
        delivered(3, 1, 1, SECOND),
        begun(1, 1),
        begun(2, 1),
    ];
    events.extend(settle(1, 1, 1, How::Ack, SECOND));
    events.extend(settle(2, 2, 1, nack, 2 * SECOND));
    events.extend(settle(3, 3, 1, nack, 2 * SECOND));
    events.push(Event::Floor { sub: 0, floor: 1 });
    events.push(Event::Stopped);
    events.push(started(&[1, 2, 3]));
    events.push(delivered(2, 2, 2, 3 * SECOND));
    events.push(delivered(3, 2, 2, 3 * SECOND));
    events.extend(settle(4, 2, 2, How::Ack, 3 * SECOND));
    events.extend(settle(5, 3, 2, nack, 3 * SECOND));
    events.push(Event::End(End {
        topics: seen(&[1, 2, 3]),
        subs: vec![SubEnd {
            sub: 0,
            floor: 3,
            backlog: 0,
            letters: vec![letter(3)],
        }],
        stuck: Vec::new(),
    }));
    History {
        topics: vec![TopicRules { keeps_all: true }],
        subs: vec![SubRules {
            topic: 0,
            is_stream: false,
            max_attempts: 2,
            max_deliveries: 100,
            least_waits_ms: vec![1_000],
        }],
        events,
    }
}

fn letter(n: u64) -> LetterSeen {
    LetterSeen {
        offset: n - 1,
        reason: DeadReason::MaxAttempts,
        failures: 2,
        deliveries: 2,
        redrives: 0,
    }
}

/// The good history, spoiled.
fn spoiled(spoil: impl FnOnce(&mut Vec<Event>)) -> Vec<Invariant> {
    let mut history = good();
    spoil(&mut history.events);
    judge(&history)
        .into_iter()
        .map(|violation| violation.invariant)
        .collect()
}

fn position(events: &[Event], is_it: impl Fn(&Event) -> bool) -> usize {
    events
        .iter()
        .position(is_it)
        .expect("the good history has one")
}

fn end(events: &mut [Event]) -> &mut End {
    match events.last_mut() {
        Some(Event::End(end)) => end,
        other => panic!("the last event is the end, not {other:?}"),
    }
}

fn last_start(events: &mut [Event]) -> &mut Vec<TopicSeen> {
    let starts = events.iter_mut().filter_map(|event| match event {
        Event::Started { topics, .. } => Some(topics),
        _ => None,
    });
    starts.last().expect("the good history has one")
}

#[test]
fn a_good_history_breaks_nothing() {
    assert_eq!(judge(&good()), []);
}

#[test]
fn an_acknowledged_message_that_is_gone_breaks_i1() {
    let found = spoiled(|events| {
        let topic = &mut last_start(events)[0];
        topic.messages.pop();
        topic.next = 2;
    });
    assert_eq!(found, [Invariant::I1]);
}

#[test]
fn other_bytes_at_an_acknowledged_offset_break_i1() {
    let found = spoiled(|events| {
        let at = position(events, |event| matches!(event, Event::Delivered(_)));
        events.insert(at, send(&[9]));
        last_start(events)[0].messages[0].digest = sent(9).digest;
    });
    assert!(found.contains(&Invariant::I1), "{found:?}");
}

#[test]
fn an_unreadable_message_in_the_middle_breaks_i1() {
    let found = spoiled(|events| {
        end(events).topics[0].messages.remove(1);
    });
    assert_eq!(found, [Invariant::I1]);
}

#[test]
fn a_duplicate_that_stands_nowhere_breaks_i3_and_i1() {
    let found = spoiled(|events| {
        let stop = position(events, |event| *event == Event::Stopped);
        let placed = Placed {
            sequence: 4,
            digest: sent(4).digest,
            offset: None,
            is_duplicate: true,
        };
        let accepted = Event::Accepted {
            producer: producer(),
            topic: 0,
            messages: vec![placed],
        };
        events.splice(stop..stop, [send(&[4]), accepted]);
    });
    assert_eq!(found, [Invariant::I3, Invariant::I1]);
}

#[test]
fn a_body_that_cannot_be_had_breaks_i1() {
    let found = spoiled(|events| {
        let at = position(events, |event| matches!(event, Event::Delivered(_)));
        if let Event::Delivered(delivery) = &mut events[at] {
            delivery.digest = None;
        }
    });
    assert_eq!(found, [Invariant::I1]);
}

#[test]
fn a_store_that_does_not_open_breaks_i1() {
    let found = spoiled(|events| {
        let stop = position(events, |event| *event == Event::Stopped);
        let why = "damage".to_owned();
        events.insert(stop + 1, Event::Unserved { why });
    });
    assert_eq!(found, [Invariant::I1]);
}

#[test]
fn bytes_that_nobody_sent_break_i8() {
    let found = spoiled(|events| {
        let at = position(events, |event| matches!(event, Event::Delivered(_)));
        if let Event::Delivered(delivery) = &mut events[at] {
            delivery.digest = Some(77);
        }
    });
    assert_eq!(found, [Invariant::I8]);
}

#[test]
fn a_message_that_was_cut_off_and_comes_back_breaks_i2() {
    let found = spoiled(|events| {
        let stop = position(events, |event| *event == Event::Stopped);
        events.insert(stop, send(&[4]));
        let end = end(events);
        end.topics = seen(&[1, 2, 3, 4]);
        end.subs[0].letters.push(letter(4));
    });
    assert!(found.contains(&Invariant::I2), "{found:?}");
}

#[test]
fn a_message_that_was_cut_off_and_sent_again_breaks_nothing() {
    let found = spoiled(|events| {
        let stop = position(events, |event| *event == Event::Stopped);
        events.insert(stop, send(&[4]));
        events.insert(stop + 3, send(&[4]));
        let end = end(events);
        end.topics = seen(&[1, 2, 3, 4]);
        end.subs[0].letters.push(letter(4));
    });
    // Its letter has failures that no delivery made; the message itself is in order.
    assert_eq!(found, [Invariant::I6]);
}

#[test]
fn one_message_at_two_offsets_breaks_i3() {
    let found = spoiled(|events| {
        let topic = &mut end(events).topics[0];
        topic.next = 4;
        topic.messages.push(Seen {
            offset: 3,
            sequence: 1,
            digest: sent(1).digest,
        });
    });
    assert!(found.contains(&Invariant::I3), "{found:?}");
}

#[test]
fn a_retry_with_another_offset_breaks_i3() {
    let found = spoiled(|events| {
        let placed = Placed {
            sequence: 1,
            digest: sent(1).digest,
            offset: Some(7),
            is_duplicate: true,
        };
        let at = position(events, |event| *event == Event::Stopped);
        events.insert(
            at,
            Event::Accepted {
                producer: producer(),
                topic: 0,
                messages: vec![placed],
            },
        );
    });
    assert!(found.contains(&Invariant::I3), "{found:?}");
}

#[test]
fn a_batch_with_a_hole_breaks_i4() {
    let found = spoiled(|events| {
        let at = position(events, |event| matches!(event, Event::Accepted { .. }));
        if let Event::Accepted { messages, .. } = &mut events[at] {
            messages[2].offset = Some(3);
        }
    });
    assert!(found.contains(&Invariant::I4), "{found:?}");
}

#[test]
fn an_offset_that_is_there_twice_breaks_i4() {
    let found = spoiled(|events| {
        let topic = &mut end(events).topics[0];
        let again = topic.messages[1];
        topic.messages.insert(2, again);
    });
    assert_eq!(found, [Invariant::I4]);
}

#[test]
fn what_was_let_go_before_it_was_looked_at_was_not_cut_off() {
    let look = |from| {
        let mut topics = seen(&[]);
        (topics[0].from, topics[0].first_kept, topics[0].next) = (from, from, from);
        Event::Started { at: 0, topics }
    };
    let broken = |from| {
        let mut history = good();
        history.topics[0].keeps_all = false;
        let events = [send(&[1]), taken(&[1], 0), Event::Stopped, look(from)];
        history.events = vec![started(&[])];
        history.events.extend(events);
        history.events.push(delivered(1, 1, 1, SECOND));
        broken_by(&history)
    };
    assert_eq!(broken(0), [Invariant::I2]);
    assert_eq!(broken(1), []);
}

/// A stream subscription reads three messages and commits two.
fn stream(offsets: &[u64]) -> History {
    let mut events = vec![
        started(&[]),
        send(&[1, 2, 3]),
        taken(&[1, 2, 3], 0),
        accepted(&[1, 2, 3]),
        Event::Floor { sub: 0, floor: 0 },
        Event::Active {
            sub: 0,
            session: 5,
            from: 0,
        },
    ];
    events.extend(offsets.iter().map(|at| delivered(at + 1, 0, 1, SECOND)));
    let (id, sub, next) = (1, 0, 2);
    events.push(Event::CommitTaken { id, sub, next });
    events.push(Event::Committed { id, refused: false });
    let mut history = good();
    history.subs[0].is_stream = true;
    history.events = events;
    history
}

fn broken_by(history: &History) -> Vec<Invariant> {
    let violations = judge(history).into_iter();
    violations.map(|violation| violation.invariant).collect()
}

#[test]
fn a_stream_with_a_hole_or_out_of_order_breaks_i4() {
    assert_eq!(broken_by(&stream(&[0, 1, 2])), []);
    assert_eq!(broken_by(&stream(&[0, 2])), [Invariant::I4]);
    let found = broken_by(&stream(&[1, 0, 2]));
    assert!(found.iter().all(|found| *found == Invariant::I4) && !found.is_empty());
}

#[test]
fn a_committed_offset_that_is_lost_breaks_i7() {
    let mut history = stream(&[0, 1, 2]);
    history.events.push(Event::Stopped);
    history.events.push(Event::Floor { sub: 0, floor: 1 });
    assert_eq!(broken_by(&history), [Invariant::I7]);
}

#[test]
fn a_release_that_comes_back_before_its_delay_breaks_i5() {
    let delay_ms = Some(1_500);
    let found = spoiled(|events| {
        let stop = position(events, |event| *event == Event::Stopped);
        let mut more = vec![send(&[4]), taken(&[4], SECOND), accepted(&[4])];
        more.push(delivered(4, 1, 1, SECOND));
        more.extend(settle(9, 4, 1, How::Release { delay_ms }, SECOND));
        more.push(delivered(4, 2, 1, 2 * SECOND));
        more.extend(settle(10, 4, 2, How::Ack, 2 * SECOND));
        events.splice(stop..stop, more);
        *last_start(events) = seen(&[1, 2, 3, 4]);
        end(events).topics = seen(&[1, 2, 3, 4]);
        end(events).subs[0].floor = 4;
    });
    assert_eq!(found, [Invariant::I5]);
}

#[test]
fn a_redelivery_before_its_time_breaks_i5() {
    let found = spoiled(|events| {
        let at = position(
            events,
            |event| matches!(event, Event::Delivered(delivery) if delivery.attempt == 2),
        );
        if let Event::Delivered(delivery) = &mut events[at] {
            delivery.at = 3 * SECOND - 1;
        }
    });
    assert_eq!(found, [Invariant::I5]);
}

#[test]
fn a_delayed_message_before_its_time_breaks_i5() {
    let found = spoiled(|events| {
        for event in events {
            if let Event::Send { messages, .. } = event {
                messages[0].delay_ms = 2_000;
            }
        }
    });
    assert_eq!(found, [Invariant::I5]);
}

#[test]
fn a_failure_counted_twice_breaks_i6() {
    let found = spoiled(|events| {
        let at = position(
            events,
            |event| matches!(event, Event::Delivered(delivery) if delivery.attempt == 2),
        );
        if let Event::Delivered(delivery) = &mut events[at] {
            delivery.attempt = 3;
        }
    });
    assert!(found.iter().all(|found| *found == Invariant::I6) && !found.is_empty());
}

#[test]
fn a_failure_that_somebody_else_says_breaks_i6() {
    let stale = |nack: How| {
        spoiled(|events| {
            let stop = position(events, |event| *event == Event::Stopped);
            let [mut taken, settled] = settle(9, 2, 7, nack, 2 * SECOND);
            if let Event::SettleTaken { session, .. } = &mut taken {
                *session = 4;
            }
            events.splice(stop + 3..stop + 3, [taken, settled]);
        })
    };
    assert_eq!(stale(How::Nack { delay_ms: None }), [Invariant::I6]);
    assert_eq!(stale(How::Release { delay_ms: None }), [Invariant::I6]);
}

#[test]
fn a_refused_word_of_a_lease_takes_no_other_back() {
    let found = spoiled(|events| {
        for event in events {
            match event {
                Event::SettleTaken { id: 2, items, .. } => items.push(Settling {
                    how: How::Release { delay_ms: None },
                    ..items[0]
                }),
                Event::Settled { id: 2, refused } => refused.push(1),
                _ => {}
            }
        }
    });
    assert_eq!(found, []);
}

#[test]
fn a_session_that_begins_twice_breaks_i6() {
    let found = spoiled(|events| {
        let opened = Event::SessionOpened { session: 5 };
        events.insert(0, opened.clone());
        let stop = position(events, |event| *event == Event::Stopped);
        events.insert(stop + 1, opened);
    });
    assert_eq!(found, [Invariant::I6]);
}

#[test]
fn dead_after_too_few_attempts_breaks_i6() {
    let found = spoiled(|events| end(events).subs[0].letters[0].failures = 1);
    assert!(found.iter().all(|found| *found == Invariant::I6) && !found.is_empty());
}

#[test]
fn dead_and_acknowledged_breaks_i6() {
    let found = spoiled(|events| end(events).subs[0].letters.push(letter(1)));
    assert!(found.iter().all(|found| *found == Invariant::I6) && !found.is_empty());
}

#[test]
fn neither_dead_nor_acknowledged_breaks_i6() {
    let found = spoiled(|events| end(events).subs[0].letters.clear());
    assert_eq!(found, [Invariant::I6]);
}

#[test]
fn dead_twice_breaks_i6() {
    let found = spoiled(|events| end(events).subs[0].letters.push(letter(3)));
    assert_eq!(found, [Invariant::I6]);
}

#[test]
fn a_floor_that_moves_back_breaks_i7_unless_it_was_sought() {
    let back = |events: &mut Vec<Event>, more: &[Event]| {
        let at = position(events, |event| *event == Event::Stopped);
        events.splice(at..at, more.iter().cloned());
    };
    let zero = Event::Floor { sub: 0, floor: 0 };
    let seek = Event::Admin(Admin::Seek { sub: 0 });
    let one = std::slice::from_ref(&zero);
    assert_eq!(spoiled(|events| back(events, one)), [Invariant::I7]);
    assert_eq!(spoiled(|events| back(events, &[seek, zero.clone()])), []);
}

#[test]
fn a_floor_shown_during_a_seek_binds_nobody_if_the_seek_was_cut_off() {
    let (seek, floor) = (Event::Admin(Admin::Seek { sub: 0 }), |floor| Event::Floor {
        sub: 0,
        floor,
    });
    let around_the_stop = |before: &[Event]| {
        spoiled(|events| {
            let at = position(events, |event| *event == Event::Stopped);
            let more = [before, &[Event::Stopped, floor(0)]].concat();
            events.splice(at..at, more);
        })
    };
    assert_eq!(around_the_stop(&[seek.clone(), floor(1)]), []);
    let applied = [seek.clone(), seek, floor(1)];
    assert_eq!(around_the_stop(&applied), [Invariant::I7]);
}

#[test]
fn a_delivery_after_its_acknowledgement_breaks_i7() {
    let found = spoiled(|events| {
        let at = position(events, |event| *event == Event::Stopped);
        events.insert(at, delivered(1, 2, 1, 2 * SECOND));
    });
    assert_eq!(found, [Invariant::I7]);
}

#[test]
fn an_unknown_acknowledgement_breaks_nothing_either_way() {
    let found = spoiled(|events| {
        let at = position(events, |event| {
            matches!(event, Event::Settled { id: 4, .. })
        });
        events.remove(at);
    });
    assert_eq!(found, []);
}

#[test]
fn an_answer_after_a_failed_sync_breaks_i9() {
    let found = spoiled(|events| {
        let at = position(events, |event| *event == Event::Stopped);
        events.splice(at..at, [Event::SyncFailed, Event::AnsweredAfterFailure]);
    });
    assert_eq!(found, [Invariant::I9]);
}

#[test]
fn a_backlog_that_stays_breaks_i11() {
    let found = spoiled(|events| end(events).stuck.push("subscription 0".to_owned()));
    assert!(found.contains(&Invariant::I11), "{found:?}");
}
