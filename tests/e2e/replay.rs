//! A backlog that is read from the disk, in order: nothing missing, nothing twice, every byte as sent.

use millpond_client::{Client, Message, Offset, StartAt, SubscriptionConfig, TopicConfig};
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
