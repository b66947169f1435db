//! A broker, the clients that outlive it, and those that die with it.
//!
//! ```text
//! lasting clients   two connections over all processes: they publish, consume and commit, and come back
//!                   by themselves
//! passing clients   one to each process: looks at what was found, then publishes, and is gone with the
//!                   process; the next one takes its producer over and sends what is in doubt again, or
//!                   leaves it in doubt for ever
//! ```

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use millpond_client::{
    Backoff, Client, Error, Jitter, Offset, StartAt, SubscriptionConfig, SubscriptionMode,
    TopicConfig,
};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::broker::{Ended, Launch, Process, binary, write_config};
use crate::clients::{ATTEMPTS_MAX, Consumer, Publisher, Reader, WAITS_MS, connect, seen};
use crate::history::{End, LetterSeen, SubEnd, SubNo, SubRules, TopicNo, TopicRules, TopicSeen};
use crate::record::{Counts, Lasting, Record};

/// Kept for ever and read in order; and worked on, letting go what is done.
pub const TOPICS: [&str; 2] = ["kept", "work"];
/// The stream subscription of the one, the queue subscription of the other.
pub const SUBS: [&str; 2] = ["reader", "hands"];
const READER: SubNo = 0;
const HANDS: SubNo = 1;
/// Messages of a page that is looked at.
const PAGE: u32 = 500;
/// Longest wait for progress, and for everything to come to rest: of it 10 s are the grace for sessions.
const WAIT_MAX: Duration = Duration::from_secs(40);
/// Longest that a broker which answers no more may take to end.
const END_WAIT: Duration = Duration::from_secs(5);
/// Answers to the lasting clients that make a process one under load.
const PROGRESS: u64 = 24;

pub struct World {
    pub record: Arc<Record>,
    pub launch: Launch,
    pub rng: Rng,
    process: Option<Process>,
    lasting: Runtime,
    publishers: Vec<JoinHandle<()>>,
    consumers: Vec<JoinHandle<()>>,
    publishing: watch::Sender<bool>,
    consuming: watch::Sender<bool>,
    passing: Option<Passing>,
    /// The last passing producer, if what it left in doubt is to be sent again.
    left: Option<Publisher>,
    next_key: u64,
    /// How far each topic has been looked at.
    looked: [u64; 2],
    ca: Vec<u8>,
    _scratch: TempDir,
}

/// The client that goes with the process.
struct Passing {
    runtime: Runtime,
    publishing: JoinHandle<()>,
}

impl World {
    /// A fresh store in `data`, with everybody at work.
    pub fn new(data: PathBuf, seed: u64) -> Self {
        let scratch = tempfile::tempdir().expect("a folder");
        let config = scratch.path().join("config.toml");
        write_config(&config);
        let launch = Launch {
            data,
            config,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            stderr: scratch.path().join("stderr"),
        };
        let mut world = Self {
            record: Arc::new(Record::new(topic_rules(), sub_rules())),
            launch,
            rng: Rng(seed),
            process: None,
            lasting: runtime(2),
            publishers: Vec::new(),
            consumers: Vec::new(),
            publishing: watch::Sender::new(false),
            consuming: watch::Sender::new(false),
            passing: None,
            left: None,
            next_key: 1,
            looked: [0; 2],
            ca: Vec::new(),
            _scratch: scratch,
        };
        world.begin();
        world
    }

    /// Starts the broker behind these words; it is under load when this returns.
    pub fn start(&mut self, before: &[String]) -> Result<(), Ended> {
        let mut process = self.launch.start(before)?;
        self.launch.listen = process.listen;
        let place = self.record.started();
        let floors = [READER, HANDS].map(|_| self.record.reserve());
        let passing = runtime(1);
        let looked = passing.block_on(async {
            tokio::select! {
                looked = self.look(place, floors) => looked.map_err(|error| error.to_string()),
                () = gone(&mut process) => Err("it has ended".to_owned()),
            }
        });
        self.process = Some(process);
        match looked {
            Ok(client) => self.pass(passing, client),
            Err(error) => {
                // It may be about to end.
                self.wait_for_end(END_WAIT);
                assert!(self.is_gone(), "the broker cannot be looked at: {error}");
                return Err(self.ended());
            }
        }
        Ok(())
    }

    /// Starts it with nothing in its way.
    pub fn start_well(&mut self) {
        if let Err(ended) = self.start(&[]) {
            panic!("the broker does not start: {ended:?}");
        }
    }

