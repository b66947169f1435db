//! The floors: what the machine gives to anybody, measured beside the broker.

use std::time::Duration;

use anyhow::Result;

use crate::args::{Plan, Role};
use crate::child::Child;
use crate::disk;
use crate::raw_quic::{ECHO_BYTES, Raw};
use crate::sample::{Meter, Sample};

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Floor {
    QuinnBulk,
    QuinnRoundTrip,
    Sync4k,
    Sync64k,
    Sync1m,
}

impl Floor {
    pub const ALL: [Self; 5] = [
        Self::QuinnBulk,
        Self::QuinnRoundTrip,
        Self::Sync4k,
        Self::Sync64k,
        Self::Sync1m,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::QuinnBulk => "quinn_bulk",
            Self::QuinnRoundTrip => "quinn_round_trip",
            Self::Sync4k => "sync_4k",
            Self::Sync64k => "sync_64k",
            Self::Sync1m => "sync_1m",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Self::QuinnBulk => "one QUIC stream, 256 KiB writes",
            Self::QuinnRoundTrip => "128 B there and back, 1 in flight",
            Self::Sync4k => "4 KiB write + fdatasync, file written before",
            Self::Sync64k => "64 KiB write + fdatasync, file written before",
            Self::Sync1m => "1 MiB write + fdatasync, file written before",
        }
    }

    pub async fn measure(self, plan: &Plan) -> Result<Sample> {
        match self {
            Self::QuinnBulk | Self::QuinnRoundTrip => {
                let child = Child::start(Role::QuinnSink, plan.dir(), plan.mtu).await?;
                let ca = std::fs::read(&child.greeting.ca)?;
                let raw = Raw::connect(child.greeting.address, &ca, plan.mtu).await?;
                let sample = match self {
                    Self::QuinnBulk => bulk(&raw, child.pid, plan).await,
                    _ => round_trip(&raw, child.pid, plan).await,
                };
                raw.close().await;
                child.stop().await?;
                sample
            }
            Self::Sync4k => sync(plan, 4 << 10).await,
            Self::Sync64k => sync(plan, 64 << 10).await,
            Self::Sync1m => sync(plan, 1 << 20).await,
        }
    }
}

/// An operation is one KiB here, so that the rate reads like that of messages.
async fn bulk(raw: &Raw, server: u32, plan: &Plan) -> Result<Sample> {
    raw.bulk(BULK_WARM_UP_BYTES, plan.pace.warm_up).await?;
    let mut meter = Meter::start(Some(server))?;
    let bytes = raw.bulk(plan.pace.bytes_max, time(plan)).await?;
    meter.count(bytes / 1_024);
    meter.stop(1_024)
}

async fn round_trip(raw: &Raw, server: u32, plan: &Plan) -> Result<Sample> {
    let mut warm_up = Meter::start(None)?;
    raw.round_trips(plan.pace.warm_up, &mut warm_up).await?;
    let mut meter = Meter::start(Some(server))?;
    raw.round_trips(time(plan), &mut meter).await?;
    meter.stop(ECHO_BYTES as u64)
}

async fn sync(plan: &Plan, write_bytes: usize) -> Result<Sample> {
    let (dir, time) = (plan.dir().to_owned(), time(plan));
    tokio::task::spawn_blocking(move || disk::write_and_sync(&dir, write_bytes, time)).await?
}

/// Floors are steadier than what stands on them.
fn time(plan: &Plan) -> Duration {
    plan.pace.measured / 2
}

const BULK_WARM_UP_BYTES: u64 = 64 << 20;
