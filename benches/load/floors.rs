//! The floors: what the machine gives to anybody, measured beside the broker.

use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use crate::args::{Plan, Role};
use crate::child::Child;
use crate::disk;
use crate::open_loop;
use crate::raw_quic::Answer::{self, WhenDurable, WhenRead};
use crate::raw_quic::{ECHO_BYTES, Raw};
use crate::sample::{Meter, Sample};

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Floor {
    QuinnBulk,
    QuinnRoundTrip,
    Quinn1k,
    Quinn1kDeep,
    Quinn128,
    Quinn128Deep,
    SyncedAlone,
    Synced1k,
    Synced1kDeep,
    Synced128,
    Synced128Deep,
    SyncedPaced,
    ReadBulk,
    QuinnBulk6400,
    ReadBulk6400,
    Sync4k,
    Sync64k,
    Sync1m,
}

impl Floor {
    pub const ALL: [Self; 18] = [
        Self::QuinnBulk,
        Self::QuinnRoundTrip,
        Self::Quinn1k,
        Self::Quinn1kDeep,
        Self::Quinn128,
        Self::Quinn128Deep,
        Self::SyncedAlone,
        Self::Synced1k,
        Self::Synced1kDeep,
        Self::Synced128,
        Self::Synced128Deep,
        Self::SyncedPaced,
        Self::ReadBulk,
        Self::QuinnBulk6400,
        Self::ReadBulk6400,
        Self::Sync4k,
        Self::Sync64k,
        Self::Sync1m,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::QuinnBulk => "quinn_bulk",
            Self::QuinnRoundTrip => "quinn_round_trip",
            Self::Quinn1k => "quinn_1k",
            Self::Quinn1kDeep => "quinn_1k_deep",
            Self::Quinn128 => "quinn_128",
            Self::Quinn128Deep => "quinn_128_deep",
            Self::SyncedAlone => "synced_alone",
            Self::Synced1k => "synced_1k",
            Self::Synced1kDeep => "synced_1k_deep",
            Self::Synced128 => "synced_128",
            Self::Synced128Deep => "synced_128_deep",
            Self::SyncedPaced => "synced_paced",
            Self::ReadBulk => "read_bulk",
            Self::QuinnBulk6400 => "quinn_bulk_6400",
            Self::ReadBulk6400 => "read_bulk_6400",
            Self::Sync4k => "sync_4k",
            Self::Sync64k => "sync_64k",
            Self::Sync1m => "sync_1m",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Self::QuinnBulk => "one QUIC stream, 256 KiB writes",
            Self::QuinnRoundTrip => "128 B there and back, 1 in flight",
            Self::Quinn1k => "1 KiB messages on one stream, 256 unanswered",
            Self::Quinn1kDeep => "1 KiB messages on one stream, 4,096 unanswered",
            Self::Quinn128 => "128 B messages on one stream, 256 unanswered",
            Self::Quinn128Deep => "128 B messages on one stream, 4,096 unanswered",
            Self::SyncedAlone => {
                "1 KiB on one stream, answered once a thread has it on disk, 1 in flight"
            }
            Self::Synced1k => "as synced_alone, 256 unanswered",
            Self::Synced1kDeep => "as synced_alone, 4,096 unanswered",
            Self::Synced128 => "as synced_1k with 128 B",
            Self::Synced128Deep => "as synced_1k_deep with 128 B",
            Self::SyncedPaced => "as synced_alone, 2,000 a second whatever the answers do",
            Self::ReadBulk => "one QUIC stream of what is read from the disk",
            Self::QuinnBulk6400 => "as quinn_bulk at MTU 6400",
            Self::ReadBulk6400 => "as read_bulk at MTU 6400",
            Self::Sync4k => "4 KiB write + fdatasync, file written before",
            Self::Sync64k => "64 KiB write + fdatasync, file written before",
            Self::Sync1m => "1 MiB write + fdatasync, file written before",
        }
    }

    pub async fn measure(self, plan: &Plan) -> Result<Sample> {
        match self {
            Self::Sync4k => sync(plan, 4 << 10).await,
            Self::Sync64k => sync(plan, 64 << 10).await,
            Self::Sync1m => sync(plan, 1 << 20).await,
            _ => self.measure_quinn(plan).await,
        }
    }

    async fn measure_quinn(self, plan: &Plan) -> Result<Sample> {
        let mtu = match self {
            Self::QuinnBulk6400 | Self::ReadBulk6400 => MTU_LARGE,
            _ => plan.mtu,
        };
        let child = Child::start(Role::QuinnSink, plan.dir(), mtu).await?;
        let ca = std::fs::read(&child.greeting.ca)?;
        let raw = Raw::connect(child.greeting.address, &ca, mtu).await?;
        let bench = Bench {
            raw: &raw,
            server: child.pid,
            plan,
        };
        let sample = match self {
            Self::Quinn1k => bench.windowed(WhenRead, 1_024, WINDOW).await,
            Self::Quinn1kDeep => bench.windowed(WhenRead, 1_024, WINDOW_DEEP).await,
            Self::Quinn128 => bench.windowed(WhenRead, 128, WINDOW).await,
            Self::Quinn128Deep => bench.windowed(WhenRead, 128, WINDOW_DEEP).await,
            Self::SyncedAlone => bench.windowed(WhenDurable, 1_024, 1).await,
            Self::Synced1k => bench.windowed(WhenDurable, 1_024, WINDOW).await,
            Self::Synced1kDeep => bench.windowed(WhenDurable, 1_024, WINDOW_DEEP).await,
            Self::Synced128 => bench.windowed(WhenDurable, 128, WINDOW).await,
            Self::Synced128Deep => bench.windowed(WhenDurable, 128, WINDOW_DEEP).await,
            Self::SyncedPaced => bench.paced(1_024).await,
            Self::ReadBulk | Self::ReadBulk6400 => bench.read().await,
            Self::QuinnRoundTrip => bench.round_trip().await,
            _ => bench.bulk().await,
        };
        raw.close().await;
        child.stop().await?;
        sample
    }
}

