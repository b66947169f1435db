//! Consumers of queue subscriptions and workers against a scripted broker.

#![allow(clippy::unwrap_used, reason = "a helper's failure is its test's")]

mod fake;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fake::{Duplex, FakeBroker, FakeConnection, lease, opened, patient};
use futures_util::StreamExt;
use millpond_client::{
    Client, Error, ErrorCode, Job, LostReason, MessageState, Nack, Offset, Outcome, Reject,
    SubscriptionMode, WireError,
};
use millpond_client::{Delivery, Subscription};
use millpond_protocol::control::{
    ConsumerNotice, ConsumerOpened, Outcome as Wire, RejectKind, Settle, SettleRefused, Settled,
};
use millpond_protocol::frame::{FrameType, empty};
use millpond_protocol::hot::{AckRun, ConsumerCredit, decode_acks};

struct Consumer {
    subscription: Subscription,
    deliveries: Duplex,
    settlements: Duplex,
}

async fn open(client: &Client, connection: &FakeConnection, prefetch: u32) -> Consumer {
    let opening = client
        .subscribe("orders", "billing")
        .prefetch(prefetch)
        .open();
    let opened = opened(1, SubscriptionMode::Queue);
    let (subscription, (open, deliveries, settlements)) =
        tokio::join!(opening, connection.consumer(&opened));
    assert_eq!((open.topic.as_str(), open.resume), ("orders", None));
    assert_eq!(open.subscription, "billing");
    Consumer {
        subscription: subscription.unwrap(),
        deliveries,
        settlements,
    }
}

impl Consumer {
    async fn next(&mut self) -> Delivery {
        let next = patient(self.subscription.next()).await;
        next.unwrap().unwrap()
    }
}

/// Reads credit until it says this much.
async fn credit(deliveries: &mut Duplex, messages: u64, begun: u64) {
    loop {
        let frame = deliveries.read(FrameType::ConsumerCredit).await;
        let found = ConsumerCredit::decode(&frame.body).unwrap();
        assert!(found.credit.max_messages <= messages, "{found:?}");
        assert!(found.begun <= begun, "{found:?}");
        if found.credit.max_messages == messages && found.begun == begun {
            return;
        }
    }
}

async fn acks(settlements: &mut Duplex) -> Vec<AckRun> {
    decode_acks(&settlements.read(FrameType::Acks).await.body).unwrap()
}

async fn settle(settlements: &mut Duplex) -> Settle {
    let frame = settlements.read(FrameType::Settle).await;
    frame.decode().unwrap()
}

async fn settled(settlements: &mut Duplex, upto: u64) {
    let settled = Settled {
        upto,
        refused: vec![],
    };
    settlements.write(FrameType::Settled, &settled).await;
}

#[tokio::test]
async fn what_is_taken_is_begun_and_what_is_settled_makes_room() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 3).await;
    credit(&mut consumer.deliveries, 3, 0).await;
    consumer.deliveries.deliver(1, [4, 5, 6]).await;
    let first = consumer.next().await;
    assert_eq!((first.offset(), first.attempt()), (Offset(4), 1));
    assert_eq!(&first.payload()[..], b"4");
    credit(&mut consumer.deliveries, 3, 1).await;
    let second = consumer.next().await;
    credit(&mut consumer.deliveries, 3, 2).await;
    let receipts = [first.ack_later(), second.ack_later()];
    credit(&mut consumer.deliveries, 5, 2).await;
    let mut runs = acks(&mut consumer.settlements).await;
    if runs[0].run == 1 {
        runs.extend(acks(&mut consumer.settlements).await);
    }
    let covered: u32 = runs.iter().map(|run| run.run).sum();
    assert_eq!((runs[0].offset, covered), (Offset(4), 2));
    settled(&mut consumer.settlements, 2).await;
    for receipt in receipts {
        assert_eq!(patient(receipt).await, Ok(()));
    }
}

