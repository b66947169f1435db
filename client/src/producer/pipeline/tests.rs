//! The pipeline against a broker that follows SEMANTICS section 4 and misbehaves at will.

use std::collections::VecDeque;
use std::task::{Context, Poll, Waker};

use bytes::{BufMut, BytesMut};
use millpond_protocol::frame::HEADER_BYTES;
use millpond_protocol::hot::Publish;
use millpond_protocol::{
    Epoch, ErrorClass, MessageView, Offset, ProducerHandle, TopicId, WireError,
};
use proptest::prelude::*;

use super::super::batch::Accepted;
use super::*;
use millpond_protocol::control::PublishRefused;
use millpond_protocol::hot::{AckKind, AckRow, PublishAck};

const HANDLE: ProducerHandle = ProducerHandle(1);
const TIMEOUT: Duration = Duration::from_secs(30);
const WIDE: Credit = Credit {
    max_messages: 1 << 40,
    max_bytes: 1 << 40,
};

fn opened(last: u64, credit: Credit) -> ProducerOpened {
    ProducerOpened {
        handle: HANDLE,
        topic: TopicId(1),
        producer: ProducerKey(1),
        epoch: Epoch(1),
        last_sequence: Sequence(last),
        credit,
    }
}

fn pipeline(last: u64, credit: Credit) -> Pipeline {
    let config = PipelineConfig {
        window_messages: 1_000,
        linger: Duration::ZERO,
        send_timeout: TIMEOUT,
    };
    Pipeline::new(config, &opened(last, credit), None)
}

fn push(pipeline: &mut Pipeline, payload: &str, now: Instant) -> Slot {
    let message = Message::new(payload.to_owned());
    pipeline.push(&message, None, || now).unwrap()
}

fn outcome(slot: &Slot) -> Option<Outcome> {
    let context = Context::from_waker(Waker::noop());
    match slot.slots.poll(slot.index, &context) {
        Poll::Ready((nth, Ok(accepted))) => Some(Ok(Accepted {
            offset: accepted
                .offset
                .map(|first| Offset(first.0 + u64::from(nth))),
            ..accepted
        })),
        Poll::Ready((_, error)) => Some(error),
        Poll::Pending => None,
    }
}

fn frame(pipeline: &mut Pipeline, now: Instant) -> Option<Publish> {
    match pipeline.next(now) {
        Next::Wait(_) => None,
        Next::Write(frame) => {
            let bytes = frame.messages.len();
            let prefix = Publish::prefix(HANDLE, frame.previous, frame.count, bytes);
            let mut body = BytesMut::from(&prefix[HEADER_BYTES..]);
            body.put_slice(&frame.messages);
            Some(Publish::decode(&body.freeze()).unwrap())
        }
    }
}

fn refusal(publish: &Publish, last: u64, code: ErrorCode) -> PublishRefused {
    PublishRefused {
        handle: publish.handle,
        previous: publish.previous,
        count: publish.count,
        last_accepted: Sequence(last),
        error: WireError::new(code, "refused"),
    }
}

fn appended(last: u64, offset: u64, count: u32) -> PublishAck {
    PublishAck {
        credit: WIDE,
        rows: vec![AckRow {
            last_sequence: Sequence(last),
            offset: Offset(offset),
            count,
            kind: AckKind::Appended,
        }],
        ..PublishAck::default()
    }
}

fn good(offset: u64) -> Option<Outcome> {
    Some(Ok(Accepted {
        offset: Some(Offset(offset)),
        duplicate: false,
    }))
}

