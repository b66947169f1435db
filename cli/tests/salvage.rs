//! Damage at rest, as an operator meets it: each kind of it, told by `log verify`, accepted by `log salvage` where
//! that is needed, and what the broker serves afterwards.

#![expect(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{Broker, CONFIG, Run, millpond, run, serve_command, text};
use serde_json::Value;
use tempfile::TempDir;

/// Segments and snapshots as small as they come: three messages of four lie below a snapshot.
const SMALL: &str =
    "[log]\nsegment_bytes = 1048576\nsnapshot_every_bytes = 1048576\nspare_segments = 1\n";
const MESSAGES: u64 = 60;
const BODY_BYTES: usize = 60_000;
const BLOCK: u64 = 4_096;
/// What a broker keeps back by default.
const RESERVE_BYTES: u64 = 320 << 20;

/// A data folder after a clean end, and where everything lies in it.
struct Golden {
    folder: TempDir,
    /// By offset.
    messages: Vec<Place>,
    /// Behind the last entry of each segment.
    segments: BTreeMap<String, u64>,
    /// Oldest first.
    snapshots: Vec<String>,
    /// The last entry.
    last: u64,
}

#[derive(Clone)]
struct Place {
    file: String,
    index: u64,
    position: u64,
    covered: bool,
}

fn golden() -> &'static Golden {
    static GOLDEN: OnceLock<Golden> = OnceLock::new();
    GOLDEN.get_or_init(|| {
        let broker = Broker::with(SMALL);
        broker.good("topic create orders");
        for nth in 0..MESSAGES {
            broker.good(&format!("send orders {}", payload(nth)));
        }
        let mut broker = broker;
        assert_eq!(broker.terminate(), Some(0));
        let folder = copy(&broker.data);
        drop(broker);
        look(folder)
    })
}

fn payload(nth: u64) -> String {
    format!("message-{nth}-{}", "x".repeat(BODY_BYTES))
}

fn look(folder: TempDir) -> Golden {
    let data = folder.path().join("data");
    let (code, report) = json("verify", &data);
    assert_eq!((code, &report["good"]), (0, &Value::Bool(true)), "{report}");
    let covered = report["snapshot_index"].as_u64().unwrap();
    let mut command = millpond();
    command.args(["log", "dump", "--output", "json"]).arg(&data);
    let (mut file, mut position, mut last) = (String::new(), 0, 0);
    let (mut messages, mut segments) = (Vec::new(), BTreeMap::new());
    for line in run(command).json_lines() {
        match line["type"].as_str().unwrap() {
            "segment" => file = text(&line["file"]),
            "entry" => {
                position = line["position"].as_u64().unwrap();
                last = line["index"].as_u64().unwrap();
                let used = 96 + line["payload_bytes"].as_u64().unwrap();
                segments.insert(file.clone(), position + used.next_multiple_of(BLOCK));
            }
            _ if line["kind"] == "Publish" => {
                let index = line["index"].as_u64().unwrap();
                messages.push(Place {
                    file: file.clone(),
                    index,
                    position,
                    covered: index <= covered,
                });
            }
            _ => {}
        }
    }
    assert_eq!(messages.len() as u64, MESSAGES);
    assert!(messages.iter().any(|place| !place.covered));
    let files = files(&data.join("log"));
    let snapshots = files.keys().filter(|name| name.starts_with("snapshot-"));
    let snapshots: Vec<_> = snapshots.cloned().collect();
    assert_eq!(snapshots.len(), 2);
    Golden {
        folder,
        messages,
        segments,
        snapshots,
        last,
    }
}

/// The data folder without the reserve, which is large and holds nothing.
fn copy(data: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(CONFIG), SMALL).unwrap();
    let to = folder.path().join("data");
    for part in ["", "log", "tls"] {
        std::fs::create_dir(to.join(part)).unwrap();
        for file in std::fs::read_dir(data.join(part)).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap();
            if path.is_file() && name != "reserve" {
                std::fs::copy(&path, to.join(part).join(name)).unwrap();
            }
        }
    }
    folder
}

