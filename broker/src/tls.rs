//! The server's certificate: the operator's, or one made here and signed by an authority made here.
//!
//! ```text
//! DATA/tls/ca.key      0600   made once       server.key   0600   made once
//! DATA/tls/ca.pem      0644   made once       server.pem   0644   renewed at start
//! ```
//!
//! Clients on the same machine trust `ca.pem` by finding it, others by being given it. Keys are
//! written before what they sign and each file is replaced whole, so that a crash at any point
//! leaves something that the next start completes. The server certificate is renewed when a
//! client that trusts `ca.pem` would refuse it, today or [`RENEW_BEFORE`] from now, for any name
//! that it should have: asked of the same verifier that clients use, not of a date kept aside.
//!
//! A name taken out of the configuration stays in the certificate until it is renewed. Clients
//! are authenticated by tokens, not here.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::server::NoServerSessionStorage;
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::config::Config;
use crate::small_file::{Readers, read_if_there, replace};
use crate::start_error::StartError;

/// The folder of certificates and keys.
#[must_use]
pub fn folder(data: &Path) -> PathBuf {
    data.join("tls")
}

/// The certificate that clients must trust when the operator supplied none.
#[must_use]
pub fn ca_path(data: &Path) -> PathBuf {
    folder(data).join("ca.pem")
}

/// What the server shows: TLS 1.3, [`millpond_protocol::ALPN`], no early data. Makes or renews
/// what is missing below `config.data`, which must exist. May be called again while serving, to
/// renew: hand the result to `quinn::Endpoint::set_server_config`.
///
/// `wall_us` is the wall clock, in microseconds since 1970.
///
/// # Errors
/// A file cannot be read, written or used; the sentence names it.
pub fn server_config(config: &Config, wall_us: u64) -> Result<rustls::ServerConfig, StartError> {
    let provider = provider();
    let certified = match (&config.tls.cert, &config.tls.key) {
        (Some(cert), Some(key)) => supplied(cert, key, &provider)?,
        _ => generated(config, Duration::from_micros(wall_us), &provider)?,
    };
    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(&folder(&config.data), error))?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
    server.alpn_protocols = vec![millpond_protocol::ALPN.to_vec()];
    server.ignore_client_order = true;
    server.max_early_data_size = 0;
    // A resumed handshake saves tens of microseconds; a store of tickets costs memory per client.
    server.send_tls13_tickets = 0;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(server)
}

/// AES-128-GCM first: with the CPU's help it is the fastest, and the server's order rules.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    })
}

fn supplied(
    cert: &Path,
    key: &Path,
    provider: &CryptoProvider,
) -> Result<CertifiedKey, StartError> {
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unusable(cert, error))?;
    if chain.is_empty() {
        return Err(unusable(cert, "it holds no certificate"));
    }
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, error))?;
    CertifiedKey::from_der(chain, key_der, provider).map_err(|error| unusable(key, error))
}

fn generated(
    config: &Config,
    now: Duration,
    provider: &Arc<CryptoProvider>,
) -> Result<CertifiedKey, StartError> {
    let folder = folder(&config.data);
    std::fs::create_dir_all(&folder).map_err(|error| StartError::io("create", &folder, error))?;
    let names = names(config);
    let ca = authority(&folder, now)?;
    let (server_key, server_key_der) = server_key(&folder)?;

    let path = folder.join("server.pem");
    if let Some(pem) = read(&path)?
        && let Ok(cert) = CertificateDer::from_pem_slice(&pem)
        && serves(&cert, &ca, &names, now, provider)
        && let Ok(certified) =
            CertifiedKey::from_der(vec![cert], server_key_der.clone_key(), provider)
    {
        return Ok(certified);
    }
    let pem = sign_server(&folder, &names, &server_key, now)?;
    replace(&path, pem.as_bytes(), Readers::Everyone)
        .map_err(|error| StartError::io("write", &path, error))?;
    let cert =
        CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| unusable(&path, error))?;
    CertifiedKey::from_der(vec![cert], server_key_der, provider)
        .map_err(|error| unusable(&path, error))
}

/// Every name that a client may know this server by.
fn names(config: &Config) -> Vec<String> {
    let mut names = vec![
        "localhost".to_string(),
        "127.0.0.1".to_string(),
        "::1".to_string(),
    ];
    let listen = config.listen.ip();
    if !listen.is_unspecified() {
        names.push(listen.to_string());
    }
    names.extend(config.tls.names.iter().cloned());
    names.sort();
    names.dedup();
    names
}

