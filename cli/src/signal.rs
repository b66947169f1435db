//! Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends the process at once,
//! with every command that it runs.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::exec;
use crate::failure::Failure;

/// Which signal asked for the end.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    Interrupt,
    Terminate,
}

impl Stop {
    /// What a shell reports for a process that this signal ended.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

/// Tells its holders when the process has been asked to end.
#[derive(Clone, Debug)]
pub struct Signals {
    asked: watch::Receiver<Option<Stop>>,
}

impl Signals {
    /// Takes both signals over from their default, which is to end the process.
    pub fn listen() -> Result<Self, Failure> {
        let failed = |error| Failure::System {
            what: "cannot listen for signals",
            error,
        };
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let (ask, asked) = watch::channel(None);
        tokio::spawn(async move {
            loop {
                let stop = tokio::select! {
                    _ = interrupt.recv() => Stop::Interrupt,
                    _ = terminate.recv() => Stop::Terminate,
                };
                if ask.borrow().is_some() {
                    exec::exit(stop.exit_code());
                }
                ask.send_replace(Some(stop));
            }
        });
        Ok(Self { asked })
    }

    /// Waits until the end is asked for. Cancel-safe.
    pub async fn asked(&mut self) -> Stop {
        loop {
            if let Some(stop) = *self.asked.borrow_and_update() {
                return stop;
            }
            if self.asked.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Signals of which one has come already.
    #[cfg(test)]
    pub fn that_asked(stop: Stop) -> Self {
        let (_, asked) = watch::channel(Some(stop));
        Self { asked }
    }
}