fn files(log: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |file: std::io::Result<std::fs::DirEntry>| {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        // The reserve is large and says nothing.
        let bytes = match name == "reserve" {
            true => path.metadata().unwrap().len().to_le_bytes().to_vec(),
            false => std::fs::read(path).unwrap(),
        };
        (name, bytes)
    };
    let all = std::fs::read_dir(log).unwrap();
    let all = all
        .filter(|file| file.as_ref().unwrap().path().is_file())
        .map(read);
    // Who holds the folder stands in the lock file.
    all.filter(|(name, _)| name != "LOCK").collect()
}

fn log(what: &str, data: &Path) -> Run {
    let mut command = millpond();
    command.arg("log").args(what.split(' ')).arg(data);
    run(command)
}

/// The command's JSON, from wherever it tells it.
fn json(what: &str, data: &Path) -> (i32, Value) {
    let run = log(&format!("{what} --output json"), data);
    let told = if run.out.is_empty() {
        &run.err
    } else {
        &run.out
    };
    let value = serde_json::from_str(told.lines().next().unwrap_or_default());
    (run.code, value.unwrap_or_else(|e| panic!("{e} in {run:?}")))
}

/// A copy of the golden folder that is damaged.
struct Damaged {
    folder: TempDir,
    data: PathBuf,
}

impl Damaged {
    fn new(damage: impl FnOnce(&Path)) -> Self {
        let folder = copy(&golden().folder.path().join("data"));
        let data = folder.path().join("data");
        damage(&data.join("log"));
        Self { folder, data }
    }

    /// Verifying tells this of this file, in both forms, and writes nothing.
    fn verify(&self, file: &str, what: &str, harm: &str) {
        let before = files(&self.data.join("log"));
        let human = log("verify", &self.data);
        let (code, report) = json("verify", &self.data);
        assert_eq!((human.code, code), (4, 4), "{human:?}");
        let findings = report["findings"].as_array().unwrap();
        let found = findings.iter().find(|found| {
            found["file"] == file && text(&found["what"]).contains(what) && found["harm"] == harm
        });
        let found = found.unwrap_or_else(|| panic!("no {what:?} of {file}: {report}"));
        for part in ["what", "advice"] {
            let part = text(&found[part]);
            let told = human
                .out
                .lines()
                .any(|line| line.starts_with(file) && line.contains(&part));
            assert!(told, "{part}: {human:?}");
        }
        assert_eq!(files(&self.data.join("log")), before, "verifying wrote");
    }

    /// Nothing keeps the broker from writing, so there is nothing to accept.
    fn needs_no_salvage(&self) {
        let before = files(&self.data.join("log"));
        for what in ["salvage", "salvage --accept-loss"] {
            let run = log(what, &self.data);
            assert_eq!(run.code, 0, "{run:?}");
            assert!(run.out.contains("nothing has to be salvaged"), "{run:?}");
        }
        assert_eq!(files(&self.data.join("log")), before, "salvaging wrote");
    }

    /// The broker takes no writes, until the loss is accepted.
    fn salvage(&self) {
        let readonly = Damaged {
            folder: copy(&self.data),
            data: PathBuf::new(),
        };
        let broker = Broker::of(readonly.folder);
        let refused = broker.run("send orders more");
        assert_ne!(refused.code, 0, "{refused:?}");
        assert!(refused.err.contains("salvage"), "{refused:?}");
        drop(broker);
        let before = files(&self.data.join("log"));
        let shown = log("salvage", &self.data);
        assert_eq!(shown.code, 4, "{shown:?}");
        assert!(shown.out.contains("--accept-loss"), "{shown:?}");
        assert_eq!(files(&self.data.join("log")), before, "showing wrote");
        let (code, accepted) = json("salvage --accept-loss", &self.data);
        assert_eq!((code, &accepted["accepted"]), (0, &Value::Bool(true)));
        assert!(!accepted["losses"].as_array().unwrap().is_empty());
        let mut after = files(&self.data.join("log"));
        after.insert("manifest".to_owned(), before["manifest"].clone());
        assert_eq!(after, before, "only the manifest tells of it");
        let again = log("salvage", &self.data);
        assert_eq!(again.code, 0, "{again:?}");
    }