#[tokio::test]
async fn every_outcome_arrives_as_it_was_meant() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(2, 0..4).await;
    let nacked = consumer.next().await;
    let nack = Nack::new("no stock").code(7).delay(Duration::from_secs(2));
    let nacking = tokio::spawn(nacked.nack(nack));
    let found = settle(&mut consumer.settlements).await;
    assert_eq!(found.items[0].lease, lease(0, 2));
    let expected = Wire::Nack {
        delay_ms: Some(2_000),
        code: 7,
        reason: "no stock".to_owned(),
    };
    assert_eq!(found.items[0].outcome, expected);
    settled(&mut consumer.settlements, 1).await;
    assert_eq!(patient(nacking).await.unwrap(), Ok(()));

    let rejecting = consumer.next().await.reject(Reject::undecodable("no json"));
    let rejecting = tokio::spawn(rejecting);
    let found = settle(&mut consumer.settlements).await;
    let expected = Wire::Reject {
        kind: RejectKind::Undecodable,
        code: 0,
        reason: "no json".to_owned(),
    };
    assert_eq!(found.items[0].outcome, expected);
    settled(&mut consumer.settlements, 2).await;
    assert_eq!(patient(rejecting).await.unwrap(), Ok(()));

    let held = consumer.next().await;
    let extending = held.extend();
    let answering = async {
        let found = settle(&mut consumer.settlements).await;
        assert_eq!(found.items[0].outcome, Wire::Extend);
        settled(&mut consumer.settlements, 3).await;
    };
    let (extended, ()) = tokio::join!(extending, answering);
    assert_eq!(extended, Ok(()));
    let releasing = tokio::spawn(held.release(None));
    let found = settle(&mut consumer.settlements).await;
    assert_eq!(found.items[0].outcome, Wire::Release { delay_ms: None });
    settled(&mut consumer.settlements, 4).await;
    assert_eq!(patient(releasing).await.unwrap(), Ok(()));
}

#[tokio::test]
async fn a_dropped_delivery_is_released_and_counted() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 1).await;
    consumer.deliveries.deliver(1, [8]).await;
    drop(consumer.next().await);
    let found = settle(&mut consumer.settlements).await;
    assert_eq!(found.items[0].lease, lease(8, 1));
    let expected = Wire::Release {
        delay_ms: Some(1_000),
    };
    assert_eq!(found.items[0].outcome, expected);
    assert_eq!(consumer.subscription.dropped_deliveries(), 1);
}

#[tokio::test]
async fn a_refused_settlement_tells_the_state() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 1).await;
    consumer.deliveries.deliver(1, [8]).await;
    let acking = tokio::spawn(consumer.next().await.ack());
    acks(&mut consumer.settlements).await;
    let refused = Settled {
        upto: 1,
        refused: vec![SettleRefused {
            ordinal: 0,
            code: ErrorCode::LeaseLost,
            state: MessageState::Leased,
        }],
    };
    consumer
        .settlements
        .write(FrameType::Settled, &refused)
        .await;
    let expected = Error::LeaseLost {
        state: Some(MessageState::Leased),
    };
    assert_eq!(patient(acking).await.unwrap(), Err(expected));
}