#[test]
fn a_message_that_fails_leaves_no_hole_in_the_chain() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(7, WIDE);
    let old = push(&mut pipeline, "old", now);
    let first = frame(&mut pipeline, now).unwrap();
    assert_eq!(first.previous, Sequence(7));
    let low = refusal(&first, 7, ErrorCode::DiskLow);
    assert_eq!(pipeline.refused(&low, now, wakeups), Ok(Verdict::Fine));

    let late = now + TIMEOUT;
    let young = push(&mut pipeline, "young", late);
    pipeline.expire(late, wakeups);
    let failed = outcome(&old).unwrap().unwrap_err();
    assert_eq!(failed.code(), Some(ErrorCode::DiskLow));
    assert_eq!(failed.class(), ErrorClass::Backpressure);

    let next = frame(&mut pipeline, late).unwrap();
    assert_eq!((next.previous, young.sequence), (Sequence(7), Sequence(9)));
    pipeline.acked(&appended(9, 3, 1), wakeups).unwrap();
    assert_eq!(outcome(&young), good(3));
    assert!(pipeline.is_empty());
}

#[test]
fn nothing_is_sent_before_every_frame_behind_a_refusal_is_answered() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(0, WIDE);
    let slots = ["a", "b"].map(|text| {
        let slot = push(&mut pipeline, text, now);
        (slot, frame(&mut pipeline, now).unwrap())
    });
    let busy = refusal(&slots[0].1, 0, ErrorCode::Busy);
    pipeline.refused(&busy, now, wakeups).unwrap();
    let later = now + Duration::from_secs(1);
    assert!(frame(&mut pipeline, later).is_none());
    let gap = refusal(&slots[1].1, 0, ErrorCode::SequenceGap);
    pipeline.refused(&gap, now, wakeups).unwrap();
    assert!(frame(&mut pipeline, now).is_none(), "it asked for a wait");
    let again = frame(&mut pipeline, later).unwrap();
    assert_eq!((again.previous, again.count), (Sequence(0), 1));
    let again = frame(&mut pipeline, later).unwrap();
    assert_eq!((again.previous, again.count), (Sequence(1), 1));
}

#[test]
fn only_the_guilty_message_of_a_batch_fails() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(0, WIDE);
    let slots = ["a", "guilty", "c"].map(|text| push(&mut pipeline, text, now));
    let whole = frame(&mut pipeline, now).unwrap();
    assert_eq!(whole.count, 3);
    let wrong = refusal(&whole, 0, ErrorCode::TooLarge);
    pipeline.refused(&wrong, now, wakeups).unwrap();
    let singles = [0; 3].map(|_| frame(&mut pipeline, now).unwrap());
    assert!(singles.iter().all(|single| single.count == 1));
    pipeline.acked(&appended(1, 0, 1), wakeups).unwrap();
    let wrong = refusal(&singles[1], 1, ErrorCode::TooLarge);
    pipeline.refused(&wrong, now, wakeups).unwrap();
    let gap = refusal(&singles[2], 1, ErrorCode::SequenceGap);
    pipeline.refused(&gap, now, wakeups).unwrap();
    let last = frame(&mut pipeline, now).unwrap();
    assert_eq!(last.previous, Sequence(1));
    pipeline.acked(&appended(3, 1, 1), wakeups).unwrap();
    assert_eq!(outcome(&slots[0]), good(0));
    let error = outcome(&slots[1]).unwrap().unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::TooLarge));
    assert_eq!(outcome(&slots[2]), good(1));
}

#[test]
fn a_batch_larger_than_the_credit_goes_out_in_parts() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(0, WIDE);
    for text in ["a", "b", "c"] {
        push(&mut pipeline, text, now);
    }
    pipeline.lost();
    let narrow = Credit {
        max_messages: 2,
        ..WIDE
    };
    pipeline.reopened(&opened(0, narrow), wakeups).unwrap();
    assert_eq!(frame(&mut pipeline, now).unwrap().count, 2);
    assert!(frame(&mut pipeline, now).is_none());
    let more = PublishAck {
        credit: WIDE,
        ..PublishAck::default()
    };
    pipeline.acked(&more, wakeups).unwrap();
    let rest = frame(&mut pipeline, now).unwrap();
    assert_eq!((rest.previous, rest.count), (Sequence(2), 1));
}

