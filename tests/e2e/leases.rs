//! Leases: renewed by themselves, lost by slow handlers, settled late.

use std::time::{Duration, Instant};

use millpond_client::{DeadReason, Error, LostReason, MessageState, Offset, SubscriptionConfig};

use crate::common::{
    billing, broker, letters, next, nothing_for, publish, quick_retries, subscribe, until,
};

fn slow_handlers(processing_timeout_ms: u64, backoff_ms: u64) -> SubscriptionConfig {
    SubscriptionConfig {
        processing_timeout_ms,
        ..quick_retries(backoff_ms, 3)
    }
}

#[tokio::test]
async fn a_lease_is_renewed_for_as_long_as_its_handler_works() {
    let (broker, client) = broker().await;
    let config = SubscriptionConfig {
        lease_ms: 1_000,
        ..quick_retries(10, 1)
    };
    let mut consumer = subscribe(&client, "billing", config).await;
    let mut other = client.subscribe("orders", "billing").open().await.unwrap();
    publish(&client, &["long"]).await;
    let wait = Duration::from_millis(2_600);
    let (delivery, idle) = tokio::select! {
        delivery = next(&mut consumer) => (delivery, &mut other),
        delivery = next(&mut other) => (delivery, &mut consumer),
    };
    nothing_for(idle, wait).await;
    assert_eq!(delivery.lost(), None);
    delivery.ack().await.unwrap();
    assert_eq!(billing(&client).await.backlog, 0);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_handler_that_takes_too_long_is_charged_a_failure() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", slow_handlers(150, 10)).await;
    publish(&client, &["slow"]).await;
    let mut kept = Vec::new();
    for attempt in 1..=3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt(), attempt);
        kept.push(delivery);
    }
    until(&client, |view| view.dead == 1).await;
    assert_eq!(kept[0].lost(), Some(LostReason::ProcessingTimeout));
    let letters = letters(&client).await;
    assert_eq!(
        (letters[0].reason, letters[0].failures),
        (DeadReason::MaxAttempts, 3)
    );
    let outcomes: Vec<_> = letters[0]
        .history
        .iter()
        .map(|h| h.outcome.as_str())
        .collect();
    assert_eq!(outcomes, ["processing_timeout"; 3]);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn an_extended_lease_outlives_the_processing_timeout() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", slow_handlers(500, 10)).await;
    publish(&client, &["slow"]).await;
    let delivery = next(&mut consumer).await;
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1_200) {
        nothing_for(&mut consumer, Duration::from_millis(100)).await;
        delivery.extend().await.unwrap();
    }
    assert_eq!(delivery.lost(), None);
    delivery.ack().await.unwrap();
    assert!(letters(&client).await.is_empty());
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_late_ack_counts_while_the_message_waits_for_its_retry() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", slow_handlers(150, 3_600_000)).await;
    publish(&client, &["slow"]).await;
    let delivery = next(&mut consumer).await;
    until(&client, |view| view.scheduled == 1).await;
    delivery.ack().await.unwrap();
    let view = billing(&client).await;
    assert_eq!(
        (view.backlog, view.scheduled, view.floor),
        (0, 0, Offset(1))
    );
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_late_ack_is_refused_once_another_has_the_message() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", slow_handlers(300, 1)).await;
    publish(&client, &["slow"]).await;
    let mut other = client.subscribe("orders", "billing").open().await.unwrap();
    let (late, newer) = tokio::select! {
        first = next(&mut consumer) => (first, next_of(&mut consumer, &mut other).await),
        first = next(&mut other) => (first, next_of(&mut consumer, &mut other).await),
    };
    assert_eq!(newer.attempt(), 2);
    let leased = Some(MessageState::Leased);
    assert_eq!(late.ack().await, Err(Error::LeaseLost { state: leased }));
    newer.ack().await.unwrap();
    assert_eq!(billing(&client).await.backlog, 0);
    broker.shutdown().await.unwrap();
}

async fn next_of(
    a: &mut millpond_client::Subscription,
    b: &mut millpond_client::Subscription,
) -> millpond_client::Delivery {
    tokio::select! {
        delivery = next(a) => delivery,
        delivery = next(b) => delivery,
    }
}