#[tokio::test]
async fn no_more_is_asked_for_than_will_be_taken_in_all() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let opening = client.subscribe("orders", "billing").at_most(3).open();
    let first = opened(1, SubscriptionMode::Queue);
    let (subscription, (_, mut deliveries, mut settlements)) =
        tokio::join!(opening, connection.consumer(&first));
    let mut subscription = subscription.unwrap();
    credit(&mut deliveries, 3, 0).await;
    deliveries.deliver(1, [1, 2]).await;
    let taken = patient(subscription.next()).await.unwrap().unwrap();
    credit(&mut deliveries, 3, 1).await;
    let acking = tokio::spawn(taken.ack());
    acks(&mut settlements).await;
    settled(&mut settlements, 1).await;
    assert_eq!(patient(acking).await.unwrap(), Ok(()));
    connection.break_off();

    // Offset 2 was buffered and is lost with the session: two are still to be taken.
    let connection = broker.accept().await;
    let other = opened(2, SubscriptionMode::Queue);
    let (_, mut deliveries, mut settlements) = connection.consumer(&other).await;
    credit(&mut deliveries, 2, 0).await;
    deliveries.deliver(1, [2, 3]).await;
    for offset in [2, 3] {
        let taken = patient(subscription.next()).await.unwrap().unwrap();
        assert_eq!(taken.offset(), Offset(offset));
        let acking = tokio::spawn(taken.ack());
        acks(&mut settlements).await;
        settled(&mut settlements, offset - 1).await;
        assert_eq!(patient(acking).await.unwrap(), Ok(()));
    }
    let closing = tokio::spawn(subscription.close());
    settlements.read(FrameType::CloseSession).await;
    settlements
        .write_bytes(empty(FrameType::SessionClosed))
        .await;
    patient(closing).await.unwrap();
    // Whatever was granted until the end, it was not more.
    while let Some(frame) = deliveries.next().await {
        let found = ConsumerCredit::decode(&frame.body).unwrap();
        assert_eq!(found.credit.max_messages, 2, "{found:?}");
    }
}

#[tokio::test]
async fn a_consumer_may_ask_for_any_number_of_bytes() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let subscribe = client.subscribe("orders", "billing");
    let opening = subscribe.prefetch(1).prefetch_bytes(u64::MAX).open();
    let first = opened(1, SubscriptionMode::Queue);
    let (subscription, (_, mut deliveries, _settlements)) =
        tokio::join!(opening, connection.consumer(&first));
    let mut subscription = subscription.unwrap();
    deliveries.deliver(1, [1]).await;
    let taken = patient(subscription.next()).await.unwrap().unwrap();
    let _receipt = taken.ack_later();
    credit(&mut deliveries, 2, 1).await;
}

#[tokio::test]
async fn what_was_lost_before_it_was_taken_is_not_handed_out() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2, 3]).await;
    let taken = consumer.next().await;
    assert_eq!((taken.offset(), taken.lost()), (Offset(1), None));
    let notice = ConsumerNotice::LeasesLost {
        leases: vec![lease(1, 1), lease(2, 1)],
        reason: LostReason::Seek,
    };
    consumer
        .deliveries
        .write(FrameType::ConsumerNotice, &notice)
        .await;
    patient(async {
        while taken.lost().is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(taken.lost(), Some(LostReason::Seek));
    let next = consumer.next().await;
    assert_eq!((next.offset(), next.lost()), (Offset(3), None));
}

#[tokio::test]
async fn what_was_lost_before_it_came_is_not_handed_out() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    let mut taken = Vec::new();
    // The first notice finds nothing here, the second finds what the user has.
    for (offsets, messages, begun) in [([1, 2, 3], 12, 3), ([4, 5, 6], 14, 6)] {
        let notice = ConsumerNotice::LeasesLost {
            leases: vec![lease(offsets[0], 1), lease(offsets[2], 1)],
            reason: LostReason::HoldMax,
        };
        let deliveries = &mut consumer.deliveries;
        deliveries.write(FrameType::ConsumerNotice, &notice).await;
        deliveries.deliver(1, offsets).await;
        let next = consumer.next().await;
        assert_eq!((next.offset(), next.lost()), (Offset(offsets[1]), None));
        credit(&mut consumer.deliveries, messages, begun).await;
        taken.push(next);
    }
}

