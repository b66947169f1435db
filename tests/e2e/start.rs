//! Bad starts: each says in one sentence what is wrong and what to do.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use millpond_broker::{Broker, BrokerError, Config, Door, StartError};
use tempfile::TempDir;

/// A configuration on a folder of its own and free ports.
fn config() -> (TempDir, Config) {
    let folder = TempDir::new().unwrap();
    let mut config = Config {
        data: folder.path().join("data"),
        listen: ([127, 0, 0, 1], 0).into(),
        http: None,
        shutdown_grace_ms: 100,
        ..Config::default()
    };
    config.log.segment_bytes = 4 << 20;
    config.disk.reserve_bytes = 4 << 20;
    (folder, config)
}

async fn refused(config: &Config) -> StartError {
    match Broker::start(config.clone()).await {
        Ok(_) => panic!("it started"),
        Err(error) => error,
    }
}

/// Starts and stops a broker, so that its folder has a store.
async fn used(config: &Config) -> Result<(), BrokerError> {
    Broker::start(config.clone())
        .await
        .unwrap()
        .shutdown()
        .await
}

#[tokio::test]
async fn a_second_broker_on_the_same_folder_names_the_first() {
    let (_folder, config) = config();
    let first = Broker::start(config.clone()).await.unwrap();
    let error = refused(&config).await;
    assert!(matches!(error, StartError::DataHeld { .. }), "{error:?}");
    let text = error.to_string();
    let process = format!("process {}", std::process::id());
    assert!(text.contains(&process) && text.contains("--data"), "{text}");
    first.shutdown().await.unwrap();
    used(&config).await.unwrap();
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_the_flag_that_moves_it() {
    let (_folder, config) = config();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let taken = Config {
        listen: udp.local_addr().unwrap(),
        ..config.clone()
    };
    let error = refused(&taken).await;
    let quic = Door::Quic;
    assert!(
        matches!(error, StartError::PortInUse { door, .. } if door == quic),
        "{error:?}"
    );
    assert!(error.to_string().contains("--listen"), "{error}");

    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = Config {
        http: Some(tcp.local_addr().unwrap()),
        ..config.clone()
    };
    let error = refused(&taken).await;
    let http = Door::Http;
    assert!(
        matches!(error, StartError::PortInUse { door, .. } if door == http),
        "{error:?}"
    );
    assert!(error.to_string().contains("--http"), "{error}");
    // What failed has let go of the folder.
    used(&config).await.unwrap();
}

#[tokio::test]
async fn a_store_of_a_newer_version_is_left_alone() {
    let (_folder, config) = config();
    used(&config).await.unwrap();
    let manifest = manifest_of(&config.data);
    let before = fs::read(&manifest).unwrap();
    let mut newer = before.clone();
    // The first record as a newer version would have signed it.
    let payload = u32::from_le_bytes([newer[8], newer[9], newer[10], newer[11]]) as usize;
    newer[12..14].copy_from_slice(&9u16.to_le_bytes());
    newer[4..8].fill(0);
    let crc = crc32(&newer[..40 + payload]);
    newer[4..8].copy_from_slice(&crc.to_le_bytes());
    assert_ne!(before, newer);
    fs::write(&manifest, &newer).unwrap();
    let error = refused(&config).await;
    assert!(
        matches!(error, StartError::NewerVersion { found: 9, .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("newer Millpond"), "{error}");
    assert_eq!(fs::read(&manifest).unwrap(), newer, "it was written to");
    fs::write(&manifest, &before).unwrap();
    used(&config).await.unwrap();
}

#[tokio::test]
async fn a_file_in_place_of_the_folder_is_named() {
    let (folder, mut config) = config();
    config.data = folder.path().join("file");
    fs::write(&config.data, b"not a folder").unwrap();
    let error = refused(&config).await;
    assert!(matches!(error, StartError::DataFolder { .. }), "{error:?}");
    assert!(error.to_string().contains("--data"), "{error}");
    assert_eq!(fs::read(&config.data).unwrap(), b"not a folder");
}

#[tokio::test]
async fn a_manifest_of_garbage_is_damage_and_is_kept_for_whoever_mends_it() {
    let (_folder, config) = config();
    used(&config).await.unwrap();
    let manifest = manifest_of(&config.data);
    let bytes = fs::metadata(&manifest).unwrap().len() as usize;
    let garbage = vec![0xA5; bytes];
    fs::write(&manifest, &garbage).unwrap();
    let error = refused(&config).await;
    assert!(matches!(error, StartError::Damaged { .. }), "{error:?}");
    assert!(error.to_string().contains("millpond log verify"), "{error}");
    assert_eq!(fs::read(&manifest).unwrap(), garbage, "it was written to");

    fs::remove_file(&manifest).unwrap();
    let error = refused(&config).await;
    assert!(
        matches!(error, StartError::Damaged { .. }),
        "segments without a manifest: {error:?}"
    );
}

#[tokio::test]
async fn a_setting_out_of_range_is_named_before_anything_is_made() {
    let (_folder, config) = config();
    let mut wrong = config.clone();
    wrong.memory.budget_bytes = 1;
    let error = refused(&wrong).await;
    assert!(matches!(error, StartError::Config(_)), "{error:?}");
    assert!(error.to_string().contains("memory.budget_bytes"), "{error}");
    assert!(!config.data.exists(), "a folder was made");

    let mut wrong = config.clone();
    wrong.tls.cert = Some(PathBuf::from("/nowhere/cert.pem"));
    wrong.tls.key = Some(PathBuf::from("/nowhere/key.pem"));
    let error = refused(&wrong).await;
    assert!(error.to_string().contains("/nowhere/"), "{error}");
}

fn manifest_of(data: &Path) -> PathBuf {
    let log = data.join("log");
    let mut found = fs::read_dir(&log)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.eq_ignore_ascii_case("manifest")
    };
    found.find(named).expect("a store has a manifest")
}

/// The CRC-32 of Ethernet, bit by bit.
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
