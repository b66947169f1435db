//! A broker: the shard's threads, the QUIC endpoint and HTTP, started together and ended in order.
//!
//! Start: lock the folder, listen, recover, serve. Stop: refuse newcomers, tell everybody to go away,
//! take settlements until the grace is over, close the connections, commit, seal.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use millpond_protocol::ErrorCode;
use millpond_protocol::control::StatusView;
use millpond_wal::storage::{FolderStorage, Mapping};
use quinn::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::allocator;
use crate::bodies::Bodies;
use crate::clock::{ANCHOR_BYTES, SystemClock, load_anchor, save_anchor};
use crate::config::Config;
use crate::disk::{DiskLevel, DiskMonitor};
use crate::http;
use crate::memory::{Class, MemoryBudget, Pressure as MemoryPressure};
use crate::metrics::{self, BrokerMetrics};
use crate::quic::{Context, Pressure, connection};
use crate::shard::{Fatal, Shard, ShardOptions};
use crate::shard_thread::{Aside, ShardHandle, ShardThread, StopError};
use crate::start_error::{Door, StartError};
use crate::{identity, tls, token, transport};

/// The folder of the log within the data folder.
pub const LOG_FOLDER: &str = "log";
/// How often the disk and the memory are looked at.
const SURROUNDINGS_EVERY: Duration = Duration::from_millis(500);
/// How often the certificate is looked at.
const CERTIFICATE_EVERY: Duration = Duration::from_secs(24 * 3_600);
/// What a producer is told to wait under pressure.
const PRESSURE_RETRY: Duration = Duration::from_millis(200);
/// How often a draining broker looks whether all leases are settled.
const SETTLED_EVERY: Duration = Duration::from_millis(20);
/// How often a stopped broker looks whether its address is free.
const RELEASED_EVERY: Duration = Duration::from_millis(1);
/// How long connections may take to close once they were told.
const CLOSE_WAIT: Duration = Duration::from_millis(500);

type Store = FolderStorage;

/// Why a running broker stopped by itself. The process should end: start it again.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error(transparent)]
    Fatal(Arc<Fatal>),
    #[error("the broker could not finish its last commit: {0}")]
    Close(Fatal),
    #[error("the broker's shard ended unexpectedly; its log tells why")]
    Gone,
    #[error("the broker could not finish its last commit in time: its disk does not answer")]
    Late,
}

