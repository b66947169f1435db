//! Dead letters: why, where, and the way back.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use millpond_client::{
    Client, DeadFilter, DeadLetterView, DeadReason, Delivery, Message, Nack, Offset, RedriveTarget,
    Reject, StartAt, SubscriptionConfig,
};
use millpond_protocol::limits::{
    DEAD_OFFSETS_MAX, EXTRA_BYTES_MAX, HEADERS_BYTES_MAX, KEY_BYTES_MAX, PAYLOAD_BYTES_MAX,
    REASON_BYTES_MAX,
};
use tokio::time::sleep;

use crate::common::{
    PATIENCE, billing, broker, letters, next, nothing_for, producer, publish, quick_retries,
    subscribe, text, texts, until,
};

#[tokio::test]
async fn a_failing_message_comes_back_and_ends_as_a_dead_letter_that_tells_why() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(20, 3)).await;
    publish(&client, &["bad"]).await;
    for attempt in 1..=3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.attempt(), attempt);
        let reason = format!("no {attempt}");
        delivery.nack(Nack::new(reason)).await.unwrap();
    }
    let page = letters(&client).await;
    assert_eq!(page.len(), 1);
    let letter = &page[0];
    assert_eq!(
        (letter.reason, letter.failures, letter.error.as_str()),
        (DeadReason::MaxAttempts, 3, "no 3")
    );
    assert_eq!(letter.history.len(), 3);

    redrive(
        &client,
        DeadFilter::default(),
        None,
        RedriveTarget::Subscription,
    )
    .await;
    let delivery = next(&mut consumer).await;
    assert_eq!((text(&delivery).as_str(), delivery.attempt()), ("bad", 1));
    delivery.ack().await.unwrap();
    assert!(letters(&client).await.is_empty());
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_message_that_is_only_ever_handed_back_ends_as_a_letter_that_tells_why() {
    let (broker, client) = broker().await;
    let config = SubscriptionConfig {
        max_deliveries: 2,
        ..quick_retries(1, 1)
    };
    let mut consumer = subscribe(&client, "billing", config).await;
    publish(&client, &["unwanted"]).await;
    for _ in 0..2 {
        let delivery = next(&mut consumer).await;
        delivery.release(Some(Duration::ZERO)).await.unwrap();
    }
    until(&client, |billing| billing.dead == 1).await;
    let page = letters(&client).await;
    let letter = &page[0];
    assert_eq!(
        (letter.reason, letter.failures, letter.error.as_str()),
        (
            DeadReason::MaxDeliveries,
            0,
            "it was handed out too often without being finished"
        )
    );
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_redrive_takes_only_what_its_filter_names() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(1, 1)).await;
    publish(
        &client,
        &["rejected", "failed", "failed too", "failed as well"],
    )
    .await;
    let delivery = next(&mut consumer).await;
    delivery.reject(Reject::new("no")).await.unwrap();
    for _ in 0..3 {
        next(&mut consumer)
            .await
            .nack(Nack::new("no"))
            .await
            .unwrap();
    }
    let by_reason = DeadFilter {
        reason: Some(DeadReason::MaxAttempts),
        limit: Some(1),
        ..DeadFilter::default()
    };
    redrive(&client, by_reason, None, RedriveTarget::Subscription).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(text(&delivery), "failed");
    delivery.ack().await.unwrap();
    let left = letters(&client).await;
    assert_eq!(texts(&left), ["rejected", "failed too", "failed as well"]);

    let by_offset = DeadFilter {
        offsets: vec![left[2].offset],
        ..DeadFilter::default()
    };
    redrive(&client, by_offset, None, RedriveTarget::Subscription).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(text(&delivery), "failed as well");
    delivery.nack(Nack::new("again")).await.unwrap();
    let left = letters(&client).await;
    assert_eq!(texts(&left), ["rejected", "failed too", "failed as well"]);
    assert_eq!((left[2].redrives, left[2].failures), (1, 1));
    nothing_for(&mut consumer, Duration::from_millis(50)).await;

    let count = client
        .purge_dead_letters("orders", "billing", DeadFilter::default())
        .await
        .unwrap();
    assert_eq!(count, 3);
    assert!(letters(&client).await.is_empty());
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_redrive_to_the_topic_reaches_every_subscription_as_a_new_message() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(1, 1)).await;
    let mut audit = subscribe(&client, "audit", quick_retries(1, 1)).await;
    publish(&client, &["m"]).await;
    next(&mut audit).await.ack().await.unwrap();
    next(&mut consumer)
        .await
        .nack(Nack::new("no"))
        .await
        .unwrap();
    redrive(&client, DeadFilter::default(), None, RedriveTarget::Topic).await;
    for subscription in [&mut audit, &mut consumer] {
        let delivery = next(subscription).await;
        assert_eq!(delivery.offset(), Offset(1));
        assert_eq!((text(&delivery).as_str(), delivery.attempt()), ("m", 1));
        delivery.ack().await.unwrap();
    }
    assert!(letters(&client).await.is_empty());
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_redrive_keeps_to_its_rate_and_can_be_stopped_half_way() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(1, 1)).await;
    publish(&client, &["a", "b", "c", "d", "e", "f"]).await;
    for _ in 0..6 {
        next(&mut consumer)
            .await
            .nack(Nack::new("no"))
            .await
            .unwrap();
    }
    let began = Instant::now();
    let all = DeadFilter::default();
    let job = client
        .redrive(
            "orders",
            "billing",
            all,
            Some(5),
            RedriveTarget::Subscription,
        )
        .await
        .unwrap();
    assert_eq!(job.total, 6);
    for want in ["a", "b", "c"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), want);
        delivery.ack().await.unwrap();
    }
    // Three letters at five a second: the third comes 400 ms after the first at the earliest.
    assert!(
        began.elapsed() >= Duration::from_millis(390),
        "{:?}",
        began.elapsed()
    );
    let stopped = client.cancel_redrive(job.job).await.unwrap();
    assert!(stopped.cancelled && stopped.done < 6, "{stopped:?}");
    let mut redriven = 3;
    while stopped.done > redriven {
        next(&mut consumer).await.ack().await.unwrap();
        redriven += 1;
    }
    nothing_for(&mut consumer, Duration::from_millis(400)).await;
    assert_eq!(letters(&client).await.len() as u64, 6 - redriven);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_dead_letter_topic_is_read_like_any_other_and_its_headers_tell_the_story() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(1, 2)).await;
    publish(&client, &["bad"]).await;
    let mut published_at = None;
    for n in 1..=2 {
        let delivery = next(&mut consumer).await;
        published_at = Some(delivery.published_at());
        let failed = Nack::new(format!("no {n}")).code(40 + n);
        delivery.nack(failed).await.unwrap();
    }
    let dead = billing(&client).await.dead_letter;
    assert_eq!(dead, "orders.billing.dead");
    client
        .create_subscription(
            &dead,
            "watch",
            SubscriptionConfig::default(),
            StartAt::Earliest,
        )
        .await
        .unwrap();
    let mut watch = client.subscribe(&dead, "watch").open().await.unwrap();
    let delivery = next(&mut watch).await;
    assert_eq!((text(&delivery).as_str(), delivery.attempt()), ("bad", 1));
    let published_at = published_at.unwrap().to_string();
    for (name, want) in [
        ("mp-dead-reason", "max_attempts"),
        ("mp-dead-error-code", "42"),
        ("mp-dead-error", "no 2"),
        ("mp-dead-topic", "orders"),
        ("mp-dead-offset", "0"),
        ("mp-dead-subscription", "billing"),
        ("mp-dead-failures", "2"),
        ("mp-dead-deliveries", "2"),
        ("mp-dead-releases", "0"),
        ("mp-dead-redrives", "0"),
        ("mp-dead-published-at", published_at.as_str()),
    ] {
        assert_eq!(header(&delivery, name), want, "{name}");
    }
    for name in ["mp-dead-first-attempt-at", "mp-dead-dead-at"] {
        assert!(
            header(&delivery, name).parse::<u64>().unwrap() > 0,
            "{name}"
        );
    }
    assert!(!header(&delivery, "mp-dead-consumer").is_empty());
    assert_eq!(header(&delivery, "mp-dead-history").lines().count(), 2);
    assert_eq!(
        letters(&client).await.len(),
        1,
        "reading takes nothing away"
    );
    let peeked = client.peek(&dead, Offset(0), 10).await.unwrap();
    let extra = String::from_utf8_lossy(&peeked.messages[0].extra).into_owned();
    assert!(extra.contains("mp-dead-reason") && extra.contains("no 2"));
    delivery.ack().await.unwrap();
    broker.shutdown().await.unwrap();
}