    /// The broker starts: these are damaged, all others are there at their offsets; what is sent gets an
    /// offset that nobody had. A second start says the same.
    fn served_but(self, lost: &[u64]) {
        let mut broker = Broker::of(self.folder);
        let sent = broker.json("send orders more");
        let at = sent["first_offset"]
            .as_u64()
            .unwrap_or_else(|| panic!("{sent}"));
        assert!(at >= MESSAGES, "{sent}");
        for again in [false, true] {
            if again {
                broker.kill();
                broker.restart();
            }
            let (there, damaged) = everything(&broker);
            let expected = (0..MESSAGES).filter(|nth| !lost.contains(nth));
            let mut expected: BTreeMap<_, _> = expected.map(|nth| (nth, payload(nth))).collect();
            expected.insert(at, "more".to_owned());
            let wrong = there
                .iter()
                .find(|(at, text)| expected.get(at) != Some(text));
            assert_eq!(wrong.map(|(at, _)| at), None, "wrong bytes");
            assert_eq!(there.len(), expected.len());
            // What was lost at the very end nothing tells of: it is left out.
            match lost.contains(&(MESSAGES - 1)) {
                true => assert!(
                    damaged
                        .iter()
                        .all(|nth| lost.contains(nth) || *nth >= MESSAGES)
                ),
                false => assert_eq!(damaged, lost),
            }
        }
    }
}

/// What can be had, and what is answered as damaged.
fn everything(broker: &Broker) -> (BTreeMap<u64, String>, Vec<u64>) {
    let (mut there, mut damaged) = (BTreeMap::new(), Vec::new());
    let run = broker.good("peek orders --count 1000000 --output json");
    for message in run.json_lines() {
        let at = message["offset"].as_u64().unwrap();
        if message["damaged"] == true {
            damaged.push(at);
        } else {
            there.insert(at, text(&message["payload"]));
        }
    }
    (there, damaged)
}

fn flip(log: &Path, file: &str, at: u64) {
    let path = log.join(file);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at as usize] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn cut(log: &Path, file: &str, len: u64) {
    let file = std::fs::File::options().write(true).open(log.join(file));
    file.unwrap().set_len(len).unwrap();
}

fn remove(log: &Path, file: &str) {
    std::fs::remove_file(log.join(file)).unwrap();
}

/// A message in the middle of a segment below the snapshots, and one above them with others behind it.
fn covered() -> (u64, &'static Place) {
    (5, &golden().messages[5])
}

fn uncovered() -> (u64, &'static Place) {
    let messages = &golden().messages;
    let first = messages.iter().position(|place| !place.covered).unwrap() + 1;
    assert!(first + 1 < messages.len());
    (first as u64, &messages[first])
}

fn in_file(file: &str) -> Vec<u64> {
    let messages = (0..).zip(&golden().messages);
    let here = messages.filter(|(_, place)| place.file == file);
    here.map(|(nth, _)| nth).collect()
}

fn entry(place: &Place) -> String {
    format!("entries {0}..={0} are damaged", place.index)
}

#[test]
fn a_flipped_bit_in_a_body_or_header_below_the_snapshot_costs_that_message() {
    let (nth, place) = covered();
    for at in [500, 20] {
        let damaged = Damaged::new(|log| flip(log, &place.file, place.position + at));
        damaged.verify(&place.file, &entry(place), "bodies");
        damaged.needs_no_salvage();
        damaged.served_but(&[nth]);
    }
}

#[test]
fn a_flipped_bit_in_a_body_or_header_above_the_snapshot_costs_that_message_once_it_is_accepted() {
    let (nth, place) = uncovered();
    for at in [500, 20] {
        let damaged = Damaged::new(|log| flip(log, &place.file, place.position + at));
        damaged.verify(&place.file, &entry(place), "state");
        damaged.salvage();
        damaged.served_but(&[nth]);
    }
}

/// The copies of directory and footer begin here; each footer is a block.
fn copies(file: &str) -> [(u64, u64); 2] {
    let end = golden().segments[file];
    let len = std::fs::metadata(golden().folder.path().join("data/log").join(file));
    let half = (len.unwrap().len() - end) / 2;
    [
        (end, end + half - BLOCK),
        (end + half, end + 2 * half - BLOCK),
    ]
}