/// A broker that runs in this process.
pub struct Broker {
    listen: SocketAddr,
    http: Option<SocketAddr>,
    first_token: Option<String>,
    config: Config,
    shard: ShardThread<Store>,
    context: Arc<Context<Store>>,
    endpoint: quinn::Endpoint,
    /// Gone once the endpoint has let go of its address.
    socket: Weak<dyn quinn::AsyncUdpSocket>,
    drain: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Broker {
    /// Starts a broker; when this returns it accepts connections.
    ///
    /// # Errors
    /// One sentence that says what to do. Nothing of the data folder was lost.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        config.check()?;
        let began = Instant::now();
        allocator::keep_freed_memory();
        make_folder(&config.data)?;
        let mapping = if config.log.mmap {
            Mapping::On
        } else {
            Mapping::Off
        };
        let path = config.data.join(LOG_FOLDER);
        let storage =
            FolderStorage::open(&path, mapping).map_err(|e| StartError::folder(&config.data, e))?;
        let clock = SystemClock::new();
        let wall_us = crate::clock::Clock::wall_us(&clock);
        let server = transport::server_config(&config, wall_us)?;
        let endpoint_config = identity::endpoint_config(&config.data, &config.quic)?;
        let socket = transport::bind_udp(config.listen)?;
        let (surroundings, http_address, http_task) = Surroundings::open(&config, began).await?;
        let metrics = surroundings.metrics.clone();
        let anchor =
            load_anchor(&config.data).map_err(|e| StartError::io("read", &config.data, e))?;
        let options = shard_options(&config);
        let opened = tokio::task::spawn_blocking(move || {
            Shard::open(storage, clock, anchor.as_deref(), options)
        })
        .await;
        let (mut shard, recovered) = opened
            .map_err(|e| StartError::io("recover", &config.data, std::io::Error::other(e)))?
            .map_err(|e| StartError::shard(&config.data, e))?;
        save_first_anchor(&config.data, &shard.anchor())?;
        metrics.recovered(began.elapsed());
        log_recovery(&recovered, began.elapsed());

        let first_token = first_token(&config, &mut shard)?;
        let bodies = Bodies::new(
            shard.log().reader(),
            as_usize(config.memory.cache_bytes()),
            config.read_threads,
        );
        let identity = (shard.log().store_id(), shard.log().recovery_epoch());
        let thread = ShardThread::start(shard, bodies.cache(), metrics.clone())
            .map_err(|e| StartError::io("start threads for", &config.data, e))?;
        surroundings.attach(thread.handle.clone(), bodies.cache());

        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = runtime.wrap_udp_socket(socket).and_then(|socket| {
            let held = Arc::downgrade(&socket);
            let made = quinn::Endpoint::new_with_abstract_socket(
                endpoint_config,
                Some(server),
                socket,
                runtime,
            );
            Ok((made?, held))
        });
        let (endpoint, socket) =
            endpoint.map_err(|e| StartError::listen(Door::Quic, config.listen, e))?;
        let listen = endpoint
            .local_addr()
            .map_err(|e| StartError::listen(Door::Quic, config.listen, e))?;
        let (drain, draining) = watch::channel(false);
        let (tell_pressure, pressure) = watch::channel(Pressure::default());
        let memory = surroundings.memory.clone();
        let context = Arc::new(Context::new(
            thread.handle.clone(),
            bodies,
            memory,
            metrics,
            config.clone(),
            identity,
            pressure,
            draining,
            surroundings.clone(),
        ));
        let mut tasks: Vec<_> = http_task.into_iter().collect();
        tasks.push(tokio::spawn(watch_surroundings(
            surroundings.clone(),
            thread.handle.clone(),
            tell_pressure,
        )));
        tasks.push(tokio::spawn(connection::accept(
            context.clone(),
            endpoint.clone(),
        )));
        tasks.push(tokio::spawn(renew_certificate(
            config.clone(),
            endpoint.clone(),
        )));
        surroundings.inner.serving.store(true, Ordering::Release);
        Ok(Self {
            listen,
            http: http_address,
            first_token,
            config,
            shard: thread,
            context,
            endpoint,
            socket,
            drain,
            tasks,
        })
    }

    /// Where clients connect to.
    #[must_use]
    pub fn listen_addr(&self) -> SocketAddr {
        self.listen
    }

