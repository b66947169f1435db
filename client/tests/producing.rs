//! A producer against a scripted broker.

#![allow(clippy::unwrap_used, reason = "a helper's failure is its test's")]

mod fake;

use std::time::Duration;

use fake::{FakeBroker, WIDE, patient};
use millpond_client::{Error, ErrorClass, ErrorCode, Message, Offset, Producer, WireError};
use millpond_protocol::control::{Leaving, OpenProducer, ProducerOpened, PublishRefused};
use millpond_protocol::frame::FrameType;
use millpond_protocol::hot::{AckKind, Credit, Publish, PublishAck};
use millpond_protocol::{Epoch, MessageView, ProducerHandle, ProducerKey, Sequence, TopicId};

/// The first producer of a stream.
const FIRST: ProducerHandle = ProducerHandle(1);

async fn open(
    client: &millpond_client::Client,
    connection: &fake::FakeConnection,
) -> (Producer, fake::Duplex) {
    let opening = client.producer("orders").open();
    let (producer, (open, stream)) = tokio::join!(opening, connection.producer(0, WIDE));
    assert_eq!(open.topic, "orders");
    (producer.unwrap(), stream)
}

fn refusal(previous: u64, count: u32, last: u64, code: ErrorCode) -> PublishRefused {
    PublishRefused {
        handle: FIRST,
        previous: Sequence(previous),
        count,
        last_accepted: Sequence(last),
        error: WireError::new(code, "refused").retry_after(1),
    }
}

#[tokio::test]
async fn messages_get_their_offsets() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let receipts = [
        producer.try_send(Message::new("a")).unwrap(),
        producer.try_send(Message::new("b")).unwrap(),
    ];
    let batch = stream.publish().await;
    assert_eq!((batch.previous, batch.count), (Sequence(0), 2));
    let (first, rest) = MessageView::split(&batch.messages).unwrap();
    assert_eq!(first.payload(), b"a");
    assert_eq!(first.verify(), Ok(()));
    let (second, _) = MessageView::split(rest).unwrap();
    assert_eq!(
        (second.payload(), second.sequence()),
        (&b"b"[..], Sequence(2))
    );
    stream.ack(2, 10, 2, AckKind::Appended).await;
    for (receipt, offset) in receipts.into_iter().zip([10, 11]) {
        let done = patient(receipt).await.unwrap();
        assert_eq!(done.offset, Some(Offset(offset)));
        assert!(!done.duplicate);
    }
}

#[tokio::test]
async fn what_was_in_doubt_is_sent_again_and_is_no_duplicate_to_its_sender() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let doubtful = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    connection.break_off();
    let young = producer.try_send(Message::new("b")).unwrap();

    let connection = broker.accept().await;
    let (open, mut stream) = connection.producer(1, WIDE).await;
    let resume = open.resume.unwrap();
    assert_eq!(resume.producer, ProducerKey(5));
    let again = stream.publish().await;
    assert_eq!((again.previous, again.count), (Sequence(0), 1));
    let next = stream.publish().await;
    assert_eq!((next.previous, next.count), (Sequence(1), 1));
    stream.ack(1, 40, 1, AckKind::Duplicate).await;
    stream.ack(2, 41, 1, AckKind::Appended).await;
    let done = patient(doubtful).await.unwrap();
    assert_eq!((done.offset, done.duplicate), (Some(Offset(40)), false));
    assert_eq!(patient(young).await.unwrap().offset, Some(Offset(41)));
}

#[tokio::test]
async fn a_refusal_for_the_moment_is_tried_again_in_order() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let first = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    let second = producer.try_send(Message::new("b")).unwrap();
    stream.publish().await;
    let low = refusal(0, 1, 0, ErrorCode::DiskLow);
    stream.write(FrameType::PublishRefused, &low).await;
    let gap = refusal(1, 1, 0, ErrorCode::SequenceGap);
    stream.write(FrameType::PublishRefused, &gap).await;
    assert_eq!(stream.publish().await.previous, Sequence(0));
    assert_eq!(producer.pressure().unwrap().reason, ErrorCode::DiskLow);
    assert_eq!(stream.publish().await.previous, Sequence(1));
    stream.ack(2, 0, 2, AckKind::Appended).await;
    assert_eq!(patient(first).await.unwrap().offset, Some(Offset(0)));
    assert_eq!(patient(second).await.unwrap().offset, Some(Offset(1)));
    assert_eq!(producer.pressure(), None);
}

