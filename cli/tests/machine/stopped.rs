//! A broker that stands still for seconds, as one does whose machine swaps or is suspended.

use std::time::Duration;

use millpond_client::{
    Client, Delivery, Error, Message, StartAt, Subscription, SubscriptionConfig, TopicConfig,
};
use tokio::time::timeout;

use crate::world::World;

/// Below and above the time after which a client gives its connection up.
const STANDSTILLS_S: [u64; 2] = [3, 8];
/// Shorter than the longer of them.
const LEASE_MS: u64 = 2_000;
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn stopped_for_seconds_it_goes_on_and_nothing_is_lost_or_doubled() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut world = World::new(folder.path().join("data"), 1);
    let mut standstills = 0;
    for seconds in STANDSTILLS_S {
        world.load_for_a_while();
        let (client, subscription, held) = world.ask(async |client| lease_one(client).await);
        world.stand_still(Duration::from_secs(seconds));
        standstills += 1;
        world.load(Duration::from_millis(200));
        world.ask(async |_| settle_or_again(client, subscription, held).await);
    }
    world.finish_well();
    println!("durability: standstills {standstills}");
}

/// A delivery under a short lease.
async fn lease_one(client: Client) -> (Client, Subscription, Delivery) {
    // It is there from the second time on.
    let _ = client.create_topic("leased", TopicConfig::default()).await;
    let config = SubscriptionConfig {
        lease_ms: LEASE_MS,
        ..SubscriptionConfig::default()
    };
    let subscribing = client.subscribe("leased", "short");
    let opened = subscribing.create(config, StartAt::Earliest).open().await;
    let mut subscription = opened.expect("a consumer");
    let producer = client.producer("leased").open().await.expect("a producer");
    let sent = producer.send(Message::new("once")).await;
    sent.expect("an acknowledgement");
    let held = next(&mut subscription).await.expect("a delivery");
    (client, subscription, held)
}

/// It is acknowledged, and then never comes again; or the lease was lost, and it comes.
async fn settle_or_again(client: Client, mut subscription: Subscription, held: Delivery) {
    let offset = held.offset();
    match held.ack().await {
        Ok(()) => {}
        Err(Error::LeaseLost { .. }) => {
            let again = next(&mut subscription).await.expect("it comes again");
            assert_eq!(again.offset(), offset);
            assert_eq!(again.attempt(), 1, "a standstill is charged to nobody");
            again.ack().await.expect("an acknowledgement");
        }
        Err(error) => panic!("{error}"),
    }
    let view = client
        .subscription("leased", "short")
        .await
        .expect("a view");
    assert_eq!((view.backlog, view.dead), (0, 0), "{view:?}");
    subscription.close().await;
}

async fn next(subscription: &mut Subscription) -> Option<Delivery> {
    let next = timeout(PATIENCE, subscription.next()).await;
    next.ok()??.ok()
}