    /// Where health and metrics are.
    #[must_use]
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http
    }

    /// The token that this start has made, if it was asked to and there was none. Shown once.
    #[must_use]
    pub fn first_token(&self) -> Option<&str> {
        self.first_token.as_deref()
    }

    /// The address as clients take it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("millpond://{}", self.listen)
    }

    /// The certificate authority that clients of this broker trust, as PEM.
    ///
    /// # Errors
    /// If the file in the data folder cannot be read.
    pub fn ca_pem(&self) -> std::io::Result<Vec<u8>> {
        std::fs::read(tls::ca_path(&self.config.data))
    }

    /// Resolves when the broker has failed by itself: nothing is acknowledged any more.
    pub fn failed(&self) -> impl Future<Output = BrokerError> + use<> {
        let mut failed = self.shard.failed.clone();
        async move {
            let result = failed
                .wait_for(Option::is_some)
                .await
                .map(|fatal| fatal.clone());
            match result {
                Ok(Some(fatal)) => BrokerError::Fatal(fatal),
                _ => BrokerError::Gone,
            }
        }
    }

    /// Ends gracefully: no new leases, settlements are taken until the grace is over or everybody has
    /// gone, then the last commit is made and the log sealed. The address is free when this returns.
    ///
    /// # Errors
    /// If the last commit could not be made, or not in time; what it held was not acknowledged.
    pub async fn shutdown(self) -> Result<(), BrokerError> {
        self.drain.send_replace(true);
        // A stopped shard has nothing to drain, and one that hangs must not keep this from ending.
        let _ = tokio::time::timeout(CLOSE_WAIT, self.context.shard.tell(Aside::Drain)).await;
        // Whoever has not settled by then is disconnected; what it holds is released.
        let grace = self.config.shutdown_grace();
        let _ = tokio::time::timeout(grace, settled(&self.endpoint, &self.context.shard)).await;
        self.endpoint
            .close(connection::closing_code(), b"the broker is shutting down");
        let _ = tokio::time::timeout(CLOSE_WAIT, self.endpoint.wait_idle()).await;
        self.context.tasks.close();
        let _ = tokio::time::timeout(CLOSE_WAIT, self.context.tasks.wait()).await;
        for task in &self.tasks {
            task.abort();
        }
        drop(self.endpoint);
        let _ = tokio::time::timeout(CLOSE_WAIT, released(&self.socket)).await;
        match self.shard.stop().await {
            Ok(anchor) => {
                save_anchor(&self.config.data, &anchor).unwrap_or_else(
                    |error| tracing::warn!(%error, "the clock's anchor was not saved"),
                );
                Ok(())
            }
            Err(StopError::Fatal(fatal)) => Err(BrokerError::Close(fatal)),
            Err(StopError::Gone) => Err(BrokerError::Gone),
            Err(StopError::Late) => Err(BrokerError::Late),
        }
    }
}

/// Resolves when nobody holds a lease any more, or nobody is connected.
async fn settled(endpoint: &quinn::Endpoint, shard: &ShardHandle<Store>) {
    while endpoint.open_connections() > 0 {
        match shard.look(|shard| shard.queue().leases_held()).await {
            Ok(0) | Err(_) => return,
            Ok(_) => tokio::time::sleep(SETTLED_EVERY).await,
        }
    }
}

/// Resolves when the endpoint's own task, which nobody can await, has closed the socket.
async fn released(socket: &Weak<dyn quinn::AsyncUdpSocket>) {
    while socket.strong_count() > 0 {
        tokio::time::sleep(RELEASED_EVERY).await;
    }
}

fn make_folder(path: &Path) -> Result<(), StartError> {
    std::fs::create_dir_all(path).map_err(|source| StartError::DataFolder {
        path: path.to_owned(),
        source,
    })
}

/// Starting needs no new space: without an anchor the next start counts as one after a reboot.
fn save_first_anchor(data: &Path, anchor: &[u8; ANCHOR_BYTES]) -> Result<(), StartError> {
    match save_anchor(data, anchor) {
        Err(error) if millpond_wal::storage::is_full(error.kind()) => {
            tracing::warn!(%error, "the clock's anchor was not saved");
            Ok(())
        }
        saved => saved.map_err(|e| StartError::io("write", data, e)),
    }
}

fn shard_options(config: &Config) -> ShardOptions {
    let log = millpond_wal::Options {
        segment_bytes: config.log.segment_bytes,
        spare_segments: config.log.spare_segments,
        entry_bytes_max: ENTRY_BYTES_MAX,
        buffer_bytes_idle: as_usize(config.memory.log_idle_bytes()),
        ..millpond_wal::Options::default()
    };
    ShardOptions {
        log,
        snapshot_every_bytes: config.log.snapshot_every_bytes,
    }
}

