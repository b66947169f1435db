//! Opening a damaged store and judging all that it says, by the rules that users were promised.
//!
//! - what is read is right, byte for byte, or an error names it (I8, I1);
//! - nothing is there that was never acknowledged (I2);
//! - the state is right, or it is that of an earlier entry and the log takes no writes;
//! - only a manifest may keep a store from being opened, and says why;
//! - only what nothing vouches for may be taken for a torn write;
//! - the damaged bytes of acknowledged entries are still on the disk afterwards;
//! - a second start says the same.

use std::panic::{AssertUnwindSafe, catch_unwind};

use millpond_broker::bodies::{BodyError, read_log};
use millpond_broker::shard::{OpenShardError, Recovered};
use millpond_protocol::{MessageView, Offset, TopicId};
use millpond_wal::{ReadError, VerifyReport};

use crate::disk::{Contents, Disk};
use crate::golden::NEXT_MINUTE;
use crate::life::{self, NO_SNAPSHOT, TestShard};
use crate::mutation::{Mutation, What};
use crate::oracle::Oracle;

/// More rows than there are.
const ROWS_MAX: usize = 10_000;

/// How a store came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Every message and the whole state are there: the damage hit what is twice there or of no use.
    Whole,
    /// Messages are lost and named; the state is whole and the log takes writes.
    Quarantined,
    /// The last entry, which nothing vouches for, counts as a torn write.
    Torn,
    /// The fold stops before the damage; the log takes no writes.
    ReadOnly,
    /// It does not open, and says why.
    Refused,
}

/// What a start made of it.
struct Seen {
    verdict: Verdict,
    /// Acknowledged messages that cannot be had, in order.
    missing: Vec<(TopicId, Offset)>,
    words: String,
}

/// How much is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// One start.
    Once,
    /// Also a second start, and verifying.
    Twice,
}

/// The verdict, or what is wrong with it.
pub fn judge(oracle: &Oracle, mutation: &Mutation, depth: Depth) -> Result<Verdict, String> {
    let judged = catch_unwind(AssertUnwindSafe(|| judge_all(oracle, mutation, depth)));
    judged.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied());
        Err(format!("panic: {}", text.unwrap_or("without words")))
    })
}

fn judge_all(oracle: &Oracle, mutation: &Mutation, depth: Depth) -> Result<Verdict, String> {
    let damaged = mutation.apply(&oracle.contents);
    let disk = Disk::of(&damaged);
    if depth == Depth::Twice {
        verified(oracle, mutation, &disk)?;
        if !unchanged(&damaged, &disk.contents()) {
            return Err("verifying wrote something".to_owned());
        }
    }
    let seen = start(oracle, mutation, &disk, None)?;
    still_there(oracle, mutation, seen.verdict, &damaged, &disk)?;
    if depth == Depth::Twice {
        let again = start(oracle, mutation, &disk, Some(&seen));
        let again = again.map_err(|error| format!("second start: {error}"))?;
        if seen.verdict != again.verdict || seen.missing != again.missing {
            return Err(format!(
                "the second start says {:?}: {}",
                again.verdict, again.words
            ));
        }
    }
    Ok(seen.verdict)
}

/// A start, perhaps after another one.
fn start(
    oracle: &Oracle,
    mutation: &Mutation,
    disk: &Disk,
    before: Option<&Seen>,
) -> Result<Seen, String> {
    match life::open(disk, NEXT_MINUTE, NO_SNAPSHOT) {
        Ok((shard, recovered, _)) => look(oracle, mutation, &shard, &recovered, before),
        Err(error) => refused(mutation, &error),
    }
}

fn refused(mutation: &Mutation, error: &OpenShardError) -> Result<Seen, String> {
    if mutation.file != "manifest" {
        return Err(format!("refused although the manifest is whole: {error}"));
    }
    match error {
        OpenShardError::Log(error) => Ok(Seen {
            verdict: Verdict::Refused,
            missing: Vec::new(),
            words: error.to_string(),
        }),
        other => Err(format!("refused without naming the manifest: {other}")),
    }
}

