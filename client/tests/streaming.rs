//! Consumers of stream subscriptions against a scripted broker.

#![allow(clippy::unwrap_used, reason = "a helper's failure is its test's")]

mod fake;

use std::time::Duration;

use fake::{Duplex, FakeBroker, FakeConnection, opened, patient};
use millpond_client::{
    Client, Error, Offset, Request, Response, StartAt, StreamMessage, StreamSubscription,
    SubscribeBuilder, SubscriptionConfig, SubscriptionMode,
};
use millpond_protocol::control::{
    ConsumerNotice, ConsumerOpened, MessageState, SettleRefused, Settled,
};
use millpond_protocol::frame::FrameType;
use millpond_protocol::hot::{ConsumerCredit, decode_commit};
use millpond_protocol::{ErrorCode, WireError};
use tokio::time::timeout;

async fn open(
    client: &Client,
    connection: &FakeConnection,
) -> (StreamSubscription, Duplex, Duplex) {
    open_with(client.subscribe("orders", "audit"), connection).await
}

async fn open_with(
    subscribe: SubscribeBuilder,
    connection: &FakeConnection,
) -> (StreamSubscription, Duplex, Duplex) {
    let opening = subscribe
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .open_stream();
    let opened = opened(1, SubscriptionMode::Stream);
    let (subscription, (open, mut deliveries, settlements)) =
        tokio::join!(opening, connection.consumer(&opened));
    let create = open.create.unwrap();
    assert_eq!(create.config.mode, SubscriptionMode::Stream);
    let active = ConsumerNotice::Active { from: Offset(0) };
    deliveries.write(FrameType::ConsumerNotice, &active).await;
    (subscription.unwrap(), deliveries, settlements)
}

async fn next(subscription: &mut StreamSubscription) -> Result<StreamMessage, Error> {
    patient(subscription.next()).await.unwrap()
}

async fn offsets(subscription: &mut StreamSubscription, count: usize) -> Vec<u64> {
    let mut found = Vec::new();
    for _ in 0..count {
        found.push(next(subscription).await.unwrap().offset().0);
    }
    found
}

async fn gives_credit(deliveries: &mut Duplex, messages: u64) -> bool {
    let frame = deliveries.read(FrameType::ConsumerCredit).await;
    let credit = ConsumerCredit::decode(&frame.body).unwrap();
    credit.credit.max_messages >= messages
}

async fn settled(settlements: &mut Duplex, upto: u64, refused: Option<u64>) {
    let refused = refused.map(|ordinal| SettleRefused {
        ordinal,
        code: ErrorCode::NotActive,
        state: MessageState::Gone,
    });
    let refused = refused.into_iter().collect();
    let settled = Settled { upto, refused };
    settlements.write(FrameType::Settled, &settled).await;
}

#[tokio::test]
async fn a_commit_resolves_when_it_is_durable() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (mut subscription, mut deliveries, mut settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..3).await;
    assert_eq!(offsets(&mut subscription, 3).await, [0, 1, 2]);
    assert!(subscription.active());
    let committing = subscription.commit_later(Offset(3));
    let frame = settlements.read(FrameType::Commit).await;
    assert_eq!(decode_commit(&frame.body), Ok(Offset(3)));
    settled(&mut settlements, 1, None).await;
    assert_eq!(patient(committing).await, Ok(()));
}

#[tokio::test]
async fn a_resumed_stream_repeats_nothing_and_leaves_nothing_out() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (mut subscription, mut deliveries, _settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..4).await;
    assert_eq!(offsets(&mut subscription, 2).await, [0, 1]);
    connection.break_off();
    let connection = broker.accept().await;
    let again = ConsumerOpened {
        resumed: true,
        ..opened(1, SubscriptionMode::Stream)
    };
    let (_, mut deliveries, _settlements) = connection.consumer(&again).await;
    let active = ConsumerNotice::Active { from: Offset(0) };
    deliveries.write(FrameType::ConsumerNotice, &active).await;
    deliveries.deliver(0, 0..6).await;
    assert_eq!(offsets(&mut subscription, 4).await, [2, 3, 4, 5]);
}

#[tokio::test]
async fn what_a_resumed_stream_repeats_takes_no_credit() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let subscribe = client.subscribe("orders", "audit").prefetch(4);
    let (mut subscription, mut deliveries, _settlements) = open_with(subscribe, &connection).await;
    for first in [0, 4] {
        deliveries.deliver(0, first..first + 4).await;
        offsets(&mut subscription, 4).await;
    }
    connection.break_off();
    let connection = broker.accept().await;
    let again = ConsumerOpened {
        resumed: true,
        ..opened(1, SubscriptionMode::Stream)
    };
    let (_, mut deliveries, _settlements) = connection.consumer(&again).await;
    let active = ConsumerNotice::Active { from: Offset(0) };
    deliveries.write(FrameType::ConsumerNotice, &active).await;
    for first in [0, 4] {
        while !gives_credit(&mut deliveries, first + 4).await {}
        deliveries.deliver(0, first..first + 4).await;
    }
    while !gives_credit(&mut deliveries, 12).await {}
    deliveries.deliver(0, [8]).await;
    assert_eq!(offsets(&mut subscription, 1).await, [8]);
}

