//! What every test here needs: a broker, a client, a topic.

use std::time::Duration;

use millpond_broker::EmbeddedBroker;
use millpond_client::{
    Backoff, Client, Delivery, Jitter, Message, StartAt, Subscription, SubscriptionConfig,
    TopicConfig,
};

/// Longest that anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A broker with one topic, `orders`, and a client.
pub async fn broker() -> (EmbeddedBroker, Client) {
    let broker = EmbeddedBroker::start().await.unwrap();
    let client = connect(&broker).await;
    client
        .create_topic("orders", TopicConfig::default())
        .await
        .unwrap();
    (broker, client)
}

pub async fn connect(broker: &EmbeddedBroker) -> Client {
    let ca = broker.ca_pem().unwrap();
    Client::builder()
        .ca_pem(ca)
        .connect(&broker.url())
        .await
        .unwrap()
}

/// Retries at once after `wait_ms`, at most `max_attempts` times.
pub fn quick_retries(wait_ms: u64, max_attempts: u32) -> SubscriptionConfig {
    SubscriptionConfig {
        backoff: Backoff::Fixed { wait_ms },
        jitter: Jitter::None,
        max_attempts,
        ..SubscriptionConfig::default()
    }
}

pub async fn subscribe(client: &Client, name: &str, config: SubscriptionConfig) -> Subscription {
    client
        .create_subscription("orders", name, config, StartAt::Earliest)
        .await
        .unwrap();
    client.subscribe("orders", name).open().await.unwrap()
}

/// Publishes these payloads and returns when they are durable.
pub async fn publish(client: &Client, payloads: &[&str]) {
    let producer = client.producer("orders").open().await.unwrap();
    for payload in payloads {
        producer
            .send(Message::new(payload.as_bytes().to_vec()))
            .await
            .unwrap();
    }
    producer.close().await;
}

/// The next delivery, which must come in time.
pub async fn next(subscription: &mut Subscription) -> Delivery {
    let delivery = tokio::time::timeout(PATIENCE, subscription.next()).await;
    delivery
        .expect("a delivery comes in time")
        .expect("the subscription goes on")
        .unwrap()
}

pub fn text(delivery: &Delivery) -> String {
    String::from_utf8(delivery.payload().to_vec()).unwrap()
}
