//! Keeps a client connected: one task, which owns the decision when to dial again.
//!
//! Everything else looks at `Shared::link` and waits there. Attempts are bounded in rate by the
//! backoff alone; the breaker hears of them, and is what requests ask.

use std::sync::Arc;
use std::time::Duration;

use millpond_protocol::control::Welcome;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backoff::{Backoff, random};
use crate::breaker::Breaker;
use crate::connection::{Dialer, Link};
use crate::control::ControlStream;
use crate::error::Error;
use crate::limits::{CLOSE_TIMEOUT, REDIAL_TIMEOUT, REDIAL_TIMEOUT_FIRST};

/// What the tasks of one client share.
pub struct Shared {
    pub request_timeout: Duration,
    pub send_timeout: Duration,
    pub name: String,
    dialer: Dialer,
    link: watch::Sender<Option<Arc<Link>>>,
    breaker: Mutex<Breaker>,
    last_error: Mutex<Option<Error>>,
    /// Producers and sessions finish what they have and end.
    pub draining: CancellationToken,
    /// Everything ends now.
    pub closed: CancellationToken,
    /// Producers and sessions.
    pub tasks: TaskTracker,
    /// What several of them share; ends with its connection.
    pub streams: TaskTracker,
    supervisor: TaskTracker,
}

impl Shared {
    pub fn new(
        dialer: Dialer,
        name: String,
        request_timeout: Duration,
        send_timeout: Duration,
        breaker: Breaker,
    ) -> Arc<Self> {
        Arc::new(Self {
            request_timeout,
            send_timeout,
            name,
            dialer,
            link: watch::Sender::new(None),
            breaker: Mutex::new(breaker),
            last_error: Mutex::new(None),
            draining: CancellationToken::new(),
            closed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            streams: TaskTracker::new(),
            supervisor: TaskTracker::new(),
        })
    }

    /// Connects once and starts the supervisor.
    pub async fn start(self: &Arc<Self>, limit: Duration) -> Result<(), Error> {
        let (link, control) = self.dialer.dial(limit).await?;
        let link = self.connected(link);
        let task = supervise(Arc::clone(self), link, control);
        self.supervisor.spawn(task);
        Ok(())
    }

    /// The connection, once there is one.
    ///
    /// # Errors
    /// Why there is none at the deadline; `Closed` if the client is.
    pub async fn link(&self, deadline: Instant) -> Result<Arc<Link>, Error> {
        let mut watched = self.link.subscribe();
        let up = timeout_at(deadline, watched.wait_for(Option::is_some));
        let found = tokio::select! {
            found = up => found,
            () = self.closed.cancelled() => return Err(Error::Closed),
        };
        match found {
            Ok(Ok(link)) => link.clone().ok_or(Error::Closed),
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => Err(self.last_error.lock().clone().unwrap_or(Error::Timeout {
                what: "connecting to the broker",
            })),
        }
    }

    /// True while there is a connection.
    pub fn is_connected(&self) -> bool {
        self.link.borrow().is_some()
    }

    /// What the broker said when it was connected to.
    pub fn welcome(&self) -> Option<Welcome> {
        let link = self.link.borrow();
        link.as_ref().map(|link| link.welcome.clone())
    }

    /// Fails at once while the breaker is open.
    pub fn allow(&self) -> Result<(), Error> {
        if self.closed.is_cancelled() {
            return Err(Error::Closed);
        }
        let now = Instant::now().into_std();
        let allowed = self.breaker.lock().allow(now);
        allowed.map_err(|retry_after| Error::CircuitOpen { retry_after })
    }

    pub fn succeeded(&self) {
        self.breaker.lock().success();
    }

    pub fn failed(&self) {
        self.breaker.lock().failure(Instant::now().into_std());
    }

    /// Lets producers and sessions finish, then closes the connection and waits for all tasks.
    pub async fn close(&self) {
        self.draining.cancel();
        self.tasks.close();
        if timeout(CLOSE_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!("the client was closed before everything was finished");
        }
        self.closed.cancel();
        self.tasks.wait().await;
        self.supervisor.close();
        self.supervisor.wait().await;
        self.streams.close();
        self.streams.wait().await;
        let _ = timeout(CLOSE_TIMEOUT, self.dialer.wait_idle()).await;
    }

    /// Shows everybody the new connection.
    fn connected(&self, link: Link) -> Arc<Link> {
        self.succeeded();
        self.last_error.lock().take();
        let link = Arc::new(link);
        self.link.send_replace(Some(Arc::clone(&link)));
        link
    }

    async fn redial(&self) -> (Link, ControlStream) {
        let mut backoff = Backoff::default();
        loop {
            sleep(backoff.next(random())).await;
            let limit = REDIAL_TIMEOUT_FIRST * (1 << (backoff.attempts() - 1).min(8));
            match self.dialer.dial(limit.min(REDIAL_TIMEOUT)).await {
                Ok(made) => return made,
                Err(error) => {
                    self.failed();
                    let attempts = backoff.attempts();
                    tracing::debug!(attempts, %error, "the broker cannot be reached");
                    *self.last_error.lock() = Some(error);
                }
            }
        }
    }
}

async fn supervise(shared: Arc<Shared>, mut link: Arc<Link>, mut control: ControlStream) {
    loop {
        let connection = link.connection.clone();
        tokio::select! {
            end = control.run() => {
                tracing::info!(?end, "the connection to the broker has ended");
            }
            () = left(&shared, &link) => {}
            () = shared.closed.cancelled() => {
                shared.link.send_replace(None);
                connection.close(0u32.into(), b"the client was closed");
                return;
            }
        }
        shared.link.send_replace(None);
        connection.close(0u32.into(), b"the control stream ended");
        let made = tokio::select! {
            made = shared.redial() => made,
            () = shared.closed.cancelled() => return,
        };
        link = shared.connected(made.0);
        control = made.1;
    }
}

/// Returns once the broker has asked this client to leave and everybody has. Who takes too long is
/// cut off by the broker.
async fn left(shared: &Shared, link: &Link) {
    link.leaving.cancelled().await;
    shared.link.send_replace(None);
    link.users.close();
    link.users.wait().await;
}
