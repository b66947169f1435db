//! Producers: once each, in order, slowed when there is no room.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use millpond_client::{
    Client, DeadReason, Error, ErrorCode, Message, MessageError, Offset, OnLimit, Producer,
    SendReceipt, Sequence, TopicConfig, TopicPatch,
};
use millpond_protocol::limits::{PAYLOAD_BYTES_MAX, STREAM_PRODUCERS_MAX};

use crate::common::{
    broker, builder, connect, letters, next, producer, quick_retries, subscribe, text,
};

#[tokio::test]
async fn what_a_new_process_sends_again_is_recognised_with_its_original_offsets() {
    let (broker, client) = broker().await;
    let ledger = named(&client, 1).await;
    let mut first = Vec::new();
    for n in 1..=5 {
        first.push(ledger.send(Message::new(n.to_string())).await.unwrap());
    }
    client.close().await;

    let client = connect(&broker).await;
    let again = named(&client, 1).await;
    for (n, before) in (1..=5).zip(&first) {
        let receipt = again.send(Message::new(n.to_string())).await.unwrap();
        assert!(receipt.duplicate && !before.duplicate);
        assert_eq!(
            (receipt.offset, receipt.sequence),
            (before.offset, before.sequence)
        );
    }
    let new = again.send(Message::new("6")).await.unwrap();
    assert_eq!((new.offset, new.duplicate), (Some(Offset(5)), false));
    assert_eq!(client.topic("orders").await.unwrap().next, Offset(6));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn dedup_outlives_a_restart_of_the_broker() {
    let (broker, client) = broker().await;
    let ledger = named(&client, 1).await;
    let before = ledger.send(Message::new("a")).await.unwrap();
    ledger.close().await;
    let broker = broker.restart().await.unwrap();
    let again = named(&client, 1).await;
    let after = again.send(Message::new("a")).await.unwrap();
    let want = SendReceipt {
        duplicate: true,
        ..before
    };
    assert_eq!(after, want);

    // Without a first sequence a producer goes on where the last one ended.
    let goes_on = client.producer("orders").id("ledger").open().await.unwrap();
    assert_eq!(goes_on.last_sequence(), Sequence(1));
    let new = goes_on.send(Message::new("b")).await.unwrap();
    assert_eq!((new.offset, new.sequence), (Some(Offset(1)), Sequence(2)));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_second_producer_of_the_same_id_fences_the_first() {
    let (broker, client) = broker().await;
    let other = connect(&broker).await;
    let old = named(&client, 1).await;
    old.send(Message::new("old")).await.unwrap();
    let new = other.producer("orders").id("ledger").open().await.unwrap();
    let fenced = old.send(Message::new("too late")).await;
    assert_eq!(fenced, Err(Error::Fenced));
    let receipt = new.send(Message::new("new")).await.unwrap();
    assert_eq!(
        (receipt.offset, receipt.sequence),
        (Some(Offset(1)), Sequence(2))
    );
    assert_eq!(old.send(Message::new("later")).await, Err(Error::Fenced));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_users_own_sequences_may_skip_but_not_fall() {
    let (broker, client) = broker().await;
    let outbox = named(&client, 1).await;
    let row = |n: u64| (Message::new(n.to_string()), Sequence(n));
    for (offset, n) in [7, 19, 1_000_000].into_iter().enumerate() {
        let (message, sequence) = row(n);
        let receipt = outbox.send_with_sequence(message, sequence).await.unwrap();
        assert_eq!(receipt.offset, Some(Offset(offset as u64)));
    }
    let (message, sequence) = row(19);
    let error = outbox
        .send_with_sequence(message, sequence)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::SequenceNotRising { .. }), "{error}");

    let again = named(&connect(&broker).await, 1).await;
    for (n, offset) in [(19, 1), (1_000_000, 2)] {
        let (message, sequence) = row(n);
        let receipt = again.send_with_sequence(message, sequence).await.unwrap();
        assert_eq!(
            (receipt.offset, receipt.duplicate),
            (Some(Offset(offset)), true)
        );
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn messages_of_one_producer_keep_the_order_in_which_they_were_enqueued() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 3)).await;
    let producer = producer(&client).await;
    let mut receipts = Vec::new();
    for n in 0..500 {
        receipts.push(producer.enqueue(Message::new(n.to_string())).await.unwrap());
    }
    for (n, receipt) in receipts.into_iter().enumerate() {
        assert_eq!(receipt.await.unwrap().offset, Some(Offset(n as u64)));
    }
    for n in 0..500 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), n.to_string());
        delivery.ack_later().await.unwrap();
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_full_window_is_backpressure_at_once_for_try_send() {
    let (broker, client) = broker().await;
    let narrow = client.producer("orders").window_messages(2);
    let producer = narrow.open().await.unwrap();
    // Nothing runs between these calls, so nothing can be answered.
    let first = producer.try_send(Message::new("1")).unwrap();
    let second = producer.try_send(Message::new("2")).unwrap();
    let full = producer.try_send(Message::new("3")).err();
    assert!(
        matches!(
            full,
            Some(Error::Backpressure { .. } | Error::Timeout { .. })
        ),
        "{full:?}"
    );
    assert!(full.unwrap().is_retriable());
    first.await.unwrap();
    second.await.unwrap();
    let third = producer.send(Message::new("3")).await.unwrap();
    assert_eq!(third.offset, Some(Offset(2)));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_topic_at_its_limit_refuses_until_consumers_catch_up() {
    let (broker, client) = broker().await;
    limit_to_three(&client, OnLimit::RefusePublish).await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 3)).await;
    let hurried = client
        .producer("orders")
        .send_timeout(Duration::from_millis(350));
    let producer = hurried.open().await.unwrap();
    for n in 0..3 {
        producer.send(Message::new(n.to_string())).await.unwrap();
    }
    let limit = ErrorCode::BacklogLimit;
    // Given up in the very moment that it was tried once more, its outcome is unknown.
    let mut refused = producer.send(Message::new("3")).await;
    while refused == Err(Error::Ambiguous) {
        refused = producer.send(Message::new("3")).await;
    }
    assert!(
        matches!(refused, Err(Error::Backpressure { reason, .. }) if reason == limit),
        "{refused:?}"
    );
    assert_eq!(
        producer.pressure().map(|pressure| pressure.reason),
        Some(limit)
    );

    let patient = client.producer("orders").open().await.unwrap();
    let waiting = tokio::spawn(async move { patient.send(Message::new("4")).await });
    next(&mut consumer).await.ack().await.unwrap();
    let receipt = waiting.await.unwrap().unwrap();
    assert_eq!(
        receipt.offset,
        Some(Offset(3)),
        "what was refused has no offset"
    );
    for want in ["1", "2", "4"] {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), want);
        delivery.ack().await.unwrap();
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_topic_that_drops_at_its_limit_keeps_the_newest() {
    let (broker, client) = broker().await;
    limit_to_three(&client, OnLimit::Drop).await;
    let mut consumer = paused(&client).await;
    publish_six(&client).await;
    client
        .resume_subscription("orders", "billing")
        .await
        .unwrap();
    for want in 3..6 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), want.to_string());
        delivery.ack().await.unwrap();
    }
    assert!(letters(&client).await.is_empty());
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_topic_that_dead_letters_at_its_limit_files_the_oldest() {
    let (broker, client) = broker().await;
    limit_to_three(&client, OnLimit::DeadLetter).await;
    let mut consumer = paused(&client).await;
    publish_six(&client).await;
    client
        .resume_subscription("orders", "billing")
        .await
        .unwrap();
    for want in 3..6 {
        let delivery = next(&mut consumer).await;
        assert_eq!(text(&delivery), want.to_string());
        delivery.ack().await.unwrap();
    }
    let letters = letters(&client).await;
    assert_eq!(crate::common::texts(&letters), ["0", "1", "2"]);
    assert!(
        letters
            .iter()
            .all(|letter| letter.reason == DeadReason::Expired)
    );
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_largest_message_passes_and_one_byte_more_is_refused_alone() {
    let (broker, client) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(10, 3)).await;
    let producer = producer(&client).await;
    let largest: Vec<u8> = (0..PAYLOAD_BYTES_MAX)
        .map(|n| (n * 31 / 128) as u8)
        .collect();
    let largest = Bytes::from(largest);
    let mut with_headers = Message::new(largest.clone());
    with_headers.key = Bytes::from(vec![7; 1_024]);
    with_headers.headers = vec![("h".into(), Bytes::from(vec![8; (64 << 10) - 7]))];
    let small = producer.enqueue(Message::new("before")).await.unwrap();
    let large = producer.enqueue(with_headers).await.unwrap();
    let error = producer
        .enqueue(Message::new(vec![0; PAYLOAD_BYTES_MAX + 1]))
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Some(ErrorCode::TooLarge), "{error}");
    let after = producer.enqueue(Message::new("after")).await.unwrap();
    for (receipt, offset) in [(small, 0), (large, 1), (after, 2)] {
        assert_eq!(receipt.await.unwrap().offset, Some(Offset(offset)));
    }
    assert_eq!(text(&next(&mut consumer).await), "before");
    let delivery = next(&mut consumer).await;
    assert!(delivery.payload() == &largest, "the bytes changed");
    assert_eq!(delivery.key().len(), 1_024);
    delivery.ack().await.unwrap();
    assert_eq!(text(&next(&mut consumer).await), "after");
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_reserved_header_and_an_unknown_topic_are_refused_with_their_codes() {
    let (broker, client) = broker().await;
    let producer = producer(&client).await;
    let mut forged = Message::new("m");
    forged.headers.push(("MP-dead-reason".into(), Bytes::new()));
    let error = producer.send(forged).await.unwrap_err();
    assert!(
        matches!(error, Error::Message(MessageError::ReservedHeader(_))),
        "{error}"
    );
    assert_eq!(error.code(), Some(ErrorCode::ReservedHeader));

    let error = client.producer("nowhere").open().await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::UnknownTopic), "{error}");
    assert!(error.to_string().contains("nowhere") && !error.is_retriable());
    let error = client
        .subscribe("orders", "nobody")
        .open()
        .await
        .err()
        .unwrap();
    assert_eq!(
        error.code(),
        Some(ErrorCode::UnknownSubscription),
        "{error}"
    );
    let names: Vec<_> = client.list_topics().await.unwrap();
    assert_eq!(names.len(), 1, "asking creates nothing");
    broker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_producers_than_a_stream_holds_are_served_on_two() {
    let (broker, client) = broker().await;
    let opening = |_| async { client.producer("orders").open().await.unwrap() };
    let producers: Vec<Producer> = stream::iter(0..=STREAM_PRODUCERS_MAX)
        .map(opening)
        .buffered(64)
        .collect()
        .await;
    let mut offsets = Vec::new();
    for producer in [&producers[0], &producers[STREAM_PRODUCERS_MAX]] {
        let receipt = producer.send(Message::new("m")).await.unwrap();
        offsets.push(receipt.offset);
    }
    assert_eq!(offsets, [0, 1].map(|offset| Some(Offset(offset))));
    drop(producers);
    client.close().await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_send_without_a_broker_fails_in_time_and_is_told_apart_from_a_refusal() {
    let (broker, client) = broker().await;
    let patience = Duration::from_millis(400);
    let url = broker.url();
    let hurried = builder(&broker).send_timeout(patience);
    let other = hurried.connect(&url).await.unwrap();
    let producer = producer(&other).await;
    broker.shutdown().await.unwrap();
    let began = std::time::Instant::now();
    let error = producer.send(Message::new("m")).await.unwrap_err();
    assert!(error.is_retriable(), "{error}");
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    drop(client);
}

async fn named(client: &Client, first_sequence: u64) -> Producer {
    let named = client.producer("orders").id("ledger");
    named.first_sequence(first_sequence).open().await.unwrap()
}

async fn limit_to_three(client: &Client, on_limit: OnLimit) {
    let patch = TopicPatch {
        max_messages: Some(Some(3)),
        on_limit: Some(on_limit),
        ..TopicPatch::default()
    };
    client.update_topic("orders", patch).await.unwrap();
}

async fn paused(client: &Client) -> millpond_client::Subscription {
    let consumer = subscribe(client, "billing", quick_retries(10, 3)).await;
    client
        .pause_subscription("orders", "billing")
        .await
        .unwrap();
    consumer
}

async fn publish_six(client: &Client) {
    let producer = producer(client).await;
    for n in 0..6 {
        producer.send(Message::new(n.to_string())).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_topics_are_made_and_published_to_over_one_connection() {
    let (_broker, client) = broker().await;
    let producers: Vec<_> = stream::iter(0..1_000)
        .map(|nth| {
            let client = &client;
            async move {
                let topic = format!("topic-{nth}");
                let created = client.create_topic(&topic, TopicConfig::default()).await;
                created.unwrap();
                client.producer(&topic).open().await.unwrap()
            }
        })
        .buffered(64)
        .collect()
        .await;
    let mut receipts = Vec::new();
    for nth in 0..8_000 {
        let message = Message::new(vec![7; 1_024]);
        receipts.push(
            producers[nth % producers.len()]
                .enqueue(message)
                .await
                .unwrap(),
        );
    }
    for receipt in receipts {
        receipt.await.unwrap();
    }
}
