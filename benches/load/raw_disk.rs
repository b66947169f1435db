//! Raw quinn with the disk behind it: what is left of the transport's rate once bytes must be durable, or come
//! from the disk, before anything is a broker's.
//!
//! What a synced stream brings goes to a thread, which writes all that has gathered at once and durably, as the
//! broker does (blocks written before, past the page cache), and then has the number of whole messages told to the
//! other side. A read stream sends a file, read past the page cache by the megabyte and up to three of them ahead,
//! as the broker does. There are no frames, checksums, offsets or topics.

use std::path::Path;

use anyhow::{Result, ensure};
use bytes::Bytes;
use millpond_client::limits;
use millpond_wal::buffer::BufferPool;
use millpond_wal::storage::{FolderFile, FolderStorage, Mapping, Storage, StorageFile};
use quinn::{RecvStream, SendStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};

use crate::raw_quic::READY;

/// Makes what a stream brings durable, messages of this many bytes, until it ends.
pub async fn synced(
    dir: &Path,
    message_bytes: u64,
    send: &mut SendStream,
    receive: &mut RecvStream,
) -> Result<()> {
    let disk = Disk::prepare(dir).await?;
    send.write_all(&READY).await?;
    let (give, pieces) = mpsc::channel(PIECES_MAX);
    let (tell, mut durable) = watch::channel(0);
    let log = spawn_blocking(move || disk.write(pieces, &tell));
    let bring = async {
        let mut chunks = vec![Bytes::new(); limits::READ_CHUNKS];
        while let Some(read) = receive.read_chunks(&mut chunks).await? {
            let piece: Vec<Bytes> = chunks[..read].iter_mut().map(std::mem::take).collect();
            give.send(piece).await?;
        }
        drop(give);
        anyhow::Ok(())
    };
    let answer = async {
        let mut told = 0;
        while durable.changed().await.is_ok() {
            let whole = *durable.borrow_and_update() / message_bytes;
            if whole > told {
                told = whole;
                send.write_all(&whole.to_le_bytes()).await?;
            }
        }
        anyhow::Ok(())
    };
    tokio::try_join!(bring, answer)?;
    log.await?
}

/// Sends what it reads, round and round, until the other side has enough.
pub async fn read(dir: &Path, send: &mut SendStream) -> Result<()> {
    let disk = Disk::prepare(dir).await?;
    send.write_all(&READY).await?;
    let (give, mut pieces) = mpsc::channel(READ_AHEAD - 1);
    let reader: JoinHandle<Result<()>> = spawn_blocking(move || disk.read(&give));
    while let Some(piece) = pieces.recv().await {
        if send.write_chunk(piece).await.is_err() {
            break;
        }
    }
    drop(pieces);
    reader.await?
}

/// A file whose blocks have been written before.
struct Disk {
    file: FolderFile,
    pool: BufferPool,
}

impl Disk {
    async fn prepare(dir: &Path) -> Result<Self> {
        let dir = dir.join("raw-disk");
        spawn_blocking(move || Self::make(&dir)).await?
    }

    fn make(dir: &Path) -> Result<Self> {
        let storage = FolderStorage::open(dir, Mapping::Off)?;
        let file = storage.create(FILE)?;
        // It stays good while it is open, and nothing is left behind.
        storage.remove(FILE)?;
        let pool = BufferPool::new(POOL_BYTES);
        let mut block = pool.take(GROUP_BYTES_MAX);
        block.resize(GROUP_BYTES_MAX);
        for place in (0..FILE_BYTES).step_by(GROUP_BYTES_MAX) {
            file.write_durable_at(place, &block)?;
        }
        Ok(Self { file, pool })
    }

    /// Writes what has gathered, again and again, and tells how many bytes are durable.
    fn write(
        self,
        mut pieces: mpsc::Receiver<Vec<Bytes>>,
        tell: &watch::Sender<u64>,
    ) -> Result<()> {
        let (mut place, mut bytes) = (0, 0);
        while let Some(first) = pieces.blocking_recv() {
            let mut group = self.pool.take(BUFFER_BYTES);
            // Room for an entry's header.
            group.resize(HEADER_BYTES);
            let mut next = Some(first);
            while let Some(piece) = next {
                for chunk in &piece {
                    group.extend_from_slice(chunk);
                    bytes += chunk.len() as u64;
                }
                let is_full = group.len() >= GROUP_BYTES_MAX;
                next = if is_full {
                    None
                } else {
                    pieces.try_recv().ok()
                };
            }
            group.pad_to_block();
            if place + group.len() as u64 > FILE_BYTES {
                place = 0;
            }
            self.file.write_durable_at(place, &group)?;
            place += group.len() as u64;
            tell.send_replace(bytes);
        }
        Ok(())
    }

    fn read(self, give: &mpsc::Sender<Bytes>) -> Result<()> {
        let mut place = 0;
        loop {
            let mut piece = self.pool.take_blocks(BUFFER_BYTES);
            piece.resize(GROUP_BYTES_MAX);
            let read = self.file.read_past_cache_at(place, &mut piece)?;
            ensure!(read == GROUP_BYTES_MAX, "the file has all that was written");
            if give.blocking_send(piece.freeze()).is_err() {
                return Ok(());
            }
            place = (place + GROUP_BYTES_MAX as u64) % FILE_BYTES;
        }
    }
}

const FILE: &str = "blocks";
const FILE_BYTES: u64 = 256 << 20;
/// What is written at once, or little more, and what is read at once.
const GROUP_BYTES_MAX: usize = 1 << 20;
/// From here on the pool's buffers lie in huge pages.
const BUFFER_BYTES: usize = 2 << 20;
const HEADER_BYTES: usize = 128;
const POOL_BYTES: usize = 16 << 20;
const PIECES_MAX: usize = 8_192;
/// Pieces that are read, or being read, before they are sent.
const READ_AHEAD: usize = 3;
