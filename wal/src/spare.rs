//! Spare segments: files filled with zeros before they are needed.
//!
//! Owns their names and the job that fills one. Syncing onto blocks that were written before takes half
//! as long as onto fallocated or growing ones, and a start on a full disk needs no new space. A file
//! is called spare only after its zeros are durable; one that was not finished is deleted by the next opening, or
//! finished after it.

use std::io;

use crate::buffer::BufferPool;
use crate::error::JobError;
use crate::storage::{BLOCK_BYTES, Storage, StorageFile};

/// Makes one spare segment. [`run`](Self::run) writes `segment_bytes` of zeros.
pub struct SpareJob<S: Storage> {
    storage: S,
    pool: BufferPool,
    number: u64,
    bytes: u64,
    step_bytes: u64,
}

/// What a [`SpareJob`] made; for `Log::install_spare`.
#[derive(Debug)]
pub struct SpareDone(pub(crate) Spare);

#[derive(Clone, Debug)]
pub(crate) struct Spare {
    pub number: u64,
    pub bytes: u64,
}

impl Spare {
    pub fn name(&self) -> String {
        spare_name(self.number)
    }
}

impl<S: Storage> SpareJob<S> {
    /// Entries of `entry_bytes` are written meanwhile: zeros go in pieces of that size, within bounds, so that a
    /// sync waits for little more than what it takes by itself.
    pub(crate) fn new(
        storage: S,
        pool: BufferPool,
        number: u64,
        bytes: u64,
        entry_bytes: u64,
    ) -> SpareJob<S> {
        SpareJob {
            storage,
            pool,
            number,
            bytes,
            step_bytes: step_bytes(entry_bytes),
        }
    }

    pub fn run(self) -> Result<SpareDone, JobError> {
        let unfinished = unfinished_name(self.number);
        self.fill(&unfinished).map_err(|source| {
            // Best effort: an unfinished spare is no danger.
            let _ = self.storage.remove(&unfinished);
            JobError {
                what: "fill",
                file: unfinished.clone(),
                source,
            }
        })?;
        Ok(SpareDone(Spare {
            number: self.number,
            bytes: self.bytes,
        }))
    }

    fn fill(&self, unfinished: &str) -> io::Result<()> {
        let file = match self.storage.open(unfinished) {
            Ok(file) => {
                file.set_len(file.len()?.min(self.bytes))?;
                file
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.storage.create(unfinished)?
            }
            Err(error) => return Err(error),
        };
        fill_with_zeros(&file, &self.pool, self.bytes, self.step_bytes)?;
        file.sync_data()?;
        self.storage.rename(unfinished, &spare_name(self.number))?;
        self.storage.sync_dir()
    }
}

fn step_bytes(entry_bytes: u64) -> u64 {
    let blocks = entry_bytes.next_multiple_of(BLOCK_BYTES as u64);
    blocks.clamp(STEP_BYTES_MIN, STEP_BYTES_MAX)
}

/// Reserves so many bytes and writes zeros to all of them. A full disk is noticed before the first is written.
pub(crate) fn fill_with_zeros(
    file: &impl StorageFile,
    pool: &BufferPool,
    bytes: u64,
    step_bytes: u64,
) -> io::Result<()> {
    file.preallocate(bytes)?;
    let most = step_bytes.min(bytes) as usize;
    let mut zeros = pool.take(most);
    zeros.resize(most);
    let mut at = 0;
    while at < bytes {
        let step = (most as u64).min(bytes - at) as usize;
        // Past the page cache: copying zeros through it costs ten times the processor time.
        if step.is_multiple_of(BLOCK_BYTES) {
            file.write_durable_at(at, &zeros[..step])?;
        } else {
            file.write_at(at, &zeros[..step])?;
        }
        at += step as u64;
    }
    Ok(())
}

pub(crate) fn spare_name(number: u64) -> String {
    format!("spare-{number:016x}")
}

fn unfinished_name(number: u64) -> String {
    format!("spare-{number:016x}.new")
}

/// What a file called like a spare is.
pub(crate) enum SpareName {
    Ready(u64),
    /// With its number, if it is one that a job looks for.
    Unfinished(Option<u64>),
}

pub(crate) fn parse_spare_name(name: &str) -> Option<SpareName> {
    let rest = name.strip_prefix("spare-")?;
    let number = |digits| u64::from_str_radix(digits, 16).ok();
    match rest.strip_suffix(".new") {
        Some(digits) => {
            let number = number(digits).filter(|number| unfinished_name(*number) == name);
            Some(SpareName::Unfinished(number))
        }
        None => number(rest).map(SpareName::Ready),
    }
}

/// How much is written at once.
pub(crate) const STEP_BYTES_MAX: u64 = 1 << 20;
const STEP_BYTES_MIN: u64 = 128 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_blocks_and_about_as_large_as_entries() {
        let steps = [0, 4_096, 600_001, u64::from(u32::MAX)].map(step_bytes);
        assert_eq!(steps, [128 << 10, 128 << 10, 602_112, 1 << 20]);
        assert!(
            steps
                .iter()
                .all(|step| step.is_multiple_of(BLOCK_BYTES as u64))
        );
    }
}
