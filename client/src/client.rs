//! The client: how it is built, and what all its handles share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use millpond_protocol::WireError;
use millpond_protocol::control::{Request, Response, Welcome};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};

use crate::address::Address;
use crate::backoff::{Backoff, random, retry_after};
use crate::breaker::Breaker;
use crate::connection::{Dialer, hello};
use crate::consumer::SubscribeBuilder;
use crate::control::{Ask, Lost, is_repeatable};
use crate::error::Error;
use crate::limits::{
    BREAKER_COOLDOWN, BREAKER_FAILURES, CONNECT_TIMEOUT, MTU_DEFAULT, MTU_MAX, MTU_MIN,
    REQUEST_TIMEOUT, SEND_TIMEOUT, SETTING_MAX,
};
use crate::producer::ProducerBuilder;
use crate::supervisor::Shared;
use crate::{ErrorClass, tls};

/// How a client connects.
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    ca: Option<Ca>,
    token: Option<String>,
    name: String,
    request_timeout: Duration,
    connect_timeout: Duration,
    send_timeout: Duration,
    max_mtu: u16,
    failures_max: u32,
    cooldown: Duration,
}

#[derive(Clone, Debug)]
enum Ca {
    Pem(Vec<u8>),
    File(PathBuf),
}

impl ClientBuilder {
    fn new() -> Self {
        Self {
            ca: None,
            token: None,
            name: format!("pid-{}", std::process::id()),
            request_timeout: REQUEST_TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
            send_timeout: SEND_TIMEOUT,
            max_mtu: MTU_DEFAULT,
            failures_max: BREAKER_FAILURES,
            cooldown: BREAKER_COOLDOWN,
        }
    }

    /// The certificates to trust, as PEM.
    #[must_use]
    pub fn ca_pem(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.ca = Some(Ca::Pem(pem.into()));
        self
    }

    /// The file with the certificates to trust, as PEM; read when connecting.
    #[must_use]
    pub fn ca_file(mut self, path: impl AsRef<Path>) -> Self {
        self.ca = Some(Ca::File(path.as_ref().to_owned()));
        self
    }

    /// The API token, where the broker asks for one.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// The name shown in the broker's log and in dead letters; default: the process id.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// How long a control request may take; default 10 s, at most a year.
    #[must_use]
    pub fn request_timeout(mut self, limit: Duration) -> Self {
        self.request_timeout = limit.min(SETTING_MAX);
        self
    }

    /// How long `connect` may take; default 5 s, at most a year. A host with several addresses is tried at
    /// one after another, IPv4 first, each for an equal share of the time that is left.
    #[must_use]
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit.min(SETTING_MAX);
        self
    }

    /// How long a message may wait for credit or for its acknowledgement; default 30 s, at most a year.
    #[must_use]
    pub fn send_timeout(mut self, limit: Duration) -> Self {
        self.send_timeout = limit.min(SETTING_MAX);
        self
    }

    /// The largest UDP payload to try and to take, 1,200 to 6,400 bytes; default 1,452, which fits every
    /// Ethernet. More is for networks with jumbo frames; what the socket is read into grows with it, from
    /// 3 MiB to 13 at 6,400.
    #[must_use]
    pub fn max_mtu(mut self, bytes: u16) -> Self {
        self.max_mtu = bytes.clamp(MTU_MIN, MTU_MAX);
        self
    }

    /// Requests fail at once after this many failures in a row (default 5), until one that is let
    /// through after the cooldown (default 1 s, doubling up to 30 s; at most a year) succeeds. Messages
    /// of producers are not requests: they wait for at most `send_timeout`.
    #[must_use]
    pub fn circuit_breaker(mut self, failures: u32, cooldown: Duration) -> Self {
        self.failures_max = failures;
        self.cooldown = cooldown.min(SETTING_MAX);
        self
    }

    /// Connects to `millpond://HOST:PORT` or `HOST:PORT`, and stays connected until closed.
    ///
    /// # Errors
    /// Why the first connection could not be made. Later ones are made again without a word.
    pub async fn connect(self, url: &str) -> Result<Client, Error> {
        let address = Address::parse(url)?;
        let pem = match self.ca {
            None => Vec::new(),
            Some(Ca::Pem(pem)) => pem,
            Some(Ca::File(path)) => tokio::fs::read(&path).await.map_err(|error| {
                Error::Tls(format!(
                    "the CA file {} cannot be read: {error}",
                    path.display()
                ))
            })?,
        };
        let tls = tls::config(&pem)?;
        let hello = hello(self.token, self.name.clone());
        let dialer = Dialer::new(address, hello, tls, self.max_mtu);
        let breaker = Breaker::new(self.failures_max, self.cooldown);
        let shared = Shared::new(
            dialer,
            self.name,
            self.request_timeout,
            self.send_timeout,
            breaker,
        );
        shared.start(self.connect_timeout).await?;
        Ok(Client::from_inner(Arc::new(Inner { shared })))
    }
}