/// The authority's certificate, made if there is none.
fn authority(folder: &Path, now: Duration) -> Result<CertificateDer<'static>, StartError> {
    let path = folder.join("ca.pem");
    let pem = match read(&path)? {
        Some(pem) => pem,
        None => {
            let key = key_or_new(&folder.join("ca.key"))?;
            let mut params = authority_params();
            validity(&mut params, now, CA_LIFE);
            let cert = params
                .self_signed(&key)
                .map_err(|error| unusable(&path, error))?;
            let pem = cert.pem().into_bytes();
            replace(&path, &pem, Readers::Everyone)
                .map_err(|error| StartError::io("write", &path, error))?;
            pem
        }
    };
    CertificateDer::from_pem_slice(&pem).map_err(|error| unusable(&path, error))
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "Millpond local authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
}

fn server_key(folder: &Path) -> Result<(KeyPair, PrivateKeyDer<'static>), StartError> {
    let path = folder.join("server.key");
    let key = key_or_new(&path)?;
    let der =
        PrivateKeyDer::try_from(key.serialize_der()).map_err(|problem| unusable(&path, problem))?;
    Ok((key, der))
}

fn sign_server(
    folder: &Path,
    names: &[String],
    server_key: &KeyPair,
    now: Duration,
) -> Result<String, StartError> {
    let ca_key_path = folder.join("ca.key");
    let ca_key = read_key(&ca_key_path)?.ok_or_else(|| {
        unusable(
            &ca_key_path,
            "it is missing and the server certificate is to be renewed; put it back, or remove \
             ca.pem as well and give the new one to every client",
        )
    })?;
    let path = folder.join("server.pem");
    let mut params =
        CertificateParams::new(names.to_vec()).map_err(|error| unusable(&path, error))?;
    params
        .distinguished_name
        .push(DnType::CommonName, "Millpond broker");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    validity(&mut params, now, SERVER_LIFE);
    let issuer = Issuer::new(authority_params(), ca_key);
    let cert = params
        .signed_by(server_key, &issuer)
        .map_err(|error| unusable(&path, error))?;
    Ok(cert.pem())
}

/// Whether a client that trusts `ca` takes `cert` for each name, now and for some time to come.
fn serves(
    cert: &CertificateDer<'_>,
    ca: &CertificateDer<'static>,
    names: &[String],
    now: Duration,
    provider: &Arc<CryptoProvider>,
) -> bool {
    let mut roots = RootCertStore::empty();
    if roots.add(ca.clone()).is_err() {
        return false;
    }
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    let Ok(verifier) = verifier else {
        return false;
    };
    names.iter().all(|name| {
        ServerName::try_from(name.as_str()).is_ok_and(|name| {
            [now, now + RENEW_BEFORE].into_iter().all(|at| {
                let at = UnixTime::since_unix_epoch(at);
                verifier
                    .verify_server_cert(cert, &[], &name, &[], at)
                    .is_ok()
            })
        })
    })
}

/// From a day ago, for clients whose clocks are behind.
fn validity(params: &mut CertificateParams, now: Duration, life: Duration) {
    let at = |since_1970| SystemTime::UNIX_EPOCH + since_1970;
    params.not_before = at(now.saturating_sub(DAY)).into();
    params.not_after = at(now + life).into();
}

fn key_or_new(path: &Path) -> Result<KeyPair, StartError> {
    if let Some(key) = read_key(path)? {
        return Ok(key);
    }
    let key = KeyPair::generate().map_err(|error| StartError::NoRandomness {
        problem: error.to_string(),
    })?;
    replace(path, key.serialize_pem().as_bytes(), Readers::Owner)
        .map_err(|error| StartError::io("write", path, error))?;
    Ok(key)
}

