//! A message a line: reads files and standard input on a thread of its own, a bounded step ahead of
//! the sender. A line may be any bytes but a line feed; its bytes are taken as they are.
//!
//! Memory: at most [`BATCHES_AHEAD`] + 2 batches of [`BATCH_BYTES`] and one longest line each.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::PathBuf;

use bytes::Bytes;
use millpond_protocol::limits::PAYLOAD_BYTES_MAX;
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Where messages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Each text is a message.
    Texts(Vec<String>),
    /// Each line is a message.
    File(PathBuf),
    /// Each line is a message.
    Stdin,
}

/// Lines that were read together.
#[derive(Debug, Default)]
pub struct Batch {
    pub lines: Vec<Bytes>,
    /// Bytes of the input that they took, line feeds included.
    pub input_bytes: u64,
}

/// The lines of one source, in order.
#[derive(Debug)]
pub struct Lines {
    batches: mpsc::Receiver<Result<Batch, Failure>>,
    /// Bytes of the whole input, where that is known.
    pub total_bytes: Option<u64>,
}

impl Lines {
    /// Opens the source and begins to read it.
    pub fn open(source: Source) -> Result<Self, Failure> {
        let (out, batches) = mpsc::channel(BATCHES_AHEAD);
        let mut total_bytes = None;
        match source {
            Source::Texts(texts) => {
                let lines: Vec<Bytes> = texts.into_iter().map(Bytes::from).collect();
                let input_bytes = 0;
                // The channel is empty and holds more than one batch.
                let _ = out.try_send(Ok(Batch { lines, input_bytes }));
            }
            Source::File(path) => {
                let failed = |error| Failure::Read {
                    path: path.clone(),
                    error,
                };
                let file = File::open(&path).map_err(failed)?;
                let about = file.metadata().map_err(failed)?;
                if about.is_dir() {
                    return Err(failed(io::ErrorKind::IsADirectory.into()));
                }
                total_bytes = about.is_file().then_some(about.len());
                read_on_a_thread(file, path, out);
            }
            Source::Stdin => read_on_a_thread(io::stdin(), PathBuf::from("standard input"), out),
        }
        Ok(Self {
            batches,
            total_bytes,
        })
    }

    /// The next lines; `None` at the end. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Batch, Failure>> {
        self.batches.recv().await
    }
}

fn read_on_a_thread(
    input: impl Read + Send + 'static,
    path: PathBuf,
    out: mpsc::Sender<Result<Batch, Failure>>,
) {
    std::thread::spawn(move || {
        let mut reader = Reader {
            input: BufReader::with_capacity(BUFFER_BYTES, input),
            path,
            lines_read: 0,
        };
        while let Some(batch) = reader.batch().transpose() {
            let last = batch.is_err();
            if out.blocking_send(batch).is_err() || last {
                return;
            }
        }
    });
}

struct Reader<R> {
    input: BufReader<R>,
    path: PathBuf,
    lines_read: u64,
}

impl<R: Read> Reader<R> {
    /// What can be had without waiting for more input, at least one line; `None` at the end. Lines
    /// before one that fails come first; the failure comes with the next call.
    fn batch(&mut self) -> Result<Option<Batch>, Failure> {
        let mut batch = Batch::default();
        while let Some((line, input_bytes)) = self.line()? {
            batch.lines.push(line);
            batch.input_bytes += input_bytes;
            let full = batch.lines.len() >= BATCH_LINES || batch.input_bytes >= BATCH_BYTES;
            if full || !self.input.buffer().contains(&b'\n') {
                return Ok(Some(batch));
            }
        }
        Ok((!batch.lines.is_empty()).then_some(batch))
    }

    fn line(&mut self) -> Result<Option<(Bytes, u64)>, Failure> {
        let mut line = Vec::new();
        let most = PAYLOAD_BYTES_MAX as u64 + 1;
        let read = self.input.by_ref().take(most).read_until(b'\n', &mut line);
        let read = read.map_err(|error| Failure::Read {
            path: self.path.clone(),
            error,
        })?;
        if read == 0 {
            return Ok(None);
        }
        self.lines_read += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if read as u64 == most {
            return Err(Failure::LineTooLong {
                line: self.lines_read,
                limit: PAYLOAD_BYTES_MAX,
            });
        }
        Ok(Some((Bytes::from(line), read as u64)))
    }
}

/// Batches that are read before the sender has taken them.
const BATCHES_AHEAD: usize = 2;
/// Lines after which a batch is full.
const BATCH_LINES: usize = 4_096;
/// Bytes after which a batch is full.
const BATCH_BYTES: u64 = 256 << 10;
/// Bytes read from the input at once.
const BUFFER_BYTES: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(input: &[u8]) -> Reader<&[u8]> {
        Reader {
            input: BufReader::with_capacity(BUFFER_BYTES, input),
            path: PathBuf::from("test"),
            lines_read: 0,
        }
    }

    fn lines(input: &[u8]) -> Vec<Bytes> {
        let mut reader = reader(input);
        let mut all = Vec::new();
        while let Some(batch) = reader.batch().unwrap() {
            all.extend(batch.lines);
        }
        all
    }

    #[test]
    fn a_message_is_a_line_and_the_last_needs_no_line_feed() {
        assert_eq!(lines(b"a\nb\n"), ["a", "b"]);
        assert_eq!(lines(b"a\n\nb\xff"), [&b"a"[..], b"", b"b\xff"]);
        assert_eq!(lines(b"a\r\n"), ["a\r"]);
        assert!(lines(b"").is_empty());
    }

    #[test]
    fn the_longest_line_passes_and_a_longer_one_is_named() {
        let mut input = vec![b'x'; PAYLOAD_BYTES_MAX];
        assert_eq!(lines(&input)[0].len(), PAYLOAD_BYTES_MAX);
        input.push(b'\n');
        input.extend(vec![b'y'; PAYLOAD_BYTES_MAX + 1]);
        let mut reader = reader(&input);
        assert_eq!(reader.batch().unwrap().unwrap().lines.len(), 1);
        let error = reader.batch().unwrap_err();
        assert!(matches!(error, Failure::LineTooLong { line: 2, .. }));
    }

    #[test]
    fn many_lines_come_in_bounded_batches() {
        let input = "l\n".repeat(3 * BATCH_LINES);
        let mut reader = reader(input.as_bytes());
        let first = reader.batch().unwrap().unwrap();
        assert!(first.lines.len() <= BATCH_LINES);
        assert_eq!(first.input_bytes, 2 * first.lines.len() as u64);
        assert_eq!(lines(input.as_bytes()).len(), 3 * BATCH_LINES);
    }
}
