//! A backlog that is read from the disk, in order: nothing missing, nothing twice, every byte as sent.

use std::time::Duration;

use millpond_client::{
    Client, Message, Offset, Producer, StartAt, StreamSubscription, SubscriptionConfig, TopicConfig,
};
use tokio::time::timeout;

use crate::common::{PATIENCE, broker_with, connect};

/// Messages that fill the log by themselves.
const DENSE: u64 = 6_000;
/// Messages that stand between ten times as many bytes of another topic.
const SPARSE: u64 = 200;
const BYTES: usize = 1_000;

fn payload(n: u64) -> Vec<u8> {
    let mut payload = n.to_le_bytes().repeat(BYTES / 8);
    payload.extend_from_slice(n.to_string().as_bytes());
    payload
}

/// Publishes, and has a restart empty the cache of recent bodies and seal every segment.
async fn backlog() -> (millpond_broker::EmbeddedBroker, Client) {
    let (broker, client) = broker_with(|config| config.log.segment_bytes = 4 << 20).await;
    client
        .create_topic("others", TopicConfig::default())
        .await
        .unwrap();
    let orders = client.producer("orders").open().await.unwrap();
    let others = client.producer("others").open().await.unwrap();
    for n in 0..DENSE {
        drop(orders.enqueue(Message::new(payload(n))).await.unwrap());
    }
    orders.flush().await.unwrap();
    for n in DENSE..DENSE + SPARSE {
        others
            .send(Message::new(vec![7; 10 * BYTES]))
            .await
            .unwrap();
        orders.send(Message::new(payload(n))).await.unwrap();
    }
    orders.close().await;
    others.close().await;
    let broker = broker.restart().await.unwrap();
    let client = connect(&broker).await;
    (broker, client)
}

#[tokio::test]
async fn a_stream_replays_what_fills_the_log_and_what_is_strewn_over_it() {
    let (broker, client) = backlog().await;
    let mut ledger = client
        .subscribe("orders", "ledger")
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .open_stream()
        .await
        .unwrap();
    let mut expect = async |n: u64| {
        let message = timeout(PATIENCE, ledger.next()).await.unwrap();
        let message = message.unwrap().unwrap();
        assert_eq!(message.offset(), Offset(n));
        assert!(message.payload()[..] == payload(n)[..], "message {n}");
    };
    for n in 0..DENSE + SPARSE {
        expect(n).await;
    }
    ledger.close().await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_queue_hands_a_backlog_out_once_although_some_of_it_comes_back_between() {
    let (broker, client) = backlog().await;
    let mut billing = client
        .subscribe("orders", "billing")
        .create(crate::common::quick_retries(1, 5), StartAt::Earliest)
        .open()
        .await
        .unwrap();
    let mut left: std::collections::BTreeSet<u64> = (0..DENSE + SPARSE).collect();
    while !left.is_empty() {
        let delivery = timeout(PATIENCE, billing.next()).await.unwrap();
        let delivery = delivery.unwrap().unwrap();
        let n = delivery.offset().0;
        assert!(delivery.payload()[..] == payload(n)[..], "message {n}");
        if n.is_multiple_of(500) && delivery.attempt() == 1 {
            delivery
                .nack(millpond_client::Nack::default())
                .await
                .unwrap();
        } else {
            assert!(left.remove(&n), "message {n} came once");
            drop(delivery.ack_later());
        }
    }
    billing.close().await;
    broker.shutdown().await.unwrap();
}

/// More than one piece of what is read ahead, and than the cache of recent bodies has room for.
const MANY: u64 = 30_000;

/// At the smallest budget, in which an answer of the largest size needs all that a connection has for large
/// ones: a stream that begins with a backlog, and who publishes by another connection.
async fn narrow() -> (
    millpond_broker::EmbeddedBroker,
    Client,
    StreamSubscription,
    Producer,
) {
    let (broker, client) = broker_with(|config| config.memory.budget_bytes = 192 << 20).await;
    let other = connect(&broker).await;
    let orders = other.producer("orders").open().await.unwrap();
    for n in 0..MANY {
        drop(orders.enqueue(Message::new(payload(n))).await.unwrap());
    }
    orders.flush().await.unwrap();
    let ledger = client
        .subscribe("orders", "ledger")
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .open_stream()
        .await
        .unwrap();
    (broker, client, ledger, orders)
}

async fn peeks_in_time(client: &Client) {
    let page = timeout(PATIENCE / 4, client.peek("orders", Offset(0), 10)).await;
    assert_eq!(page.expect("in time").unwrap().messages.len(), 10);
}

#[tokio::test]
async fn a_stream_that_has_caught_up_holds_no_memory_that_others_want() {
    let (broker, client, mut ledger, orders) = narrow().await;
    for n in 0..MANY {
        let message = timeout(PATIENCE, ledger.next()).await.unwrap();
        assert_eq!(message.unwrap().unwrap().offset(), Offset(n));
    }
    let listening = tokio::spawn(async move { while let Some(Ok(_)) = ledger.next().await {} });
    // It is never idle for long.
    let publishing = tokio::spawn(async move {
        for n in MANY.. {
            orders.send(Message::new(payload(n))).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    peeks_in_time(&client).await;
    publishing.abort();
    listening.abort();
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_stream_that_is_read_slowly_gives_up_memory_that_others_want() {
    let (broker, client, mut ledger, _orders) = narrow().await;
    let listening = tokio::spawn(async move {
        let mut taken = 0;
        while let Some(Ok(_)) = ledger.next().await {
            taken += 1;
            if taken > MANY / 10 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    peeks_in_time(&client).await;
    listening.abort();
    broker.shutdown().await.unwrap();
}
