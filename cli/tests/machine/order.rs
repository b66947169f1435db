//! The order of system calls in a real publish: write, sync, acknowledgement. A device that keeps what was
//! written without a sync hides a missing one from every power cut; this does not.
//!
//! Each durable write is made slow by 20 ms, so that an acknowledgement that does not wait for it comes
//! before it and not a moment behind.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use millpond_client::{Message, TopicConfig};

use crate::broker::{Launch, write_config};
use crate::clients::connect;
use crate::disk::LoopDisk;
use crate::strace::{Call, Strace, durable_at};
use crate::world::{World, runtime};

/// Folders in which the loader looks for libraries first.
const SEARCHED: usize = 200;
/// More files than any thread opens in a test.
const OPENED_MAX: usize = 1_000;
/// Messages that are published one by one.
const MESSAGES: u32 = 24;

/// When a message was acknowledged, in seconds since 1970.
struct Acknowledged {
    marker: String,
    at: f64,
}

#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn every_acknowledgement_follows_the_sync_of_its_write() {
    let disk = LoopDisk::new(128);
    let scratch = tempfile::tempdir().expect("a folder");
    let launch = prepared(disk.path().join("data"), scratch.path());
    let plain = fallback(&launch, scratch.path());
    let direct =
        Strace::new(scratch.path().join("direct")).inject("pwrite64:delay_exit=20000:when=6+");
    let synced = plain.clone().inject("fdatasync:delay_enter=20000:when=2+");
    for (name, strace) in [("direct", direct), ("write, then sync", synced)] {
        let acknowledged = publish(&launch, &strace);
        let wrong = out_of_order(&strace.calls(), &acknowledged);
        assert!(wrong.is_empty(), "{name}: {}", wrong.join("\n"));
    }
    let planted = plain.inject("fdatasync:retval=0");
    let acknowledged = publish(&launch, &planted);
    let wrong = out_of_order(&planted.calls(), &acknowledged);
    assert_eq!(
        wrong.len(),
        MESSAGES as usize,
        "a missing sync is not noticed: {wrong:?}"
    );
    assert!(
        wrong.iter().all(|what| what.contains("never synced")),
        "{wrong:?}"
    );
    println!("durability: acknowledgements_in_order {}", 2 * MESSAGES);
    println!("durability: missing_syncs_noticed {}", wrong.len());
}

/// The same planted bug, met by a power cut: what was acknowledged is lost, and the oracle says so.
#[test]
#[ignore = "needs a machine of its own; .ci/machine runs it"]
fn a_power_cut_shows_a_missing_sync() {
    let mut disk = LoopDisk::new(256);
    let scratch = tempfile::tempdir().expect("a folder");
    let mut world = World::new(disk.path().join("data"), 1);
    world.load(Duration::ZERO);
    world.kill();
    let planted = fallback(&world.launch, scratch.path()).inject("fdatasync:retval=0");
    let started = world.start(&planted.words());
    started.unwrap_or_else(|ended| panic!("{ended:?}"));
    world.load(Duration::from_millis(100));
    disk.cut();
    world.kill();
    disk.remount();
    world.start_well();
    let wrong = world.judged();
    assert!(
        wrong.iter().any(|what| what.starts_with("I1")),
        "acknowledged messages were lost, and nobody noticed: {wrong:?}"
    );
    println!("durability: missing_sync_shown_by_cut 1");
}

/// A folder with a topic, whose broker has ended.
fn prepared(data: std::path::PathBuf, scratch: &Path) -> Launch {
    let config = scratch.join("config.toml");
    write_config(&config);
    let launch = Launch {
        data,
        config,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        stderr: scratch.join("stderr"),
    };
    let process = launch
        .start(&[])
        .unwrap_or_else(|ended| panic!("{ended:?}"));
    runtime(1).block_on(async {
        let client = connect(
            &format!("millpond://{}", process.listen),
            ca(&launch),
            "order",
        )
        .await;
        let client = client.expect("a connection");
        let created = client.create_topic("orders", TopicConfig::default()).await;
        created.expect("a topic");
    });
    assert_eq!(process.terminate().code, Some(0));
    launch
}

/// How a broker is traced that finds no direct path to its disk, so that it writes and then syncs: its
/// probe, the second opening of the lock file, fails.
///
/// Every thread counts its calls for itself, so that the call of the probe's number fails in all of them:
/// the main thread comes to the probe by so many openings that no other makes as many.
pub fn fallback(launch: &Launch, scratch: &Path) -> Strace {
    let looked = Strace::new(scratch.join("looked")).search_libraries(SEARCHED);
    let process = launch.start(&looked.words());
    let process = process.unwrap_or_else(|ended| panic!("{ended:?}"));
    process.terminate();
    let calls = looked.calls();
    let main = calls.first().expect("a traced call").thread;
    let opens: Vec<&Call> = calls
        .iter()
        .filter(|call| call.thread == main && call.name == "openat")
        .collect();
    let probe = opens
        .iter()
        .position(|call| call.arguments.contains("/LOCK") && call.arguments.contains("O_DIRECT"));
    let probe = probe.expect("the probe of the direct path") + 1;
    assert!(
        probe > OPENED_MAX,
        "the loader opens something in each folder"
    );
    Strace::new(scratch.join("fallback"))
        .search_libraries(SEARCHED)
        .inject(format!("openat:error=EINVAL:when={probe}"))
}

fn publish(launch: &Launch, strace: &Strace) -> Vec<Acknowledged> {
    let process = launch.start(&strace.words());
    let process = process.unwrap_or_else(|ended| panic!("{ended:?}"));
    let acknowledged = runtime(1).block_on(async {
        let url = format!("millpond://{}", process.listen);
        let client = connect(&url, ca(launch), "order")
            .await
            .expect("a connection");
        let producer = client.producer("orders").open().await.expect("a producer");
        let mut all = Vec::new();
        for number in 0..MESSAGES {
            let marker = format!("marker-{}-{number}-end", strace.output.display());
            let sent = producer.send(Message::new(marker.clone())).await;
            sent.expect("an acknowledgement");
            let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let at = at.expect("after 1970").as_secs_f64();
            all.push(Acknowledged { marker, at });
        }
        all
    });
    assert_eq!(process.terminate().code, Some(0));
    acknowledged
}

/// What was acknowledged before it was durable, or without ever being.
fn out_of_order(calls: &[Call], acknowledged: &[Acknowledged]) -> Vec<String> {
    let wrong = acknowledged.iter().filter_map(|message| {
        let durable = match durable_at(calls, &message.marker) {
            Ok(durable) => durable,
            Err(what) => return Some(what),
        };
        let answered = calls.iter().any(|call| {
            call.name.starts_with("sendm") && call.from >= durable && call.from <= message.at
        });
        (!answered).then(|| {
            format!(
                "{} was acknowledged at {}, and durable at {durable}",
                message.marker, message.at
            )
        })
    });
    wrong.collect()
}

fn ca(launch: &Launch) -> Vec<u8> {
    std::fs::read(launch.data.join("tls/ca.pem")).expect("the CA")
}
