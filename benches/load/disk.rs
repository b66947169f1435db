//! Raw write and fdatasync: the floor under any durable acknowledgement.
//!
//! The file's blocks have been written before, as those of a log with spare segments, because a
//! growing or merely allocated file syncs two times slower.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::sample::{Meter, Sample};

/// Writes and syncs one size at a time for this long, going round in the file.
pub fn write_and_sync(dir: &Path, write_bytes: usize, time: Duration) -> Result<Sample> {
    let file = tempfile::tempfile_in(dir)
        .with_context(|| format!("no file can be made in {}", dir.display()))?;
    fill(&file)?;
    let block = vec![0x5a; write_bytes];
    let places = FILE_BYTES / write_bytes as u64;
    let mut meter = Meter::start(None)?;
    let end = Instant::now() + time;
    let mut nth = 0;
    while Instant::now() < end {
        let began = Instant::now();
        file.write_all_at(&block, nth % places * write_bytes as u64)?;
        file.sync_data()?;
        meter.record(began.elapsed());
        meter.count(1);
        nth += 1;
    }
    meter.stop(write_bytes as u64)
}

fn fill(file: &File) -> Result<()> {
    let zeros = vec![0; FILL_BYTES];
    for nth in 0..FILE_BYTES / FILL_BYTES as u64 {
        file.write_all_at(&zeros, nth * FILL_BYTES as u64)?;
    }
    file.sync_all()?;
    Ok(())
}

const FILE_BYTES: u64 = 128 << 20;
const FILL_BYTES: usize = 1 << 20;