fn header(delivery: &Delivery, name: &str) -> String {
    let value = delivery
        .header(name)
        .unwrap_or_else(|| panic!("{name} is there"));
    String::from_utf8(value.to_vec()).unwrap()
}

/// Redrives and waits for the end of the job.
async fn redrive(client: &Client, filter: DeadFilter, rate: Option<u32>, target: RedriveTarget) {
    let mut view = client
        .redrive("orders", "billing", filter, rate, target)
        .await
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !view.finished {
        assert!(Instant::now() < deadline, "it stayed {view:?}");
        sleep(Duration::from_millis(10)).await;
        view = client.redrive_status(view.job).await.unwrap();
    }
}

#[tokio::test]
async fn letters_of_any_size_are_listed_page_by_page_and_looked_at() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(1, 1)).await;
    let sizes = [1 << 10, 16 << 20, 5 << 20, 1 << 10, 3 << 20, 2 << 10];
    let producer = producer(&client).await;
    for (fill, size) in (b'a'..).zip(sizes) {
        producer.send(Message::new(vec![fill; size])).await.unwrap();
    }
    let reason = "x".repeat(1_024);
    for _ in sizes {
        let delivery = next(&mut consumer).await;
        delivery.nack(Nack::new(reason.clone())).await.unwrap();
    }
    let found = by_pages(&client).await;
    let lengths: Vec<_> = texts(&found).iter().map(String::len).collect();
    assert_eq!(lengths, sizes);
    assert!(found.iter().all(|letter| letter.error == reason));

    let (mut looked, mut from) = (Vec::new(), Offset(0));
    loop {
        let page = client.peek("orders.billing.dead", from, 1_000);
        let page = page.await.unwrap();
        looked.extend(page.messages.iter().map(|message| message.message.len()));
        if !page.more {
            break;
        }
        from = page.next;
    }
    assert!(looked.iter().zip(sizes).all(|(have, size)| *have >= size));
    assert_eq!(looked.len(), sizes.len());
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_page_of_many_long_stories_fits_its_frame() {
    let (broker, client) = broker().await;
    drop(subscribe(&client, "billing", quick_retries(0, 10)).await);
    let named = client.subscribe("orders", "billing");
    let mut consumer = named.consumer_name("c".repeat(200)).open().await.unwrap();
    let total = 1_000;
    let producer = producer(&client).await;
    let receipts = (0..total).map(|_| producer.enqueue(Message::new(vec![b'm'; 1_500])));
    for receipt in join_all(receipts).await {
        receipt.unwrap().await.unwrap();
    }
    let reason = "x".repeat(1_024);
    for _ in 0..total * 10 {
        let delivery = next(&mut consumer).await;
        drop(delivery.nack_later(Nack::new(reason.clone())));
    }
    until(&client, |view| view.dead == total).await;
    let found = by_pages(&client).await;
    assert!(found.iter().map(|letter| letter.offset.0).eq(0..total));
    assert!(found.iter().all(|letter| letter.history.len() == 10));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_peek_passes_over_what_is_gone_page_by_page() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(1, 1)).await;
    let total = 1_501;
    let producer = producer(&client).await;
    let receipts = (0..total).map(|nth| producer.enqueue(Message::new(nth.to_string())));
    for receipt in join_all(receipts).await {
        receipt.unwrap().await.unwrap();
    }
    for _ in 0..total {
        drop(next(&mut consumer).await.nack_later(Nack::new("no")));
    }
    until(&client, |view| view.dead == total).await;
    let most = DeadFilter {
        limit: Some(total - 1),
        ..DeadFilter::default()
    };
    let purged = client.purge_dead_letters("orders", "billing", most);
    assert_eq!(purged.await.unwrap(), total - 1);

    let dead = "orders.billing.dead";
    let page = client.peek(dead, Offset(0), 10).await.unwrap();
    assert_eq!((page.messages.len(), page.more), (0, true));
    assert_eq!(page.next, Offset(1_000));
    let page = client.peek(dead, page.next, 10).await.unwrap();
    let found: Vec<_> = page.messages.iter().map(|message| message.offset).collect();
    assert_eq!((found, page.more), (vec![Offset(total - 1)], false));
    broker.shutdown().await.unwrap();
}