#[tokio::test]
async fn a_commit_that_was_not_confirmed_makes_a_resumed_stream_repeat_nothing() {
    for refused in [false, true] {
        let broker = FakeBroker::start();
        let (client, connection) = broker.connected().await;
        let (mut subscription, mut deliveries, mut settlements) = open(&client, &connection).await;
        deliveries.deliver(0, 0..6).await;
        assert_eq!(offsets(&mut subscription, 5).await, [0, 1, 2, 3, 4]);
        let first = subscription.commit_later(Offset(3));
        settlements.read(FrameType::Commit).await;
        settled(&mut settlements, 1, None).await;
        assert_eq!(patient(first).await, Ok(()));
        let second = subscription.commit_later(Offset(4));
        settlements.read(FrameType::Commit).await;
        if refused {
            settled(&mut settlements, 2, Some(1)).await;
            assert!(patient(second).await.is_err());
        }
        connection.break_off();

        let connection = broker.accept().await;
        let again = ConsumerOpened {
            resumed: true,
            position: Offset(3),
            ..opened(1, SubscriptionMode::Stream)
        };
        let (_, mut deliveries, _settlements) = connection.consumer(&again).await;
        let active = ConsumerNotice::Active { from: Offset(3) };
        deliveries.write(FrameType::ConsumerNotice, &active).await;
        deliveries.deliver(0, 3..7).await;
        assert_eq!(offsets(&mut subscription, 2).await, [5, 6]);
    }
}

#[tokio::test]
async fn a_stream_that_comes_back_before_what_was_committed_is_followed() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (mut subscription, mut deliveries, mut settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..3).await;
    assert_eq!(offsets(&mut subscription, 3).await, [0, 1, 2]);
    let committing = subscription.commit_later(Offset(3));
    settlements.read(FrameType::Commit).await;
    settled(&mut settlements, 1, None).await;
    assert_eq!(patient(committing).await, Ok(()));
    connection.break_off();

    let connection = broker.accept().await;
    let again = ConsumerOpened {
        resumed: true,
        position: Offset(1),
        ..opened(1, SubscriptionMode::Stream)
    };
    let (_, mut deliveries, _settlements) = connection.consumer(&again).await;
    let active = ConsumerNotice::Active { from: Offset(1) };
    deliveries.write(FrameType::ConsumerNotice, &active).await;
    deliveries.deliver(0, 1..3).await;
    assert_eq!(offsets(&mut subscription, 2).await, [1, 2]);
}

#[tokio::test]
async fn a_new_session_reads_from_the_committed_offset_again() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (mut subscription, mut deliveries, _settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..2).await;
    assert_eq!(offsets(&mut subscription, 2).await, [0, 1]);
    connection.break_off();
    let connection = broker.accept().await;
    let other = opened(2, SubscriptionMode::Stream);
    let (_, mut deliveries, _settlements) = connection.consumer(&other).await;
    deliveries.deliver(0, 0..2).await;
    assert_eq!(offsets(&mut subscription, 2).await, [0, 1]);
}

#[tokio::test]
async fn a_standby_hands_out_nothing_that_another_will_read() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (mut subscription, mut deliveries, _settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..2).await;
    assert_eq!(offsets(&mut subscription, 1).await, [0]);
    deliveries
        .write(FrameType::ConsumerNotice, &ConsumerNotice::Standby)
        .await;
    patient(async {
        while subscription.active() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let active = ConsumerNotice::Active { from: Offset(9) };
    deliveries.write(FrameType::ConsumerNotice, &active).await;
    deliveries.deliver(0, [9]).await;
    assert_eq!(offsets(&mut subscription, 1).await, [9]);
}

#[tokio::test]
async fn a_damaged_range_is_told_in_its_place_and_is_not_the_end() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (mut subscription, mut deliveries, _settlements) = open(&client, &connection).await;
    deliveries.deliver(0, [0]).await;
    let damaged = ConsumerNotice::Corrupt {
        first: Offset(1),
        next: Offset(5),
    };
    deliveries.write(FrameType::ConsumerNotice, &damaged).await;
    deliveries.deliver(0, [5]).await;
    assert_eq!(offsets(&mut subscription, 1).await, [0]);
    let expected = Error::Corrupt {
        first: Offset(1),
        next: Offset(5),
    };
    assert_eq!(next(&mut subscription).await.unwrap_err(), expected);
    assert_eq!(offsets(&mut subscription, 1).await, [5]);
}

