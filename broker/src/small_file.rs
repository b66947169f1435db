//! Small files that are replaced whole: after a crash there is the old one or the new one.
//!
//! For keys, certificates and the clock's anchor. Not for the log, which has its own rules.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Who may read a file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Readers {
    /// Its owner: private keys.
    Owner,
    /// Everyone: certificates.
    Everyone,
}

/// Replaces `path` by `bytes`; durable when it returns.
///
/// # Errors
/// Any of the calls failed; `path` then holds the old bytes or the new ones.
pub(crate) fn replace(path: &Path, bytes: &[u8], readers: Readers) -> io::Result<()> {
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = Path::new(&temporary);
    remove_if_there(temporary)?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(match readers {
            Readers::Owner => 0o600,
            Readers::Everyone => 0o644,
        })
        .open(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(temporary, path)?;
    File::open(folder)?.sync_all()
}

/// The bytes of `path`, or `None` where there is no such file.
///
/// # Errors
/// It is there and cannot be read.
pub(crate) fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_with_its_mode_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.key");
        std::fs::write(folder.path().join("a.key.tmp"), b"left by a crash").unwrap();
        replace(&path, b"one", Readers::Everyone).unwrap();
        replace(&path, b"two", Readers::Owner).unwrap();
        assert_eq!(read_if_there(&path).unwrap().unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn a_missing_file_is_none_and_not_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_if_there(&folder.path().join("none")).unwrap(), None);
    }
}
