//! Why a broker does not start: one sentence each, which says what to do.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use millpond_queue::{RecordError, RestoreError};
use millpond_wal::storage::FolderError;
use millpond_wal::{LogError, OpenError, ReadError};

use crate::config::ConfigError;
use crate::shard::{Fatal, OpenShardError};

/// Why the broker did not start. Nothing was changed that a later start would trip over.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),

    #[error(
        "cannot create the data folder {}: {source}; choose another with --data or create it",
        path.display()
    )]
    DataFolder { path: PathBuf, source: io::Error },

    #[error(
        "the data folder {} cannot be written to; make it writable for this user or choose \
         another with --data",
        path.display()
    )]
    DataReadOnly { path: PathBuf },

    #[error(
        "the data folder {} is in use by another broker{}; stop that one or choose another \
         folder with --data",
        path.display(),
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    DataHeld { path: PathBuf, pid: Option<u32> },

    #[error(
        "the {door} address {address} is already in use; stop whatever listens there or choose \
         another with {}",
        door.flag()
    )]
    PortInUse { door: Door, address: SocketAddr },

    #[error(
        "cannot listen on the {door} address {address}: {source}; choose another with {}",
        door.flag()
    )]
    Listen {
        door: Door,
        address: SocketAddr,
        source: io::Error,
    },

    #[error(
        "the data folder {} was written by a newer Millpond ({file} has format {found}, this one reads up \
         to {known}); start that version or choose another folder with --data",
        path.display()
    )]
    NewerVersion {
        path: PathBuf,
        file: String,
        found: u32,
        known: u32,
    },

    #[error(
        "the data folder {} was written by a newer Millpond (entry {entry} of its log: {record}); start that \
         version or choose another folder with --data",
        path.display()
    )]
    NewerRecord {
        path: PathBuf,
        entry: u64,
        record: RecordError,
    },

    #[error("cannot use the certificate or key {}: {problem}", path.display())]
    Certificate { path: PathBuf, problem: String },

    #[error(
        "the disk of {} is full; free some space there and start again, nothing was lost",
        path.display()
    )]
    DiskFull { path: PathBuf },

    #[error(
        "refusing to listen on {listen}, which others can reach, while there is no token: start \
         once with `--first-token NAME`, which prints a new token, or start with `--listen \
         127.0.0.1:{}`, run `millpond token new NAME`, and start again with this address",
        listen.port()
    )]
    NoToken { listen: SocketAddr },

    #[error(
        "`require_tokens` is true and there is no token: start once with `--first-token NAME`, \
         which prints a new token"
    )]
    NoRequiredToken,

    #[error(
        "the store in {} is damaged: {problem}; run `millpond log verify {}` to see what is \
         affected",
        path.display(),
        path.display()
    )]
    Damaged { path: PathBuf, problem: String },

    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error("the system gives no random numbers: {problem}; no key can be made without them")]
    NoRandomness { problem: String },
}

impl StartError {
    /// Names the failure of a file operation under the data folder by who must act.
    #[must_use]
    pub fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            kind if millpond_wal::storage::is_full(kind) => Self::DiskFull { path },
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                Self::DataReadOnly { path }
            }
            _ => Self::Io {
                doing,
                path,
                source,
            },
        }
    }

    /// Names the failure to take the data folder by who must act.
    #[must_use]
    pub fn folder(data: &Path, error: FolderError) -> Self {
        let path = data.to_path_buf();
        match error {
            FolderError::Held { pid, .. } => Self::DataHeld { path, pid },
            FolderError::ReadOnly { .. } => Self::DataReadOnly { path },
            FolderError::Io { path, source } => Self::io("open", &path, source),
        }
    }

    /// Names the failure to open the store by who must act.
    #[must_use]
    pub fn shard(data: &Path, error: OpenShardError) -> Self {
        match error {
            OpenShardError::Log(error) => Self::log(data, error),
            OpenShardError::Start(Fatal::Log(LogError::DiskFull)) => Self::DiskFull {
                path: data.to_path_buf(),
            },
            OpenShardError::Start(Fatal::Log(LogError::Disk { what, file, source })) => {
                Self::io(what, &data.join(file), source)
            }
            OpenShardError::Replay(LogError::Read(ReadError::NewerFormat { file, found })) => {
                let known = millpond_wal::FORMAT;
                Self::log(data, OpenError::NewerFormat { file, found, known })
            }
            OpenShardError::Restore {
                file,
                error: RestoreError::Format(found),
            } => Self::NewerVersion {
                path: data.to_path_buf(),
                file,
                found,
                known: millpond_queue::SNAPSHOT_FORMAT,
            },
            // Its checksum is right: whoever wrote it knows more.
            OpenShardError::Record { entry, error } => Self::NewerRecord {
                path: data.to_path_buf(),
                entry,
                record: error,
            },
            damage => Self::Damaged {
                path: data.to_path_buf(),
                problem: damage.to_string(),
            },
        }
    }

    /// Names the failure to open the log by who must act.
    #[must_use]
    pub fn log(data: &Path, error: OpenError) -> Self {
        let path = data.to_path_buf();
        match error {
            OpenError::NewerFormat { file, found, known } => Self::NewerVersion {
                path,
                file,
                found: found.into(),
                known: known.into(),
            },
            OpenError::ReadOnlyFolder(_) => Self::DataReadOnly { path },
            OpenError::DiskFull { .. } => Self::DiskFull { path },
            OpenError::Io { what, source, file } => Self::io(what, &path.join(file), source),
            OpenError::Option { name, value, min } => Self::Config(ConfigError::Value {
                key: name,
                problem: format!("is {value}, but must be at least {min}"),
            }),
            damage @ (OpenError::ManifestMissing { .. }
            | OpenError::ManifestDamaged { .. }
            | OpenError::ManifestBehind { .. }
            | OpenError::HistoryMissing { .. }) => Self::Damaged {
                path,
                problem: damage.to_string(),
            },
        }
    }

    /// Names the failure of a bind by who must act.
    #[must_use]
    pub fn listen(door: Door, address: SocketAddr, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::AddrInUse {
            return Self::PortInUse { door, address };
        }
        Self::Listen {
            door,
            address,
            source,
        }
    }
}

