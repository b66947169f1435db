//! Looking at a log that nobody runs: verify, dump, salvage.
//!
//! Owns no format; it walks everything with the code that recovery and reading use, so that it can only
//! agree with them. Verifying and dumping write nothing. Salvage writes one manifest record for each
//! loss that the operator accepts, and deletes nothing.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};

use crate::buffer::BufferPool;
use crate::directory::bad_blocks;
use crate::entry::{EntryHeader, LogIndex};
use crate::error::{IndexRange, OpenError, ReadError};
use crate::manifest::{Change, Folded, Manifest, SegmentEnd, State, read_state};
use crate::options::Options;
use crate::record::Records;
use crate::recover::folder::Folder;
use crate::recover::judge::{self, Judged};
use crate::recover::{RecoveryReport, choose_snapshot};
use crate::segment::{Contents, SegmentDefect, SegmentHeader, SegmentId};
use crate::snapshot::{Flaw, Snapshot, flaws};
use crate::storage::{BLOCK_BYTES, Storage, StorageFile};
use crate::tables::{Body, SealedBody, Segment};

/// What is in a folder, and everything that is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    pub store: [u8; 16],
    pub epoch: u32,
    pub segments: usize,
    pub entries: u64,
    pub records: u64,
    /// First and last entry that exist.
    pub range: Option<IndexRange>,
    /// Where the newest readable snapshot stands.
    pub snapshot: Option<LogIndex>,
    pub findings: Vec<Finding>,
}

/// One thing that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub file: String,
    pub what: Wrong,
    /// The bytes of the file that it lies in, where `what` does not say so.
    pub bytes: Option<Range<u64>>,
    pub harm: Harm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    #[error("{0}")]
    Segment(SegmentDefect),
    #[error("entries {0} are damaged")]
    Entries(IndexRange),
    #[error("entries {0} were removed once snapshots covered them, and none of those can be read")]
    Uncovered(IndexRange),
    #[error("{bytes} torn bytes behind the last vouched entry, at byte {position}")]
    Torn { position: u64, bytes: u64 },
    #[error("copy {copy} of the directory has {blocks} bad blocks")]
    DirectoryCopy { copy: u64, blocks: u64 },
    #[error("copy {0} of the footer is bad")]
    FooterCopy(u64),
    #[error("the digest over the entry headers is wrong")]
    Digest,
    #[error("the segment header is damaged")]
    Header,
    #[error("it is {bytes} bytes long and was {expected}")]
    Short { bytes: u64, expected: u64 },
    #[error("it is damaged: {0}")]
    Snapshot(Flaw),
    #[error("it cannot be read as a part of a snapshot")]
    SnapshotFile,
    #[error("{bytes} bytes behind the last good record, at byte {position}")]
    TornRecord { position: u64, bytes: u64 },
    #[error("padding is not zero at byte {position}")]
    Padding { position: u64 },
}

/// What a finding means for who uses the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Harm {
    /// A second copy, or the next start, makes up for it.
    None,
    /// Below the snapshot, or given up: messages are lost, the log takes writes.
    Bodies,
    /// Above the snapshot: the log takes no writes until the loss is accepted.
    State,
}

impl VerifyReport {
    pub fn is_good(&self) -> bool {
        self.findings.is_empty()
    }

    /// The worst of all findings.
    pub fn harm(&self) -> Harm {
        self.findings
            .iter()
            .map(|finding| finding.harm)
            .max()
            .unwrap_or(Harm::None)
    }
}

/// Reads every byte that counts and compares every checksum.
pub fn verify<S: Storage>(storage: &S) -> Result<VerifyReport, OpenError> {
    let manifest = read_manifest(storage)?;
    let state = &manifest.state;
    let log = Inspected::of(storage, state)?;
    let mut report = VerifyReport {
        store: state.store,
        epoch: state.epoch,
        snapshot: log.report.snapshot,
        ..VerifyReport::default()
    };
    manifest_findings(&manifest, &mut report);
    log.recovery_findings(state, &mut report);
    verify_snapshots(storage, state, &mut report);
    for segment in log.judged.tables.iter() {
        report.segments += 1;
        log.verify_segment(segment, state, &mut report)?;
        verify_length(storage, state, segment, &mut report)?;
    }
    Ok(report)
}

/// The manifest of a folder that has one and no segment that it does not know.
fn read_manifest<S: Storage>(storage: &S) -> Result<Folded, OpenError> {
    let folder = Folder::list(storage, 0)?;
    if !folder.has_manifest {
        folder.refuse_remains()?;
    }
    let manifest = read_state(storage)?;
    folder.refuse_strangers(storage, &manifest.state)?;
    Ok(manifest)
}