/// A stream consumer opens its streams again; it is the active one and reads from there.
async fn resumes(connection: &FakeConnection, from: u64) -> (Duplex, Duplex) {
    let position = Offset(from);
    let again = ConsumerOpened {
        resumed: true,
        position,
        ..opened(1, SubscriptionMode::Stream)
    };
    let (open, mut deliveries, settlements) = connection.consumer(&again).await;
    assert_eq!(open.resume.unwrap().session.0, 1);
    let active = ConsumerNotice::Active { from: position };
    deliveries.write(FrameType::ConsumerNotice, &active).await;
    (deliveries, settlements)
}

#[tokio::test]
async fn a_seek_back_is_followed() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let (mut subscription, mut deliveries, _settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..4).await;
    assert_eq!(offsets(&mut subscription, 3).await, [0, 1, 2]);
    let to = StartAt::Offset(Offset(1));
    let seeking = subscription.seek(to);
    let answering = async {
        let (id, request) = connection.request().await;
        let expected = Request::SubscriptionSeek {
            topic: "orders".to_owned(),
            name: "audit".to_owned(),
            to,
        };
        assert_eq!(request, expected);
        connection.respond(id, Ok(Response::Done)).await;
    };
    let (sought, ()) = tokio::join!(seeking, answering);
    assert_eq!(sought, Ok(()));
    let (mut deliveries, _settlements) = resumes(&connection, 1).await;
    deliveries.deliver(0, 1..3).await;
    assert_eq!(offsets(&mut subscription, 2).await, [1, 2]);
    assert!(subscription.active());
}

#[tokio::test]
async fn nothing_from_before_a_seek_is_handed_out_behind_its_answer() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (mut subscription, mut deliveries, _settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..4).await;
    assert_eq!(offsets(&mut subscription, 3).await, [0, 1, 2]);
    connection.break_off();
    patient(async {
        while client.is_connected() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let seeking = subscription.seek(StartAt::Offset(Offset(9)));
    let answering = async {
        // The session is resumed before the broker has heard of the seek.
        let mut connection = broker.accept().await;
        let (mut deliveries, settlements) = resumes(&connection, 0).await;
        deliveries.deliver(0, 0..6).await;
        let (id, _) = connection.request().await;
        connection.respond(id, Ok(Response::Done)).await;
        (connection, deliveries, settlements)
    };
    let (sought, (connection, _before, _settlements)) = tokio::join!(seeking, answering);
    assert_eq!(sought, Ok(()));
    let resuming = async {
        let (mut deliveries, settlements) = resumes(&connection, 9).await;
        deliveries.deliver(0, [9]).await;
        (deliveries, settlements)
    };
    let (found, _streams) = tokio::join!(offsets(&mut subscription, 1), resuming);
    assert_eq!(found, [9]);
}

#[tokio::test]
async fn a_commit_is_answered_before_a_seek_is_asked_for() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let (mut subscription, mut deliveries, mut settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..4).await;
    assert_eq!(offsets(&mut subscription, 3).await, [0, 1, 2]);
    let committing = subscription.commit_later(Offset(3));
    let seeking = subscription.seek(StartAt::Offset(Offset(0)));
    let answering = async {
        settlements.read(FrameType::Commit).await;
        let early = timeout(Duration::from_millis(50), connection.request()).await;
        assert!(early.is_err(), "{early:?}");
        settled(&mut settlements, 1, None).await;
        let (id, _) = connection.request().await;
        connection.respond(id, Ok(Response::Done)).await;
    };
    let (sought, committed, ()) = tokio::join!(seeking, committing, answering);
    assert_eq!((sought, committed), (Ok(()), Ok(())));
    let (mut deliveries, _settlements) = resumes(&connection, 0).await;
    deliveries.deliver(0, 0..2).await;
    assert_eq!(offsets(&mut subscription, 2).await, [0, 1]);
}

#[tokio::test]
async fn a_refused_seek_leaves_what_is_there() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let (mut subscription, mut deliveries, _settlements) = open(&client, &connection).await;
    deliveries.deliver(0, 0..4).await;
    assert_eq!(offsets(&mut subscription, 3).await, [0, 1, 2]);
    let seeking = subscription.seek(StartAt::Offset(Offset(1)));
    let refusing = async {
        let (id, _) = connection.request().await;
        let no = WireError::new(ErrorCode::UnknownSubscription, "it has gone");
        connection.respond(id, Err(no)).await;
    };
    let (sought, ()) = tokio::join!(seeking, refusing);
    assert!(sought.is_err());
    assert_eq!(offsets(&mut subscription, 1).await, [3]);
}