#[test]
fn one_bad_copy_of_a_directory_or_footer_costs_nothing() {
    let (_, place) = covered();
    for (copy, (directory, footer)) in copies(&place.file).into_iter().enumerate() {
        let damaged = Damaged::new(|log| flip(log, &place.file, directory + 30));
        let what = format!("copy {copy} of the directory");
        damaged.verify(&place.file, &what, "none");
        damaged.needs_no_salvage();
        damaged.served_but(&[]);
        let damaged = Damaged::new(|log| flip(log, &place.file, footer + 30));
        damaged.verify(&place.file, &format!("copy {copy} of the footer"), "none");
        damaged.needs_no_salvage();
        damaged.served_but(&[]);
    }
}

#[test]
fn both_copies_of_a_directory_or_footer_cost_the_messages_of_that_segment() {
    for ((_, place), harm) in [(covered(), "bodies"), (uncovered(), "state")] {
        let [first, second] = copies(&place.file);
        for (ats, what) in [
            ([first.0 + 30, second.0 + 30], "directory"),
            ([first.1 + 30, second.1 + 30], "footer"),
        ] {
            let damaged = Damaged::new(|log| {
                ats.iter().for_each(|at| flip(log, &place.file, *at));
            });
            damaged.verify(&place.file, what, harm);
            match harm {
                "state" => damaged.salvage(),
                _ => damaged.needs_no_salvage(),
            }
            damaged.served_but(&in_file(&place.file));
        }
    }
}

#[test]
fn a_shorter_or_missing_segment_costs_the_messages_that_were_in_it() {
    for ((_, place), harm) in [(covered(), "bodies"), (uncovered(), "state")] {
        let lost = in_file(&place.file);
        for missing in [false, true] {
            let damaged = Damaged::new(|log| match missing {
                true => remove(log, &place.file),
                false => cut(log, &place.file, place.position + 9),
            });
            let what = if missing { "missing" } else { "footer" };
            damaged.verify(&place.file, what, harm);
            match harm {
                "state" => damaged.salvage(),
                _ => damaged.needs_no_salvage(),
            }
            damaged.served_but(&lost);
        }
    }
    let (_, place) = covered();
    let end = copies(&place.file)[1].1;
    let damaged = Damaged::new(|log| cut(log, &place.file, end + 5));
    damaged.verify(&place.file, "bytes long and was", "none");
    damaged.served_but(&[]);
}

#[test]
fn a_damaged_or_missing_snapshot_costs_nothing_nor_do_both() {
    let snapshots = &golden().snapshots;
    for lost in [&snapshots[1..], &snapshots[..1], &snapshots[..]] {
        let damaged = Damaged::new(|log| lost.iter().for_each(|name| remove(log, name)));
        for name in lost {
            damaged.verify(name, "cannot be read as a part of a snapshot", "none");
        }
        damaged.needs_no_salvage();
        damaged.served_but(&[]);
        let damaged = Damaged::new(|log| lost.iter().for_each(|name| flip(log, name, BLOCK + 3)));
        for name in lost {
            damaged.verify(name, "chunk", "none");
        }
        damaged.needs_no_salvage();
        damaged.served_but(&[]);
    }
    let name = &snapshots[1];
    let damaged = Damaged::new(|log| flip(log, name, 30));
    damaged.verify(name, "copy 0 of its header is bad", "none");
    damaged.served_but(&[]);
}

/// What can only be restored: no command changes a byte, and each says what to do.
fn refused(damaged: &Damaged, said: &[&str]) {
    let log_folder = damaged.data.join("log");
    let before = files(&log_folder);
    for what in ["verify", "salvage", "salvage --accept-loss", "dump"] {
        let human = log(what, &damaged.data);
        assert_eq!(
            (human.code, human.out.as_str()),
            (4, ""),
            "{what}: {human:?}"
        );
        let (code, error) = json(what, &damaged.data);
        assert_eq!(
            (code, &error["error"]["class"]),
            (4, &Value::from("corrupt"))
        );
        let message = text(&error["error"]["message"]);
        assert!(human.err.contains(&message), "{human:?}");
        assert!(said.iter().all(|part| message.contains(part)), "{message}");
    }
    let run = run(serve_command(&damaged.data, "127.0.0.1:0"));
    assert_eq!(run.code, 1, "{run:?}");
    assert!(said.iter().all(|part| run.err.contains(part)), "{run:?}");
    assert_eq!(files(&log_folder), before, "something was written");
}

