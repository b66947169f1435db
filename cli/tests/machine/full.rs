//! A disk that fills up, and one that cannot be written to: SEMANTICS' rules for it, for real.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use millpond_client::{
    Backoff, Client, Message, Nack, StartAt, Subscription, SubscriptionConfig, TopicConfig,
};
use tokio::time::timeout;

use crate::broker::{Ended, Launch, write_config};
use crate::disk::SmallDisk;
use crate::world::World;

const DISK_MIB: u64 = 48;
/// Below the hard limit, which is 5 % of the disk.
const NEARLY_FULL_BYTES: u64 = 1 << 20;
/// Messages that wait when the disk fills up.
const PILE: usize = 600;
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn on_a_full_disk_only_publishing_stops_and_all_goes_on_once_there_is_space() {
    let disk = SmallDisk::new(DISK_MIB);
    let mut world = World::new(disk.path().join("data"), 1);
    world.load(Duration::ZERO);
    world.ask(async |client| pile_up(&client).await);

    disk.fill(NEARLY_FULL_BYTES);
    let refused = refused(&world);
    assert_eq!(world.get("/healthz").0, 200);
    assert_eq!(world.get("/ready").0, 200, "the reserve is there");
    let died = world.ask(async |client| work_off(&client).await);
    assert!(died > 0, "retries and dead letters at the hard limit");
    world.ask(async |client| client.delete_topic("scrap", true).await.expect("deletion"));

    // As much again as the reserve gives back.
    fill_up(&disk, &world);
    let said = world.wait_for_ready(503);
    assert!(said.contains("disk"), "{said}");
    assert_eq!(world.get("/healthz").0, 200);
    let leased = world.ask(async |client| hand_outs(&client).await);
    assert_eq!(leased, 0, "leases without a reserve");

    world.kill();
    world.start_well();
    let said = world.wait_for_ready(503);
    assert!(said.contains("disk"), "{said}");
    assert_eq!(world.get("/healthz").0, 200);

    disk.free();
    world.wait_for_ready(200);
    let left = world.ask(async |client| work_rest(&client).await);
    assert_eq!(left, PILE - PILE / 2, "what waited is all there");
    world.load(Duration::from_millis(200));
    world.finish_well();
    println!("durability: full_disk_publishes_refused {refused}");
}

#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn a_broker_that_cannot_write_says_so_in_one_sentence_and_loses_nothing() {
    let disk = SmallDisk::new(DISK_MIB);
    let mut world = World::new(disk.path().join("data"), 1);
    world.load(Duration::ZERO);
    world.kill();

    disk.mount_again("ro");
    let ended = world.start(&[]).expect_err("it cannot write");
    assert_said(&ended, "cannot be written");
    disk.mount_again("rw");

    disk.fill(0);
    let scratch = tempfile::tempdir().expect("a folder");
    let config = scratch.path().join("config.toml");
    write_config(&config);
    let fresh = Launch {
        data: disk.path().join("fresh"),
        config,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        stderr: scratch.path().join("stderr"),
    };
    let ended = fresh.start(&[]).err().expect("there is no space");
    assert_said(&ended, "is full; free some space");
    disk.free();

    world.start_well();
    world.load(Duration::ZERO);
    world.finish_well();
    println!("durability: unwritable_folders_refused 2");
}

/// One line, on an exit that scripts know.
fn assert_said(ended: &Ended, sentence: &str) {
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains(sentence), "{ended:?}");
    let errors = ended.stderr.lines().filter(|line| line.contains("error"));
    assert_eq!(errors.count(), 1, "{ended:?}");
}

/// A topic with messages that wait, and one that nobody needs.
async fn pile_up(client: &Client) {
    for topic in ["pile", "scrap"] {
        let created = client.create_topic(topic, TopicConfig::default()).await;
        created.expect("a topic");
    }
    let config = SubscriptionConfig {
        max_attempts: 2,
        backoff: Backoff::Fixed { wait_ms: 20 },
        ..SubscriptionConfig::default()
    };
    let created = client.create_subscription("pile", "slow", config, StartAt::Earliest);
    created.await.expect("a subscription");
    for topic in ["pile", "scrap"] {
        let producer = client.producer(topic).open().await.expect("a producer");
        for number in 0..PILE {
            let queued = producer
                .enqueue(Message::new(vec![number as u8; 2_000]))
                .await;
            drop(queued.expect("room"));
        }
        producer.flush().await.expect("all of them");
    }
}

/// Sends until it is refused; how often it was.
fn refused(world: &World) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let send = ["send", "scrap", "one more"];
        let (code, said) = world.command(&send);
        if code != Some(0) {
            assert_eq!(code, Some(3), "{said}");
            assert!(said.contains("disk is nearly full"), "{said}");
            assert_eq!(said.lines().count(), 1, "{said}");
            return 1;
        }
        assert!(
            Instant::now() < deadline,
            "it publishes on a disk that is nearly full"
        );
    }
}

/// Fills the disk until the reserve has been given up and eaten.
fn fill_up(disk: &SmallDisk, world: &World) {
    let deadline = Instant::now() + PATIENCE;
    while world.get("/ready").0 == 200 {
        assert!(Instant::now() < deadline, "ready on a full disk");
        disk.fill(0);
        std::thread::sleep(Duration::from_millis(50));
    }
    disk.fill(0);
}

async fn open(client: &Client) -> Subscription {
    let opened = client.subscribe("pile", "slow").prefetch(16).open().await;
    opened.expect("a consumer")
}

/// Settles half of the pile: every fifth of it dies of two failures. How many died.
async fn work_off(client: &Client) -> u64 {
    let mut subscription = open(client).await;
    let (mut done, mut died) = (0, 0);
    while done < PILE / 2 {
        let next = timeout(PATIENCE, subscription.next()).await;
        let delivery = next
            .expect("a delivery in time")
            .expect("open")
            .expect("a delivery");
        if delivery.offset().0.is_multiple_of(5) {
            let is_last = delivery.attempt() == 2;
            delivery.nack(Nack::new("no")).await.expect("a nack");
            done += usize::from(is_last);
            died += u64::from(is_last);
        } else {
            delivery.ack().await.expect("an acknowledgement");
            done += 1;
        }
    }
    subscription.close().await;
    let view = client.subscription("pile", "slow").await.expect("a view");
    assert_eq!(view.dead, died, "{view:?}");
    died
}

/// How many messages are handed out within a while.
async fn hand_outs(client: &Client) -> usize {
    let mut subscription = open(client).await;
    let mut handed = 0;
    while let Ok(Some(Ok(delivery))) = timeout(Duration::from_secs(1), subscription.next()).await {
        handed += 1;
        drop(delivery);
    }
    handed
}

/// Acknowledges all that is left; how many there were.
async fn work_rest(client: &Client) -> usize {
    let mut subscription = open(client).await;
    let mut done = 0;
    while let Ok(next) = timeout(Duration::from_secs(12), subscription.next()).await {
        let delivery = next.expect("open").expect("a delivery");
        delivery.ack().await.expect("an acknowledgement");
        done += 1;
        let view = client.subscription("pile", "slow").await.expect("a view");
        if view.backlog == 0 {
            break;
        }
    }
    subscription.close().await;
    done
}
