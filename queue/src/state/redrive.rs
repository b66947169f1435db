//! Redrive jobs: dead letters on their way back, a few at a time.
//!
//! Logged and resumable: a job is where it stands, and each step moves it and its letters at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use millpond_protocol::control::{DeadFilter, RedriveTarget, RedriveView};
use millpond_protocol::{Stamp, TopicId};

/// Finished jobs that can still be asked about.
pub const FINISHED_JOBS_MAX: usize = 64;
/// Jobs that run at one time.
pub const RUNNING_JOBS_MAX: usize = 64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub topic: TopicId,
    pub source_topic: Arc<str>,
    pub subscription: Arc<str>,
    pub filter: DeadFilter,
    pub rate_per_s: Option<u32>,
    pub target: RedriveTarget,
    /// The next letter to look at, and one past the last that the job is about.
    pub next: u64,
    pub end: u64,
    pub total: u64,
    pub done: u64,
    pub finished: bool,
    pub cancelled: bool,
    /// Volatile: when the next step may be proposed, and whether one is on its way.
    pub pace: Pace,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    pub not_before: Stamp,
    pub proposed: bool,
}

impl Job {
    pub fn view(&self, job: u64) -> RedriveView {
        RedriveView {
            job,
            total: self.total,
            done: self.done,
            finished: self.finished,
            cancelled: self.cancelled,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Jobs {
    pub all: BTreeMap<u64, Job>,
    pub next: u64,
}

impl Jobs {
    pub fn running(&self) -> usize {
        self.all.values().filter(|job| !job.finished).count()
    }

    /// Forgets the oldest finished jobs beyond the bound.
    pub fn forget(&mut self) {
        while self.all.len() - self.running() > FINISHED_JOBS_MAX {
            let oldest = self.all.iter().find(|(_, job)| job.finished);
            let Some(key) = oldest.map(|(key, _)| *key) else {
                return;
            };
            self.all.remove(&key);
        }
    }
}