/// A job keeps them, and so does every snapshot.
#[tokio::test]
async fn dead_letters_are_chosen_by_a_bounded_number_of_offsets() {
    let (broker, client) = broker().await;
    drop(subscribe(&client, "billing", quick_retries(1, 1)).await);
    let filter = |count| DeadFilter {
        offsets: vec![Offset(1); count],
        ..DeadFilter::default()
    };
    let purged = client.purge_dead_letters("orders", "billing", filter(DEAD_OFFSETS_MAX));
    assert_eq!(purged.await.unwrap(), 0);
    let too_many = filter(DEAD_OFFSETS_MAX + 1);
    let purged = client.purge_dead_letters("orders", "billing", too_many.clone());
    let error = purged.await.unwrap_err();
    assert!(error.to_string().contains("1000 offsets"), "{error}");
    let target = RedriveTarget::Subscription;
    let redriven = client.redrive("orders", "billing", too_many, None, target);
    let error = redriven.await.unwrap_err();
    assert!(error.to_string().contains("1000 offsets"), "{error}");
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_largest_message_with_the_longest_story_is_delivered_as_a_dead_letter() {
    let (broker, client) = broker().await;
    let name = "b".repeat(150);
    let failing = client
        .subscribe("orders", &name)
        .consumer_name("c".repeat(200));
    let failing = failing.create(quick_retries(0, 10), StartAt::Earliest);
    let mut consumer = failing.open().await.unwrap();
    let mut largest = Message::new(vec![7; PAYLOAD_BYTES_MAX]);
    largest.key = vec![8; KEY_BYTES_MAX].into();
    let value = vec![9; HEADERS_BYTES_MAX - 7];
    largest.headers.push(("h".to_owned(), value.into()));
    producer(&client).await.send(largest).await.unwrap();
    for _ in 0..10 {
        let nack = Nack::new("x".repeat(REASON_BYTES_MAX)).code(u32::MAX);
        next(&mut consumer).await.nack(nack).await.unwrap();
    }

    let dead = client.subscribe(format!("orders.{name}.dead"), "look");
    let dead = dead.create(SubscriptionConfig::default(), StartAt::Earliest);
    let letter = next(&mut dead.open().await.unwrap()).await;
    assert_eq!(letter.payload().len(), PAYLOAD_BYTES_MAX);
    let told = letter.headers().filter(|(name, _)| name.starts_with("mp-"));
    let bytes: usize = told.map(|(name, value)| 6 + name.len() + value.len()).sum();
    assert!((4_100..EXTRA_BYTES_MAX).contains(&bytes), "{bytes} bytes");
    let history = letter.header("mp-dead-history").unwrap();
    assert_eq!(history.iter().filter(|&&byte| byte == b'\n').count(), 10);
    letter.ack().await.unwrap();
    broker.shutdown().await.unwrap();
}

/// Every dead letter of `billing`, read as a listing reads them.
async fn by_pages(client: &Client) -> Vec<DeadLetterView> {
    let (mut found, mut from) = (Vec::new(), Offset(0));
    loop {
        let page = client.dead_letters("orders", "billing", from, 1_000);
        let page = page.await.unwrap();
        found.extend(page.letters);
        if !page.more {
            return found;
        }
        assert!(page.next > from, "a page goes on behind the one before");
        from = page.next;
    }
}
