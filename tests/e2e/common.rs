//! What every test here needs: a broker, a client, a topic.

use std::time::{Duration, SystemTime};

use millpond_broker::{Config, EmbeddedBroker};
use millpond_client::{
    Backoff, Client, ClientBuilder, DeadLetterView, Delivery, Jitter, Message, MessageView, Offset,
    Producer, StartAt, Subscription, SubscriptionConfig, SubscriptionView, TopicConfig,
};
use tokio::time::{Instant, sleep, timeout};

/// Longest that anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A broker with one topic, `orders`, and a client.
pub async fn broker() -> (EmbeddedBroker, Client) {
    broker_with(|_| {}).await
}

/// The same, configured. What a test still holds at its end is not waited for.
pub async fn broker_with(change: impl FnOnce(&mut Config)) -> (EmbeddedBroker, Client) {
    let started = EmbeddedBroker::start_with(|config| {
        config.shutdown_grace_ms = 300;
        change(config);
    });
    let broker = started.await.unwrap();
    let client = connect(&broker).await;
    client
        .create_topic("orders", TopicConfig::default())
        .await
        .unwrap();
    (broker, client)
}

pub async fn connect(broker: &EmbeddedBroker) -> Client {
    builder(broker).connect(&broker.url()).await.unwrap()
}

/// A client that trusts this broker.
pub fn builder(broker: &EmbeddedBroker) -> ClientBuilder {
    Client::builder().ca_pem(broker.ca_pem().unwrap())
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
    let delivery = timeout(PATIENCE, subscription.next()).await;
    delivery
        .expect("a delivery comes in time")
        .expect("the subscription goes on")
        .unwrap()
}

pub fn text(delivery: &Delivery) -> String {
    String::from_utf8(delivery.payload().to_vec()).unwrap()
}

pub fn texts(letters: &[DeadLetterView]) -> Vec<String> {
    let payload = |letter: &DeadLetterView| {
        let (view, _) = MessageView::split(&letter.message).unwrap();
        String::from_utf8(view.payload().to_vec()).unwrap()
    };
    letters.iter().map(payload).collect()
}

/// Asserts that nothing is delivered for a while.
pub async fn nothing_for(subscription: &mut Subscription, wait: Duration) {
    let found = timeout(wait, subscription.next()).await;
    assert!(found.is_err(), "nothing was expected, but {found:?} came");
}

/// Every dead letter of `billing`.
pub async fn letters(client: &Client) -> Vec<DeadLetterView> {
    let page = client
        .dead_letters("orders", "billing", Offset(0), 1_000)
        .await
        .unwrap();
    page.letters
}

/// The state of `billing`.
pub async fn billing(client: &Client) -> SubscriptionView {
    client.subscription("orders", "billing").await.unwrap()
}

/// Waits until `billing` looks like this; for what tells nobody that it has happened.
pub async fn until(client: &Client, looks: impl Fn(&SubscriptionView) -> bool) -> SubscriptionView {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let view = billing(client).await;
        if looks(&view) {
            return view;
        }
        assert!(Instant::now() < deadline, "it stayed {view:#?}");
        sleep(Duration::from_millis(10)).await;
    }
}

pub async fn producer(client: &Client) -> Producer {
    client.producer("orders").open().await.unwrap()
}

/// The wall clock as the broker stamps, in microseconds.
pub fn wall_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap().as_micros() as u64
}
