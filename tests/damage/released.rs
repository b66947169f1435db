//! A data folder of every format that there was, kept in the repository: each is opened, and all that was
//! acknowledged in it is there. `MILLPOND_BLESS=1` writes the newest one anew; the older ones stay.

use std::path::PathBuf;

use crate::disk::Contents;
use crate::golden::{self, Golden};
use crate::judge::{Depth, Verdict, judge};
use crate::mutation::{Mutation, What};
use crate::oracle::Oracle;

fn folder(format: u32) -> PathBuf {
    let tests = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/damage");
    tests.join(format!("format-{format}"))
}

fn read(format: u32) -> Contents {
    let files = std::fs::read_dir(folder(format)).expect("the repository has it");
    let read = |file: std::io::Result<std::fs::DirEntry>| {
        let path = file.expect("it can be listed").path();
        let bytes = std::fs::read(&path).expect("it can be read");
        let name = path.file_name().expect("it was listed");
        (name.to_string_lossy().into_owned(), bytes.into())
    };
    files.map(read).collect()
}

fn bless(format: u32, contents: &Contents) {
    let folder = folder(format);
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    for (name, bytes) in contents {
        std::fs::write(folder.join(name), &**bytes).expect("it can be written");
    }
}

#[test]
fn a_folder_of_every_format_is_opened_with_all_that_was_acknowledged_in_it() {
    let made = golden::make();
    if std::env::var_os("MILLPOND_BLESS").is_some() {
        bless(NEWEST, &made.contents);
    }
    // A change of what is written needs a folder of its own beside these.
    for (name, bytes) in &read(NEWEST) {
        assert!(*bytes == made.contents[name], "{name} is written otherwise");
    }
    let names = |contents: &Contents| contents.keys().cloned().collect::<Vec<_>>();
    for format in 1..=NEWEST {
        let kept = read(format);
        assert_eq!(names(&kept), names(&made.contents), "format {format}");
        let oracle = Oracle::of(&Golden {
            contents: kept,
            accepted: made.accepted.clone(),
        });
        let file = "manifest".to_owned();
        let what = What::Truncated(oracle.contents[&file].len() as u64 - 1);
        let harmless = Mutation { file, what };
        let judged = judge(&oracle, &harmless, Depth::Twice);
        assert_eq!(judged, Ok(Verdict::Whole), "format {format}");
    }
}

/// In the first, snapshots had retries otherwise.
const NEWEST: u32 = 2;