/// A connection to a broker that is made again whenever it breaks. Clones share it.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

/// Held by the client and by every producer and session: the last one closes the connection.
pub(crate) struct Inner {
    pub shared: Arc<Shared>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}

impl Client {
    #[must_use]
    pub fn builder() -> ClientBuilder {
        ClientBuilder::new()
    }

    /// Asks the broker; waits for a connection if there is none.
    ///
    /// # Errors
    /// `CircuitOpen` at once after too many failures; `Timeout` or `Connect` if nothing was sent;
    /// `Ambiguous` if the answer to a request that changes something was lost.
    pub async fn request(&self, request: Request) -> Result<Response, Error> {
        let deadline = Instant::now() + self.shared().request_timeout;
        let mut backoff = Backoff::default();
        loop {
            self.shared().allow()?;
            let wait = match self.ask(&request, deadline).await {
                Ok(response) => return Ok(response),
                Err(Asked::Final(error)) => return Err(error),
                Err(Asked::Again(error, wait)) => {
                    let wait = wait.unwrap_or_else(|| backoff.next(random()));
                    if Instant::now() + wait >= deadline {
                        return Err(error);
                    }
                    wait
                }
            };
            sleep(wait).await;
        }
    }

    /// A producer for a topic.
    pub fn producer(&self, topic: impl Into<String>) -> ProducerBuilder {
        ProducerBuilder::new(Arc::clone(&self.inner), topic.into())
    }

    /// A consumer of a subscription.
    pub fn subscribe(
        &self,
        topic: impl Into<String>,
        subscription: impl Into<String>,
    ) -> SubscribeBuilder {
        SubscribeBuilder::new(Arc::clone(&self.inner), topic.into(), subscription.into())
    }

    /// What the broker said of itself when the present connection was made; `None` while there is
    /// no connection.
    pub fn welcome(&self) -> Option<Welcome> {
        self.shared().welcome()
    }

    /// True while there is a connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared().is_connected()
    }

    /// Flushes producers, settles and ends subscriptions, then closes the connection. Every clone
    /// and handle is closed by it.
    pub async fn close(self) {
        self.shared().close().await;
    }

    /// A client that shares what another handle holds.
    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    fn shared(&self) -> &Shared {
        &self.inner.shared
    }

    async fn ask(&self, request: &Request, deadline: Instant) -> Result<Response, Asked> {
        let shared = self.shared();
        let link = shared.link(deadline).await.map_err(Asked::Final)?;
        let _using = link.users.token();
        let (answer, answered) = oneshot::channel();
        let ask = Ask {
            request: request.clone(),
            answer,
        };
        const SLOW: Error = Error::Timeout {
            what: "writing the request",
        };
        match timeout_at(deadline, link.control.send(ask)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Asked::Again(SLOW, None)),
            Err(_) => return Err(Asked::Final(SLOW)),
        }
        let outcome = match timeout_at(deadline, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(Lost::Sent),
            Err(_) => {
                shared.failed();
                return Err(Asked::Final(unanswered(request)));
            }
        };
        if !matches!(outcome, Err(Lost::Sent | Lost::Unsent)) {
            shared.succeeded();
        }
        outcome.map_err(|lost| asked(request, lost))
    }
}

/// What to do after a request that has no response.
enum Asked {
    Again(Error, Option<Duration>),
    Final(Error),
}

fn asked(request: &Request, lost: Lost) -> Asked {
    match lost {
        Lost::Unsent => Asked::Again(
            Error::Timeout {
                what: "connecting to the broker",
            },
            None,
        ),
        Lost::Sent if is_repeatable(request) => Asked::Again(unanswered(request), None),
        Lost::Sent => Asked::Final(Error::Ambiguous),
        Lost::Unsendable(error) => Asked::Final(error),
        Lost::Refused(wire) => refused(wire),
    }
}

fn refused(wire: WireError) -> Asked {
    if wire.code.class() == ErrorClass::Retriable {
        let wait = retry_after(wire.retry_after_ms);
        Asked::Again(wire.into(), Some(wait))
    } else {
        Asked::Final(wire.into())
    }
}

fn unanswered(request: &Request) -> Error {
    if is_repeatable(request) {
        Error::Timeout {
            what: "the broker's answer",
        }
    } else {
        Error::Ambiguous
    }
}
