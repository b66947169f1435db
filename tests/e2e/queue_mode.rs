//! Queue mode: hand-outs and settlements, pause, seek, purge.

use std::time::{Duration, Instant};

use millpond_client::{
    DeadReason, Error, LostReason, Message, MessageState, Nack, Offset, Reject, Stamp, StartAt,
    SubscriptionConfig,
};

use crate::common::{
    billing, broker, connect, letters, next, nothing_for, publish, quick_retries, subscribe, text,
    texts, until,
};

#[tokio::test]
async fn what_is_published_is_delivered_and_acknowledged_once() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 3)).await;
    publish(&client, &["a", "b", "c"]).await;
    for want in ["a", "b", "c"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), want);
        assert_eq!((delivery.attempt(), delivery.delivery()), (1, 1));
        delivery.ack().await.unwrap();
    }
    let view = billing(&client).await;
    assert_eq!((view.backlog, view.floor), (0, Offset(3)));
    consumer.close().await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_rejected_message_is_dead_at_once_and_says_why() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 16)).await;
    publish(&client, &["bad", "worse", "good"]).await;
    let no = Reject::new("no such customer").code(17);
    next(&mut consumer).await.reject(no).await.unwrap();
    let garbled = Reject::undecodable("not JSON");
    next(&mut consumer).await.reject(garbled).await.unwrap();
    next(&mut consumer).await.ack().await.unwrap();

    let letters = letters(&client).await;
    assert_eq!(texts(&letters), ["bad", "worse"]);
    let (bad, worse) = (&letters[0], &letters[1]);
    assert_eq!(
        (bad.reason, bad.error_code, bad.error.as_str()),
        (DeadReason::Rejected, 17, "no such customer")
    );
    assert_eq!(
        (bad.failures, bad.deliveries, bad.source_offset),
        (1, 1, Offset(0))
    );
    assert_eq!(worse.reason, DeadReason::Undecodable);
    assert_eq!(billing(&client).await.backlog, 0);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_nacks_own_delay_wins_over_the_backoff_and_is_never_early() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(3_600_000, 16)).await;
    publish(&client, &["later"]).await;
    let delivery = next(&mut consumer).await;
    let nacked = Instant::now();
    let wait = Duration::from_millis(300);
    let later = Nack::new("busy").delay(wait);
    delivery.nack(later).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert!(nacked.elapsed() >= wait, "early: {:?}", nacked.elapsed());
    assert_eq!((delivery.attempt(), delivery.delivery()), (2, 2));
    delivery.ack().await.unwrap();
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_release_costs_no_attempt() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 1)).await;
    publish(&client, &["again"]).await;
    for hand_out in 1..=4 {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.attempt(), delivery.delivery()), (1, hand_out));
        let delay = (hand_out == 2).then_some(Duration::from_millis(50));
        delivery.release(delay).await.unwrap();
    }
    next(&mut consumer)
        .await
        .nack(Nack::new("no"))
        .await
        .unwrap();
    let letters = letters(&client).await;
    assert_eq!(letters.len(), 1, "the first failure is the last attempt");
    let letter = &letters[0];
    assert_eq!(
        (letter.failures, letter.releases, letter.deliveries),
        (1, 4, 5)
    );
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_delivery_that_is_dropped_is_released_and_comes_again_after_a_second() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 1)).await;
    publish(&client, &["forgotten"]).await;
    drop(next(&mut consumer).await);
    let dropped = Instant::now();
    let delivery = next(&mut consumer).await;
    assert!(dropped.elapsed() >= Duration::from_millis(900));
    assert_eq!((delivery.attempt(), delivery.delivery()), (1, 2));
    assert_eq!(consumer.dropped_deliveries(), 1);
    delivery.ack().await.unwrap();
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn two_consumers_share_a_subscription_and_nothing_comes_twice() {
    let (broker, client) = broker().await;
    let other = connect(&broker).await;
    let mut first = subscribe(&client, "billing", quick_retries(10, 3)).await;
    let mut second = other.subscribe("orders", "billing").open().await.unwrap();
    let all: Vec<String> = (0..200).map(|n| format!("m{n}")).collect();
    publish(&client, &all.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (mut seen, mut by) = (Vec::new(), [0, 0]);
    while seen.len() < all.len() {
        let (delivery, who) = tokio::select! {
            delivery = next(&mut first) => (delivery, 0),
            delivery = next(&mut second) => (delivery, 1),
        };
        seen.push(text(&delivery));
        by[who] += 1;
        delivery.ack().await.unwrap();
    }
    seen.sort();
    let mut want = all.clone();
    want.sort();
    assert_eq!(seen, want);
    assert!(by[0] > 0 && by[1] > 0, "one of them got nothing: {by:?}");
    assert_eq!(billing(&client).await.backlog, 0);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_consumer_holds_no_more_than_its_prefetch_and_another_gets_the_rest() {
    let (broker, client) = broker().await;
    publish_five(&client).await;
    let two = client.subscribe("orders", "billing").prefetch(2);
    let mut greedy = two.open().await.unwrap();
    let held = next(&mut greedy).await;
    assert_eq!(held.offset(), Offset(0));
    let mut other = client.subscribe("orders", "billing").open().await.unwrap();
    for want in 2..5 {
        let delivery = next(&mut other).await;
        assert_eq!(delivery.offset(), Offset(want));
        delivery.ack().await.unwrap();
    }
    assert_eq!(billing(&client).await.in_flight, 2);
    held.ack().await.unwrap();
    next(&mut greedy).await.ack().await.unwrap();
    assert_eq!(billing(&client).await.backlog, 0);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn what_a_stuck_consumer_never_takes_is_called_back_uncharged() {
    let (broker, client) = broker().await;
    let config = SubscriptionConfig {
        hold_max_ms: 1_000,
        ..quick_retries(10, 1)
    };
    let stuck = subscribe(&client, "billing", config).await;
    publish(&client, &["held"]).await;
    until(&client, |view| view.in_flight == 1).await;
    let mut other = client.subscribe("orders", "billing").open().await.unwrap();
    let delivery = next(&mut other).await;
    assert_eq!(delivery.attempt(), 1);
    assert_eq!(delivery.delivery(), 2, "it came back to the stuck one");
    delivery.ack().await.unwrap();
    assert!(letters(&client).await.is_empty());
    drop(stuck);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_paused_subscription_hands_out_nothing_until_it_is_resumed() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 3)).await;
    client
        .pause_subscription("orders", "billing")
        .await
        .unwrap();
    publish(&client, &["a"]).await;
    nothing_for(&mut consumer, Duration::from_millis(200)).await;
    let view = billing(&client).await;
    assert!(view.paused && view.ready == 1);
    client
        .resume_subscription("orders", "billing")
        .await
        .unwrap();
    let delivery = next(&mut consumer).await;
    assert_eq!((delivery.attempt(), delivery.delivery()), (1, 1));
    delivery.ack().await.unwrap();
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_seek_back_makes_settled_messages_ready_and_one_ahead_finishes_them() {
    let (broker, client) = broker().await;
    // Another subscription keeps every message.
    let _keeper = subscribe(&client, "keeper", quick_retries(10, 3)).await;
    publish_five(&client).await;
    let mut consumer = client.subscribe("orders", "billing").open().await.unwrap();
    let mut middle = Stamp(0);
    for offset in 0..5 {
        let delivery = next(&mut consumer).await;
        if offset == 3 {
            middle = delivery.published_at();
        }
        delivery.ack().await.unwrap();
    }
    for (to, first) in [
        (StartAt::Offset(Offset(2)), 2),
        (StartAt::Time(middle), 3),
        (StartAt::Earliest, 0),
    ] {
        client.seek("orders", "billing", to).await.unwrap();
        for want in first..5 {
            let delivery = next(&mut consumer).await;
            assert_eq!(delivery.offset(), Offset(want), "after a seek to {to:?}");
            assert_eq!(delivery.attempt(), 1);
            delivery.ack().await.unwrap();
        }
    }
    client
        .seek("orders", "billing", StartAt::Earliest)
        .await
        .unwrap();
    let delivery = next(&mut consumer).await;
    client
        .seek("orders", "billing", StartAt::Latest)
        .await
        .unwrap();
    let view = billing(&client).await;
    assert_eq!((view.backlog, view.floor), (0, Offset(5)));
    let late = delivery.nack(Nack::new("too late")).await;
    let state = Some(MessageState::Acked);
    assert_eq!(late, Err(Error::LeaseLost { state }), "it was revoked");
    publish(&client, &["new"]).await;
    assert_eq!(next(&mut consumer).await.offset(), Offset(5));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_purge_takes_every_message_and_offsets_go_on() {
    let (broker, client) = broker().await;
    publish_five(&client).await;
    let two = client.subscribe("orders", "billing").prefetch(1);
    let mut consumer = two.open().await.unwrap();
    let delivery = next(&mut consumer).await;
    client.purge_topic("orders").await.unwrap();
    publish(&client, &["after"]).await;
    let late = delivery.nack(Nack::new("too late")).await;
    assert!(matches!(late, Err(Error::LeaseLost { .. })), "{late:?}");
    let delivery = next(&mut consumer).await;
    assert_eq!(
        (delivery.offset(), text(&delivery)),
        (Offset(5), "after".into())
    );
    delivery.ack().await.unwrap();
    let topic = client.topic("orders").await.unwrap();
    assert_eq!(topic.next, Offset(6));
    assert!(letters(&client).await.is_empty(), "purged is not dead");
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_holder_is_told_that_a_seek_took_its_lease() {
    let (broker, client) = broker().await;
    publish_five(&client).await;
    let one = client.subscribe("orders", "billing").prefetch(1);
    let mut consumer = one.open().await.unwrap();
    let delivery = next(&mut consumer).await;
    client
        .seek("orders", "billing", StartAt::Latest)
        .await
        .unwrap();
    let told = async {
        while delivery.lost().is_none() {
            tokio::task::yield_now().await;
        }
    };
    let told = tokio::time::timeout(crate::common::PATIENCE, told).await;
    assert!(told.is_ok(), "nobody told the holder");
    assert_eq!(delivery.lost(), Some(LostReason::Seek));
    broker.shutdown().await.unwrap();
}

/// Makes `billing` and publishes `m0` to `m4`.
async fn publish_five(client: &millpond_client::Client) {
    let config = quick_retries(10, 3);
    client
        .create_subscription("orders", "billing", config, StartAt::Earliest)
        .await
        .unwrap();
    publish(client, &["m0", "m1", "m2", "m3", "m4"]).await;
}

/// One is read from the disk and one is in the cache, which gives a message whatever its size: in one frame they
/// would be more than it may have.
#[tokio::test]
async fn large_messages_behind_each_other_each_get_a_frame() {
    let (broker, client) = broker().await;
    let sizes = [9_500_000, 9_000_000];
    // What a subscription waits for goes into the cache, which holds one of them.
    drop(subscribe(&client, "billing", quick_retries(1, 3)).await);
    let producer = client.producer("orders").open().await.unwrap();
    for size in sizes {
        producer.send(Message::new(vec![7; size])).await.unwrap();
    }
    let mut consumer = client.subscribe("orders", "billing").open().await.unwrap();
    for size in sizes {
        let delivery = next(&mut consumer).await;
        assert_eq!((delivery.payload().len(), delivery.delivery()), (size, 1));
        delivery.ack().await.unwrap();
    }
    broker.shutdown().await.unwrap();
}