#[tokio::test]
async fn a_fenced_producer_is_over() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let pending = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    let fenced = WireError::new(ErrorCode::ProducerFenced, "another one was opened");
    stream.end_producer(FIRST, Some(fenced)).await;
    assert_eq!(patient(pending).await, Err(Error::Fenced));
    let next = producer.send(Message::new("b")).await;
    assert_eq!(next, Err(Error::Fenced));
}

#[tokio::test]
async fn without_credit_a_send_waits_and_a_try_fails_at_once() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let one = Credit {
        max_messages: 1,
        ..WIDE
    };
    let opening = client.producer("orders").open();
    let (producer, (_, mut stream)) = tokio::join!(opening, connection.producer(0, one));
    let producer = producer.unwrap();
    let _first = producer.try_send(Message::new("a")).unwrap();
    let full = producer.try_send(Message::new("b")).err().unwrap();
    assert_eq!(full.class(), ErrorClass::Backpressure);
    let waiting = {
        let producer = producer.clone();
        tokio::spawn(async move { producer.send(Message::new("b")).await })
    };
    stream.publish().await;
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert_eq!(stream.publish().await.previous, Sequence(1));
    stream.ack(2, 1, 1, AckKind::Appended).await;
    let done = patient(waiting).await.unwrap().unwrap();
    assert_eq!(done.offset, Some(Offset(1)));
}

#[tokio::test]
async fn a_send_that_finds_no_room_in_time_tells_the_brokers_reason() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let limit = Duration::from_millis(50);
    let opening = client.producer("orders").send_timeout(limit).open();
    let none = Credit::default();
    let (producer, (_, mut stream)) = tokio::join!(opening, connection.producer(0, none));
    let producer = producer.unwrap();
    let pressed = PublishAck {
        handle: FIRST,
        pressure: Some(ErrorCode::Memory),
        retry_after_ms: 70,
        ..PublishAck::default()
    };
    stream.write_ack(&pressed).await;
    patient(async {
        while producer.pressure().is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let error = patient(producer.send(Message::new("a"))).await.unwrap_err();
    let expected = Error::Backpressure {
        reason: ErrorCode::Memory,
        retry_after: Duration::from_millis(70),
    };
    assert_eq!(error, expected);
}

#[tokio::test]
async fn no_answer_within_the_timeout_is_ambiguous() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let limit = Duration::from_millis(50);
    let opening = client.producer("orders").send_timeout(limit).open();
    let (producer, (_, mut stream)) = tokio::join!(opening, connection.producer(0, WIDE));
    let producer = producer.unwrap();
    let sent = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    assert_eq!(patient(sent).await, Err(Error::Ambiguous));
    assert_eq!(producer.flush().await, Err(Error::Ambiguous));
    // The late answer is taken in its turn.
    let next = producer.try_send(Message::new("b")).unwrap();
    stream.publish().await;
    stream.ack(2, 0, 2, AckKind::Appended).await;
    assert_eq!(patient(next).await.unwrap().offset, Some(Offset(1)));
}

#[tokio::test]
async fn a_message_beyond_the_limits_is_not_sent() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let mut wrong = Message::new("a");
    wrong.headers.push(("mp-x".into(), "y".into()));
    let error = producer.send(wrong).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::ReservedHeader));
    let _good = producer.try_send(Message::new("b")).unwrap();
    assert_eq!(stream.publish().await.count, 1);
}