#[tokio::test]
async fn a_lost_lease_that_never_came_may_be_given_again_after_a_crash() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    let notice = ConsumerNotice::LeasesLost {
        leases: vec![lease(1, 1)],
        reason: LostReason::HoldMax,
    };
    consumer
        .deliveries
        .write(FrameType::ConsumerNotice, &notice)
        .await;
    consumer.deliveries.deliver(1, [2]).await;
    let taken = consumer.next().await;
    connection.break_off();

    let connection = broker.accept().await;
    let again = ConsumerOpened {
        leases: vec![lease(2, 1)],
        resumed: true,
        ..opened(1, SubscriptionMode::Queue)
    };
    let (_, mut deliveries, _settlements) = connection.consumer(&again).await;
    deliveries.deliver(1, [1]).await;
    let next = consumer.next().await;
    assert_eq!((next.offset(), taken.lost()), (Offset(1), None));
}

#[tokio::test]
async fn a_resumed_session_settles_again_what_was_not_answered() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2, 3, 4]).await;
    let acked = consumer.next().await.ack_later();
    acks(&mut consumer.settlements).await;
    let held = consumer.next().await;
    connection.break_off();

    let connection = broker.accept().await;
    let again = ConsumerOpened {
        leases: vec![lease(1, 1), lease(2, 1), lease(4, 1), lease(5, 1)],
        resumed: true,
        ..opened(1, SubscriptionMode::Queue)
    };
    let (open, mut deliveries, mut settlements) = connection.consumer(&again).await;
    let resume = open.resume.unwrap();
    assert_eq!((resume.session.0, resume.token), (1, 99));
    assert_eq!(acks(&mut settlements).await[0].offset, Offset(1));
    // Offset 5 was on its way when the connection broke: nobody has seen it.
    let unseen = settle(&mut settlements).await;
    assert_eq!(unseen.items.len(), 1);
    assert_eq!(unseen.items[0].lease, lease(5, 1));
    assert_eq!(unseen.items[0].outcome, Wire::Release { delay_ms: None });
    settled(&mut settlements, 2).await;
    assert_eq!(patient(acked).await, Ok(()));
    // Offset 3 no longer stands; 4 was buffered and still does. 2 and 4 are outstanding.
    credit(&mut deliveries, 8, 0).await;
    let buffered = consumer.next().await;
    assert_eq!(buffered.offset(), Offset(4));
    let acking = tokio::spawn(held.ack());
    while acks(&mut settlements).await[0].offset != Offset(2) {}
    settled(&mut settlements, 3).await;
    assert_eq!(patient(acking).await.unwrap(), Ok(()));
}

#[tokio::test]
async fn a_broker_without_memory_is_asked_ever_more_slowly() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    connection.break_off();
    let connection = broker.accept().await;
    let began = Instant::now();
    for _ in 0..6 {
        let (open, mut refused) = connection.stream().await;
        open.expect(FrameType::OpenConsumer).unwrap();
        refused.reset(ErrorCode::Memory);
    }
    // The least waits between six attempts, in milliseconds.
    let least = Duration::from_millis(5 + 10 + 20 + 40 + 80);
    assert!(began.elapsed() >= least, "{:?}", began.elapsed());
    let again = ConsumerOpened {
        resumed: true,
        ..opened(1, SubscriptionMode::Queue)
    };
    let (_, mut deliveries, _settlements) = connection.consumer(&again).await;
    deliveries.deliver(1, [1]).await;
    assert_eq!(consumer.next().await.offset(), Offset(1));
}

/// A consumer of offsets 1 to 3 whose broker has lost the leases of 1 and 2 in a crash, and gives them again.
async fn after_a_crash(broker: &FakeBroker) -> (Consumer, Client, [Delivery; 3], FakeConnection) {
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2, 3]).await;
    let taken = [
        consumer.next().await,
        consumer.next().await,
        consumer.next().await,
    ];
    connection.break_off();
    let connection = broker.accept().await;
    let again = ConsumerOpened {
        leases: vec![lease(3, 1)],
        resumed: true,
        ..opened(1, SubscriptionMode::Queue)
    };
    let (_, deliveries, settlements) = connection.consumer(&again).await;
    (consumer.deliveries, consumer.settlements) = (deliveries, settlements);
    credit(&mut consumer.deliveries, 7, 0).await;
    (consumer, client, taken, connection)
}