/// One of the two addresses a broker listens on.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Door {
    /// Clients, by UDP.
    Quic,
    /// Health and metrics, by TCP.
    Http,
}

impl Door {
    fn flag(self) -> &'static str {
        match self {
            Self::Quic => "--listen",
            Self::Http => "--http",
        }
    }
}

impl std::fmt::Display for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Quic => "QUIC (UDP)",
            Self::Http => "HTTP (TCP)",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_folder_names_the_process_if_it_is_known() {
        let path = PathBuf::from("/d");
        let known = StartError::DataHeld {
            path: path.clone(),
            pid: Some(7),
        };
        let unknown = StartError::DataHeld { path, pid: None };
        assert!(known.to_string().contains("broker (process 7);"));
        assert!(unknown.to_string().contains("broker; stop"));
    }

    #[test]
    fn a_full_disk_and_a_read_only_folder_are_told_apart() {
        let path = Path::new("/d/tls");
        let full = StartError::io("write", path, io::ErrorKind::StorageFull.into());
        let read_only = StartError::io("write", path, io::ErrorKind::ReadOnlyFilesystem.into());
        assert!(matches!(full, StartError::DiskFull { .. }), "{full}");
        assert!(
            matches!(read_only, StartError::DataReadOnly { .. }),
            "{read_only}"
        );
    }

    #[test]
    fn damage_a_newer_format_and_a_held_folder_are_told_apart() {
        let data = Path::new("/d");
        let newer = StartError::log(
            data,
            OpenError::NewerFormat {
                file: "manifest".into(),
                found: 9,
                known: 1,
            },
        );
        assert!(
            matches!(newer, StartError::NewerVersion { found: 9, .. }),
            "{newer}"
        );
        let damaged = StartError::log(data, OpenError::ManifestDamaged { at: 64 });
        assert!(damaged.to_string().contains("byte 64"), "{damaged}");
        let path = PathBuf::from("/d/log");
        let held = StartError::folder(data, FolderError::Held { path, pid: Some(7) });
        assert!(held.to_string().contains("process 7"), "{held}");
    }

    #[test]
    fn a_start_that_finds_the_disk_full_is_no_damage() {
        let full = OpenShardError::Start(Fatal::Log(LogError::DiskFull));
        let error = StartError::shard(Path::new("/d"), full);
        assert!(matches!(error, StartError::DiskFull { .. }), "{error}");
    }

    #[test]
    fn a_taken_port_says_which_flag_moves_it() {
        let address = "127.0.0.1:8080".parse().unwrap();
        let error = StartError::listen(Door::Http, address, io::ErrorKind::AddrInUse.into());
        let text = error.to_string();
        assert!(
            text.contains("127.0.0.1:8080") && text.contains("--http"),
            "{text}"
        );
    }

    #[test]
    fn no_token_says_how_to_get_one() {
        let error = StartError::NoToken {
            listen: "0.0.0.0:7400".parse().unwrap(),
        };
        let text = error.to_string();
        assert!(text.contains("--first-token NAME"), "{text}");
        assert!(text.contains("127.0.0.1:7400"), "{text}");
    }
}