/// A full group may be followed by one more message of the largest size, and by a mark of it; what dispatching proposes
/// stands before and behind that.
const ENTRY_BYTES_MAX: usize = crate::shard::GROUP_BYTES_TARGET
    + millpond_protocol::limits::FRAME_BYTES_MAX
    + (4 << 20)
    + 2 * millpond_queue::PROPOSED_BYTES_MAX;

fn as_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn log_recovery(recovered: &crate::shard::Recovered, took: Duration) {
    let (records, bytes) = (recovered.replayed_records, recovered.replayed_bytes);
    tracing::info!(records, bytes, took_ms = took.as_millis() as u64, report = ?recovered.report, "recovered");
    if recovered.damaged {
        tracing::error!(
            "the log is damaged above its snapshot: nothing can be written; stop, then run `millpond log verify DIR` on the data folder"
        );
    }
}

/// Looks once a day whether the certificate must be renewed; connections that stand keep theirs.
async fn renew_certificate(config: Config, endpoint: quinn::Endpoint) {
    loop {
        tokio::time::sleep(CERTIFICATE_EVERY).await;
        let wall_us = crate::clock::Clock::wall_us(&SystemClock::new());
        match transport::server_config(&config, wall_us) {
            Ok(server) => endpoint.set_server_config(Some(server)),
            Err(error) => tracing::error!(%error, "the certificate could not be renewed"),
        }
    }
}

/// Makes the first token, and refuses to face others without any.
fn first_token(
    config: &Config,
    shard: &mut Shard<Store, SystemClock>,
) -> Result<Option<String>, StartError> {
    let have_some = !shard.queue().tokens().is_empty();
    match &config.first_token {
        Some(name) if !have_some => {
            let (text, hash) = token::new_token();
            shard.add_token(name, hash).map_err(|e| {
                StartError::io("write a token to", &config.data, std::io::Error::other(e))
            })?;
            Ok(Some(text))
        }
        _ if config.require_tokens == Some(true) && !have_some => Err(StartError::NoRequiredToken),
        _ if config.tokens_required() && !have_some => Err(StartError::NoToken {
            listen: config.listen,
        }),
        _ => Ok(None),
    }
}

/// What the broker knows of itself beside the shard: for status, metrics and readiness.
#[derive(Clone)]
pub struct Surroundings {
    pub metrics: Arc<BrokerMetrics>,
    pub memory: MemoryBudget,
    inner: Arc<Inner>,
}

struct Inner {
    began: Instant,
    serving: AtomicBool,
    disk: DiskMonitor,
    shard: std::sync::OnceLock<(ShardHandle<Store>, Arc<crate::bodies::Cache>)>,
}

impl Surroundings {
    /// Opens what is there before the shard is: HTTP answers while the broker recovers.
    async fn open(
        config: &Config,
        began: Instant,
    ) -> Result<(Self, Option<SocketAddr>, Option<JoinHandle<()>>), StartError> {
        let disk = DiskMonitor::open(&config.data, &config.disk)
            .map_err(|e| StartError::io("reserve space in", &config.data, e))?;
        let surroundings = Self {
            metrics: Arc::new(BrokerMetrics::new()),
            memory: MemoryBudget::new(&config.memory),
            inner: Arc::new(Inner {
                began,
                serving: AtomicBool::new(false),
                disk,
                shard: std::sync::OnceLock::new(),
            }),
        };
        let Some(address) = config.http else {
            return Ok((surroundings, None, None));
        };
        let listener = http::bind(address).await?;
        let bound = listener
            .local_addr()
            .map_err(|e| StartError::listen(Door::Http, address, e))?;
        let task = tokio::spawn(http::serve(listener, Arc::new(surroundings.clone())));
        Ok((surroundings, Some(bound), Some(task)))
    }

    fn attach(&self, shard: ShardHandle<Store>, cache: Arc<crate::bodies::Cache>) {
        // Set once, at the start.
        let _ = self.inner.shard.set((shard, cache));
    }