#[tokio::test]
async fn what_the_user_has_is_not_handed_out_again_when_a_crash_lost_its_lease() {
    let broker = FakeBroker::start();
    let (mut consumer, _client, [first, second, third], _connection) = after_a_crash(&broker).await;
    assert_eq!(first.lost(), Some(LostReason::LeaseExpired));
    // Other messages stand before, between and behind what comes again.
    consumer.deliveries.deliver(1, [7, 1, 8, 2, 9]).await;
    let mut others = Vec::new();
    for (offset, begun) in [(7, 2), (8, 4), (9, 5)] {
        let next = consumer.next().await;
        assert_eq!(next.offset(), Offset(offset));
        credit(&mut consumer.deliveries, 9, begun).await;
        others.push(next);
    }
    assert_eq!([&first, &second, &third].map(Delivery::lost), [None; 3]);
    let acking = tokio::spawn(first.ack());
    let run = acks(&mut consumer.settlements).await;
    assert_eq!((run[0].offset, run[0].delivery.0), (Offset(1), 1));
    settled(&mut consumer.settlements, 1).await;
    assert_eq!(patient(acking).await.unwrap(), Ok(()));
}

#[tokio::test]
async fn what_comes_again_alone_is_begun_at_once() {
    let broker = FakeBroker::start();
    let (mut consumer, _client, _taken, _connection) = after_a_crash(&broker).await;
    consumer.deliveries.deliver(1, [1]).await;
    credit(&mut consumer.deliveries, 8, 1).await;
    // Behind what is lost before it is taken, too.
    consumer.deliveries.deliver(1, [7, 2]).await;
    let notice = ConsumerNotice::LeasesLost {
        leases: vec![lease(7, 1)],
        reason: LostReason::Seek,
    };
    consumer
        .deliveries
        .write(FrameType::ConsumerNotice, &notice)
        .await;
    credit(&mut consumer.deliveries, 10, 3).await;
}

#[tokio::test]
async fn what_was_settled_is_not_handed_out_again_under_its_old_name() {
    let broker = FakeBroker::start();
    let (mut consumer, _client, [first, _second, _third], _connection) =
        after_a_crash(&broker).await;
    let nacking = tokio::spawn(first.nack(Nack::new("no")));
    let found = settle(&mut consumer.settlements).await;
    assert_eq!(found.items[0].lease, lease(1, 1));
    // It was given again before the broker heard of that, which then counted against it.
    settled(&mut consumer.settlements, 1).await;
    assert_eq!(patient(nacking).await.unwrap(), Ok(()));
    consumer.deliveries.deliver(1, [1, 9]).await;
    assert_eq!(consumer.next().await.offset(), Offset(9));
    // If it did not count, nobody has it.
    let found = settle(&mut consumer.settlements).await;
    assert_eq!(found.items[0].lease, lease(1, 1));
    assert_eq!(found.items[0].outcome, Wire::Release { delay_ms: None });
}