#[test]
fn without_credit_there_is_no_room() {
    let now = Instant::now();
    let narrow = Credit {
        max_messages: 1,
        ..WIDE
    };
    let mut pipeline = pipeline(0, narrow);
    push(&mut pipeline, "a", now);
    let full = pipeline
        .push(&Message::new("b"), None, || now)
        .err()
        .unwrap();
    assert_eq!(full.class(), ErrorClass::Backpressure);
}

#[test]
fn a_sequence_must_rise() {
    let now = Instant::now();
    let mut pipeline = pipeline(4, WIDE);
    let message = Message::new("a");
    let low = pipeline.push(&message, Some(Sequence(4)), || now).err();
    let expected = Error::SequenceNotRising {
        last: Sequence(4),
        given: Sequence(4),
    };
    assert_eq!(low, Some(expected));
    let skipped = pipeline.push(&message, Some(Sequence(40)), || now).unwrap();
    assert_eq!(skipped.sequence, Sequence(40));
    assert_eq!(pipeline.last_assigned(), Sequence(40));
}

#[test]
fn an_outbox_row_that_the_broker_has_is_a_duplicate() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let config = PipelineConfig {
        window_messages: 10,
        linger: Duration::ZERO,
        send_timeout: TIMEOUT,
    };
    let mut pipeline = Pipeline::new(config, &opened(5, WIDE), Some(Sequence(5)));
    let slot = push(&mut pipeline, "row 5", now);
    assert_eq!(slot.sequence, Sequence(5));
    frame(&mut pipeline, now).unwrap();
    let mut ack = appended(5, 9, 1);
    ack.rows[0].kind = AckKind::Duplicate;
    pipeline.acked(&ack, wakeups).unwrap();
    let duplicate = Accepted {
        offset: Some(Offset(9)),
        duplicate: true,
    };
    assert_eq!(outcome(&slot), Some(Ok(duplicate)));
}

#[test]
fn a_higher_sequence_than_was_ever_sent_means_another_writer() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(0, WIDE);
    let slot = push(&mut pipeline, "a", now);
    pipeline.lost();
    let result = pipeline.reopened(&opened(1, WIDE), wakeups);
    assert_eq!(result, Err(Error::Fenced));
    pipeline.fail(&Error::Fenced, wakeups);
    assert_eq!(outcome(&slot), Some(Err(Error::Fenced)));
}

#[test]
fn what_a_forgetful_broker_may_have_had_is_ambiguous() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(3, WIDE);
    let doubtful = push(&mut pipeline, "a", now);
    frame(&mut pipeline, now).unwrap();
    let unsent = push(&mut pipeline, "b", now);
    pipeline.lost();
    pipeline.reopened(&opened(0, WIDE), wakeups).unwrap();
    assert_eq!(outcome(&doubtful), Some(Err(Error::Ambiguous)));
    assert_eq!(frame(&mut pipeline, now).unwrap().previous, Sequence(0));
    pipeline.acked(&appended(5, 0, 1), wakeups).unwrap();
    assert_eq!(outcome(&unsent), good(0));
}

#[test]
fn another_dedup_state_knows_nothing_of_what_is_in_doubt() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(0, WIDE);
    let doubtful = push(&mut pipeline, "a", now);
    frame(&mut pipeline, now).unwrap();
    pipeline.lost();
    let other = ProducerOpened {
        producer: ProducerKey(2),
        ..opened(0, WIDE)
    };
    pipeline.reopened(&other, wakeups).unwrap();
    assert_eq!(outcome(&doubtful), Some(Err(Error::Ambiguous)));
    assert!(pipeline.is_empty());
}

/// A broker by the book: dedup by sequence, the chain by `previous`, all or nothing.
#[derive(Default)]
struct Broker {
    last: u64,
    /// Sequences in offset order.
    log: Vec<u64>,
    answers: VecDeque<Answer>,
}