#[tokio::test]
async fn a_closed_producer_has_sent_everything() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let opening = client
        .producer("orders")
        .id("shop-1")
        .linger(Duration::from_secs(3_600))
        .open();
    let (producer, (open, mut stream)) = tokio::join!(opening, connection.producer(3, WIDE));
    assert_eq!(open.producer_id.as_deref(), Some("shop-1"));
    let producer = producer.unwrap();
    assert_eq!(producer.last_sequence(), Sequence(3));
    let other = producer.clone();
    let receipt = producer.try_send(Message::new("a")).unwrap();
    let closing = tokio::spawn(producer.close());
    assert_eq!(stream.publish().await.previous, Sequence(3));
    stream.ack(4, 0, 1, AckKind::Appended).await;
    patient(closing).await.unwrap();
    assert!(patient(receipt).await.is_ok());
    let left = stream.producer_leaves().await;
    assert_eq!((left.handle, left.leaving), (FIRST, Leaving::ForGood));
    let late = other.send(Message::new("b")).await;
    assert_eq!(late, Err(Error::Closed));
}

#[tokio::test]
async fn when_the_broker_goes_away_answers_are_awaited_and_the_rest_goes_to_the_next() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let sent = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    connection.go_away().await;
    patient(async {
        while client.is_connected() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert_eq!(patient(sent).await.unwrap().offset, Some(Offset(0)));
    patient(connection.connection.closed()).await;
    let later = producer.try_send(Message::new("b")).unwrap();
    let connection = broker.accept().await;
    let (_, mut stream) = connection.producer(1, WIDE).await;
    assert_eq!(stream.publish().await.previous, Sequence(1));
    stream.ack(2, 1, 1, AckKind::Appended).await;
    assert_eq!(patient(later).await.unwrap().offset, Some(Offset(1)));
}

/// Opens the stream's next producer, or fences it, as a broker does whose epoch of it is `known`.
async fn reopen_as_of(stream: &mut fake::Duplex, known: Epoch) -> OpenProducer {
    let frame = stream.read(FrameType::OpenProducer).await;
    let open: OpenProducer = frame.decode().unwrap();
    if open.resume.unwrap().epoch < known {
        let fenced = WireError::new(ErrorCode::ProducerFenced, "a newer one exists");
        stream.end_producer(open.handle, Some(fenced)).await;
    } else {
        stream.opened_as(open.handle, known.next(), 0, WIDE).await;
    }
    open
}

#[tokio::test]
async fn a_producer_is_not_fenced_by_an_opening_of_its_own_that_took_too_long() {
    let broker = FakeBroker::start();
    let limit = Duration::from_millis(500);
    let builder = broker.client().request_timeout(limit);
    let (client, connection) = broker.connected_as(builder).await;
    let (producer, mut stream) = open(&client, &connection).await;
    let sent = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    connection.break_off();

    // Taken as epoch 2, but the answer comes to nobody.
    let connection = broker.accept().await;
    let (asked, mut stream) = connection.producer_asks().await;
    assert_eq!(asked.resume.unwrap().epoch, Epoch(1));
    let left = stream.producer_leaves().await;
    assert_eq!((left.handle, left.leaving), (asked.handle, Leaving::ForNow));
    let mut open = reopen_as_of(&mut stream, Epoch(2)).await;
    if open.resume.unwrap().epoch < Epoch(2) {
        open = reopen_as_of(&mut stream, Epoch(2)).await;
    }
    stream.handle = open.handle;
    assert_eq!(stream.publish().await.handle, open.handle);
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert_eq!(patient(sent).await.unwrap().offset, Some(Offset(0)));
}

#[tokio::test]
async fn a_producer_that_comes_back_does_not_fence_its_successor_but_is_over() {
    let broker = FakeBroker::start();
    let limit = Duration::from_millis(500);
    let builder = broker.client().request_timeout(limit);
    let (client, connection) = broker.connected_as(builder).await;
    let (producer, _stream) = open(&client, &connection).await;
    connection.break_off();

    // Two openings that the broker never took.
    let connection = broker.accept().await;
    let (_, mut stream) = connection.producer_asks().await;
    stream.producer_leaves().await;
    stream.read(FrameType::OpenProducer).await;
    stream.producer_leaves().await;
    // Somebody else has opened it twice meanwhile.
    reopen_as_of(&mut stream, Epoch(3)).await;
    reopen_as_of(&mut stream, Epoch(3)).await;
    let next = patient(producer.send(Message::new("a"))).await;
    assert_eq!(next, Err(Error::Fenced));
}

#[tokio::test]
async fn a_forgotten_anonymous_producer_begins_anew() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let doubtful = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    connection.break_off();

    let connection = broker.accept().await;
    let (open, mut stream) = connection.producer_asks().await;
    assert!(open.resume.is_some());
    let unsent = producer.try_send(Message::new("b")).unwrap();
    let expired = WireError::new(ErrorCode::ProducerStateExpired, "forgotten");
    stream.end_producer(open.handle, Some(expired)).await;
    let again = stream.read(FrameType::OpenProducer).await;
    let open: OpenProducer = again.decode().unwrap();
    assert!(open.resume.is_none());
    stream.handle = open.handle;
    let opened = ProducerOpened {
        handle: open.handle,
        topic: TopicId(1),
        producer: ProducerKey(6),
        epoch: Epoch(1),
        last_sequence: Sequence(0),
        credit: WIDE,
    };
    stream.write(FrameType::ProducerOpened, &opened).await;
    assert_eq!(patient(doubtful).await, Err(Error::Ambiguous));
    let batch = stream.publish().await;
    assert_eq!((batch.previous, batch.count), (Sequence(0), 1));
    stream.ack(2, 0, 1, AckKind::Appended).await;
    assert_eq!(patient(unsent).await.unwrap().offset, Some(Offset(0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_senders_share_batches_and_each_gets_its_own_offset() {
    const SENDERS: u64 = 50;
    const EACH: u64 = 200;
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let narrow = Credit {
        max_messages: 64,
        max_bytes: 1 << 20,
    };
    let opening = client.producer("orders").window_messages(32).open();
    let (producer, (_, mut stream)) = tokio::join!(opening, connection.producer(0, narrow));
    let producer = producer.unwrap();
    let serving = tokio::spawn(async move {
        let (mut next, mut last, mut bytes, mut batches) = (0u64, 0u64, 0u64, 0u64);
        while next < SENDERS * EACH {
            let batch = stream.publish().await;
            assert_eq!(batch.previous, Sequence(last));
            bytes += batch.messages.len() as u64;
            last += u64::from(batch.count);
            assert!(last <= next + 64, "more than the credit was sent");
            let ack = PublishAck {
                handle: FIRST,
                credit: Credit {
                    max_messages: last + 64,
                    max_bytes: bytes + (1 << 20),
                },
                rows: vec![millpond_protocol::hot::AckRow {
                    last_sequence: Sequence(last),
                    offset: Offset(next),
                    count: batch.count,
                    kind: AckKind::Appended,
                }],
                ..PublishAck::default()
            };
            stream.write_ack(&ack).await;
            next = last;
            batches += 1;
        }
        batches
    });
    let mut senders = tokio::task::JoinSet::new();
    for _ in 0..SENDERS {
        let producer = producer.clone();
        senders.spawn(async move {
            for _ in 0..EACH {
                let done = producer.send(Message::new("x")).await.unwrap();
                assert_eq!(done.offset.unwrap().0 + 1, done.sequence.0);
            }
        });
    }
    while let Some(sender) = patient(senders.join_next()).await {
        sender.unwrap();
    }
    assert!(patient(serving).await.unwrap() < SENDERS * EACH, "batched");
}

#[tokio::test]
async fn producers_of_one_connection_share_a_stream_and_nothing_else() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (first, mut stream) = open(&client, &connection).await;
    let opening = client.producer("bills").id("b").open();
    let (second, asked) = tokio::join!(opening, stream.next_producer(7, WIDE));
    let second = second.unwrap();
    assert_eq!(
        (asked.topic.as_str(), asked.handle),
        ("bills", ProducerHandle(2))
    );

    let of_first = first.try_send(Message::new("a")).unwrap();
    assert_eq!(stream.publish().await.handle, FIRST);
    let of_second = second.try_send(Message::new("b")).unwrap();
    let batch = stream.publish().await;
    assert_eq!((batch.handle, batch.previous), (asked.handle, Sequence(7)));
    stream.handle = asked.handle;
    stream.ack(8, 3, 1, AckKind::Appended).await;
    assert_eq!(patient(of_second).await.unwrap().offset, Some(Offset(3)));

    // What ends one of them is nothing to the other.
    let fenced = WireError::new(ErrorCode::ProducerFenced, "another one was opened");
    stream.end_producer(FIRST, Some(fenced)).await;
    assert_eq!(patient(of_first).await, Err(Error::Fenced));
    // An answer that comes behind the end finds nobody.
    stream.handle = FIRST;
    stream.ack(1, 0, 1, AckKind::Appended).await;
    let more = second.try_send(Message::new("c")).unwrap();
    assert_eq!(stream.publish().await.previous, Sequence(8));
    stream.handle = asked.handle;
    stream.ack(9, 4, 1, AckKind::Appended).await;
    assert_eq!(patient(more).await.unwrap().offset, Some(Offset(4)));
}

#[tokio::test]
async fn a_name_that_is_too_long_is_refused_and_is_nothing_to_the_others() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let name = "x".repeat(5_000);
    let openings = [
        client.producer(&name),
        client.producer("orders").id(&name),
        client.producer("x".repeat(201)),
    ];
    for opening in openings {
        let error = patient(opening.open()).await.err().unwrap();
        assert!(matches!(error, Error::TooLong { .. }), "{error:?}");
        assert_eq!(error.code(), Some(ErrorCode::InvalidName));
        assert!(!error.is_retriable());
    }
    let sent = producer.try_send(Message::new("a")).unwrap();
    assert_eq!(stream.publish().await.handle, FIRST);
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert!(patient(sent).await.is_ok());
}

#[tokio::test]
async fn a_dropped_producer_leaves_once_it_is_answered_and_the_others_go_on() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (first, mut stream) = open(&client, &connection).await;
    let opening = client.producer("bills").open();
    let (second, asked) = tokio::join!(opening, stream.next_producer(0, WIDE));
    let second = second.unwrap();
    let last_words = first.try_send(Message::new("a")).unwrap();
    drop(first);
    assert_eq!(stream.publish().await.handle, FIRST);
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert!(patient(last_words).await.is_ok());
    let left = stream.producer_leaves().await;
    assert_eq!((left.handle, left.leaving), (FIRST, Leaving::ForGood));
    stream.end_producer(FIRST, None).await;
    let sent = second.try_send(Message::new("b")).unwrap();
    assert_eq!(stream.publish().await.handle, asked.handle);
    stream.handle = asked.handle;
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert!(patient(sent).await.is_ok());
}

#[tokio::test]
async fn settings_without_end_are_taken() {
    let broker = FakeBroker::start();
    let builder = broker.client().circuit_breaker(1, Duration::MAX);
    let builder = builder.connect_timeout(Duration::MAX);
    let builder = builder.request_timeout(Duration::MAX);
    let (client, mut connection) = broker.connected_as(builder).await;
    let opening = client.producer("orders").linger(Duration::MAX);
    let opening = opening.send_timeout(Duration::MAX).open();
    let one = Credit {
        max_messages: 1,
        ..WIDE
    };
    let (producer, (_, mut stream)) = tokio::join!(opening, connection.producer(0, one));
    let producer = producer.unwrap();
    let first = producer.try_send(Message::new("a")).unwrap();
    // The writer has looked at it, and waits, once it has opened another producer.
    let opening = client.producer("bills").open();
    let (second, _) = tokio::join!(opening, stream.next_producer(0, WIDE));
    let second = second.unwrap();
    let waiting = {
        let producer = producer.clone();
        tokio::spawn(async move { producer.enqueue(Message::new("b")).await })
    };
    let of_second = second.try_send(Message::new("c")).unwrap();
    let batch = stream.publish().await;
    assert_eq!(batch.handle, ProducerHandle(2));
    stream.handle = batch.handle;
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert!(patient(of_second).await.is_ok());

    let flushing = tokio::spawn(async move { producer.flush().await });
    assert_eq!(stream.publish().await.handle, FIRST);
    stream.handle = FIRST;
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert!(patient(first).await.is_ok());
    assert_eq!(patient(flushing).await.unwrap(), Ok(()));
    assert!(patient(waiting).await.unwrap().is_ok());

    let asking = tokio::spawn(async move { client.new_token("a").await });
    let (id, _) = connection.request().await;
    let refusal = WireError::new(ErrorCode::Unauthorized, "not allowed");
    connection.respond(id, Err(refusal)).await;
    let error = patient(asking).await.unwrap().err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Unauthorized));
}