#[tokio::test]
async fn when_the_broker_goes_away_what_is_held_is_settled_before_leaving() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2]).await;
    let held = consumer.next().await;
    connection.go_away().await;
    patient(async {
        while client.is_connected() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let acking = tokio::spawn(held.ack());
    assert_eq!(acks(&mut consumer.settlements).await[0].offset, Offset(1));
    settled(&mut consumer.settlements, 1).await;
    assert_eq!(patient(acking).await.unwrap(), Ok(()));
    patient(connection.connection.closed()).await;

    let connection = broker.accept().await;
    let again = ConsumerOpened {
        leases: vec![lease(2, 1)],
        resumed: true,
        ..opened(1, SubscriptionMode::Queue)
    };
    let (_, _deliveries, _settlements) = connection.consumer(&again).await;
    assert_eq!(consumer.next().await.offset(), Offset(2));
}

#[tokio::test]
async fn a_new_session_ends_the_rights_of_the_old_one() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2, 3]).await;
    let acked = consumer.next().await.ack_later();
    let held = consumer.next().await;
    acks(&mut consumer.settlements).await;
    connection.break_off();
    let connection = broker.accept().await;
    let other = opened(2, SubscriptionMode::Queue);
    let (_, mut deliveries, _settlements) = connection.consumer(&other).await;
    let lost = Err(Error::LeaseLost { state: None });
    assert_eq!(patient(acked).await, lost, "sent and not answered");
    assert_eq!(held.lost(), Some(LostReason::LeaseExpired));
    assert_eq!(patient(held.ack()).await, lost, "not sent");
    deliveries.deliver(2, [1]).await;
    let next = consumer.next().await;
    assert_eq!((next.offset(), next.delivery()), (Offset(1), 2));
}

#[tokio::test]
async fn sessions_that_end_while_they_are_opened_are_followed_by_another() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    connection.break_off();
    let connection = broker.accept().await;
    let ended = WireError::new(ErrorCode::SessionEnded, "too slow");
    for session in 2..4 {
        let (_, mut deliveries) = connection.stream().await;
        let opened = opened(session, SubscriptionMode::Queue);
        deliveries.write(FrameType::ConsumerOpened, &opened).await;
        let (_, mut settlements) = connection.stream().await;
        settlements.write(FrameType::Error, &ended).await;
    }
    let last = opened(4, SubscriptionMode::Queue);
    let (_, mut deliveries, _settlements) = connection.consumer(&last).await;
    deliveries.deliver(1, [7]).await;
    assert_eq!(consumer.next().await.offset(), Offset(7));
}

#[tokio::test]
async fn a_consumer_comes_back_at_once_however_often_its_connection_broke() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    connection.break_off();
    let again = ConsumerOpened {
        resumed: true,
        ..opened(1, SubscriptionMode::Queue)
    };
    // Waits that doubled each time would add up to more than the test's patience.
    let last = patient(async {
        for _ in 0..BREAKS {
            let connection = broker.accept().await;
            let _streams = connection.consumer(&again).await;
            connection.break_off();
        }
        broker.accept().await
    })
    .await;
    let (_, mut deliveries, _settlements) = last.consumer(&again).await;
    deliveries.deliver(1, [7]).await;
    assert_eq!(consumer.next().await.offset(), Offset(7));
}

#[tokio::test]
async fn leases_are_renewed_while_something_is_held() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let opening = client.subscribe("orders", "billing").open();
    let short = ConsumerOpened {
        lease_ms: 30,
        ..opened(1, SubscriptionMode::Queue)
    };
    let (subscription, (_, mut deliveries, mut settlements)) =
        tokio::join!(opening, connection.consumer(&short));
    let mut subscription = subscription.unwrap();
    deliveries.deliver(1, [0]).await;
    let held = subscription.next().await.unwrap().unwrap();
    settlements.read(FrameType::Renew).await;
    settlements.read(FrameType::Renew).await;
    let _receipt = held.ack_later();
    while settlements.next().await.unwrap().kind != FrameType::Acks {}
}

#[tokio::test]
async fn closing_settles_what_is_pending_and_waits_for_the_broker() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2]).await;
    let acked = consumer.next().await.ack_later();
    let Consumer {
        subscription,
        mut settlements,
        ..
    } = consumer;
    let closing = tokio::spawn(subscription.close());
    acks(&mut settlements).await;
    settlements.read(FrameType::CloseSession).await;
    assert!(!closing.is_finished());
    settled(&mut settlements, 1).await;
    settlements
        .write_bytes(empty(FrameType::SessionClosed))
        .await;
    patient(closing).await.unwrap();
    assert_eq!(patient(acked).await, Ok(()));
}