enum Answer {
    Ack(AckRow),
    Refused(PublishRefused),
}

impl Broker {
    fn publish(&mut self, publish: &Publish, code: Option<ErrorCode>) {
        let mut rest: &[u8] = &publish.messages;
        let mut sequences = Vec::new();
        let mut poisoned = false;
        while !rest.is_empty() {
            let (view, tail) = MessageView::split(rest).unwrap();
            view.verify().unwrap();
            poisoned |= view.payload() == b"poison";
            sequences.push(view.sequence().0);
            rest = tail;
        }
        assert_eq!(sequences.len(), publish.count as usize);
        assert!(sequences.is_sorted_by(|a, b| a < b));
        assert!(publish.previous.0 < sequences[0]);
        let old = sequences.partition_point(|&s| s <= self.last);
        let (old, new) = sequences.split_at(old);
        let code = match code {
            _ if new.is_empty() => None,
            _ if *old.last().unwrap_or(&publish.previous.0) != self.last => {
                Some(ErrorCode::SequenceGap)
            }
            _ if poisoned => Some(ErrorCode::ReservedHeader),
            given => given,
        };
        for &sequence in old {
            let offset = self.log.iter().position(|&s| s == sequence);
            self.row(
                sequence,
                offset.expect("accepted once"),
                1,
                AckKind::Duplicate,
            );
        }
        if let Some(code) = code {
            let mut refused = refusal(publish, self.last, code);
            refused.count = new.len() as u32;
            self.answers.push_back(Answer::Refused(refused));
        } else if let Some(&last) = new.last() {
            let offset = self.log.len();
            self.log.extend(new);
            self.last = last;
            self.row(last, offset, new.len(), AckKind::Appended);
        }
    }

    fn row(&mut self, last: u64, offset: usize, count: usize, kind: AckKind) {
        self.answers.push_back(Answer::Ack(AckRow {
            last_sequence: Sequence(last),
            offset: Offset(offset as u64),
            count: count as u32,
            kind,
        }));
    }

    fn answer(&mut self, pipeline: &mut Pipeline, now: Instant) -> bool {
        let wakeups = &mut Wakeups::default();
        match self.answers.pop_front() {
            None => return false,
            Some(Answer::Ack(row)) => {
                let ack = PublishAck {
                    credit: WIDE,
                    rows: vec![row],
                    ..PublishAck::default()
                };
                pipeline.acked(&ack, wakeups).unwrap();
            }
            Some(Answer::Refused(refused)) => {
                let verdict = pipeline.refused(&refused, now, wakeups).unwrap();
                assert_eq!(verdict, Verdict::Fine);
            }
        }
        true
    }
}

