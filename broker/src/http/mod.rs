//! Health and metrics over HTTP.
//!
//! ```text
//! GET /healthz   200 while the process lives, whatever else is wrong
//! GET /ready     200, or 503 with the reasons, one a line
//! GET /metrics   the text format that Prometheus reads
//! ```
//!
//! Nothing here changes anything, and nothing here is secret, so nobody is asked who they are.
//! One connection carries one request; see [`listener`] for the limits.

mod listener;

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::start_error::{Door, StartError};

/// Who answers for the broker.
pub trait HttpSource: Send + Sync + 'static {
    /// Whether messages are taken and given; if not, why, in sentences.
    fn readiness(&self) -> impl Future<Output = Result<(), Vec<String>>> + Send;
    /// The whole text of `/metrics`.
    fn metrics(&self) -> impl Future<Output = String> + Send;
}

/// Listens, so that a port in use is known before anything else is begun.
///
/// # Errors
/// The address is taken or not this machine's.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|error| StartError::listen(Door::Http, address, error))
}

/// Answers until it is dropped.
pub async fn serve<S: HttpSource>(listener: TcpListener, source: Arc<S>) {
    let routes = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/ready", get(ready::<S>))
        .route("/metrics", get(metrics::<S>))
        .with_state(source)
        .layer(axum::middleware::map_response(close_after));
    let ended = axum::serve(listener::Bounded::new(listener), routes).await;
    // Errors of single connections end those alone.
    if let Err(error) = ended {
        tracing::error!(%error, "HTTP is no longer served");
    }
}

async fn ready<S: HttpSource>(State(source): State<Arc<S>>) -> Response {
    match timeout(ANSWER_MAX, source.readiness()).await {
        Ok(Ok(())) => "ready\n".into_response(),
        Ok(Err(reasons)) => unavailable(reasons),
        Err(_) => unavailable(["the broker does not answer in time"]),
    }
}

async fn metrics<S: HttpSource>(State(source): State<Arc<S>>) -> Response {
    match timeout(ANSWER_MAX, source.metrics()).await {
        Ok(text) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => unavailable(["the broker does not answer in time"]),
    }
}

fn unavailable<T: Display>(reasons: impl IntoIterator<Item = T>) -> Response {
    let body: String = reasons
        .into_iter()
        .map(|reason| format!("{reason}\n"))
        .collect();
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

async fn close_after(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Longest wait for the broker's own answer; shorter than a connection may last.
const ANSWER_MAX: Duration = Duration::from_secs(5);
const _: () = assert!(ANSWER_MAX.as_millis() < listener::CONNECTION_LIFE_MAX.as_millis());
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::*;

    struct Fixed(Vec<String>);

    impl HttpSource for Fixed {
        async fn readiness(&self) -> Result<(), Vec<String>> {
            if self.0.is_empty() {
                Ok(())
            } else {
                Err(self.0.clone())
            }
        }

        async fn metrics(&self) -> String {
            "# EOF\n".to_string()
        }
    }

    async fn start(reasons: &[&str]) -> (SocketAddr, JoinHandle<()>) {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let source = Fixed(reasons.iter().map(ToString::to_string).collect());
        (address, tokio::spawn(serve(listener, Arc::new(source))))
    }

    /// Everything until the server closes, which it does after one answer.
    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn fetch(address: SocketAddr, path: &str) -> String {
        ask(address, &format!("GET {path} HTTP/1.1\r\nhost: m\r\n\r\n")).await
    }

    #[tokio::test]
    async fn a_ready_broker_says_so_and_closes() {
        let (address, server) = start(&[]).await;
        let ready = fetch(address, "/ready").await;
        assert!(ready.starts_with("HTTP/1.1 200 "), "{ready}");
        let metrics = fetch(address, "/metrics").await;
        assert!(
            metrics.contains("application/openmetrics-text"),
            "{metrics}"
        );
        assert!(metrics.ends_with("# EOF\n"), "{metrics}");
        server.abort();
    }

    #[tokio::test]
    async fn a_broker_that_is_not_ready_lives_and_tells_why() {
        let (address, server) = start(&["the disk is full", "the log is damaged"]).await;
        let ready = fetch(address, "/ready").await;
        assert!(ready.starts_with("HTTP/1.1 503 "), "{ready}");
        assert!(
            ready.ends_with("the disk is full\nthe log is damaged\n"),
            "{ready}"
        );
        let health = fetch(address, "/healthz").await;
        assert!(health.starts_with("HTTP/1.1 200 "), "{health}");
        server.abort();
    }

    #[tokio::test]
    async fn other_paths_and_methods_are_refused() {
        let (address, server) = start(&[]).await;
        let missing = fetch(address, "/").await;
        assert!(missing.starts_with("HTTP/1.1 404 "), "{missing}");
        let post = "POST /ready HTTP/1.1\r\nhost: m\r\ncontent-length: 0\r\n\r\n";
        let refused = ask(address, post).await;
        assert!(refused.starts_with("HTTP/1.1 405 "), "{refused}");
        server.abort();
    }

    #[tokio::test]
    async fn a_taken_port_is_reported_as_such() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let error = bind(address).await.unwrap_err();
        assert!(
            matches!(
                error,
                StartError::PortInUse {
                    door: Door::Http,
                    ..
                }
            ),
            "{error}"
        );
    }
}
