//! Workers: so many handlers at once, panics contained, drained at the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use millpond_client::{Outcome, Reject, StartAt, WorkerStats};
use tokio::sync::{Barrier, Notify, mpsc};
use tokio::time::timeout;

use crate::common::{PATIENCE, billing, broker, letters, publish, quick_retries, until};

#[tokio::test]
async fn a_worker_runs_as_many_handlers_as_it_may_and_no_more() {
    let (broker, client) = broker().await;
    let texts: Vec<String> = (0..24).map(|n| n.to_string()).collect();
    publish_to_billing(&client, 3, &texts).await;
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    // Nobody passes before four are there: a worker that ran fewer would never end.
    let four = Arc::new(Barrier::new(4));
    let (done, mut count) = mpsc::unbounded_channel();
    let handler = {
        let (running, most) = (Arc::clone(&running), Arc::clone(&most));
        move |_job| {
            let (running, most, four) = (running.clone(), most.clone(), four.clone());
            let done = done.clone();
            async move {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                four.wait().await;
                running.fetch_sub(1, Ordering::SeqCst);
                done.send(()).unwrap();
            }
        }
    };
    let worker = client
        .subscribe("orders", "billing")
        .worker()
        .concurrency(4);
    let all = async {
        for _ in 0..24 {
            count.recv().await.unwrap();
        }
    };
    let stats = timeout(PATIENCE, worker.run(handler, all)).await;
    let stats = stats.expect("four at a time come to an end").unwrap();
    assert_eq!(stats.acked, 24);
    assert_eq!(most.load(Ordering::SeqCst), 4);
    assert_eq!(billing(&client).await.backlog, 0);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_panic_is_a_failure_of_its_message_and_of_nothing_else() {
    let (broker, client) = broker().await;
    let texts = ["good", "panics", "fails", "never", "good"].map(str::to_owned);
    publish_to_billing(&client, 2, &texts).await;
    let finished = Arc::new(Notify::new());
    let left = Arc::new(AtomicUsize::new(7));
    let handler = {
        let finished = Arc::clone(&finished);
        move |job: millpond_client::Job| {
            if left.fetch_sub(1, Ordering::SeqCst) == 1 {
                finished.notify_one();
            }
            async move {
                match &job.payload()[..] {
                    b"panics" => panic!("a bug in a handler"),
                    b"fails" => Err("no".to_owned()).into_outcome(),
                    b"never" => Outcome::Reject(Reject::new("never")),
                    _ => Outcome::Ack,
                }
            }
        }
    };
    use millpond_client::IntoOutcome;
    let worker = client
        .subscribe("orders", "billing")
        .worker()
        .concurrency(2);
    let stats = timeout(PATIENCE, worker.run(handler, finished.notified())).await;
    let stats = stats.expect("seven hand-outs are enough").unwrap();
    let want = WorkerStats {
        acked: 2,
        nacked: 4,
        rejected: 1,
        panicked: 2,
        ..WorkerStats::default()
    };
    assert_eq!(stats, want);
    let errors: BTreeMap<_, _> = letters(&client)
        .await
        .into_iter()
        .map(|letter| (letter.source_offset.0, letter.error))
        .collect();
    assert_eq!(errors.len(), 3);
    assert_eq!(errors[&1], "panic: a bug in a handler");
    assert_eq!((errors[&2].as_str(), errors[&3].as_str()), ("no", "never"));
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_stopped_worker_lets_handlers_finish_and_hands_the_rest_back() {
    let (broker, client) = broker().await;
    let texts = ["quick", "stuck", "later"].map(str::to_owned);
    publish_to_billing(&client, 1, &texts).await;
    let both = Arc::new(Barrier::new(3));
    let handler = {
        let both = Arc::clone(&both);
        move |job: millpond_client::Job| {
            let both = Arc::clone(&both);
            async move {
                both.wait().await;
                if &job.payload()[..] == b"stuck" {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    let worker = client
        .subscribe("orders", "billing")
        .worker()
        .concurrency(2)
        .drain_timeout(Duration::from_millis(500));
    let stop = async {
        both.wait().await;
    };
    let stats = timeout(PATIENCE, worker.run(handler, stop))
        .await
        .unwrap()
        .unwrap();
    let want = WorkerStats {
        acked: 1,
        released: 1,
        ..WorkerStats::default()
    };
    assert_eq!(stats, want);
    let view = until(&client, |view| view.in_flight == 0).await;
    assert_eq!(
        (view.backlog, view.dead),
        (2, 0),
        "nothing is charged for a stop"
    );
    broker.shutdown().await.unwrap();
}

async fn publish_to_billing(client: &millpond_client::Client, attempts: u32, texts: &[String]) {
    let config = quick_retries(1, attempts);
    client
        .create_subscription("orders", "billing", config, StartAt::Earliest)
        .await
        .unwrap();
    publish(
        client,
        &texts.iter().map(String::as_str).collect::<Vec<_>>(),
    )
    .await;
}