fn look(
    oracle: &Oracle,
    mutation: &Mutation,
    shard: &TestShard,
    recovered: &Recovered,
    before: Option<&Seen>,
) -> Result<Seen, String> {
    let words = format!("{recovered:?}");
    let stopped = recovered.damaged.then(|| shard.log().applied().0);
    let torn = match before {
        // What was cut is not there to be cut again.
        Some(before) => (before.verdict == Verdict::Torn).then_some(oracle.last),
        None => recovered.report.torn.first().map(|torn| torn.index.0),
    };
    let missing = read_everything(oracle, mutation, shard, stopped, torn)
        .map_err(|error| format!("{error}; {words}"))?;
    let lost_last = torn.is_some_and(|index| index <= oracle.last);
    let state = shard.queue().chunks();
    let nth = usize::from(before.is_some());
    let (whole, without_last) = (&oracle.whole[nth], &oracle.without_last[nth]);
    let verdict = match stopped {
        Some(index) => {
            // Blank entries change nothing.
            let right = oracle.stopped.range(..=index).next_back();
            if right.is_none_or(|(_, right)| *right != state) {
                return Err(format!("the state at {index} is wrong; {words}"));
            }
            Verdict::ReadOnly
        }
        None if state == *whole && missing.is_empty() => Verdict::Whole,
        None if state == *whole => Verdict::Quarantined,
        None if lost_last && state == *without_last => Verdict::Torn,
        None => return Err(format!("the state is wrong; {words}")),
    };
    Ok(Seen {
        verdict,
        missing,
        words,
    })
}

/// The messages that are missing, each for a reason that was given.
fn read_everything(
    oracle: &Oracle,
    mutation: &Mutation,
    shard: &TestShard,
    stopped: Option<u64>,
    torn: Option<u64>,
) -> Result<Vec<(TopicId, Offset)>, String> {
    let reader = shard.log().reader();
    let mut missing = Vec::new();
    for (&(topic, offset), known) in &oracle.messages {
        let above = stopped.is_some_and(|index| known.index > index)
            || torn.is_some_and(|index| known.index >= index && known.index > oracle.vouched);
        match read_log(&reader, topic, offset, 1, usize::MAX) {
            Ok(runs) => match runs.first() {
                Some(run) if run.messages == known.bytes && run.base == offset => {}
                _ => return Err(format!("wrong bytes at offset {offset} of topic {topic}")),
            },
            Err(BodyError::Damaged { first, next }) if first <= offset && offset < next => {
                // Above the damage nothing is folded, so nobody knows what stands where.
                if known.live && !above && !may_be_damaged(oracle, mutation, known.index) {
                    return Err(format!("offset {offset} of topic {topic} is not served"));
                }
                if known.live {
                    missing.push((topic, offset));
                }
            }
            Err(BodyError::Gone(_)) if !known.live => {}
            Err(BodyError::Gone(_)) if above => missing.push((topic, offset)),
            Err(error) => return Err(format!("offset {offset} of topic {topic}: {error}")),
        }
    }
    no_phantoms(oracle, shard)?;
    Ok(missing)
}

/// Whether the mutation can have reached a message of this entry.
fn may_be_damaged(oracle: &Oracle, mutation: &Mutation, index: u64) -> bool {
    let in_segment = || {
        let segment = oracle.segments.get(&mutation.file);
        segment.is_some_and(|segment| (segment.first..=segment.last).contains(&index))
    };
    match mutation.what {
        What::FlippedBit(_) => {
            let mut hit = oracle.entries_at(&mutation.file, mutation.touched());
            hit.any(|hit| hit == index)
        }
        What::Truncated(_) | What::Removed => in_segment(),
    }
}