/// The rate of small messages that are answered once they are on disk, over this connection to a sink.
pub async fn synced_rate(raw: &Raw, server: u32, plan: &Plan) -> Result<f64> {
    let bench = Bench { raw, server, plan };
    let sample = bench.windowed(WhenDurable, 128, WINDOW_DEEP).await?;
    Ok(sample.per_second())
}

/// A connection to the sink, and what is measured over it.
struct Bench<'a> {
    raw: &'a Raw,
    server: u32,
    plan: &'a Plan,
}

impl Bench<'_> {
    /// An operation is one KiB here, so that the rate reads like that of messages.
    async fn bulk(&self) -> Result<Sample> {
        let pace = &self.plan.pace;
        self.raw.bulk(BULK_WARM_UP_BYTES, pace.warm_up).await?;
        let mut meter = Meter::start(Some(self.server))?;
        let bytes = self.raw.bulk(pace.bytes_max, time(self.plan)).await?;
        meter.count(bytes / 1_024);
        meter.stop(1_024)
    }

    async fn read(&self) -> Result<Sample> {
        let mut stream = self.raw.open_read().await?;
        stream.run(self.plan.pace.warm_up).await?;
        let mut meter = Meter::start(Some(self.server))?;
        let bytes = stream.run(time(self.plan)).await?;
        meter.count(bytes / 1_024);
        meter.stop(1_024)
    }

    async fn round_trip(&self) -> Result<Sample> {
        let mut warm_up = Meter::start(None)?;
        let warm = self.plan.pace.warm_up;
        self.raw.round_trips(warm, &mut warm_up).await?;
        let mut meter = Meter::start(Some(self.server))?;
        self.raw.round_trips(time(self.plan), &mut meter).await?;
        meter.stop(ECHO_BYTES as u64)
    }

    /// As `end_to_end` does it, down to the threads: one keeps the pace, and a task takes what comes.
    async fn paced(&self, message_bytes: usize) -> Result<Sample> {
        let pace = self.plan.pace;
        let stream = self.raw.open_window(WhenDurable, message_bytes).await?;
        let warm = open_loop::messages_in(pace.warm_up);
        let all = warm + open_loop::messages_in(time(self.plan));
        let (tell, due) = mpsc::channel(DUE_MAX);
        let pacer = spawn_blocking(move || {
            let origin = Instant::now();
            open_loop::at_each(origin, all, || Ok(tell.blocking_send(Instant::now())?))
        });
        let mut meter = Meter::start(Some(self.server))?;
        let running = tokio::spawn(async move {
            stream.run_paced(due, warm, &mut meter).await?;
            meter.stop(message_bytes as u64)
        });
        let sample = running.await?;
        pacer.await??;
        sample
    }

    async fn windowed(&self, answer: Answer, message_bytes: usize, window: u64) -> Result<Sample> {
        let mut stream = self.raw.open_window(answer, message_bytes).await?;
        let mut warm_up = Meter::start(None)?;
        let warm = self.plan.pace.warm_up;
        stream.run(window, warm, &mut warm_up).await?;
        let mut meter = Meter::start(Some(self.server))?;
        stream.run(window, time(self.plan), &mut meter).await?;
        meter.stop(message_bytes as u64)
    }
}

async fn sync(plan: &Plan, write_bytes: usize) -> Result<Sample> {
    let (dir, time) = (plan.dir().to_owned(), time(plan));
    spawn_blocking(move || disk::write_and_sync(&dir, write_bytes, time)).await?
}

/// Floors are steadier than what stands on them.
fn time(plan: &Plan) -> Duration {
    plan.pace.measured / 2
}

/// The largest MTU that is measured here; loopback and many data centres have more.
pub const MTU_LARGE: u16 = 6_400;
/// Messages that are due and not taken.
const DUE_MAX: usize = 1_024;
const BULK_WARM_UP_BYTES: u64 = 64 << 20;
/// Messages without an answer, as in the scenarios that stand on these floors.
pub const WINDOW: u64 = 256;
pub const WINDOW_DEEP: u64 = 4_096;