fn manifest_findings(manifest: &Folded, report: &mut VerifyReport) {
    let torn = manifest.torn.map(|torn| Wrong::TornRecord {
        position: torn.position,
        bytes: torn.bytes,
    });
    let padding = manifest.dirty_padding.map(|dirty| Wrong::Padding {
        position: dirty.position,
    });
    let findings = torn.into_iter().chain(padding).map(|what| Finding {
        file: crate::manifest::NAME.to_owned(),
        what,
        bytes: None,
        harm: Harm::None,
    });
    report.findings.extend(findings);
}

/// Every file that a kept snapshot needs. A bad one is made up for by the other generation.
fn verify_snapshots<S: Storage>(storage: &S, state: &State, report: &mut VerifyReport) {
    let files = state.snapshots.iter().flat_map(|snapshot| &snapshot.files);
    for file in files.collect::<BTreeSet<_>>() {
        let number = crate::snapshot::number_of(file).unwrap_or_default();
        let wrong = match flaws(storage, state.store, number) {
            Ok(flaws) => flaws
                .into_iter()
                .map(|(flaw, bytes)| (Wrong::Snapshot(flaw), Some(bytes)))
                .collect(),
            Err(_) => vec![(Wrong::SnapshotFile, None)],
        };
        let findings = wrong.into_iter().map(|(what, bytes)| Finding {
            file: file.clone(),
            what,
            bytes,
            harm: Harm::None,
        });
        report.findings.extend(findings);
    }
}

/// A segment has the length that it was made or sealed with.
fn verify_length<S: Storage>(
    storage: &S,
    state: &State,
    segment: &Segment<S::File>,
    report: &mut VerifyReport,
) -> Result<(), OpenError> {
    let expected = match state.segments.get(&segment.id).map(|named| named.end) {
        Some(SegmentEnd::Open { file_bytes } | SegmentEnd::Sealed { file_bytes, .. }) => file_bytes,
        Some(SegmentEnd::Cut(_)) | None => return Ok(()),
    };
    if let Body::Lost { .. } = segment.body {
        return Ok(());
    }
    let length = storage.open_read(&segment.name).and_then(|file| file.len());
    let bytes = length.map_err(|source| OpenError::Io {
        what: "read",
        file: segment.name.clone(),
        source,
    })?;
    if bytes < expected {
        report.findings.push(Finding {
            file: segment.name.clone(),
            what: Wrong::Short { bytes, expected },
            bytes: Some(bytes..expected),
            harm: Harm::None,
        });
    }
    Ok(())
}

/// One thing that a dump shows.
pub enum Dumped<'a> {
    Segment {
        id: SegmentId,
        file: &'a str,
        range: IndexRange,
        contents: Contents,
    },
    Entry {
        header: EntryHeader,
        position: u64,
        records: Records<'a>,
    },
    Damaged(IndexRange),
}