fn read_key(path: &Path) -> Result<Option<KeyPair>, StartError> {
    let Some(pem) = read(path)? else {
        return Ok(None);
    };
    let pem = String::from_utf8(pem).map_err(|_| unusable(path, "it is not a PEM file"))?;
    KeyPair::from_pem(&pem)
        .map(Some)
        .map_err(|error| unusable(path, error))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, StartError> {
    read_if_there(path).map_err(|error: io::Error| unusable(path, error))
}

fn unusable(path: &Path, problem: impl ToString) -> StartError {
    StartError::Certificate {
        path: path.to_path_buf(),
        problem: problem.to_string(),
    }
}

const DAY: Duration = Duration::from_secs(24 * 3_600);
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);
const SERVER_LIFE: Duration = Duration::from_secs(365 * 24 * 3_600);
/// A server certificate with less than this left is renewed.
pub const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 3_600);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// 2026-01-01.
    const NOW_US: u64 = 1_767_225_600_000_000;
    const DAY_US: u64 = DAY.as_micros() as u64;

    fn config(data: &Path) -> Config {
        Config {
            data: data.to_path_buf(),
            ..Config::default()
        }
    }

    fn server_pem(data: &Path) -> Vec<u8> {
        std::fs::read(folder(data).join("server.pem")).unwrap()
    }

    fn client_takes(data: &Path, name: &str, at_us: u64) -> bool {
        let ca = CertificateDer::from_pem_file(ca_path(data)).unwrap();
        let cert = CertificateDer::from_pem_slice(&server_pem(data)).unwrap();
        let names = [name.to_string()];
        serves(
            &cert,
            &ca,
            &names,
            Duration::from_micros(at_us),
            &provider(),
        )
    }

    #[test]
    fn a_first_start_makes_what_clients_then_trust() {
        let data = tempfile::tempdir().unwrap();
        let server = server_config(&config(data.path()), NOW_US).unwrap();
        assert_eq!(server.alpn_protocols, [millpond_protocol::ALPN.to_vec()]);
        assert_eq!(server.max_early_data_size, 0);
        for name in ["localhost", "127.0.0.1", "::1"] {
            assert!(client_takes(data.path(), name, NOW_US), "{name}");
        }
        assert!(!client_takes(data.path(), "example.org", NOW_US));
        for key in ["ca.key", "server.key"] {
            let meta = folder(data.path()).join(key).metadata().unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, 0o600, "{key}");
        }
    }

    #[test]
    fn a_second_start_changes_nothing() {
        let data = tempfile::tempdir().unwrap();
        server_config(&config(data.path()), NOW_US).unwrap();
        let before = server_pem(data.path());
        server_config(&config(data.path()), NOW_US + 300 * DAY_US).unwrap();
        assert_eq!(before, server_pem(data.path()));
    }

    #[test]
    fn a_certificate_near_its_end_is_renewed_under_the_same_authority() {
        let data = tempfile::tempdir().unwrap();
        server_config(&config(data.path()), NOW_US).unwrap();
        let ca = std::fs::read(ca_path(data.path())).unwrap();
        let later = NOW_US + 340 * DAY_US;
        server_config(&config(data.path()), later).unwrap();
        assert!(client_takes(data.path(), "localhost", later + 30 * DAY_US));
        assert_eq!(ca, std::fs::read(ca_path(data.path())).unwrap());
    }

    #[test]
    fn a_new_name_renews_the_certificate() {
        let data = tempfile::tempdir().unwrap();
        let mut config = config(data.path());
        server_config(&config, NOW_US).unwrap();
        config.tls.names = vec!["queue.example.org".to_string()];
        config.listen = "10.1.2.3:7400".parse().unwrap();
        server_config(&config, NOW_US).unwrap();
        assert!(client_takes(data.path(), "queue.example.org", NOW_US));
        assert!(client_takes(data.path(), "10.1.2.3", NOW_US));
    }

    #[test]
    fn a_start_after_a_crash_between_the_files_completes_them() {
        let data = tempfile::tempdir().unwrap();
        for lost in ["server.pem", "server.key"] {
            server_config(&config(data.path()), NOW_US).unwrap();
            std::fs::remove_file(folder(data.path()).join(lost)).unwrap();
            server_config(&config(data.path()), NOW_US).unwrap();
            assert!(client_takes(data.path(), "localhost", NOW_US), "{lost}");
        }
        std::fs::remove_file(ca_path(data.path())).unwrap();
        server_config(&config(data.path()), NOW_US).unwrap();
        assert!(client_takes(data.path(), "localhost", NOW_US));
    }

    #[test]
    fn a_missing_authority_key_matters_only_when_something_is_to_be_signed() {
        let data = tempfile::tempdir().unwrap();
        server_config(&config(data.path()), NOW_US).unwrap();
        std::fs::remove_file(folder(data.path()).join("ca.key")).unwrap();
        server_config(&config(data.path()), NOW_US).unwrap();
        let error = server_config(&config(data.path()), NOW_US + 400 * DAY_US).unwrap_err();
        assert!(error.to_string().contains("ca.key"), "{error}");
    }

    #[test]
    fn supplied_files_are_used_and_a_wrong_pair_is_named() {
        let ours = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        server_config(&config(ours.path()), NOW_US).unwrap();
        server_config(&config(other.path()), NOW_US).unwrap();
        let data = tempfile::tempdir().unwrap();
        let mut config = config(data.path());
        config.tls.cert = Some(folder(ours.path()).join("server.pem"));
        config.tls.key = Some(folder(ours.path()).join("server.key"));
        server_config(&config, NOW_US).unwrap();
        assert!(!folder(data.path()).exists(), "nothing is generated");

        config.tls.key = Some(folder(other.path()).join("server.key"));
        let error = server_config(&config, NOW_US).unwrap_err();
        assert!(error.to_string().contains("server.key"), "{error}");
    }
}
