//! Restarts: nothing is lost, nothing comes twice, nobody is charged.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use millpond_client::{Client, DeadReason, Message, Nack, Offset, StartAt, Subscription};
use tokio::sync::{mpsc, watch};

use crate::common::{
    billing, broker, connect, letters, next, nothing_for, publish, quick_retries, subscribe, text,
    wall_us,
};

const PRODUCERS: u64 = 3;
const EACH: u64 = 300;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_under_load_loses_nothing_and_repeats_nothing() {
    let (mut broker, client) = broker().await;
    let config = quick_retries(10, 3);
    client
        .create_subscription("orders", "billing", config, StartAt::Earliest)
        .await
        .unwrap();
    let (acked, mut answers) = mpsc::unbounded_channel();
    let (stop, stopped) = watch::channel(false);
    let mut consumers = Vec::new();
    for _ in 0..2 {
        let other = connect(&broker).await;
        let consumer = other.subscribe("orders", "billing").open().await.unwrap();
        consumers.push(tokio::spawn(consume(
            other,
            consumer,
            acked.clone(),
            stopped.clone(),
        )));
    }
    let mut producers = Vec::new();
    for id in 0..PRODUCERS {
        let other = connect(&broker).await;
        producers.push(tokio::spawn(produce(other, id)));
    }
    let mut seen = BTreeMap::new();
    let total = (PRODUCERS * EACH) as usize;
    let mut restarts = 0;
    while seen.len() < total {
        let answer = tokio::time::timeout(crate::common::PATIENCE, answers.recv()).await;
        let (text, offset): (String, Offset) = answer.expect("the backlog drains").unwrap();
        let twice = seen.insert(text.clone(), offset);
        assert_eq!(
            twice, None,
            "{text} was acknowledged twice, also at {offset}"
        );
        // In the middle of it all.
        if seen.len() == total / 3 || seen.len() == total * 2 / 3 {
            broker = broker.restart().await.unwrap();
            restarts += 1;
        }
    }
    assert_eq!(restarts, 2);
    let mut published = BTreeMap::new();
    for producer in producers {
        published.extend(producer.await.unwrap());
    }
    assert_eq!(
        published, seen,
        "receipts and deliveries name the same offsets"
    );
    let offsets: BTreeSet<_> = seen.values().map(|offset| offset.0).collect();
    assert_eq!(
        offsets,
        (0..total as u64).collect(),
        "one offset each, without gaps"
    );
    let view = billing(&client).await;
    assert_eq!((view.backlog, view.dead), (0, 0));
    stop.send_replace(true);
    for consumer in consumers {
        consumer.await.unwrap();
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_lease_that_is_held_across_a_restart_is_settled_after_it() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 1)).await;
    publish(&client, &["held", "failed"]).await;
    let held = next(&mut consumer).await;
    let fails = next(&mut consumer).await;
    let broker = broker.restart().await.unwrap();
    held.ack().await.unwrap();
    fails.nack(Nack::new("after the restart")).await.unwrap();
    nothing_for(&mut consumer, Duration::from_millis(200)).await;
    assert_eq!(billing(&client).await.backlog, 0);
    let letters = letters(&client).await;
    assert_eq!(letters.len(), 1);
    let letter = &letters[0];
    assert_eq!((letter.failures, letter.deliveries), (1, 1));
    assert_eq!(letter.error, "after the restart");
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn retries_keep_their_attempts_their_due_times_and_their_history() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 3)).await;
    publish(&client, &["bad"]).await;
    let first = Nack::new("first")
        .code(1)
        .delay(Duration::from_millis(1_500));
    let nacked = Instant::now();
    next(&mut consumer).await.nack(first).await.unwrap();
    let due = billing(&client).await.next_due.unwrap();

    let broker = broker.restart().await.unwrap();
    assert_eq!(billing(&client).await.next_due, Some(due));
    let delivery = next(&mut consumer).await;
    assert!(
        nacked.elapsed() >= Duration::from_millis(1_500),
        "{:?}",
        nacked.elapsed()
    );
    assert!(wall_us() >= due.0);
    assert_eq!((delivery.attempt(), delivery.delivery()), (2, 2));
    delivery.nack(Nack::new("second").code(2)).await.unwrap();
    next(&mut consumer)
        .await
        .nack(Nack::new("third").code(3))
        .await
        .unwrap();
    let before = letters(&client).await;
    assert_eq!(before.len(), 1);
    let letter = &before[0];
    assert_eq!(
        (letter.reason, letter.failures),
        (DeadReason::MaxAttempts, 3)
    );
    let codes: Vec<_> = letter.history.iter().map(|item| item.code).collect();
    assert_eq!(codes, [1, 2, 3]);

    let broker = broker.restart().await.unwrap();
    assert_eq!(
        letters(&client).await,
        before,
        "a dead letter stays as it was"
    );
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn every_start_raises_the_epoch_of_the_same_store() {
    let (mut broker, client) = broker().await;
    let mut last = client.welcome().unwrap();
    for _ in 0..2 {
        broker = broker.restart().await.unwrap();
        client.ping().await.unwrap();
        let welcome = connect(&broker).await.welcome().unwrap();
        assert!(welcome.recovery_epoch > last.recovery_epoch);
        assert_eq!(welcome.store_id, last.store_id);
        last = welcome;
    }
    assert_eq!(
        client.welcome().map(|w| w.recovery_epoch),
        Some(last.recovery_epoch)
    );
    broker.shutdown().await.unwrap();
}

/// Sends numbered messages, several under way at a time; what was sent where.
async fn produce(client: Client, id: u64) -> BTreeMap<String, Offset> {
    let named = client.producer("orders").id(format!("p{id}"));
    let producer = named.open().await.unwrap();
    let mut sent = BTreeMap::new();
    let mut under_way = Vec::new();
    for n in 0..EACH {
        let text = format!("{id}-{n}");
        let receipt = producer.enqueue(Message::new(text.clone())).await.unwrap();
        under_way.push((text, receipt));
        if under_way.len() == 10 {
            for (text, receipt) in under_way.drain(..) {
                sent.insert(text, receipt.await.unwrap().offset.unwrap());
            }
        }
    }
    sent
}

/// Acknowledges what comes, and tells of each acknowledgement that the broker has confirmed.
async fn consume(
    _client: Client,
    mut consumer: Subscription,
    acked: mpsc::UnboundedSender<(String, Offset)>,
    mut stopped: watch::Receiver<bool>,
) {
    loop {
        let delivery = tokio::select! {
            delivery = consumer.next() => delivery.unwrap().unwrap(),
            _ = stopped.wait_for(|&stop| stop) => return,
        };
        let (text, offset) = (text(&delivery), delivery.offset());
        assert_eq!(delivery.attempt(), 1, "{text} was charged");
        delivery.ack().await.unwrap();
        acked.send((text, offset)).unwrap();
    }
}