/// Shows every entry from `from` on, until `show` breaks.
pub fn dump<S: Storage>(
    storage: &S,
    from: LogIndex,
    mut show: impl FnMut(Dumped<'_>) -> ControlFlow<()>,
) -> Result<(), OpenError> {
    let state = read_manifest(storage)?.state;
    let log = Inspected::of(storage, &state)?;
    for segment in log
        .judged
        .tables
        .iter()
        .filter(|segment| segment.last() >= from)
    {
        let (id, file, contents) = (segment.id, segment.name.as_str(), segment.contents);
        let range = segment.range();
        if show(Dumped::Segment {
            id,
            file,
            range,
            contents,
        })
        .is_break()
        {
            return Ok(());
        }
        let shown = walk(segment, from.previous(), &mut |walked| match walked {
            Walked::Entry(header, bytes) => {
                let records = Records::new(&header, bytes);
                show(Dumped::Entry {
                    header,
                    position: header.position,
                    records,
                })
            }
            Walked::Damaged(range) => show(Dumped::Damaged(range)),
        })?;
        if shown.is_break() {
            return Ok(());
        }
    }
    Ok(())
}

/// Accepts the loss of every damaged entry above the snapshot: records durable skips, so that the
/// next opening folds over them. Returns what was given up; none if nothing keeps the log from
/// being written.
pub fn salvage_accept_loss<S: Storage>(
    storage: &S,
    options: &Options,
) -> Result<Vec<IndexRange>, OpenError> {
    options.check()?;
    read_manifest(storage)?;
    let pool = BufferPool::new(options.buffer_bytes_idle);
    let mut manifest = Manifest::read(storage.clone(), pool, options.manifest_bytes)?;
    let state = manifest.state().clone();
    let log = Inspected::of(storage, &state)?;
    let lost = log.losses(&state)?;
    for &range in &lost {
        manifest
            .append(Change::Skipped(range), state.durable)
            .map_err(|error| OpenError::Io {
                what: "write",
                file: "manifest".into(),
                source: error.0,
            })?;
    }
    Ok(lost)
}

/// A folder as recovery would see it, without its effects.
struct Inspected<F> {
    judged: Judged<F>,
    report: RecoveryReport,
    replay_from: LogIndex,
}

impl<F: StorageFile> Inspected<F> {
    fn of<S: Storage<File = F>>(storage: &S, state: &State) -> Result<Inspected<F>, OpenError> {
        let mut report = RecoveryReport::default();
        let snapshot = choose_snapshot(storage, state, &mut report)?.map(|(snapshot, _)| snapshot);
        let replay_from = snapshot.as_ref().map_or(LogIndex::NONE, Snapshot::index);
        let judged = judge::find(storage, state)?.judge(state, replay_from, &mut report);
        Ok(Inspected {
            judged,
            report,
            replay_from,
        })
    }

    fn harm(&self, range: IndexRange, state: &State) -> Harm {
        if range.last > self.replay_from && !is_given_up(range, state) {
            Harm::State
        } else {
            Harm::Bodies
        }
    }

    /// What a start would report.
    fn recovery_findings(&self, state: &State, report: &mut VerifyReport) {
        let file_of = |id| state.file_name(id).unwrap_or_default();
        for lost in &self.report.lost {
            report.findings.push(Finding {
                file: file_of(lost.segment),
                what: Wrong::Segment(lost.defect),
                bytes: None,
                harm: self.harm(lost.range, state),
            });
        }
        for range in self.uncovered() {
            let newest = state.snapshots.last();
            let file = newest.and_then(|snapshot| snapshot.files.last());
            report.findings.push(Finding {
                file: file
                    .cloned()
                    .unwrap_or_else(|| crate::manifest::NAME.into()),
                what: Wrong::Uncovered(range),
                bytes: None,
                harm: self.harm(range, state),
            });
        }
        for torn in &self.report.torn {
            report.findings.push(Finding {
                file: file_of(torn.segment),
                what: Wrong::Torn {
                    position: torn.position,
                    bytes: torn.bytes,
                },
                bytes: None,
                harm: Harm::None,
            });
        }
    }

    fn verify_segment(
        &self,
        segment: &Segment<F>,
        state: &State,
        report: &mut VerifyReport,
    ) -> Result<(), OpenError> {
        let range = segment.range();
        let first = report.range.map_or(range.first, |seen| seen.first);
        report.range = Some(IndexRange {
            first,
            last: range.last,
        });
        let mut digest = xxhash_rust::xxh3::Xxh3::new();
        let mut damaged = self.gaps(segment);
        let _ = walk(segment, LogIndex::NONE, &mut |walked| {
            match walked {
                Walked::Entry(header, _) => {
                    report.entries += 1;
                    report.records += u64::from(header.records);
                    digest.update(&header.encode().0);
                }
                Walked::Damaged(range) => damaged.push(range),
            }
            ControlFlow::Continue(())
        })?;
        let mut find = |what, bytes, harm| {
            report.findings.push(Finding {
                file: segment.name.clone(),
                what,
                bytes,
                harm,
            });
        };
        if !matches!(segment.body, Body::Lost { .. }) {
            verify_header(segment, &mut find)?;
        }
        if let Some(sealed) = segment.sealed() {
            verify_copies(segment, sealed, &mut find)?;
            if damaged.is_empty() && digest.digest128().to_le_bytes() != sealed.footer.digest {
                find(Wrong::Digest, None, Harm::None);
            }
        }
        for range in damaged {
            find(Wrong::Entries(range), None, self.harm(range, state));
        }
        Ok(())
    }

    /// Damaged entries above the snapshot that were not given up yet.
    fn losses(&self, state: &State) -> Result<Vec<IndexRange>, OpenError> {
        let mut lost = Vec::new();
        for segment in self.judged.tables.iter() {
            // An open one may have lost its last entries, or all.
            if segment.last() <= self.replay_from && segment.open_table().is_none() {
                continue;
            }
            if let Body::Lost { .. } = segment.body {
                lost.push(segment.range());
            }
            lost.extend(self.gaps(segment));
            let _ = walk(segment, self.replay_from, &mut |walked| {
                if let Walked::Damaged(range) = walked {
                    lost.push(range);
                }
                ControlFlow::Continue(())
            })?;
        }
        lost.extend(self.uncovered());
        lost.sort();
        lost.retain(|range| !is_given_up(*range, state));
        Ok(lost)
    }

    /// Entries above the snapshot that are not in the log any more, or not whole: nothing can fold them.
    fn uncovered(&self) -> Vec<IndexRange> {
        let mut uncovered = Vec::new();
        let mut next = self.replay_from.next();
        for segment in self.judged.tables.iter() {
            let range = IndexRange {
                first: segment.first.max(next),
                last: segment.last(),
            };
            if next < range.first {
                uncovered.push(IndexRange {
                    first: next,
                    last: range.first.previous(),
                });
            }
            if segment.contents == Contents::Sparse && range.first <= range.last {
                uncovered.push(range);
            }
            // What an open segment has lost at its end is among its gaps.
            let gaps = self.gaps(segment).into_iter().map(|gap| gap.last);
            next = gaps.fold(next.max(range.last.next()), |next, last| {
                next.max(last.next())
            });
        }
        uncovered
    }

    /// The entries of an open segment that are not where they should be.
    fn gaps(&self, segment: &Segment<F>) -> Vec<IndexRange> {
        let damaged = self.report.damaged.iter();
        damaged
            .filter(|damage| damage.segment == segment.id)
            .map(|damage| damage.range)
            .collect()
    }
}

fn is_given_up(range: IndexRange, state: &State) -> bool {
    state.is_skipped(range.first) && state.is_skipped(range.last)
}

enum Walked<'a> {
    Entry(EntryHeader, &'a [u8]),
    Damaged(IndexRange),
}

/// Reads the entries above `after`, in order.
fn walk<F: StorageFile>(
    segment: &Segment<F>,
    after: LogIndex,
    visit: &mut dyn FnMut(Walked<'_>) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, OpenError> {
    let spots = match segment.spots_after(after) {
        Ok(spots) => spots,
        Err(ReadError::Io { file, source }) => {
            return Err(OpenError::Io {
                what: "read",
                file,
                source,
            });
        }
        Err(_) => return Ok(visit(Walked::Damaged(segment.range()))),
    };
    let mut bytes = Vec::new();
    for spot in spots {
        let walked = match segment.read_entry(spot, &mut bytes) {
            Ok(header) => Walked::Entry(header, &bytes),
            Err(ReadError::Io { file, source }) => {
                return Err(OpenError::Io {
                    what: "read",
                    file,
                    source,
                });
            }
            Err(_) => Walked::Damaged(IndexRange {
                first: spot.index,
                last: spot.index,
            }),
        };
        if visit(walked).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn verify_header<F: StorageFile>(
    segment: &Segment<F>,
    find: &mut impl FnMut(Wrong, Option<Range<u64>>, Harm),
) -> Result<(), OpenError> {
    let mut block = [0; BLOCK_BYTES];
    read(segment, 0, &mut block)?;
    let whole = SegmentHeader::decode(&block)
        .is_ok_and(|header| header.uuid == segment.uuid && header.encode() == block);
    if !whole {
        // The manifest and the footers say the same.
        find(Wrong::Header, Some(0..BLOCK_BYTES as u64), Harm::None);
    }
    Ok(())
}

fn verify_copies<F: StorageFile>(
    segment: &Segment<F>,
    sealed: &SealedBody<F>,
    find: &mut impl FnMut(Wrong, Option<Range<u64>>, Harm),
) -> Result<(), OpenError> {
    let directory_bytes = sealed.footer.directory_blocks as usize * BLOCK_BYTES;
    for copy in 0..2 {
        let mut bytes = vec![0; directory_bytes + BLOCK_BYTES];
        let at = sealed.footer.copy_at(copy);
        let footer_at = at + directory_bytes as u64;
        read(segment, at, &mut bytes)?;
        let (directory, footer) = bytes.split_at(directory_bytes);
        let blocks = bad_blocks(directory, segment.uuid);
        if blocks > 0 {
            let what = Wrong::DirectoryCopy { copy, blocks };
            find(what, Some(at..footer_at), Harm::None);
        }
        if *footer != sealed.footer.encode() {
            let bytes = footer_at..footer_at + BLOCK_BYTES as u64;
            find(Wrong::FooterCopy(copy), Some(bytes), Harm::None);
        }
    }
    Ok(())
}

/// Bytes that the file has lost read as zeros, and fail their checks.
fn read<F: StorageFile>(segment: &Segment<F>, at: u64, buf: &mut [u8]) -> Result<(), OpenError> {
    match segment.fill(at, buf) {
        Err(ReadError::Io { file, source }) => Err(OpenError::Io {
            what: "read",
            file,
            source,
        }),
        _ => Ok(()),
    }
}
