//! Which entries stand, which are torn, which are damaged: the voucher rule.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use parking_lot::RwLock;

use super::report::{EntryDamage, RecoveryReport, SegmentDamage, TornTail};
use super::{io_error, newer};
use crate::directory::{OpenTable, Spot, Unreadable};
use crate::entry::LogIndex;
use crate::error::{IndexRange, OpenError};
use crate::manifest::{Cut, SegmentEnd, SegmentEntry, State};
use crate::planted::{self, Bug};
use crate::retire::Retirement;
use crate::scan::{Expect, Scan, scan};
use crate::seal::Ended;
use crate::segment::{Footer, SegmentDefect, SegmentHeader, SegmentId, file_name};
use crate::storage::{BLOCK_BYTES, Storage, StorageFile, read_exact_at};
use crate::tables::{Body, SealedBody, Segment, Tables};

/// What reading all segments found.
pub(crate) struct Found<F> {
    /// In order of their entries.
    segments: Vec<FoundSegment<F>>,
}

struct FoundSegment<F> {
    id: SegmentId,
    entry: SegmentEntry,
    what: What<F>,
}

enum What<F> {
    Sealed(SealedBody<F>),
    /// Not sealed; the end, if an earlier recovery fixed it.
    Scanned(F, Box<Scan>, Option<Cut>),
    Lost(SegmentDefect),
}

/// The log as it will be opened.
pub(crate) struct Judged<F> {
    pub retirement: Retirement<Segment<F>>,
    pub tables: Tables<F>,
    pub ended: VecDeque<Ended<F>>,
    pub durable: LogIndex,
    pub predecessor: ([u8; 16], u32),
    /// The first damage that replay would meet.
    pub damage: Option<IndexRange>,
    pub cuts: Vec<(SegmentId, Cut)>,
    /// Open segments without any entry.
    pub dropped: Vec<SegmentId>,
}

