//! TLS: which broker to trust, and how a failed handshake is explained.
//!
//! TLS 1.3 only, without early data. The only trusted roots are those that the user gave.

use std::sync::Arc;

use quinn::crypto::rustls::QuicClientConfig;
use rustls::{CipherSuite, ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::error::Error;

/// The client's side of the handshake, trusting the certificates in `ca_pem`.
pub fn config(ca_pem: &[u8]) -> Result<QuicClientConfig, Error> {
    let tls = |why: String| Error::Tls(why);
    let mut provider = rustls::crypto::ring::default_provider();
    // AES-128-GCM is the fastest where the processor helps; the others remain.
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| tls(format!("TLS 1.3 cannot be set up: {error}")))?
        .with_root_certificates(roots(ca_pem)?)
        .with_no_client_auth();
    config.alpn_protocols = vec![millpond_protocol::ALPN.to_vec()];
    QuicClientConfig::try_from(config)
        .map_err(|error| tls(format!("TLS cannot be set up for QUIC: {error}")))
}

fn roots(ca_pem: &[u8]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca_pem) {
        let certificate = certificate
            .map_err(|error| Error::Tls(format!("the CA given is no readable PEM: {error}")))?;
        roots.add(certificate).map_err(|error| {
            Error::Tls(format!("the CA given cannot be used as a root: {error}"))
        })?;
    }
    if roots.is_empty() {
        return Err(Error::Tls(
            "no CA certificate was given, so no broker can be trusted; \
             pass the ca.pem that the broker wrote into its data folder"
                .to_owned(),
        ));
    }
    Ok(roots)
}

/// A failed handshake as a sentence that says who must act; `None` if TLS was not the cause.
pub fn explain(code: quinn::TransportErrorCode, text: &str, server_name: &str) -> Option<Error> {
    const NO_APPLICATION_PROTOCOL: u64 = 120;
    let alert = u64::from(code).checked_sub(0x100)?;
    // Two brokers' CAs may bear one name: then it is the signature that does not fit.
    Some(Error::Tls(
        if text.contains("UnknownIssuer") || text.contains("BadSignature") {
            "the broker's certificate is not signed by the CA that was given; \
         pass the ca.pem of this broker's data folder"
                .to_owned()
        } else if text.contains("NotValidForName") {
            format!(
                "the broker's certificate is not valid for {server_name:?}; \
             connect by a name that it has, or give the broker a certificate with this one"
            )
        } else if text.contains("Expired") {
            "the broker's certificate has expired; renew it on the broker".to_owned()
        } else if text.contains("NotValidYet") {
            "the broker's certificate is not valid yet; check the clocks of both machines"
                .to_owned()
        } else if alert == NO_APPLICATION_PROTOCOL {
            return Some(Error::Version(
                "the server at this address does not speak millpond/1".to_owned(),
            ));
        } else {
            format!("the TLS handshake with the broker failed: {text}")
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_ca_nobody_is_trusted() {
        let error = config(b"").err().unwrap();
        assert!(error.to_string().contains("no CA certificate"), "{error}");
    }

    #[test]
    fn a_damaged_pem_is_said_to_be_one() {
        let pem = b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
        let error = config(pem).err().unwrap();
        assert!(matches!(error, Error::Tls(_)), "{error:?}");
    }
}
