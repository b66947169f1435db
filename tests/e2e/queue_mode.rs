//! Queue mode: leases, retries, dead letters, restarts.

use millpond_client::{DeadFilter, DeadReason, Nack, Offset, RedriveTarget};

use crate::common::{broker, next, publish, quick_retries, subscribe, text};

#[tokio::test]
async fn what_is_published_is_delivered_and_acknowledged_once() {
    let (broker, client) = broker().await;
    let mut billing = subscribe(&client, "billing", quick_retries(10, 3)).await;
    publish(&client, &["a", "b", "c"]).await;
    for want in ["a", "b", "c"] {
        let delivery = next(&mut billing).await;
        assert_eq!(text(&delivery), want);
        assert_eq!(delivery.attempt(), 1);
        delivery.ack().await.unwrap();
    }
    let view = client.subscription("orders", "billing").await.unwrap();
    assert_eq!((view.backlog, view.floor), (0, Offset(3)));
    billing.close().await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_failing_message_comes_back_and_ends_as_a_dead_letter_that_tells_why() {
    let (broker, client) = broker().await;
    let mut billing = subscribe(&client, "billing", quick_retries(20, 3)).await;
    publish(&client, &["bad"]).await;
    for attempt in 1..=3 {
        let delivery = next(&mut billing).await;
        assert_eq!(delivery.attempt(), attempt);
        let reason = format!("no {attempt}");
        delivery
            .nack(Nack {
                reason,
                ..Nack::default()
            })
            .await
            .unwrap();
    }
    let page = client
        .dead_letters("orders", "billing", Offset(0), 10)
        .await
        .unwrap();
    assert_eq!(page.letters.len(), 1);
    let letter = &page.letters[0];
    assert_eq!(
        (letter.reason, letter.failures, letter.error.as_str()),
        (DeadReason::MaxAttempts, 3, "no 3")
    );
    assert_eq!(letter.history.len(), 3);

    let all = DeadFilter::default();
    client
        .redrive("orders", "billing", all, None, RedriveTarget::Subscription)
        .await
        .unwrap();
    let delivery = next(&mut billing).await;
    assert_eq!((text(&delivery).as_str(), delivery.attempt()), ("bad", 1));
    delivery.ack().await.unwrap();
    let page = client
        .dead_letters("orders", "billing", Offset(0), 10)
        .await
        .unwrap();
    assert!(page.letters.is_empty());
    broker.shutdown().await.unwrap();
}