    /// Returns when the lasting clients have got answers from this process, and after a while more;
    /// or once it is gone.
    pub fn load(&mut self, more: Duration) {
        let before = self.record.counts();
        let deadline = Instant::now() + WAIT_MAX;
        let lacks = |now: Counts| {
            now.lasting < before.lasting + PROGRESS || now.settled < before.settled + PROGRESS
        };
        while lacks(self.record.counts()) && !self.is_gone() {
            assert!(
                Instant::now() < deadline,
                "I11: no progress: {before:?}, {:?}; {:?}",
                self.record.counts(),
                self.record.faults()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(more);
    }

    /// A load of random length.
    pub fn load_for_a_while(&mut self) {
        let more = Duration::from_millis(self.rng.below(90));
        self.load(more);
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Ended {
        let process = self.process.take().expect("a broker that runs");
        let ended = process.kill();
        self.stopped();
        ended
    }

    /// Asks it to end, and waits.
    pub fn terminate(&mut self) -> Ended {
        let process = self.process.take().expect("a broker that runs");
        let ended = process.terminate();
        self.stopped();
        ended
    }

    /// Waits until it has ended by itself.
    pub fn ended(&mut self) -> Ended {
        let mut process = self.process.take().expect("a broker that runs");
        let ended = process.ended();
        self.stopped();
        ended
    }

    /// SIGKILL, unless it has ended by itself.
    pub fn kill_if_there(&mut self) -> Ended {
        if self.is_gone() {
            self.ended()
        } else {
            self.kill()
        }
    }

    fn wait_for_end(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while !self.is_gone() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn is_gone(&mut self) -> bool {
        self.process.as_mut().is_none_or(Process::is_gone)
    }

    /// Status and body of what HTTP answers.
    pub fn get(&self, path: &str) -> (u16, String) {
        let process = self.process.as_ref().expect("a broker that runs");
        let mut stream = TcpStream::connect(process.http).expect("HTTP");
        let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", process.http);
        stream.write_all(request.as_bytes()).expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        (status.expect("a status"), body.to_owned())
    }

    /// Waits until readiness is as wanted; what it says then.
    pub fn wait_for_ready(&self, wanted: u16) -> String {
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            let (status, body) = self.get("/ready");
            if status == wanted {
                return body;
            }
            assert!(Instant::now() < deadline, "/ready stays {status}: {body}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A client command for this broker: its exit code and what it says.
    pub fn command(&self, words: &[&str]) -> (Option<i32>, String) {
        let output = std::process::Command::new(binary())
            .args(words)
            .arg("--server")
            .arg(format!("millpond://{}", self.launch.listen))
            .arg("--data")
            .arg(&self.launch.data)
            .output()
            .expect("the command");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    }

    /// Stops it, as one whose machine is suspended, for so long.
    pub fn stand_still(&self, time: Duration) {
        let process = self.process.as_ref().expect("a broker that runs");
        self.record.breaks();
        process.signal(Signal::STOP);
        std::thread::sleep(time);
        self.record.breaks();
        process.signal(Signal::CONT);
    }

    /// Lets everything come to rest, ends the broker well, and says all that is wrong.
    pub fn finish(mut self) -> Vec<String> {
        let end = self.rest();
        let ended = self.terminate();
        let mut wrong = self.record.judged(Some(end));
        if ended.code != Some(0) {
            wrong.push(format!("it did not end well: {ended:?}"));
        }
        wrong
    }

    /// The same where everything must be right.
    pub fn finish_well(self) {
        let wrong = self.finish();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// What is wrong up to now, without an end.
    pub fn judged(&self) -> Vec<String> {
        self.record.judged(None)
    }

    /// A client of its own for a test that asks something itself.
    pub fn ask<T>(&self, ask: impl AsyncFnOnce(Client) -> T) -> T {
        self.lasting.block_on(async {
            let client = self.connect("asks").await.expect("a connection");
            ask(client).await
        })
    }

    fn begin(&mut self) {
        let process = self.launch.start(&[]);
        let process = process.unwrap_or_else(|ended| panic!("it does not start: {ended:?}"));
        self.launch.listen = process.listen;
        self.process = Some(process);
        self.ca = std::fs::read(self.launch.data.join("tls/ca.pem")).expect("the CA");
        let place = self.record.started();
        self.record.found(place, Vec::new());
        let (first, second) = self.lasting.block_on(async {
            let first = self.connect("first").await.expect("a connection");
            let second = self.connect("second").await.expect("a connection");
            create(&first).await.expect("topics and subscriptions");
            (first, second)
        });
        for (client, topics) in [(&first, [0, 1]), (&second, [1, 0])] {
            for topic in topics {
                self.publish(client, topic);
            }
        }
        for (session, client) in [(1, &first), (2, &second)] {
            self.consume(client, session);
        }
        self.read(&first, 3);
        let passing = runtime(1);
        let client = passing
            .block_on(self.connect("passing"))
            .expect("a connection");
        self.pass(passing, client);
    }

    fn publish(&mut self, client: &Client, topic: TopicNo) {
        let publisher = self.publisher(topic, Lasting::Yes);
        let opening = client.producer(TOPICS[topic]).id(publisher.id()).open();
        let producer = self.lasting.block_on(opening).expect("a producer");
        let stop = self.publishing.subscribe();
        let task = publisher.run(producer, 0, self.record.clone(), stop);
        self.publishers.push(self.lasting.spawn(task));
    }

    fn consume(&mut self, client: &Client, session: u64) {
        let opening = client.subscribe(TOPICS[1], SUBS[HANDS]).prefetch(64).open();
        let subscription = self.lasting.block_on(opening).expect("a consumer");
        let consumer = Consumer {
            sub: HANDS,
            session,
            record: self.record.clone(),
        };
        let task = consumer.run(subscription, self.consuming.subscribe());
        self.consumers.push(self.lasting.spawn(task));
    }

    fn read(&mut self, client: &Client, session: u64) {
        let opening = client.subscribe(TOPICS[0], SUBS[READER]).open_stream();
        let stream = self.lasting.block_on(opening).expect("a reader");
        let reader = Reader {
            sub: READER,
            session,
            record: self.record.clone(),
        };
        let task = reader.run(stream, self.consuming.subscribe());
        self.consumers.push(self.lasting.spawn(task));
    }

    fn publisher(&mut self, topic: TopicNo, lasting: Lasting) -> Publisher {
        let key = self.next_key;
        self.next_key += 1;
        Publisher {
            key,
            topic,
            lasting,
            burst: 2,
            pause: Duration::from_millis(10),
        }
    }

    /// A producer that goes with the process: the last one again, or another.
    fn pass(&mut self, runtime: Runtime, client: Client) {
        let topic = self.rng.below(2) as usize;
        let again = self.left.take().filter(|_| self.rng.below(2) == 0);
        let publisher = again.unwrap_or_else(|| self.publisher(topic, Lasting::No));
        self.left = Some(publisher.clone());
        let (record, stop) = (self.record.clone(), self.publishing.subscribe());
        let publishing = runtime.spawn(async move {
            let reach = record.reach(publisher.key);
            let topic = TOPICS[publisher.topic];
            let builder = client.producer(topic).id(publisher.id());
            // When the broker is gone before it is open there is nothing to send.
            let Ok(producer) = builder.first_sequence(reach.accepted + 1).open().await else {
                return;
            };
            publisher.run(producer, reach.accepted, record, stop).await;
        });
        self.passing = Some(Passing {
            runtime,
            publishing,
        });
    }

    fn stopped(&mut self) {
        self.process = None;
        if let Some(passing) = self.passing.take() {
            passing.runtime.shutdown_background();
        }
        self.record.stopped();
    }

    /// Looks at what a process has found: messages that were not looked at before, and floors.
    async fn look(&mut self, place: usize, floors: [usize; 2]) -> Result<Client, Error> {
        let client = self.connect("passing").await?;
        let mut topics = Vec::new();
        for topic in 0..TOPICS.len() {
            let seen = look_at(&client, topic, self.looked[topic]).await?;
            topics.push(seen);
        }
        for (sub, place) in floors.into_iter().enumerate() {
            let view = client.subscription(TOPICS[sub], SUBS[sub]).await?;
            self.record.floor(place, sub, view.floor.0);
        }
        for (topic, until) in self.record.found(place, topics) {
            self.looked[topic] = until;
        }
        Ok(client)
    }

    /// Stops publishing, waits until all is settled, and looks at everything.
    fn rest(&mut self) -> End {
        self.publishing.send_replace(true);
        let publishers = std::mem::take(&mut self.publishers);
        self.wait_for(publishers, "producers");
        if let Some(passing) = &mut self.passing {
            // What a full disk held up may still be on its way.
            let publishing = &mut passing.publishing;
            let ended = self
                .lasting
                .block_on(async { tokio::time::timeout(WAIT_MAX, publishing).await });
            match ended {
                Ok(ended) => ended.expect("a client's task"),
                Err(_) => self
                    .record
                    .fault("I11: the passing producer does not come to an end".to_owned()),
            }
        }
        let end = self.lasting.block_on(async {
            let client = self.connect("looks").await.expect("a connection");
            let mut end = End::default();
            for sub in [READER, HANDS] {
                if let Err(stuck) = at_rest(&client, sub).await {
                    end.stuck.push(stuck);
                }
            }
            for topic in 0..TOPICS.len() {
                let seen = look_at(&client, topic, 0).await;
                end.topics.push(seen.expect("the topic"));
            }
            for sub in [READER, HANDS] {
                let seen = sub_end(&client, sub).await;
                end.subs.push(seen.expect("the subscription"));
            }
            end
        });
        self.consuming.send_replace(true);
        let consumers = std::mem::take(&mut self.consumers);
        self.wait_for(consumers, "consumers");
        end
    }

    /// Waits until they have all their answers.
    fn wait_for(&self, tasks: Vec<JoinHandle<()>>, what: &str) {
        let ends = async {
            for task in tasks {
                task.await.expect("a client's task");
            }
        };
        let ended = self
            .lasting
            .block_on(async { tokio::time::timeout(WAIT_MAX, ends).await });
        if ended.is_err() {
            self.record
                .fault(format!("I11: {what} do not come to an end"));
        }
    }

    async fn connect(&self, name: &str) -> Result<Client, Error> {
        let url = format!("millpond://{}", self.launch.listen);
        connect(&url, self.ca.clone(), name).await
    }
}

/// Returns once it has ended by itself.
async fn gone(process: &mut Process) {
    while !process.is_gone() {
        sleep(Duration::from_millis(1)).await;
    }
}

pub fn runtime(threads: usize) -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn topic_rules() -> Vec<TopicRules> {
    let rules = |keeps_all| TopicRules { keeps_all };
    vec![rules(true), rules(false)]
}

fn sub_rules() -> Vec<SubRules> {
    let reader = SubRules {
        topic: 0,
        is_stream: true,
        ..SubRules::default()
    };
    let hands = SubRules {
        topic: 1,
        is_stream: false,
        max_attempts: ATTEMPTS_MAX,
        max_deliveries: SubscriptionConfig::default().max_deliveries,
        least_waits_ms: WAITS_MS.to_vec(),
    };
    vec![reader, hands]
}

async fn create(client: &Client) -> Result<(), Error> {
    let kept = TopicConfig {
        retention_ms: 24 * 3_600_000,
        ..TopicConfig::default()
    };
    client.create_topic(TOPICS[0], kept).await?;
    client
        .create_topic(TOPICS[1], TopicConfig::default())
        .await?;
    let reader = SubscriptionConfig {
        mode: SubscriptionMode::Stream,
        ..SubscriptionConfig::default()
    };
    let hands = SubscriptionConfig {
        max_attempts: ATTEMPTS_MAX,
        backoff: Backoff::List {
            waits_ms: WAITS_MS.to_vec(),
        },
        jitter: Jitter::None,
        ..SubscriptionConfig::default()
    };
    for (sub, config) in [(READER, reader), (HANDS, hands)] {
        client
            .create_subscription(TOPICS[sub], SUBS[sub], config, StartAt::Earliest)
            .await?;
    }
    Ok(())
}

/// A topic from this offset on.
async fn look_at(client: &Client, topic: TopicNo, from: u64) -> Result<TopicSeen, Error> {
    let view = client.topic(TOPICS[topic]).await?;
    let from = from.max(view.first.0);
    let mut messages = Vec::new();
    let mut at = Offset(from);
    while at < view.next {
        let page = client.peek(TOPICS[topic], at, PAGE).await?;
        let found = page.messages.iter();
        messages.extend(found.map(|found| seen(found.offset, &found.message)));
        at = page.next;
    }
    messages.retain(|seen| seen.offset < view.next.0);
    Ok(TopicSeen {
        topic,
        from,
        first_kept: view.first.0,
        next: view.next.0,
        messages,
    })
}

/// Waits until a subscription has finished with everything.
async fn at_rest(client: &Client, sub: SubNo) -> Result<(), String> {
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        let view = client.subscription(TOPICS[sub], SUBS[sub]).await;
        let view = view.map_err(|error| error.to_string())?;
        // A reader commits every so many messages, and leaves the rest.
        let is_read = sub == READER && view.backlog < crate::clients::COMMIT_EVERY;
        if view.backlog == 0 || is_read {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{view:?}"));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

async fn sub_end(client: &Client, sub: SubNo) -> Result<SubEnd, Error> {
    let view = client.subscription(TOPICS[sub], SUBS[sub]).await?;
    let mut letters = Vec::new();
    let mut from = Offset(0);
    loop {
        // A stream has none.
        if sub == READER {
            break;
        }
        let page = client
            .dead_letters(TOPICS[sub], SUBS[sub], from, PAGE)
            .await?;
        letters.extend(page.letters.iter().map(|letter| LetterSeen {
            offset: letter.source_offset.0,
            reason: letter.reason,
            failures: letter.failures,
            deliveries: letter.deliveries,
            redrives: letter.redrives,
        }));
        if !page.more {
            break;
        }
        from = page.next;
    }
    Ok(SubEnd {
        sub,
        floor: view.floor.0,
        backlog: view.backlog,
        letters,
    })
}

/// Numbers from a seed.
pub struct Rng(pub u64);

impl Rng {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % end
    }
}
