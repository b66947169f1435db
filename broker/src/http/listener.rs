//! A TCP listener that gives nobody much: at most [`CONNECTIONS_MAX`] connections, each of them
//! [`REQUEST_BYTES_MAX`] and [`CONNECTION_LIFE_MAX`] long. Whoever sends slowly or too much is cut
//! off, so that health checks are always answered.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

/// Connections at once; further ones wait in the system's backlog. About 32 KiB each.
pub(super) const CONNECTIONS_MAX: usize = 64;
/// Bytes after which nothing more is read: a request without a body is far smaller.
pub(super) const REQUEST_BYTES_MAX: usize = 16 << 10;
/// How long one connection may last.
pub(super) const CONNECTION_LIFE_MAX: Duration = Duration::from_secs(10);
/// How long to wait when the system has no more file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(500);

/// The bounded listener.
pub(super) struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self {
            listener,
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }
}

impl Listener for Bounded {
    type Io = Guarded;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guarded, SocketAddr) {
        let place = self.places.clone().acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    return (Guarded::new(stream, place, CONNECTION_LIFE_MAX), peer);
                }
                // One client's connection that was gone already: the next may be fine.
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept HTTP connections");
                    sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
    )
}

/// One connection with its limits.
pub(super) struct Guarded {
    stream: TcpStream,
    bytes_left: usize,
    end: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Guarded {
    fn new(stream: TcpStream, place: OwnedSemaphorePermit, life: Duration) -> Self {
        Self {
            stream,
            bytes_left: REQUEST_BYTES_MAX,
            end: Box::pin(sleep(life)),
            _place: place,
        }
    }

    fn check_life(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.end.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Guarded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_life(context)?;
        if self.bytes_left == 0 {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let read = buffer.filled().len() - before;
        self.bytes_left = self.bytes_left.saturating_sub(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Guarded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_life(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_life(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_life(context)?;
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn pair(bounded: &mut Bounded) -> (TcpStream, Guarded) {
        let address = bounded.local_addr().unwrap();
        let (client, (server, _)) = tokio::join!(TcpStream::connect(address), bounded.accept());
        (client.unwrap(), server)
    }

    async fn bounded() -> Bounded {
        Bounded::new(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    #[tokio::test]
    async fn whoever_sends_too_much_is_cut_off() {
        let mut bounded = bounded().await;
        let (mut client, mut server) = pair(&mut bounded).await;
        let sending = tokio::spawn(async move {
            let _ = client.write_all(&[b'a'; 4 * REQUEST_BYTES_MAX]).await;
            client
        });
        let mut got = Vec::new();
        let error = server.read_to_end(&mut got).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(sending.await.unwrap());
    }

    #[tokio::test]
    async fn whoever_sends_nothing_is_cut_off_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
        let place = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
        let life = Duration::from_millis(5);
        let mut server = Guarded::new(server.unwrap().0, place, life);
        let error = server.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(client);
    }

    #[tokio::test]
    async fn one_more_than_the_most_connections_waits_for_a_place() {
        let mut bounded = bounded().await;
        let mut open = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            open.push(pair(&mut bounded).await);
        }
        let _client = TcpStream::connect(bounded.local_addr().unwrap())
            .await
            .unwrap();
        tokio::select! {
            biased;
            _ = bounded.accept() => panic!("there was no place"),
            () = std::future::ready(()) => {}
        }
        open.pop();
        bounded.accept().await;
    }
}