#[tokio::test]
async fn a_producer_that_must_open_again_does_so_in_a_new_place_on_the_stream() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (producer, mut stream) = open(&client, &connection).await;
    let doubtful = producer.try_send(Message::new("a")).unwrap();
    stream.publish().await;
    let overrun = WireError::new(ErrorCode::CreditOverrun, "too much");
    stream.end_producer(FIRST, Some(overrun)).await;
    let open = stream.next_producer(0, WIDE).await;
    assert_eq!(
        (open.handle, open.resume.is_some()),
        (ProducerHandle(2), true)
    );
    // This late answer is not for what is sent from the new place.
    stream.ack(1, 77, 1, AckKind::Appended).await;
    let again = stream.publish().await;
    assert_eq!((again.handle, again.count), (open.handle, 1));
    stream.handle = open.handle;
    stream.ack(1, 5, 1, AckKind::Appended).await;
    assert_eq!(patient(doubtful).await.unwrap().offset, Some(Offset(5)));

    // It leaves by itself when what it hears makes no sense, and can come back.
    let doubtful = producer.try_send(Message::new("b")).unwrap();
    stream.publish().await;
    let nonsense = PublishRefused {
        handle: open.handle,
        ..refusal(99, 1, 1, ErrorCode::DiskLow)
    };
    stream.write(FrameType::PublishRefused, &nonsense).await;
    let left = stream.producer_leaves().await;
    assert_eq!((left.handle, left.leaving), (open.handle, Leaving::ForNow));
    let open = stream.next_producer(1, WIDE).await;
    stream.publish().await;
    stream.handle = open.handle;
    stream.ack(2, 6, 1, AckKind::Appended).await;
    assert_eq!(patient(doubtful).await.unwrap().offset, Some(Offset(6)));
}