#[test]
fn a_damaged_or_missing_manifest_is_to_be_restored() {
    let damaged = Damaged::new(|log| flip(log, "manifest", 2 * BLOCK + 50));
    refused(&damaged, &["manifest", "byte 8192", "backup"]);
    let damaged = Damaged::new(|log| remove(log, "manifest"));
    refused(&damaged, &["no manifest", "seg-", "backup"]);
}

/// Signs a block again, whose version stands at byte 8 and its checksum, over so many bytes, at byte 12.
fn newer(log: &Path, file: &str, at: u64, signed: usize) {
    let path = log.join(file);
    let mut bytes = std::fs::read(&path).unwrap();
    let block = &mut bytes[at as usize..][..signed];
    block[8..10].copy_from_slice(&9_u16.to_le_bytes());
    block[12..16].fill(0);
    let crc = crc32(block);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

/// A manifest signs its first record otherwise: its version stands at byte 12.
fn newer_manifest(log: &Path) {
    let path = log.join("manifest");
    let mut bytes = std::fs::read(&path).unwrap();
    let payload = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize;
    bytes[12..14].copy_from_slice(&9_u16.to_le_bytes());
    bytes[4..8].fill(0);
    let crc = crc32(&bytes[..40 + payload]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

/// A record of a kind that this version does not know, behind all others.
fn newer_record(log: &Path) {
    use millpond_wal::storage::{FolderStorage, Mapping};
    let storage = FolderStorage::open(log, Mapping::Off).unwrap();
    let mut opened = millpond_wal::Log::open(storage, millpond_wal::Options::default()).unwrap();
    let replayed = opened
        .log
        .replay(|_, _| Ok::<(), std::convert::Infallible>(()));
    replayed.unwrap();
    let mut group = opened.log.new_group();
    group.push(u64::MAX - 1, 200, &[b"of the future"]);
    opened.log.append_durable(group).unwrap();
    opened.log.vouch().unwrap();
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = !0;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[test]
fn what_a_newer_version_wrote_is_refused_before_a_byte_is_written() {
    let golden = golden();
    let segment = &golden.messages[0].file;
    let snapshot = &golden.snapshots[1];
    let second = std::fs::metadata(golden.folder.path().join("data/log").join(snapshot));
    let second = second.unwrap().len() - BLOCK;
    // How many entries there are is up to how fast the machine was.
    let next = format!("entry {} of", golden.last + 1);
    type Damage<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, &str, Damage<'_>); 4] = [
        ("manifest", "format 9", &newer_manifest),
        (segment, "format 9", &|log| newer(log, segment, 0, 92 + 4)),
        (snapshot, "format 9", &|log| {
            newer(log, snapshot, 0, BLOCK as usize);
            newer(log, snapshot, second, BLOCK as usize);
        }),
        (&next, "kind 200", &newer_record),
    ];
    for (file, version, damage) in cases {
        let newer = Damaged::new(damage);
        let reserve = std::fs::File::create(newer.data.join("reserve")).unwrap();
        reserve.set_len(RESERVE_BYTES).unwrap();
        let before = [files(&newer.data), files(&newer.data.join("log"))];
        let run = run(serve_command(&newer.data, "127.0.0.1:0"));
        assert_eq!((run.code, run.out.as_str()), (1, ""), "{run:?}");
        for part in [file, version, "newer Millpond", "start that version"] {
            assert!(run.err.contains(part), "{part}: {run:?}");
        }
        let after = [files(&newer.data), files(&newer.data.join("log"))];
        assert!(after == before, "{file}: something was written");
        if version == "kind 200" {
            continue;
        }
        for what in ["verify", "salvage", "salvage --accept-loss", "dump"] {
            let run = log(what, &newer.data);
            assert_eq!(run.code, 1, "{what}: {run:?}");
            for part in [file, version, "start that version"] {
                assert!(run.err.contains(part), "{part}: {run:?}");
            }
        }
        assert!(
            files(&newer.data.join("log")) == before[1],
            "{file}: something was written"
        );
    }
}
