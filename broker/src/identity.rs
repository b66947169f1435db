//! What must survive a restart so that clients notice it at once.
//!
//! ```text
//! DATA/tls/identity.key   0600   0 stateless-reset key [64] | 64 connection-id key u64
//! ```
//!
//! A packet for a connection of the previous process is answered by a stateless reset that its
//! client accepts, because the reset token is made from the same key, and only if the id was made
//! here, which the connection-id key tells. Without this file clients would stay blind until
//! their idle timeout; that is all that losing it costs, so a damaged one is made anew.

use std::path::Path;
use std::sync::Arc;

use millpond_protocol::limits::UDP_PAYLOAD_MIN;
use quinn::{ConnectionIdGenerator, EndpointConfig};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;

use crate::config::QuicConfig;
use crate::small_file::{Readers, read_if_there, replace};
use crate::start_error::StartError;
use crate::tls;

/// The endpoint's configuration with the keys of the data folder, made if there are none.
///
/// # Errors
/// The file cannot be read or written.
pub fn endpoint_config(data: &Path, quic: &QuicConfig) -> Result<EndpointConfig, StartError> {
    let keys = load_or_make(data)?;
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &keys.reset)));
    let connection_id_key = keys.connection_id;
    config.cid_generator(move || -> Box<dyn ConnectionIdGenerator> {
        Box::new(HashedConnectionIdGenerator::from_key(connection_id_key))
    });
    config
        .max_udp_payload_size(quic.max_mtu.max(UDP_PAYLOAD_MIN))
        .expect("the larger of a checked MTU and 1,472 is in 1,200..=65,527");
    Ok(config)
}

struct Keys {
    reset: [u8; RESET_KEY_BYTES],
    connection_id: u64,
}

fn load_or_make(data: &Path) -> Result<Keys, StartError> {
    let folder = tls::folder(data);
    let path = folder.join("identity.key");
    let there = read_if_there(&path).map_err(|error| StartError::io("read", &path, error))?;
    if let Some(bytes) = &there {
        if let Some(keys) = Keys::decode(bytes) {
            return Ok(keys);
        }
        tracing::warn!(path = %path.display(), "replacing an identity of the wrong length");
    }
    std::fs::create_dir_all(&folder).map_err(|error| StartError::io("create", &folder, error))?;
    let mut bytes = [0; IDENTITY_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| StartError::NoRandomness {
        problem: error.to_string(),
    })?;
    replace(&path, &bytes, Readers::Owner)
        .map_err(|error| StartError::io("write", &path, error))?;
    Ok(Keys::decode(&bytes).expect("an array of exactly the identity's length"))
}

impl Keys {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (reset, rest) = bytes.split_first_chunk()?;
        Some(Self {
            reset: *reset,
            connection_id: u64::from_le_bytes(rest.try_into().ok()?),
        })
    }
}

const RESET_KEY_BYTES: usize = 64;
const IDENTITY_BYTES: usize = RESET_KEY_BYTES + size_of::<u64>();

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_stay_the_same_over_restarts_and_are_private() {
        let data = tempfile::tempdir().unwrap();
        let first = load_or_make(data.path()).unwrap();
        let second = load_or_make(data.path()).unwrap();
        assert_eq!(first.reset, second.reset);
        assert_eq!(first.connection_id, second.connection_id);
        assert_ne!(first.reset, [0; RESET_KEY_BYTES]);
        let meta = data.path().join("tls/identity.key").metadata().unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        assert_eq!(meta.len(), IDENTITY_BYTES as u64);
    }

    #[test]
    fn a_damaged_identity_is_made_anew() {
        let data = tempfile::tempdir().unwrap();
        load_or_make(data.path()).unwrap();
        let path = data.path().join("tls/identity.key");
        std::fs::write(&path, b"short").unwrap();
        load_or_make(data.path()).unwrap();
        assert_eq!(path.metadata().unwrap().len(), IDENTITY_BYTES as u64);
    }

    #[test]
    fn the_endpoint_takes_packets_up_to_the_configured_mtu() {
        let data = tempfile::tempdir().unwrap();
        let mut quic = QuicConfig::default();
        let config = endpoint_config(data.path(), &quic).unwrap();
        assert_eq!(config.get_max_udp_payload_size(), 1_472);
        quic.max_mtu = 6_400;
        let config = endpoint_config(data.path(), &quic).unwrap();
        assert_eq!(config.get_max_udp_payload_size(), 6_400);
    }
}
