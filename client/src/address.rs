//! Where a broker is: `millpond://host:port`, or just `host:port`.

use std::net::{IpAddr, SocketAddr};

use url::{Host, Url};

use crate::error::Error;

/// The port of a URL that names none.
pub const PORT_DEFAULT: u16 = 7400;

/// A broker's address as the user gave it, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
    /// The name that the broker's certificate must have.
    pub server_name: String,
}

impl Address {
    pub fn parse(text: &str) -> Result<Self, Error> {
        let invalid = |why: &str| Error::InvalidUrl {
            url: text.to_owned(),
            why: why.to_owned(),
        };
        let whole = if text.contains("://") {
            text.to_owned()
        } else {
            format!("millpond://{text}")
        };
        let url = Url::parse(&whole).map_err(|error| invalid(&error.to_string()))?;
        if url.scheme() != "millpond" {
            return Err(invalid("its scheme is not millpond"));
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || !url.username().is_empty() {
            return Err(invalid("it has more than a host and a port"));
        }
        let (host, server_name) = match url.host() {
            Some(Host::Domain(name)) => Self::named(name),
            Some(Host::Ipv4(ip)) => Self::numbered(ip.into()),
            Some(Host::Ipv6(ip)) => Self::numbered(ip.into()),
            None => return Err(invalid("it has no host")),
        };
        Ok(Self {
            host,
            port: url.port().unwrap_or(PORT_DEFAULT),
            server_name,
        })
    }

    /// The socket addresses behind it; asks the name service if it is a name.
    pub async fn resolve(&self) -> Result<Vec<SocketAddr>, Error> {
        let found = tokio::net::lookup_host((self.host.as_str(), self.port)).await;
        let mut addresses: Vec<_> = match found {
            Ok(found) => found.collect(),
            Err(error) => {
                return Err(Error::Connect(format!(
                    "the name {:?} cannot be resolved: {error}",
                    self.host
                )));
            }
        };
        // A broker that listens on loopback does so on IPv4 by default.
        addresses.sort_by_key(SocketAddr::is_ipv6);
        Ok(addresses)
    }

    fn named(name: &str) -> (String, String) {
        // A URL of an unknown scheme keeps an IPv4 address as a name.
        match name.parse::<IpAddr>() {
            Ok(ip) => Self::numbered(ip),
            Err(_) => (name.to_owned(), name.to_owned()),
        }
    }

    fn numbered(ip: IpAddr) -> (String, String) {
        let server_name = if ip.is_loopback() {
            "localhost".to_owned()
        } else {
            ip.to_string()
        };
        (ip.to_string(), server_name)
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, String) {
        let address = Address::parse(text).unwrap();
        (address.to_string(), address.server_name)
    }

    #[test]
    fn loopback_is_called_localhost() {
        let expected = |at: &str| (at.to_owned(), "localhost".to_owned());
        assert_eq!(
            parsed("millpond://127.0.0.1:7400"),
            expected("127.0.0.1:7400")
        );
        assert_eq!(parsed("127.0.0.1:1"), expected("127.0.0.1:1"));
        assert_eq!(parsed("[::1]:7"), expected("[::1]:7"));
        assert_eq!(parsed("localhost"), expected("localhost:7400"));
    }

    #[test]
    fn another_host_is_called_by_its_name() {
        let (at, name) = parsed("millpond://queue.example:9");
        assert_eq!(
            (at.as_str(), name.as_str()),
            ("queue.example:9", "queue.example")
        );
        assert_eq!(parsed("10.0.0.7:9").1, "10.0.0.7");
    }

    #[test]
    fn a_url_of_another_scheme_or_with_a_path_is_refused() {
        for text in ["http://a:1", "millpond://a:1/b", "millpond://", "a:b:c"] {
            let error = Address::parse(text).unwrap_err();
            assert!(matches!(error, Error::InvalidUrl { .. }), "{text}");
        }
    }
}