#[tokio::test]
async fn a_dropped_subscription_waits_for_the_deliveries_that_are_out() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2]).await;
    let held = consumer.next().await;
    let Consumer {
        subscription,
        mut settlements,
        ..
    } = consumer;
    drop(subscription);
    let acking = tokio::spawn(held.ack());
    assert_eq!(acks(&mut settlements).await[0].offset, Offset(1));
    settled(&mut settlements, 1).await;
    assert_eq!(patient(acking).await.unwrap(), Ok(()));
    settlements.read(FrameType::CloseSession).await;
}

#[tokio::test]
async fn a_deleted_subscription_ends_the_stream_with_its_reason() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    let deleted = WireError::new(ErrorCode::Deleted, "the subscription was deleted");
    consumer.deliveries.write(FrameType::Error, &deleted).await;
    let (_, mut again) = connection.stream().await;
    let unknown = WireError::new(ErrorCode::UnknownSubscription, "there is none");
    again.write(FrameType::Error, &unknown).await;
    let end = patient(consumer.subscription.next()).await.unwrap();
    assert_eq!(
        end.unwrap_err().code(),
        Some(ErrorCode::UnknownSubscription)
    );
    assert!(
        patient(StreamExt::next(&mut consumer.subscription))
            .await
            .is_none()
    );
}

#[tokio::test]
async fn a_stream_subscription_cannot_be_opened_as_a_queue() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let opening = client.subscribe("orders", "audit").open();
    let stream = opened(1, SubscriptionMode::Stream);
    let serving = async {
        let (_, _deliveries, mut settlements) = connection.consumer(&stream).await;
        settlements.read(FrameType::CloseSession).await;
        settlements
            .write_bytes(empty(FrameType::SessionClosed))
            .await;
    };
    let (result, ()) = tokio::join!(opening, serving);
    assert_eq!(result.err().unwrap().code(), Some(ErrorCode::WrongMode));
}

#[tokio::test]
async fn a_worker_settles_by_what_its_handler_returns_even_a_panic() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let handler = async |job: Job| match &job.payload()[..] {
        b"0" => Outcome::Ack,
        b"1" => Outcome::Nack(Nack::new("later")),
        b"2" => Outcome::Reject(Reject::new("never")),
        b"3" => Outcome::Release { delay: None },
        _ => panic!("unheard of"),
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let worker = client
        .subscribe("orders", "billing")
        .worker()
        .concurrency(1);
    let handler = move |job| Box::pin(handler(job)) as futures_util::future::BoxFuture<'static, _>;
    let running = tokio::spawn(worker.run(handler, async {
        let _ = stopped.await;
    }));
    let (_, mut deliveries, mut settlements) = connection
        .consumer(&opened(1, SubscriptionMode::Queue))
        .await;
    for offset in 0..5 {
        deliveries.deliver(1, [offset]).await;
        let frame = settlements.next().await.unwrap();
        let outcome = match frame.kind {
            FrameType::Acks => None,
            _ => Some(frame.decode::<Settle>().unwrap().items.remove(0).outcome),
        };
        match (offset, outcome) {
            (0, None) => {}
            (1, Some(Wire::Nack { reason, .. })) => assert_eq!(reason, "later"),
            (2, Some(Wire::Reject { reason, .. })) => assert_eq!(reason, "never"),
            (3, Some(Wire::Release { .. })) => {}
            (4, Some(Wire::Nack { reason, .. })) => assert_eq!(reason, "panic: unheard of"),
            other => panic!("{other:?}"),
        }
        settled(&mut settlements, offset + 1).await;
    }
    stop.send(()).unwrap();
    settlements.read(FrameType::CloseSession).await;
    settlements
        .write_bytes(empty(FrameType::SessionClosed))
        .await;
    let stats = patient(running).await.unwrap().unwrap();
    assert_eq!((stats.acked, stats.nacked, stats.panicked), (1, 2, 1));
    assert_eq!((stats.rejected, stats.released, stats.refused), (1, 1, 0));
}