/// Reads every segment that the manifest names: footers of sealed ones, all of the others.
pub(crate) fn find<S: Storage>(storage: &S, state: &State) -> Result<Found<S::File>, OpenError> {
    let mut segments = Vec::with_capacity(state.segments.len());
    for (&id, &entry) in &state.segments {
        let name = file_name(id, entry.generation);
        let what = match look(storage, state, id, &entry, &name) {
            Ok(what) => what,
            Err(LookError::Newer(found)) => return Err(newer(name, found)),
            Err(LookError::Defect(defect)) => What::Lost(defect),
            Err(LookError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {
                What::Lost(SegmentDefect::Missing)
            }
            Err(LookError::Io(source)) => return Err(io_error("read", &name, source)),
        };
        segments.push(FoundSegment { id, entry, what });
    }
    segments.sort_by_key(|found| found.entry.first);
    Ok(Found { segments })
}

impl<F: StorageFile> Found<F> {
    /// Judges it above a snapshot.
    pub fn judge(
        self,
        state: &State,
        replay_from: LogIndex,
        report: &mut RecoveryReport,
    ) -> Judged<F> {
        let vouched = self.vouched(state, replay_from);
        let mut judged = Judged {
            retirement: Retirement::new(),
            tables: Tables::new(),
            ended: VecDeque::new(),
            durable: state.durable.max(replay_from),
            predecessor: ([0; 16], 0),
            damage: None,
            cuts: Vec::new(),
            dropped: Vec::new(),
        };
        let firsts: Vec<LogIndex> = self
            .segments
            .iter()
            .map(|found| found.entry.first)
            .collect();
        for (nth, found) in self.segments.into_iter().enumerate() {
            let successor = firsts.get(nth + 1).copied();
            match found.what {
                What::Sealed(body) => judged.take_sealed(found.id, &found.entry, body),
                What::Lost(defect) => {
                    let last = lost_last(&found.entry, successor, vouched);
                    if last < found.entry.first {
                        // It never held anything.
                        judged.dropped.push(found.id);
                        continue;
                    }
                    judged.take_lost(found.id, &found.entry, last, defect, report);
                    let range = IndexRange {
                        first: found.entry.first,
                        last,
                    };
                    judged.note_damage(range, replay_from, state);
                }
                What::Scanned(file, scan, cut) => {
                    report.scanned += 1;
                    let bounds = Bounds::of(&found.entry, &scan, cut, successor, vouched);
                    judged.take_scanned(found.id, &found.entry, file, scan, bounds, state, report);
                }
            }
        }
        judged
    }

    /// The highest index that anything vouches for.
    fn vouched(&self, state: &State, replay_from: LogIndex) -> LogIndex {
        let mut vouched = state.durable.max(replay_from);
        for found in &self.segments {
            if let What::Scanned(_, scan, _) = &found.what {
                vouched = vouched.max(scan.vouched);
            }
        }
        vouched
    }
}

/// What a scanned segment must hold, and what of it counts.
struct Bounds {
    /// Entries up to here that are missing are damage.
    last: LogIndex,
    /// Behind the bytes that count.
    entries_end: u64,
    /// Whether bytes behind `entries_end` are torn rather than of no interest.
    torn_end: Option<u64>,
}

impl Bounds {
    fn of(
        entry: &SegmentEntry,
        scan: &Scan,
        cut: Option<Cut>,
        successor: Option<LogIndex>,
        vouched: LogIndex,
    ) -> Bounds {
        if let Some(cut) = cut {
            return Bounds {
                last: cut.last,
                entries_end: cut.entries_end,
                torn_end: None,
            };
        }
        if let Some(successor) = successor {
            let last = successor.previous();
            return Bounds {
                last,
                entries_end: end_at(scan, last),
                torn_end: None,
            };
        }
        // The last segment: what follows the vouched entries without a gap stands as well.
        let mut last = vouched.max(entry.first.previous());
        while has(scan, last.next()) && !planted::is(Bug::CutUnvouched) {
            last = last.next();
        }
        if lost_end(entry, scan) {
            // At least one more entry, perhaps many.
            last = last.next();
        }
        let entries_end = end_at(scan, last);
        let torn_end = (scan.used_end > entries_end).then_some(scan.used_end);
        Bounds {
            last,
            entries_end,
            torn_end,
        }
    }
}

impl<F: StorageFile> Judged<F> {
    fn take_sealed(&mut self, id: SegmentId, entry: &SegmentEntry, body: SealedBody<F>) {
        self.durable = self.durable.max(body.footer.last);
        self.predecessor = (entry.uuid, body.footer.last_crc);
        let segment = segment(id, entry, Body::Sealed(body));
        self.tables.put(self.retirement.hold(segment));
    }

    fn take_lost(
        &mut self,
        id: SegmentId,
        entry: &SegmentEntry,
        last: LogIndex,
        defect: SegmentDefect,
        report: &mut RecoveryReport,
    ) {
        let range = IndexRange {
            first: entry.first,
            last,
        };
        report.lost.push(SegmentDamage {
            segment: id,
            range,
            defect,
        });
        self.durable = self.durable.max(last);
        self.predecessor = (entry.uuid, 0);
        let segment = segment(id, entry, Body::Lost { last });
        self.tables.put(self.retirement.hold(segment));
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one call, and each is a thing of its own"
    )]
    fn take_scanned(
        &mut self,
        id: SegmentId,
        entry: &SegmentEntry,
        file: F,
        scan: Box<Scan>,
        bounds: Bounds,
        state: &State,
        report: &mut RecoveryReport,
    ) {
        for range in gaps(&scan.spots, entry.first, bounds.last) {
            let skipped = state.is_skipped(range.first) && state.is_skipped(range.last);
            self.tables.mark_damaged(range);
            if !skipped {
                report.damaged.push(EntryDamage { segment: id, range });
                self.note_damage(range, LogIndex::NONE, state);
            }
        }
        if let Some(torn_end) = bounds.torn_end {
            report.torn.push(TornTail {
                segment: id,
                index: bounds.last.next(),
                position: bounds.entries_end,
                bytes: torn_end - bounds.entries_end,
                defect: scan.defect,
                saved_as: None,
            });
        }
        let mut spots = scan.spots;
        spots.retain(|spot| spot.index <= bounds.last);
        if spots.is_empty() && bounds.last < entry.first {
            self.dropped.push(id);
            return;
        }
        self.durable = self.durable.max(bounds.last);
        self.predecessor = (entry.uuid, scan.last_crc);
        if let SegmentEnd::Open { .. } = entry.end {
            self.cuts.push((
                id,
                Cut {
                    last: bounds.last,
                    entries_end: bounds.entries_end,
                },
            ));
        }
        let table = RwLock::new(OpenTable {
            spots,
            ..OpenTable::default()
        });
        let segment = self.retirement.hold(segment(
            id,
            entry,
            Body::Open {
                file: Arc::new(file),
                table,
            },
        ));
        self.tables.put(segment.clone());
        self.ended.push_back(Ended {
            segment,
            last: bounds.last,
            entries_end: bounds.entries_end,
            records: scan.records,
            digest: scan.digest.digest128().to_le_bytes(),
            last_crc: scan.last_crc,
            written: Default::default(),
        });
    }

    /// Keeps the first damage that is neither below the snapshot nor accepted.
    fn note_damage(&mut self, range: IndexRange, covered: LogIndex, state: &State) {
        let accepted = state.is_skipped(range.first) && state.is_skipped(range.last);
        if range.last > covered && !accepted && self.damage.is_none() {
            self.damage = Some(range);
        }
    }
}

