//! Health and metrics, as a probe asks for them.

use std::net::SocketAddr;
use std::time::Duration;

use millpond_broker::EmbeddedBroker;
use millpond_client::{Client, Message, Nack, StartAt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::common::{PATIENCE, broker_with, next, producer, publish, quick_retries, subscribe};

async fn broker() -> (EmbeddedBroker, Client, SocketAddr) {
    let (broker, client) =
        broker_with(|config| config.http = Some(([127, 0, 0, 1], 0).into())).await;
    let http = broker.broker().http_addr().unwrap();
    (broker, client, http)
}

/// Status and body.
pub async fn get(at: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {at}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    timeout(PATIENCE, read).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

#[tokio::test]
async fn a_broker_that_serves_is_healthy_and_ready() {
    let (broker, _client, http) = broker().await;
    assert_eq!(get(http, "/healthz").await, (200, "ok\n".to_owned()));
    assert_eq!(get(http, "/ready").await, (200, "ready\n".to_owned()));
    assert_eq!(get(http, "/nothing").await.0, 404);
    broker.shutdown().await.unwrap();
    assert!(TcpStream::connect(http).await.is_err(), "it still listens");
}

/// Bytes that one of the parts of the memory budget has lent.
async fn lent(http: SocketAddr, part: &str) -> f64 {
    let (_, text) = get(http, "/metrics").await;
    let name = format!("millpond_memory_bytes{{budget=\"{part}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&name));
    value.unwrap().parse().unwrap()
}

#[tokio::test]
async fn answers_to_many_producers_are_lent_a_window_that_holds_them() {
    let (broker, client, http) = broker().await;
    let mut producers = Vec::new();
    for _ in 0..200 {
        producers.push(producer(&client).await);
    }
    assert_eq!(lent(http, "quic_send").await, 0.0, "nobody needed any yet");
    let mut receipts = Vec::new();
    for nth in 0..10 * producers.len() {
        let producer = &producers[nth % producers.len()];
        receipts.push(producer.enqueue(Message::new("x")).await.unwrap());
    }
    for receipt in receipts {
        receipt.await.unwrap();
    }
    assert!(lent(http, "quic_send").await > 0.0);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn every_family_of_metrics_is_there_and_counts() {
    let (broker, client, http) = broker().await;
    let mut consumer = subscribe(&client, "billing", quick_retries(5, 2)).await;
    publish(&client, &["acked", "dead"]).await;
    next(&mut consumer).await.ack().await.unwrap();
    for _ in 0..2 {
        let failed = Nack::new("no").code(7);
        next(&mut consumer).await.nack(failed).await.unwrap();
    }
    publish(&client, &["taken away"]).await;
    let taken = next(&mut consumer).await;
    client
        .seek("orders", "billing", StartAt::Latest)
        .await
        .unwrap();
    let named = client.producer("orders").id("p");
    let old = named.open().await.unwrap();
    old.send(Message::new("waits")).await.unwrap();
    let new = client.producer("orders").id("p").first_sequence(1);
    let new = new.open().await.unwrap();
    new.send(Message::new("waits")).await.unwrap();
    let later = Message {
        delay_ms: 60_000,
        ..Message::new("later")
    };
    producer(&client).await.send(later).await.unwrap();
    assert!(old.send(Message::new("fenced")).await.is_err());

    let (status, text) = get(http, "/metrics").await;
    assert_eq!(status, 200);
    for family in [
        "messages",
        "oldest_ready_age_seconds",
        "next_due_timestamp_seconds",
        "attempts",
        "dead",
        "dead_letters",
        "dead_letters_oldest_age_seconds",
        "redelivery_late_seconds",
        "leases_lost",
        "dedup_hits",
        "producers_fenced",
        "sync_seconds",
        "commit_group_records",
        "commit_group_bytes",
        "log_bytes",
        "log_segments",
        "pinned_bytes",
        "disk_reserve_bytes",
        "recovery_seconds",
        "connections",
        "streams",
        "memory_bytes",
    ] {
        let described = format!("# TYPE millpond_{family} ");
        assert!(
            text.contains(&described),
            "{family} is missing from\n{text}"
        );
    }
    for (name, labels, at_least) in [
        ("dead_total", &["reason=\"max_attempts\""][..], 1.0),
        ("dead_letters", &["orders.billing.dead"], 1.0),
        (
            "dead_letters_oldest_age_seconds",
            &["orders.billing.dead"],
            0.001,
        ),
        ("dedup_hits_total", &[], 1.0),
        ("producers_fenced_total", &[], 1.0),
        ("connections", &[], 1.0),
        ("sync_seconds_count", &[], 5.0),
        ("attempts_total", &["outcome=\"nack\"", "code=\"7\""], 2.0),
        ("leases_lost_total", &[], 1.0),
    ] {
        let found = value(&text, name, labels);
        assert!(
            found >= Some(at_least),
            "{name} {labels:?}: {found:?} in\n{text}"
        );
    }
    assert!(text.ends_with("# EOF\n"));
    drop(taken);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn who_is_slow_to_ask_keeps_nobody_from_an_answer() {
    let (broker, _client, http) = broker().await;
    let mut slow = Vec::new();
    for _ in 0..30 {
        let mut stream = TcpStream::connect(http).await.unwrap();
        stream.write_all(b"GET /metrics HTT").await.unwrap();
        slow.push(stream);
    }
    let asked = timeout(Duration::from_secs(5), get(http, "/healthz")).await;
    assert_eq!(asked.expect("an answer in time").0, 200);
    broker.shutdown().await.unwrap();
}

/// The value of the first sample of this name with all these labels.
fn value(text: &str, name: &str, labels: &[&str]) -> Option<f64> {
    let name = format!("millpond_{name}");
    let line = text.lines().find(|line| {
        line.strip_prefix(&name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}
