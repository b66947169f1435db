//! A broker in this process for tests: a temporary folder, a free port, real QUIC.

use tempfile::TempDir;

use crate::broker::{Broker, BrokerError};
use crate::config::Config;
use crate::start_error::StartError;

/// A broker whose folder goes with it. It can be stopped and started again on the same folder.
pub struct EmbeddedBroker {
    folder: TempDir,
    config: Config,
    broker: Broker,
}

impl EmbeddedBroker {
    /// Starts with defaults, on a free port of the loopback interface, without HTTP.
    pub async fn start() -> Result<Self, StartError> {
        Self::start_with(|_| {}).await
    }

    /// Starts with a configuration that `change` has changed; the folder and the address are set.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Result<Self, StartError> {
        let folder =
            TempDir::new().map_err(|e| StartError::io("make", &std::env::temp_dir(), e))?;
        let mut config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            http: None,
            ..Config::default()
        };
        config.data = folder.path().join("data");
        config.log.segment_bytes = 16 << 20;
        config.disk.reserve_bytes = 16 << 20;
        change(&mut config);
        let broker = Broker::start(config.clone()).await?;
        Ok(Self {
            folder,
            config,
            broker,
        })
    }

    /// The broker.
    #[must_use]
    pub fn broker(&self) -> &Broker {
        &self.broker
    }

    /// The address as clients take it.
    #[must_use]
    pub fn url(&self) -> String {
        self.broker.url()
    }

    /// The certificate authority that its clients trust, as PEM.
    ///
    /// # Errors
    /// If the file in the data folder cannot be read.
    pub fn ca_pem(&self) -> std::io::Result<Vec<u8>> {
        self.broker.ca_pem()
    }

    /// Stops it gracefully and starts it again on the same folder and address.
    ///
    /// # Errors
    /// As `Broker::start`; a broker that did not stop cleanly is started all the same.
    pub async fn restart(self) -> Result<Self, StartError> {
        let Self {
            folder,
            mut config,
            broker,
        } = self;
        config.listen = broker.listen_addr();
        if let Err(error) = broker.shutdown().await {
            tracing::warn!(%error, "the embedded broker did not stop cleanly");
        }
        let broker = Broker::start(config.clone()).await?;
        Ok(Self {
            folder,
            config,
            broker,
        })
    }

    /// Stops it gracefully; the folder is removed.
    ///
    /// # Errors
    /// As `Broker::shutdown`.
    pub async fn shutdown(self) -> Result<(), BrokerError> {
        self.broker.shutdown().await
    }
}