#[tokio::test]
async fn a_worker_never_runs_more_handlers_than_it_may() {
    const MOST: usize = 2;
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let handler = {
        let (now, most) = (Arc::clone(&now), Arc::clone(&most));
        move |_job: Job| {
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                for _ in 0..20 {
                    tokio::task::yield_now().await;
                }
                now.fetch_sub(1, Ordering::SeqCst);
            }
        }
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let worker = client
        .subscribe("orders", "billing")
        .worker()
        .concurrency(MOST);
    let running = tokio::spawn(worker.run(handler, async {
        let _ = stopped.await;
    }));
    let (_, mut deliveries, mut settlements) = connection
        .consumer(&opened(1, SubscriptionMode::Queue))
        .await;
    credit(&mut deliveries, MOST as u64, 0).await;
    // More than was asked for: the worker still keeps its bound.
    deliveries.deliver(1, 0..20).await;
    let mut covered = 0;
    while covered < 20 {
        let runs = acks(&mut settlements).await;
        covered += runs.iter().map(|run| u64::from(run.run)).sum::<u64>();
        settled(&mut settlements, covered).await;
    }
    stop.send(()).unwrap();
    settlements.read(FrameType::CloseSession).await;
    settlements
        .write_bytes(empty(FrameType::SessionClosed))
        .await;
    assert_eq!(patient(running).await.unwrap().unwrap().acked, 20);
    assert_eq!(most.load(Ordering::SeqCst), MOST);
}

#[tokio::test]
async fn a_handler_that_outlives_the_drain_time_hands_its_message_back() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let worker = client
        .subscribe("orders", "billing")
        .worker()
        .concurrency(1)
        .drain_timeout(Duration::from_millis(10));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let begun = Arc::new(tokio::sync::Notify::new());
    let handler = {
        let begun = Arc::clone(&begun);
        move |_job: Job| {
            begun.notify_one();
            std::future::pending::<()>()
        }
    };
    let running = tokio::spawn(worker.run(handler, async {
        let _ = stopped.await;
    }));
    let (_, mut deliveries, mut settlements) = connection
        .consumer(&opened(1, SubscriptionMode::Queue))
        .await;
    deliveries.deliver(1, [0]).await;
    patient(begun.notified()).await;
    stop.send(()).unwrap();
    let found = settle(&mut settlements).await;
    assert!(matches!(found.items[0].outcome, Wire::Release { .. }));
    settled(&mut settlements, 1).await;
    settlements.read(FrameType::CloseSession).await;
    settlements
        .write_bytes(empty(FrameType::SessionClosed))
        .await;
    assert_eq!(patient(running).await.unwrap().unwrap().released, 1);
}

/// A broker that lost its last leases in a crash gives their names to the next ones.
#[tokio::test]
async fn a_resumed_session_asks_for_nothing_before_its_settlements_are_answered() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let mut consumer = open(&client, &connection, 10).await;
    consumer.deliveries.deliver(1, [1, 2]).await;
    let acked = consumer.next().await.ack_later();
    acks(&mut consumer.settlements).await;
    connection.break_off();

    let connection = broker.accept().await;
    let again = ConsumerOpened {
        resumed: true,
        ..opened(1, SubscriptionMode::Queue)
    };
    let (_, mut deliveries, mut settlements) = connection.consumer(&again).await;
    assert_eq!(acks(&mut settlements).await[0].offset, Offset(1));
    let early = tokio::time::timeout(Duration::from_millis(100), deliveries.next()).await;
    assert!(early.is_err(), "credit before the answer");
    settled(&mut settlements, 1).await;
    assert_eq!(patient(acked).await, Ok(()));
    credit(&mut deliveries, 10, 0).await;
}

/// Breaks of one connection, each sooner than `RECONNECT_MAX` after the one before.
const BREAKS: usize = 24;