fn no_phantoms(oracle: &Oracle, shard: &TestShard) -> Result<(), String> {
    let reader = shard.log().reader();
    for &topic in &oracle.topics {
        let rows = match reader.rows(topic.0, 0, ROWS_MAX) {
            Ok(rows) => rows,
            Err(ReadError::Damaged(_)) => continue,
            Err(error) => return Err(format!("rows: {error}")),
        };
        for row in rows {
            let Ok(record) = reader.record(row.place) else {
                continue;
            };
            let batch = record.body.slice(millpond_queue::PUBLISH_FIXED_BYTES..);
            let mut rest: &[u8] = &batch;
            for nth in 0..row.skip + row.count {
                let (view, behind) = MessageView::split(rest).map_err(|error| error.to_string())?;
                rest = behind;
                let Some(nth) = nth.checked_sub(row.skip) else {
                    continue;
                };
                let offset = Offset(row.base + u64::from(nth));
                let known = oracle.messages.get(&(topic, offset));
                if known.is_none_or(|known| known.bytes != view.bytes()) {
                    return Err(format!("a phantom at offset {offset} of topic {topic}"));
                }
            }
        }
    }
    Ok(())
}

/// Nothing that was acknowledged and is damaged now was cut or deleted.
fn still_there(
    oracle: &Oracle,
    mutation: &Mutation,
    verdict: Verdict,
    damaged: &Contents,
    disk: &Disk,
) -> Result<(), String> {
    let after = disk.contents();
    if matches!(verdict, Verdict::ReadOnly | Verdict::Refused) {
        return match unchanged(damaged, &after) {
            true => Ok(()),
            false => Err("a damaged store was written to".to_owned()),
        };
    }
    for (index, entry) in &oracle.entries {
        if *index > oracle.vouched {
            continue;
        }
        let before = damaged
            .get(&entry.file)
            .map(|bytes| slice(bytes, &entry.bytes));
        let now = after
            .get(&entry.file)
            .map(|bytes| slice(bytes, &entry.bytes));
        if before != now {
            return Err(format!("entry {index} was changed on the disk"));
        }
    }
    let saved = after.iter().find(|(name, _)| name.starts_with("torn-"));
    match (verdict, &mutation.what, saved) {
        (Verdict::Torn, What::FlippedBit(_), None) => Err("torn bytes were not saved".to_owned()),
        _ => Ok(()),
    }
}

fn slice<'a>(bytes: &'a [u8], range: &std::ops::Range<u64>) -> &'a [u8] {
    let end = bytes.len().min(range.end as usize);
    bytes.get(range.start as usize..end).unwrap_or_default()
}

fn unchanged(before: &Contents, after: &Contents) -> bool {
    before == after
}

/// Verifying tells that something is wrong, of the right file.
fn verified(oracle: &Oracle, mutation: &Mutation, disk: &Disk) -> Result<(), String> {
    let report = match millpond_wal::verify(disk) {
        Ok(report) => report,
        Err(_) if mutation.file == "manifest" => return Ok(()),
        Err(error) => return Err(format!("verify: {error}")),
    };
    if of_use(oracle, mutation) && !names(&report, &mutation.file) {
        return Err(format!("verify does not name it: {:?}", report.findings));
    }
    Ok(())
}

fn names(report: &VerifyReport, file: &str) -> bool {
    report.findings.iter().any(|finding| finding.file == file)
}

/// Whether anything of the mutated bytes is needed; the ends of a file that grows are not.
fn of_use(oracle: &Oracle, mutation: &Mutation) -> bool {
    let bytes = &oracle.contents[&mutation.file];
    let used = bytes
        .iter()
        .rposition(|&byte| byte != 0)
        .map_or(0, |at| at as u64 + 1);
    let grows = mutation.file == "manifest";
    match mutation.what {
        What::FlippedBit(_) | What::Removed => true,
        What::Truncated(len) => !grows || len < used,
    }
}
