//! A folder in memory of which a copy costs nothing until it is written to.
//!
//! Owns no crash model: what is written is there. It is made for damage, not for power cuts, and for being
//! forked millions of times.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};

use millpond_wal::storage::{Map, Space, Storage, StorageFile};

/// Clones share the folder; forks do not.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    files: Arc<Mutex<BTreeMap<String, Arc<Cell>>>>,
}

/// One file; outlives its name while it is open.
#[derive(Debug)]
struct Cell(RwLock<Arc<Vec<u8>>>);

#[derive(Debug)]
pub struct File(Arc<Cell>);

/// Every file's bytes, shared with the disk they were taken from.
pub type Contents = BTreeMap<String, Arc<Vec<u8>>>;

impl Disk {
    pub fn of(contents: &Contents) -> Self {
        let cell = |bytes: &Arc<Vec<u8>>| Arc::new(Cell(RwLock::new(bytes.clone())));
        let files = contents
            .iter()
            .map(|(name, bytes)| (name.clone(), cell(bytes)));
        Self {
            files: Arc::new(Mutex::new(files.collect())),
        }
    }

    pub fn contents(&self) -> Contents {
        let files = self.files();
        files
            .iter()
            .map(|(name, cell)| (name.clone(), cell.bytes()))
            .collect()
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Cell>>> {
        self.files.lock().expect("nothing panics while it looks")
    }

    fn find(&self, name: &str) -> io::Result<File> {
        let found = self.files().get(name).cloned();
        found
            .map(File)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Cell {
    fn bytes(&self) -> Arc<Vec<u8>> {
        self.read().clone()
    }

    fn read(&self) -> RwLockReadGuard<'_, Arc<Vec<u8>>> {
        self.0.read().expect("nothing panics while it looks")
    }

    fn change(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = self.0.write().expect("nothing panics while it writes");
        change(Arc::make_mut(&mut bytes));
    }
}

impl Storage for Disk {
    type File = File;

    fn create(&self, name: &str) -> io::Result<File> {
        let mut files = self.files();
        if files.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let cell = Arc::new(Cell(RwLock::default()));
        files.insert(name.to_owned(), cell.clone());
        Ok(File(cell))
    }

    fn open(&self, name: &str) -> io::Result<File> {
        self.find(name)
    }

    fn open_read(&self, name: &str) -> io::Result<File> {
        self.find(name)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.files().keys().cloned().collect())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files();
        let cell = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), cell);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let removed = self.files().remove(name);
        removed
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self) -> io::Result<()> {
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space {
            total_bytes: 1 << 40,
            free_bytes: 1 << 40,
        })
    }
}

impl StorageFile for File {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let from = offset as usize;
        self.0.change(|bytes| {
            let end = from + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[from..end].copy_from_slice(data);
        });
        Ok(())
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_at(offset, data)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let bytes = self.0.read();
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let read = rest.len().min(buf.len());
        buf[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn read_uncached_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.read_at(offset, buf)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn preallocate(&self, len: u64) -> io::Result<()> {
        if self.len()? < len {
            self.set_len(len)?;
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.change(|bytes| bytes.resize(len as usize, 0));
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.read().len() as u64)
    }

    fn map(&self) -> io::Result<Option<Map>> {
        Ok(None)
    }
}
