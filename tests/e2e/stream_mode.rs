//! Stream mode: one active consumer, strict order, a committed offset.

use std::time::Duration;

use millpond_client::{
    Client, Error, ErrorCode, Message, Offset, StartAt, StreamMessage, StreamSubscription,
    SubscriptionConfig,
};
use tokio::time::timeout;

use crate::common::{PATIENCE, broker, connect, producer, publish, quick_retries, subscribe};

#[tokio::test]
async fn messages_come_in_offset_order_and_a_commit_is_where_the_next_consumer_begins() {
    let (broker, client) = broker().await;
    let mut ledger = open(&client).await;
    publish_numbers(&client, 0..200).await;
    for want in 0..200 {
        assert_eq!(message(&mut ledger).await.offset(), Offset(want));
    }
    assert!(ledger.active());
    ledger.commit(Offset(150)).await.unwrap();
    ledger.close().await;
    let view = client.subscription("orders", "ledger").await.unwrap();
    assert_eq!((view.floor, view.backlog), (Offset(150), 50));

    let mut ledger = open(&client).await;
    let first = message(&mut ledger).await;
    assert_eq!(first.offset(), Offset(150));
    assert_eq!(&first.payload()[..], b"150");
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_delay_does_not_reorder_a_stream() {
    let (broker, client) = broker().await;
    let mut ledger = open(&client).await;
    let producer = producer(&client).await;
    let later = Message {
        delay_ms: 3_600_000,
        ..Message::new("later")
    };
    producer.send(later).await.unwrap();
    producer.send(Message::new("now")).await.unwrap();
    for want in ["later", "now"] {
        assert_eq!(&message(&mut ledger).await.payload()[..], want.as_bytes());
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_stream_goes_on_behind_a_restart_and_repeats_nothing() {
    let (broker, client) = broker().await;
    let mut ledger = open(&client).await;
    publish_numbers(&client, 0..100).await;
    for want in 0..60 {
        assert_eq!(message(&mut ledger).await.offset(), Offset(want));
    }
    ledger.commit(Offset(40)).await.unwrap();
    let broker = broker.restart().await.unwrap();
    publish_numbers(&client, 100..120).await;
    for want in 60..120 {
        assert_eq!(message(&mut ledger).await.offset(), Offset(want));
    }
    ledger.commit(Offset(110)).await.unwrap();
    ledger.close().await;

    let broker = broker.restart().await.unwrap();
    let other = connect(&broker).await;
    let mut ledger = open(&other).await;
    assert_eq!(message(&mut ledger).await.offset(), Offset(110));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_consumer_that_stands_by_takes_over_from_the_committed_offset() {
    let (broker, client) = broker().await;
    let other = connect(&broker).await;
    let mut active = open(&client).await;
    publish_numbers(&client, 0..10).await;
    for want in 0..6 {
        assert_eq!(message(&mut active).await.offset(), Offset(want));
    }
    let mut standby = open(&other).await;
    let idle = timeout(Duration::from_millis(200), standby.next()).await;
    assert!(idle.is_err(), "two consumers were active: {idle:?}");
    assert!(active.active() && !standby.active());
    active.commit(Offset(4)).await.unwrap();
    active.close().await;
    for want in 4..10 {
        assert_eq!(message(&mut standby).await.offset(), Offset(want));
    }
    assert!(standby.active());
    standby.commit(Offset(10)).await.unwrap();
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_seek_moves_the_active_consumer_both_ways() {
    let (broker, client) = broker().await;
    // Another subscription keeps every message.
    let _keeper = subscribe(&client, "keeper", quick_retries(10, 3)).await;
    let mut ledger = open(&client).await;
    publish_numbers(&client, 0..20).await;
    for want in 0..20 {
        assert_eq!(message(&mut ledger).await.offset(), Offset(want));
    }
    ledger.commit(Offset(20)).await.unwrap();
    for from in [5, 15, 0] {
        ledger.seek(StartAt::Offset(Offset(from))).await.unwrap();
        for want in from..20 {
            assert_eq!(message(&mut ledger).await.offset(), Offset(want));
        }
    }
    ledger.seek(StartAt::Latest).await.unwrap();
    publish_numbers(&client, 20..21).await;
    assert_eq!(message(&mut ledger).await.offset(), Offset(20));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_seek_takes_no_credit_with_it() {
    let (broker, client) = broker().await;
    let _keeper = subscribe(&client, "keeper", quick_retries(10, 3)).await;
    publish_numbers(&client, 0..40).await;
    let few = client.subscribe("orders", "ledger").prefetch(4);
    let few = few.create(SubscriptionConfig::default(), StartAt::Earliest);
    let mut ledger = few.open_stream().await.unwrap();
    for _ in 0..10 {
        assert_eq!(message(&mut ledger).await.offset(), Offset(0));
        assert_eq!(message(&mut ledger).await.offset(), Offset(1));
        ledger.seek(StartAt::Earliest).await.unwrap();
    }
    for want in 0..40 {
        assert_eq!(message(&mut ledger).await.offset(), Offset(want));
    }
    broker.shutdown().await.unwrap();
}

/// Messages that were handed out and wait for room when the seek comes are never sent.
#[tokio::test]
async fn a_seek_takes_no_credit_with_what_had_not_been_sent() {
    let (broker, client) = broker().await;
    let few = client.subscribe("orders", "ledger").prefetch(8);
    let few = few.prefetch_bytes(100_000);
    let few = few.create(SubscriptionConfig::default(), StartAt::Earliest);
    let mut ledger = few.open_stream().await.unwrap();
    publish_numbers(&client, 0..100).await;
    let large = vec![b'l'; 60_000];
    let large = std::str::from_utf8(&large).unwrap();
    publish(&client, &[large; 8]).await;
    for _ in 0..4 {
        for want in 0..100 {
            assert_eq!(message(&mut ledger).await.offset(), Offset(want));
        }
        // Until the broker has handed out as many large ones as there is credit for.
        tokio::time::sleep(Duration::from_millis(100)).await;
        ledger.seek(StartAt::Earliest).await.unwrap();
    }
    for want in 0..108 {
        assert_eq!(message(&mut ledger).await.offset(), Offset(want));
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_subscription_is_opened_in_the_mode_that_it_has() {
    let (broker, client) = broker().await;
    let _stream = open(&client).await;
    let _queue = subscribe(&client, "billing", quick_retries(10, 3)).await;
    let as_queue = client.subscribe("orders", "ledger").open().await;
    let as_stream = client.subscribe("orders", "billing").open_stream().await;
    for error in [as_queue.err(), as_stream.err()] {
        let code = error.as_ref().and_then(Error::code);
        assert_eq!(code, Some(ErrorCode::WrongMode), "{error:?}");
    }
    broker.shutdown().await.unwrap();
}

async fn open(client: &Client) -> StreamSubscription {
    client
        .subscribe("orders", "ledger")
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .open_stream()
        .await
        .unwrap()
}

async fn publish_numbers(client: &Client, numbers: std::ops::Range<u64>) {
    let numbers: Vec<String> = numbers.map(|n| n.to_string()).collect();
    publish(
        client,
        &numbers.iter().map(String::as_str).collect::<Vec<_>>(),
    )
    .await;
}

async fn message(subscription: &mut StreamSubscription) -> StreamMessage {
    let message = timeout(PATIENCE, subscription.next()).await;
    message
        .expect("a message comes in time")
        .expect("the subscription goes on")
        .unwrap()
}
