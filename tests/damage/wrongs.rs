//! The judge judged: what the oracle knows is bent, one thing at a time, so that a store that comes through
//! well looks as a broken one would; each must be found, for its own reason.

use crate::golden;
use crate::judge::{Depth, judge};
use crate::mutation::{Mutation, What};
use crate::oracle::Oracle;

/// What the judge says of a whole store after `bend`.
fn verdict_on(bend: impl FnOnce(&mut Oracle)) -> Result<(), String> {
    let mut oracle = golden();
    bend(&mut oracle);
    // The last byte of the manifest is behind its end: cutting it costs nothing.
    let file = "manifest".to_owned();
    let len = oracle.contents[&file].len() as u64 - 1;
    let what = What::Truncated(len);
    judge(&oracle, &Mutation { file, what }, Depth::Once).map(drop)
}

#[track_caller]
fn expect_found(reason: &str, bend: impl FnOnce(&mut Oracle)) {
    let error = verdict_on(bend).expect_err("the judge finds nothing");
    assert!(error.contains(reason), "{error}");
}

#[test]
fn the_judge_finds_nothing_wrong_with_a_whole_store() {
    assert_eq!(verdict_on(|_| ()), Ok(()));
}

#[test]
fn the_judge_finds_one_wrong_byte_in_a_message() {
    expect_found("wrong bytes", |oracle| {
        let known = oracle.messages.values_mut().find(|known| known.live);
        let known = known.expect("something is live");
        let mut bytes = known.bytes.to_vec();
        bytes[0] ^= 1;
        known.bytes = bytes.into();
    });
}

#[test]
fn the_judge_finds_a_message_that_nobody_acknowledged() {
    expect_found("phantom", |oracle| {
        let live = oracle.messages.iter().find(|(_, known)| known.live);
        let at = *live.expect("something is live").0;
        oracle.messages.remove(&at);
    });
}

#[test]
fn the_judge_finds_an_acknowledged_message_that_vanished() {
    expect_found("is no longer kept", |oracle| {
        let (&(topic, offset), known) = oracle.messages.iter().next_back().expect("there are");
        let vanished = crate::oracle::Known {
            bytes: known.bytes.clone(),
            index: oracle.vouched,
            live: true,
        };
        let behind = millpond_protocol::Offset(offset.0 + 1_000);
        oracle.messages.insert((topic, behind), vanished);
    });
}

#[test]
fn the_judge_finds_another_state() {
    expect_found("the state is wrong", |oracle| {
        oracle.whole[0].pop();
        oracle.without_last[0].pop();
    });
}

#[test]
fn the_judge_finds_a_message_that_is_not_served_for_no_reason() {
    let oracle = golden();
    // The damage is elsewhere than it is said to be, so whatever is not served has no excuse.
    let mut bent = golden();
    let entry = oracle.entries.values().next().expect("there are entries");
    let mut bytes = bent.contents[&entry.file].to_vec();
    bytes[entry.bytes.start as usize + 500] ^= 1;
    bent.contents.insert(entry.file.clone(), bytes.into());
    let last = oracle.contents["manifest"].len() as u64 - 1;
    let elsewhere = Mutation {
        file: "manifest".to_owned(),
        what: What::Truncated(last),
    };
    let error = judge(&bent, &elsewhere, Depth::Once).expect_err("the judge finds nothing");
    assert!(error.contains("is not served"), "{error}");
}
