//! One run: a broker, clients behind a bad network, a plan of faults, and a verdict.

use std::time::{Duration, Instant};

use millpond_broker::EmbeddedBroker;
use millpond_client::{Client, Offset};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::load::{self, BACKOFF, KEEP, QUEUE, STREAM, Seen, TOPIC, id_of};
use crate::oracle::{Ending, Event, judge};
use crate::proxy::{Done, Faults, Proxy};

/// One stretch of bad network.
#[derive(Clone, Copy)]
pub enum Step {
    For(Duration, Faults),
    /// Every client gets another address.
    Move,
}

/// Until everything that was sent has an answer once the network is good again: an attempt to reconnect
/// that is under way, the longest wait before another one, and time to send.
const ANSWERS_MAX: Duration = Duration::from_secs(15);
/// Until the backlog is drained after that: a session's grace, the backoff, and time to work.
const DRAIN_MAX: Duration = Duration::from_secs(20);
const PRODUCERS: u32 = 3;
const EVERY: Duration = Duration::from_millis(8);

/// Runs the plan and judges what was seen.
pub async fn run(name: &str, plan: &[Step]) {
    let seed = seed();
    println!(
        "net {name}: seed {seed}; again: MILLPOND_NET_SEED={seed} cargo test --test net {name}"
    );
    let broker = EmbeddedBroker::start_with(|config| config.shutdown_grace_ms = 300);
    let broker = broker.await.unwrap();
    let proxy = Proxy::start(broker.broker().listen_addr(), seed).await;
    let near = connect(&broker, &broker.url()).await;
    load::prepare(&near).await;
    let url = format!("millpond://{}", proxy.address);
    let seen = Seen::new();
    let (stop_sending, sending_ends) = watch::channel(false);
    let (stop_taking, taking_ends) = watch::channel(false);
    let (mut producers, mut consumers) = (JoinSet::new(), JoinSet::new());
    for number in 1..=PRODUCERS {
        let client = connect(&broker, &url).await;
        producers.spawn(load::produce(
            client,
            number,
            EVERY,
            seen.clone(),
            sending_ends.clone(),
        ));
    }
    for number in 1..=2 {
        let client = connect(&broker, &url).await;
        consumers.spawn(load::consume(
            client,
            number,
            seen.clone(),
            taking_ends.clone(),
        ));
    }
    let client = connect(&broker, &url).await;
    consumers.spawn(load::follow(client, seen.clone(), taking_ends));

    suffer(&proxy, plan).await;
    proxy.set(Faults::default());
    stop_sending.send_replace(true);
    let healed = Instant::now();
    finish(&mut producers, ANSWERS_MAX, "what was sent is answered").await;
    let answered = healed.elapsed();
    drain(&near, &seen).await;
    let drained = healed.elapsed();
    stop_taking.send_replace(true);
    finish(&mut consumers, ANSWERS_MAX, "consumers close").await;

    let ending = ending(&near).await;
    let wrong = judge(&seen.all(), &ending, BACKOFF);
    assert!(
        wrong.is_empty(),
        "net {name}, seed {seed}, of {} messages: {wrong:#?}",
        ending.topic.len()
    );
    tell(name, &seen, proxy.done().await, answered, drained);
    broker.shutdown().await.unwrap();
}

/// Like `cargo test`'s own seeds: fixed unless given.
pub fn seed() -> u64 {
    let given = std::env::var("MILLPOND_NET_SEED").ok();
    given.map_or(1, |text| {
        text.parse().expect("MILLPOND_NET_SEED is a number")
    })
}

async fn connect(broker: &EmbeddedBroker, url: &str) -> Client {
    let builder = Client::builder().ca_pem(broker.ca_pem().unwrap());
    builder.connect(url).await.unwrap()
}

async fn suffer(proxy: &Proxy, plan: &[Step]) {
    for step in plan {
        match *step {
            Step::For(time, faults) => {
                proxy.set(faults);
                sleep(time).await;
            }
            Step::Move => proxy.move_clients(),
        }
    }
}

async fn finish(tasks: &mut JoinSet<()>, limit: Duration, what: &str) {
    let all = async {
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
    };
    let done = timeout(limit, all).await;
    assert!(done.is_ok(), "{what} within {limit:?} of a good network");
}

/// Waits until everything is finished and the stream has been read.
async fn drain(near: &Client, seen: &Seen) {
    let began = Instant::now();
    loop {
        let all = near.topic(TOPIC).await.unwrap().next.0;
        let queue = near.subscription(TOPIC, QUEUE).await.unwrap();
        let read = seen.read_until();
        if queue.backlog == 0 && read == all {
            return;
        }
        assert!(
            began.elapsed() < DRAIN_MAX,
            "after {DRAIN_MAX:?} of a good network {read} of {all} were read, and {queue:#?}"
        );
        sleep(Duration::from_millis(50)).await;
    }
}

async fn ending(near: &Client) -> Ending {
    let (mut topic, mut from) = (Vec::new(), Offset(0));
    loop {
        let page = near.peek(TOPIC, from, 1_000).await.unwrap();
        for message in &page.messages {
            assert_eq!(
                message.offset.0,
                topic.len() as u64,
                "no offset is left out"
            );
            let (view, _) = millpond_client::MessageView::split(&message.message).unwrap();
            topic.push(id_of(view.payload()));
        }
        if !page.more {
            break;
        }
        from = page.next;
    }
    let queue = near.subscription(TOPIC, QUEUE).await.unwrap();
    let keep = near.subscription(TOPIC, KEEP).await.unwrap();
    let stream = near.subscription(TOPIC, STREAM).await.unwrap();
    assert_eq!(keep.backlog, topic.len() as u64, "nobody reads this one");
    assert!(stream.floor.0 <= topic.len() as u64);
    Ending {
        topic,
        backlog: queue.backlog,
        dead: queue.dead,
    }
}

fn tell(name: &str, seen: &Seen, done: Done, answered: Duration, drained: Duration) {
    let acknowledged = seen.count(|event| {
        matches!(
            event,
            Event::Published {
                offset: Some(_),
                ..
            }
        )
    });
    let unknown = seen.count(|event| matches!(event, Event::Published { offset: None, .. }));
    let delivered = seen.count(|event| matches!(event, Event::Delivered { .. }));
    let settled = seen.count(|event| matches!(event, Event::Acked { .. } | Event::Nacked { .. }));
    let faults = done.lost + done.repeated + done.damaged + done.reordered + done.cut + done.moves;
    println!("net {name}: {done:?}");
    for (what, value) in [
        ("acknowledged", acknowledged as u128),
        ("unknown", unknown as u128),
        ("delivered", delivered as u128),
        ("settled", settled as u128),
        ("faults", u128::from(faults)),
        ("answered_ms", answered.as_millis()),
        ("drained_ms", drained.as_millis()),
    ] {
        println!("durability: net_{name}_{what} {value}");
    }
}