    /// Adds to a status what the shard does not know.
    pub fn complete(&self, status: &mut StatusView) {
        let space = self.inner.disk.space();
        status.uptime_ms = self.inner.began.elapsed().as_millis() as u64;
        status.connections = u32::try_from(self.metrics.connections()).unwrap_or(u32::MAX);
        status.memory_used = self.memory_used();
        status.memory_budget = self.memory.limit();
        status.disk_free = space.free_bytes;
        status.disk_total = space.total_bytes;
        status.remarks.extend(self.inner.disk.level().remark());
    }

    fn memory_used(&self) -> u64 {
        let permits: u64 = Class::ALL
            .iter()
            .map(|&class| self.memory.used(class))
            .sum();
        permits
            + self
                .other_memory()
                .iter()
                .map(|(_, bytes)| bytes)
                .sum::<u64>()
    }

    /// Memory that is bounded by itself and not by permits.
    fn other_memory(&self) -> Vec<(&'static str, u64)> {
        self.inner
            .shard
            .get()
            .map(|(_, cache)| ("recent_bodies", cache.bytes() as u64))
            .into_iter()
            .collect()
    }

    fn pressure(&self) -> Pressure {
        let reason = if self.inner.disk.level() >= DiskLevel::Soft {
            Some(ErrorCode::DiskLow)
        } else if self.memory.pressure() >= MemoryPressure::High {
            Some(ErrorCode::Memory)
        } else {
            None
        };
        Pressure {
            reason,
            retry_after: if reason.is_some() {
                PRESSURE_RETRY
            } else {
                Duration::ZERO
            },
        }
    }
}

impl http::HttpSource for Surroundings {
    async fn readiness(&self) -> Result<(), Vec<String>> {
        if !self.inner.serving.load(Ordering::Acquire) {
            return Err(vec![
                "the broker is recovering what its log holds".to_owned(),
            ]);
        }
        let mut reasons = match self.inner.shard.get() {
            Some((shard, _)) => shard
                .look(|shard| shard.remarks())
                .await
                .unwrap_or_else(|stopped| vec![stopped.to_string()]),
            None => Vec::new(),
        };
        if self.inner.disk.level() >= DiskLevel::ReserveGone {
            reasons.extend(self.inner.disk.level().remark());
        }
        if reasons.is_empty() {
            Ok(())
        } else {
            Err(reasons)
        }
    }

    async fn metrics(&self) -> String {
        let mut samples = metrics::of_memory(&self.memory, &self.other_memory());
        samples.extend(metrics::of_disk(&self.inner.disk));
        if let Some((shard, _)) = self.inner.shard.get()
            && let Ok((mut status, counters)) = shard
                .look(|shard| (shard.status(), shard.queue().counters().clone()))
                .await
        {
            self.complete(&mut status);
            samples.extend(metrics::of_status(&status));
            samples.extend(metrics::of_counters(&counters));
        }
        self.metrics.encode(samples)
    }
}

async fn watch_surroundings(
    surroundings: Surroundings,
    shard: ShardHandle<Store>,
    tell: watch::Sender<Pressure>,
) {
    let mut level = DiskLevel::Normal;
    loop {
        let disk = surroundings.clone();
        // A blocking call: `statvfs` waits for the disk.
        let found = tokio::task::spawn_blocking(move || disk.inner.disk.refresh())
            .await
            .unwrap_or(level);
        if found != level {
            tracing::warn!(from = ?level, to = ?found, "disk space");
            level = found;
            let gates = Aside::Gates {
                disk_low: level >= DiskLevel::Hard,
                no_leases: level >= DiskLevel::ReserveGone,
            };
            if shard.tell(gates).await.is_err() {
                return;
            }
        }
        let pressure = surroundings.pressure();
        tell.send_if_modified(|held| std::mem::replace(held, pressure) != pressure);
        tokio::time::sleep(SURROUNDINGS_EVERY).await;
    }
}
