//! What time does to a message: delayed publishes, times to live, ages.

use millpond_client::{
    Client, DeadReason, Delivery, Message, StartAt, SubscriptionConfig, TopicPatch,
};

use crate::common::{
    billing, broker, letters, next, producer, quick_retries, subscribe, text, wall_us,
};

#[tokio::test]
async fn a_delayed_message_is_never_early_and_soon_there() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 3)).await;
    let producer = producer(&client).await;
    let delays = [600, 100, 500, 200, 400, 300];
    for delay_ms in delays {
        let message = Message {
            delay_ms,
            ..Message::new(delay_ms.to_string())
        };
        producer.send(message).await.unwrap();
    }
    producer.send(Message::new("0")).await.unwrap();
    let (mut order, mut late_ms) = (Vec::new(), Vec::new());
    for _ in 0..=delays.len() {
        let delivery = next(&mut consumer).await;
        let now = wall_us();
        let delay_ms: u64 = text(&delivery).parse().unwrap();
        let due = delivery.published_at().plus_ms(delay_ms).0;
        assert!(now >= due, "{delay_ms} ms came {} us early", due - now);
        late_ms.push((now - due) / 1_000);
        order.push(delay_ms);
        delivery.ack().await.unwrap();
    }
    assert_eq!(order, [0, 100, 200, 300, 400, 500, 600]);
    late_ms.sort_unstable();
    // The median: one of them may have met a busy machine.
    assert!(late_ms[late_ms.len() / 2] < 100, "late by {late_ms:?} ms");
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_message_that_outlives_its_ttl_is_dead_as_expired() {
    let (broker, client) = broker().await;
    let mut dead = paused_billing(&client, SubscriptionConfig::default()).await;
    let message = Message {
        ttl_ms: 200,
        ..Message::new("short-lived")
    };
    let producer = producer(&client).await;
    producer.send(message).await.unwrap();
    producer.send(Message::new("long-lived")).await.unwrap();
    let delivery = next(&mut dead).await;
    assert_eq!(text(&delivery), "short-lived");
    assert!(wall_us() >= delivery.published_at().plus_ms(200).0);
    let page = letters(&client).await;
    assert_eq!((page.len(), page[0].reason), (1, DeadReason::Expired));
    assert_eq!(page[0].failures, 0);

    client
        .resume_subscription("orders", "billing")
        .await
        .unwrap();
    let mut consumer = client.subscribe("orders", "billing").open().await.unwrap();
    assert_eq!(text(&next(&mut consumer).await), "long-lived");
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_topics_ttl_holds_for_messages_that_name_none() {
    let (broker, client) = broker().await;
    let patch = TopicPatch {
        ttl_ms: Some(Some(200)),
        ..TopicPatch::default()
    };
    client.update_topic("orders", patch).await.unwrap();
    let mut dead = paused_billing(&client, SubscriptionConfig::default()).await;
    producer(&client)
        .await
        .send(Message::new("old"))
        .await
        .unwrap();
    assert_eq!(text(&next(&mut dead).await), "old");
    assert_eq!(letters(&client).await[0].reason, DeadReason::Expired);
    assert_eq!(billing(&client).await.backlog, 0);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_message_beyond_the_subscriptions_max_age_is_dead() {
    let (broker, client) = broker().await;
    let config = SubscriptionConfig {
        max_age_ms: Some(300),
        ..SubscriptionConfig::default()
    };
    let mut dead = paused_billing(&client, config).await;
    producer(&client)
        .await
        .send(Message::new("old"))
        .await
        .unwrap();
    let delivery: Delivery = next(&mut dead).await;
    assert_eq!(text(&delivery), "old");
    assert!(wall_us() >= delivery.published_at().plus_ms(300).0);
    assert_eq!(letters(&client).await[0].reason, DeadReason::MaxAge);
    broker.shutdown().await.unwrap();
}

/// Makes `billing`, pauses it, and subscribes to its dead-letter topic.
async fn paused_billing(
    client: &Client,
    config: SubscriptionConfig,
) -> millpond_client::Subscription {
    client
        .create_subscription("orders", "billing", config, StartAt::Earliest)
        .await
        .unwrap();
    client
        .pause_subscription("orders", "billing")
        .await
        .unwrap();
    client
        .subscribe("orders.billing.dead", "watch")
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .open()
        .await
        .unwrap()
}
