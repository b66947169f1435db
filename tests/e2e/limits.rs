//! Memory: whatever clients do, the broker's own stays within its budget.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millpond_broker::EmbeddedBroker;
use millpond_client::{Client, Message, StartAt, SubscriptionConfig, TopicConfig};
use tokio::io::AsyncReadExt;
use tokio::time::{interval, timeout};

use crate::common::PATIENCE;

/// In the environment of the process that is to be the broker.
const CHILD: &str = "MILLPOND_E2E_BROKER";
/// The name of the only test here.
const THIS_TEST: &str = "limits::memory_stays_within_its_budget_whatever_clients_do";
const BUDGET: u64 = 192 << 20;
const LOAD: Duration = Duration::from_secs(5);
/// Published at least: what the broker would hold twice over if it kept it.
const ENOUGH: u64 = 2 * BUDGET;
/// How long a busy machine may take for that.
const LOAD_MAX: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_within_its_budget_whatever_clients_do() {
    if std::env::var_os(CHILD).is_some() {
        return be_the_broker().await;
    }
    let (mut child, mut told) = spawn_broker();
    let (url, ca) = (told.next().unwrap(), told.next().unwrap());
    let pem = std::fs::read(&ca).unwrap();
    let connect = || Client::builder().ca_pem(pem.clone()).connect(&url);
    let client = connect().await.unwrap();
    client
        .create_topic("orders", TopicConfig::default())
        .await
        .unwrap();
    let before = rss_anon(&child);
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(connect().await.unwrap());
    }
    let sent = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for size in [64 << 10, 100, 3 << 20] {
        let producer = connect().await.unwrap().producer("orders").open().await;
        tasks.push(tokio::spawn(publish_for_ever(
            producer.unwrap(),
            size,
            Arc::clone(&sent),
        )));
    }
    let mut hoarders = Vec::new();
    for name in ["a", "b"] {
        let hoarder = client
            .subscribe("orders", name)
            .prefetch(1_000_000)
            .prefetch_bytes(256 << 20)
            .create(SubscriptionConfig::default(), StartAt::Earliest);
        // Nothing is ever taken from it: what comes fills its prefetch.
        hoarders.push(hoarder.open().await.unwrap());
    }
    let began = Instant::now();
    let mut most = 0;
    let mut ticks = interval(Duration::from_millis(50));
    while began.elapsed() < LOAD
        || sent.load(Ordering::Relaxed) <= ENOUGH && began.elapsed() < LOAD_MAX
    {
        ticks.tick().await;
        most = most.max(rss_anon(&child));
    }
    for task in &tasks {
        task.abort();
    }
    let bytes = sent.load(Ordering::Relaxed);
    assert!(bytes > ENOUGH, "only {bytes} bytes were published");
    assert!(
        most <= BUDGET,
        "{most} bytes, {before} before, after {bytes} published"
    );
    timeout(PATIENCE, client.ping()).await.unwrap().unwrap();
    // The end of its input is the end of the broker.
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

async fn publish_for_ever(producer: millpond_client::Producer, size: usize, sent: Arc<AtomicU64>) {
    let payload = bytes::Bytes::from(vec![7; size]);
    loop {
        // Backpressure is what is wanted here.
        if producer
            .enqueue(Message::new(payload.clone()))
            .await
            .is_ok()
        {
            sent.fetch_add(size as u64, Ordering::Relaxed);
        }
    }
}

/// This test binary once more, with this test alone, as a broker; and what it tells.
fn spawn_broker() -> (Child, impl Iterator<Item = String>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", THIS_TEST, "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let told = lines.map_while(Result::ok).filter_map(|line| {
        let (_, told) = line.split_once("broker: ")?;
        Some(told.to_owned())
    });
    (child, told)
}

async fn be_the_broker() {
    let mut ca = std::path::PathBuf::new();
    let started = EmbeddedBroker::start_with(|config| {
        config.memory.budget_bytes = BUDGET;
        config.shutdown_grace_ms = 100;
        ca = config.data.join("tls").join("ca.pem");
    });
    let broker = started.await.unwrap();
    let ca_file = ca.with_file_name("told.pem");
    std::fs::write(&ca_file, broker.ca_pem().unwrap()).unwrap();
    say(&broker.url());
    say(&ca_file.display().to_string());
    let mut rest = Vec::new();
    tokio::io::stdin().read_to_end(&mut rest).await.unwrap();
    broker.shutdown().await.unwrap();
}

fn say(what: &str) {
    use std::io::Write;
    let mut out = std::io::stdout();
    writeln!(out, "broker: {what}").unwrap();
    out.flush().unwrap();
}

/// Bytes of memory that are the process's own, not the page cache's.
fn rss_anon(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}
