//! What files the folder has, compared with what the manifest names.

use std::collections::BTreeSet;

use super::io_error;
use crate::entry::{EntryHeader, HEADER_BYTES};
use crate::error::OpenError;
use crate::manifest::{NAME, NEW_NAME, State};
use crate::segment::{ENTRIES_START, SegmentId, file_name, parse_file_name};
use crate::snapshot;
use crate::spare::{Spare, SpareName, parse_spare_name};
use crate::storage::{Storage, StorageFile};

pub(crate) struct Folder {
    pub has_manifest: bool,
    pub spares: Vec<Spare>,
    pub next_spare: u64,
    /// The highest number in any snapshot file's name.
    pub last_snapshot: u64,
    pub names: FolderNames,
}

/// All names that there were when the folder was listed.
pub(crate) struct FolderNames {
    all: Vec<String>,
    /// Spares that are large enough to be used.
    spares: BTreeSet<u64>,
}

impl Folder {
    pub fn list<S: Storage>(storage: &S, spare_bytes: u64) -> Result<Folder, OpenError> {
        let names = storage
            .list()
            .map_err(|source| io_error("list", ".", source))?;
        let mut folder = Folder {
            has_manifest: names.iter().any(|name| name == NAME),
            spares: Vec::new(),
            next_spare: 0,
            last_snapshot: names
                .iter()
                .filter_map(|name| snapshot::number_of(name))
                .max()
                .unwrap_or(0),
            names: FolderNames {
                all: Vec::new(),
                spares: BTreeSet::new(),
            },
        };
        for name in &names {
            match parse_spare_name(name) {
                Some(SpareName::Ready(number)) => {
                    let bytes = storage.open(name).and_then(|file| file.len());
                    let bytes = bytes.map_err(|source| io_error("open", name, source))?;
                    folder.next_spare = folder.next_spare.max(number.saturating_add(1));
                    if bytes >= spare_bytes {
                        folder.spares.push(Spare { number, bytes });
                    }
                }
                Some(SpareName::Unfinished(number)) => {
                    folder.next_spare = folder.next_spare.max(number.unwrap_or(0));
                }
                None => {}
            }
        }
        folder.names = FolderNames {
            all: names,
            spares: folder.spares.iter().map(|spare| spare.number).collect(),
        };
        Ok(folder)
    }

    /// A folder without a manifest must hold nothing of a log.
    pub fn refuse_remains(&self) -> Result<(), OpenError> {
        let remains =
            |name: &&String| parse_file_name(name).is_some() || snapshot::number_of(name).is_some();
        match self.names.all.iter().find(remains) {
            Some(example) => Err(OpenError::ManifestMissing {
                example: example.clone(),
            }),
            None => Ok(()),
        }
    }

    /// A segment that the manifest has never heard of and that holds entries was written after it.
    pub fn refuse_strangers<S: Storage>(
        &self,
        storage: &S,
        state: &State,
    ) -> Result<(), OpenError> {
        for name in &self.names.all {
            let Some((id, generation)) = parse_file_name(name) else {
                continue;
            };
            let behind = match state.segments.get(&id) {
                // A cleaning that was interrupted, unless the file it should replace is gone.
                Some(known) => generation > known.generation && !self.has(id, known.generation),
                None => id.0 >= state.next_segment && holds_an_entry(storage, name)?,
            };
            if behind {
                return Err(OpenError::ManifestBehind { file: name.clone() });
            }
        }
        Ok(())
    }

    fn has(&self, id: SegmentId, generation: u32) -> bool {
        self.names.all.contains(&file_name(id, generation))
    }
}

impl FolderNames {
    /// Deletes what an interrupted job or removal left behind, but for one unfinished spare. What cannot be
    /// deleted now is found again at the next opening.
    pub fn delete_unnamed<S: Storage>(&self, storage: &S, state: &State, unfinished: Option<u64>) {
        let mut named: BTreeSet<String> = state
            .segments
            .iter()
            .map(|(&id, entry)| file_name(id, entry.generation))
            .collect();
        named.extend(
            state
                .snapshots
                .iter()
                .flat_map(|snapshot| snapshot.files.iter().cloned()),
        );
        for name in &self.all {
            let ours = parse_file_name(name).is_some() || snapshot::number_of(name).is_some();
            let useless = match parse_spare_name(name) {
                Some(SpareName::Unfinished(number)) => number.is_none() || number != unfinished,
                // Made when segments were smaller.
                Some(SpareName::Ready(number)) => !self.spares.contains(&number),
                None => false,
            };
            if (ours && !named.contains(name)) || useless || name == NEW_NAME {
                let _ = storage.remove(name);
            }
        }
    }
}

fn holds_an_entry<S: Storage>(storage: &S, name: &str) -> Result<bool, OpenError> {
    let mut header = [0; HEADER_BYTES];
    let file = storage
        .open(name)
        .map_err(|source| io_error("open", name, source))?;
    let read = file
        .read_uncached_at(ENTRIES_START, &mut header)
        .map_err(|source| io_error("read", name, source))?;
    Ok(EntryHeader::decode(&header[..read]).is_ok())
}