#[tokio::test]
async fn a_stream_that_breaks_takes_nobody_with_it() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (first, mut stream) = open(&client, &connection).await;
    let opening = client.producer("bills").open();
    let (second, _) = tokio::join!(opening, stream.next_producer(0, WIDE));
    let producers = [first, second.unwrap()];
    let receipts = [0, 1].map(|n| producers[n].try_send(Message::new("a")).unwrap());
    stream.publish().await;
    stream.publish().await;
    // An answer to a producer that never was.
    stream.handle = ProducerHandle(9);
    stream.ack(1, 0, 1, AckKind::Appended).await;
    assert_eq!(stream.next().await, None);

    let (_, mut stream) = connection.producer(0, WIDE).await;
    let mut answered = 0;
    while answered < 2 {
        // The one may publish before the other has asked.
        let frame = stream.next().await.unwrap();
        if frame.kind == FrameType::OpenProducer {
            let open: OpenProducer = frame.decode().unwrap();
            stream.opened(open.handle, 0, WIDE).await;
            continue;
        }
        let publish = frame.expect(FrameType::Publish).unwrap();
        stream.handle = Publish::decode(&publish.body).unwrap().handle;
        stream.ack(1, 0, 1, AckKind::Appended).await;
        answered += 1;
    }
    for receipt in receipts {
        assert!(patient(receipt).await.is_ok());
    }
}