enum LookError {
    Defect(SegmentDefect),
    /// Written by a version that knows this format.
    Newer(u16),
    Io(io::Error),
}

impl From<io::Error> for LookError {
    fn from(error: io::Error) -> LookError {
        LookError::Io(error)
    }
}

fn look<S: Storage>(
    storage: &S,
    state: &State,
    id: SegmentId,
    entry: &SegmentEntry,
    name: &str,
) -> Result<What<S::File>, LookError> {
    match entry.end {
        SegmentEnd::Sealed { file_bytes, .. } => {
            let file = storage.open_read(name)?;
            refuse_newer(&file)?;
            let footer = read_footer(&file, entry.uuid, file_bytes)?;
            let body = SealedBody::open(file, footer).map_err(|error| match error {
                Unreadable::Damaged => LookError::Defect(SegmentDefect::Directory),
                Unreadable::Io(source) => LookError::Io(source),
            })?;
            Ok(What::Sealed(body))
        }
        SegmentEnd::Open { .. } | SegmentEnd::Cut(_) => {
            let file = storage.open(name)?;
            // What is judged here must still be there after the next power loss.
            if !planted::is(Bug::TrustPageCache) {
                file.sync_data()?;
            }
            let cut = match entry.end {
                SegmentEnd::Cut(cut) => Some(cut),
                _ => None,
            };
            check_header(&file, state, id, entry)?;
            let expect = Expect {
                uuid: entry.uuid,
                epoch: entry.epoch,
                first: entry.first,
                end: cut.map(|cut| cut.entries_end),
            };
            let scanned = scan(&file, expect)?;
            if let Some(found) = scanned.newer {
                return Err(LookError::Newer(found));
            }
            Ok(What::Scanned(file, Box::new(scanned), cut))
        }
    }
}

/// The header of an open segment. A damaged one loses nothing, since the manifest has what it says; a
/// newer format or a foreign file must not be touched.
fn check_header<F: StorageFile>(
    file: &F,
    state: &State,
    id: SegmentId,
    entry: &SegmentEntry,
) -> Result<(), LookError> {
    let mut block = [0; BLOCK_BYTES];
    let read = file.read_uncached_at(0, &mut block)?;
    match SegmentHeader::decode(&block[..read]) {
        Ok(header)
            if header.store != state.store || header.id != id || header.uuid != entry.uuid =>
        {
            Err(LookError::Defect(SegmentDefect::Foreign))
        }
        Err(SegmentDefect::Version(found)) => Err(LookError::Newer(found)),
        _ => Ok(()),
    }
}

/// A sealed segment's header says nothing that its footers do not, so one that cannot be read is not missed.
fn refuse_newer<F: StorageFile>(file: &F) -> Result<(), LookError> {
    let mut block = [0; BLOCK_BYTES];
    let Ok(read) = file.read_at(0, &mut block) else {
        return Ok(());
    };
    match SegmentHeader::decode(&block[..read]) {
        Err(SegmentDefect::Version(found)) => Err(LookError::Newer(found)),
        _ => Ok(()),
    }
}

