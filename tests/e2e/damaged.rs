//! A body that is damaged on the disk while the broker runs: what else there is goes on.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use millpond_client::{StartAt, SubscriptionConfig};

use crate::common::{broker_with, next, publish, text};

/// Changes the one place in the log's segments where this text stands.
fn damage(data: &Path, text: &str) {
    for entry in fs::read_dir(data.join("log")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let mut places = bytes.windows(text.len());
        if let Some(place) = places.position(|there| there == text.as_bytes()) {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(b"!", place as u64).unwrap();
            file.sync_all().unwrap();
            return;
        }
    }
    panic!("no segment has {text:?}");
}

/// It was handed out and is never sent, so the consumer knows nothing of it and gives no new credit for it.
#[tokio::test]
async fn a_damaged_message_costs_its_consumer_no_credit() {
    let mut data = PathBuf::new();
    let (broker, client) = broker_with(|config| data = config.data.clone()).await;
    // Nobody subscribes yet, so that they are not in memory.
    publish(&client, &["the first", "the second", "the third"]).await;
    damage(&data, "the first");
    client
        .create_subscription(
            "orders",
            "billing",
            SubscriptionConfig::default(),
            StartAt::Earliest,
        )
        .await
        .unwrap();
    let one = client.subscribe("orders", "billing").prefetch(1);
    let mut billing = one.open().await.unwrap();
    for want in ["the second", "the third"] {
        let delivery = next(&mut billing).await;
        assert_eq!(text(&delivery), want);
        delivery.ack().await.unwrap();
    }
    broker.shutdown().await.unwrap();
}