#[derive(Clone, Debug)]
enum Step {
    Push { messages: usize, poison: bool },
    Write,
    Process(Option<u16>),
    Answer,
    Break,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1usize..5, prop::bool::weighted(0.1))
            .prop_map(|(messages, poison)| Step::Push { messages, poison }),
        4 => Just(Step::Write),
        4 => prop::option::weighted(0.3, prop::sample::select(vec![1u16, 10, 13]))
            .prop_map(Step::Process),
        4 => Just(Step::Answer),
        1 => Just(Step::Break),
        1 => (1u64..20_000).prop_map(Step::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn whatever_happens_nothing_is_lost_doubled_or_overtaken(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        let wakeups = &mut Wakeups::default();
        let mut now = Instant::now();
        let mut pipeline = pipeline(0, WIDE);
        let mut broker = Broker::default();
        let mut wire: VecDeque<Publish> = VecDeque::new();
        let mut slots = Vec::new();
        for step in steps {
            match step {
                Step::Push { messages, poison } => for _ in 0..messages {
                    let text = if poison { "poison" } else { "good" };
                    slots.push(push(&mut pipeline, text, now));
                },
                Step::Write => wire.extend(frame(&mut pipeline, now)),
                Step::Process(code) => if let Some(publish) = wire.pop_front() {
                    broker.publish(&publish, code.map(ErrorCode::from));
                },
                Step::Answer => {
                    broker.answer(&mut pipeline, now);
                }
                Step::Break => {
                    wire.clear();
                    broker.answers.clear();
                    pipeline.lost();
                    pipeline.reopened(&opened(broker.last, WIDE), wakeups).unwrap();
                }
                Step::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    pipeline.expire(now, wakeups);
                }
            }
        }
        for _ in 0..10_000 {
            now += Duration::from_millis(100);
            pipeline.expire(now, wakeups);
            wire.extend(frame(&mut pipeline, now));
            if let Some(publish) = wire.pop_front() {
                broker.publish(&publish, None);
            }
            broker.answer(&mut pipeline, now);
            if pipeline.is_empty() {
                break;
            }
        }
        prop_assert!(pipeline.is_empty());
        prop_assert_eq!(pipeline.unsent, Totals::default());
        prop_assert!(broker.log.is_sorted_by(|a, b| a < b));
        for slot in &slots {
            let at = broker.log.iter().position(|&s| s == slot.sequence.0);
            match outcome(slot) {
                Some(Ok(accepted)) => {
                    prop_assert_eq!(accepted.offset.map(|o| o.0 as usize), at);
                    prop_assert!(at.is_some() && !accepted.duplicate);
                }
                Some(Err(Error::Ambiguous)) => {}
                Some(Err(_)) => prop_assert_eq!(at, None),
                None => prop_assert!(false, "sequence {} has no outcome", slot.sequence),
            }
        }
    }
}

#[test]
fn what_was_refused_stays_pressed_until_something_is_accepted() {
    let now = Instant::now();
    let wakeups = &mut Wakeups::default();
    let mut pipeline = pipeline(0, WIDE);
    let _slot = push(&mut pipeline, "a", now);
    let first = frame(&mut pipeline, now).unwrap();
    let full = refusal(&first, 0, ErrorCode::BacklogLimit);
    pipeline.refused(&full, now, wakeups).unwrap();
    // Credit alone, as it comes behind every answer.
    pipeline.acked(&PublishAck::default(), wakeups).unwrap();
    let reason = pipeline.pressure().map(|pressure| pressure.reason);
    assert_eq!(reason, Some(ErrorCode::BacklogLimit));

    frame(&mut pipeline, now + TIMEOUT / 2).unwrap();
    pipeline.acked(&appended(1, 0, 1), wakeups).unwrap();
    assert_eq!(pipeline.pressure(), None);
}

#[test]
fn little_waits_for_an_answer_while_a_few_frames_are_unanswered() {
    let now = Instant::now();
    let mut pipeline = pipeline(0, WIDE);
    for n in 0..GATHER_FRAMES {
        push(&mut pipeline, "a", now);
        assert_eq!(
            frame(&mut pipeline, now).map(|f| f.count),
            Some(1),
            "frame {n}"
        );
    }
    push(&mut pipeline, "b", now);
    push(&mut pipeline, "c", now);
    assert!(frame(&mut pipeline, now).is_none());
    let wakeups = &mut Wakeups::default();
    pipeline.acked(&appended(1, 0, 1), wakeups).unwrap();
    assert_eq!(frame(&mut pipeline, now).map(|f| f.count), Some(2));

    push(&mut pipeline, &"d".repeat(GATHER_BYTES), now);
    assert_eq!(
        frame(&mut pipeline, now).map(|f| f.count),
        Some(1),
        "much never waits"
    );
    push(&mut pipeline, "e", now);
    assert!(frame(&mut pipeline, now).is_none());
    pipeline.flush();
    assert_eq!(
        frame(&mut pipeline, now).map(|f| f.count),
        Some(1),
        "nor what is flushed"
    );
}