/// The last footer of a sealed file, or the first one if that is bad or cannot be read.
fn read_footer<F: StorageFile>(
    file: &F,
    uuid: [u8; 16],
    file_bytes: u64,
) -> Result<Footer, LookError> {
    let mut block = [0; BLOCK_BYTES];
    // A file that has lost its end may still have a footer.
    let len = file.len()?.next_multiple_of(BLOCK_BYTES as u64);
    let mut at = file_bytes.min(len);
    let (mut failed, mut unreadable) = (None, 0);
    while at > BLOCK_BYTES as u64 {
        at -= BLOCK_BYTES as u64;
        match read_exact_at(file, at, &mut block) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(error) => {
                unreadable += 1;
                if unreadable > UNREADABLE_BLOCKS_MAX {
                    return Err(error.into());
                }
                failed.get_or_insert(error);
                continue;
            }
            Ok(()) => {}
        }
        if let Some(found) = Footer::newer(&block, uuid) {
            return Err(LookError::Newer(found));
        }
        match Footer::decode(&block) {
            Ok(footer) if footer.uuid == uuid && footer.file_bytes() == file_bytes => {
                return Ok(footer);
            }
            _ => {}
        }
    }
    Err(failed.map_or(LookError::Defect(SegmentDefect::Footer), LookError::Io))
}

fn segment<F>(id: SegmentId, entry: &SegmentEntry, body: Body<F>) -> Segment<F> {
    Segment {
        id,
        generation: entry.generation,
        uuid: entry.uuid,
        epoch: entry.epoch,
        first: entry.first,
        contents: entry.contents,
        name: file_name(id, entry.generation),
        body,
    }
}

/// How far a lost segment reached, as far as anybody knows.
fn lost_last(entry: &SegmentEntry, successor: Option<LogIndex>, vouched: LogIndex) -> LogIndex {
    match entry.end {
        SegmentEnd::Sealed { last, .. } => last,
        SegmentEnd::Cut(cut) => cut.last,
        // Its file was durable before the manifest named it, so it may have held an entry.
        SegmentEnd::Open { .. } => successor.map_or(vouched.max(entry.first), LogIndex::previous),
    }
}

/// Whether the file has lost its end and entries may have stood there. They stood back to back, so a block
/// behind them that is still there, empty or written by sealing, says that there were no more.
fn lost_end(entry: &SegmentEntry, scan: &Scan) -> bool {
    let SegmentEnd::Open { file_bytes } = entry.end else {
        return false;
    };
    scan.file_bytes < file_bytes && scan.used_end + BLOCK_BYTES as u64 > scan.file_bytes
}

fn has(scan: &Scan, index: LogIndex) -> bool {
    scan.spots
        .binary_search_by_key(&index, |spot| spot.index)
        .is_ok()
}

/// Behind entry `last`; if it is damaged, behind every block that may belong to it.
fn end_at(scan: &Scan, last: LogIndex) -> u64 {
    let behind = scan.spots.partition_point(|spot| spot.index <= last);
    match behind.checked_sub(1).and_then(|at| scan.spots.get(at)) {
        Some(spot) if spot.index == last => spot.position() + spot.bytes() as u64,
        None if last.next() == scan.run_next => scan.run_end,
        _ => match scan.spots.get(behind) {
            Some(spot) => spot.position(),
            None => scan.used_end.next_multiple_of(BLOCK_BYTES as u64),
        },
    }
}

/// The ranges of `first..=last` without a spot.
fn gaps(spots: &[Spot], first: LogIndex, last: LogIndex) -> Vec<IndexRange> {
    let mut gaps = Vec::new();
    let mut expected = first;
    let present = spots
        .iter()
        .map(|spot| spot.index)
        .filter(|&index| index <= last);
    for index in present.chain([last.next()]) {
        if expected < index {
            gaps.push(IndexRange {
                first: expected,
                last: index.previous(),
            });
        }
        expected = index.next();
    }
    gaps
}

/// Blocks that the disk fails to give while a footer is looked for; such a read may take it seconds.
const UNREADABLE_BLOCKS_MAX: usize = 16;
