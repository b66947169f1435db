//! Tokens: who must show one, who may not any more.

use std::time::{Duration, Instant};

use millpond_broker::{EmbeddedBroker, StartError};
use millpond_client::{Client, Error, ErrorCode, Request, TopicConfig};
use millpond_protocol::control::{Hello, RequestFrame};
use millpond_protocol::frame::FrameType;
use quinn::ConnectionError;
use tokio::time::{sleep, timeout};

use crate::common::{PATIENCE, builder};
use crate::raw::{Peer, Wire, hello};

#[tokio::test]
async fn beyond_loopback_a_broker_without_a_token_does_not_start_and_says_what_to_do() {
    let started = EmbeddedBroker::start_with(|config| {
        config.listen = ([0, 0, 0, 0], 0).into();
    });
    let error = started.await.err().unwrap();
    assert!(matches!(error, StartError::NoToken { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("0.0.0.0") && text.contains("--first-token"),
        "{text}"
    );

    let started = EmbeddedBroker::start_with(|config| {
        config.listen = ([0, 0, 0, 0], 0).into();
        config.require_tokens = Some(false);
    });
    let error = started.await.err().unwrap().to_string();
    assert!(error.contains("require_tokens"), "{error}");
}

#[tokio::test]
async fn the_first_token_opens_a_broker_beyond_loopback_and_is_made_once() {
    let started = EmbeddedBroker::start_with(|config| {
        config.listen = ([0, 0, 0, 0], 0).into();
        config.first_token = Some("admin".to_owned());
    });
    let broker = started.await.unwrap();
    let token = broker.broker().first_token().unwrap().to_owned();
    let client = with_token(&broker, &token).await.unwrap();
    client
        .create_topic("orders", TopicConfig::default())
        .await
        .unwrap();
    let names: Vec<_> = client
        .tokens()
        .await
        .unwrap()
        .into_iter()
        .map(|t| t.name)
        .collect();
    assert_eq!(names, ["admin"]);

    let broker = broker.restart().await.unwrap();
    assert_eq!(broker.broker().first_token(), None, "there is one already");
    let client = with_token(&broker, &token).await.unwrap();
    assert_eq!(client.list_topics().await.unwrap().len(), 1);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn no_token_and_a_wrong_one_are_told_apart() {
    let (broker, token) = guarded().await;
    let none = builder(&broker).connect(&broker.url()).await.err().unwrap();
    assert_eq!(none.code(), Some(ErrorCode::Unauthorized), "{none}");
    assert!(none.to_string().contains("wants a token"), "{none}");
    let mut other = token.clone().into_bytes();
    other[10] = if other[10] == b'A' { b'B' } else { b'A' };
    for wrong in [
        "",
        "mp_",
        "secret",
        std::str::from_utf8(&other).unwrap(),
        &token[1..],
    ] {
        let error = with_token(&broker, wrong).await.err().unwrap();
        assert_eq!(
            error.code(),
            Some(ErrorCode::Unauthorized),
            "{wrong:?}: {error}"
        );
        assert!(
            error.to_string().contains("not known"),
            "{wrong:?}: {error}"
        );
        assert!(!error.is_retriable());
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_revoked_token_closes_its_connections_and_opens_none() {
    let (broker, admin) = guarded().await;
    let admin = with_token(&broker, &admin).await.unwrap();
    let token = admin.new_token("worker").await.unwrap();
    let worker = with_token(&broker, &token).await.unwrap();
    worker.ping().await.unwrap();
    let again = admin.new_token("worker").await.err().unwrap();
    assert_eq!(again.code(), Some(ErrorCode::AlreadyExists), "{again}");

    admin.revoke_token("worker").await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while admin.status().await.unwrap().connections > 1 {
        assert!(Instant::now() < deadline, "the worker is still connected");
    }
    assert!(!worker.is_connected());
    let error = with_token(&broker, &token).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Unauthorized), "{error}");
    assert!(error.to_string().contains("revoked"), "{error}");
    let unknown = admin.revoke_token("worker").await.err().unwrap();
    assert_eq!(unknown.code(), Some(ErrorCode::UnknownToken), "{unknown}");

    let broker = broker.restart().await.unwrap();
    let error = with_token(&broker, &token).await.err().unwrap();
    assert_eq!(
        error.code(),
        Some(ErrorCode::Unauthorized),
        "still after a restart"
    );
    admin.ping().await.unwrap();
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_connection_that_reads_no_answers_ends_when_its_token_is_revoked() {
    let (broker, admin) = guarded().await;
    let admin = with_token(&broker, &admin).await.unwrap();
    let token = admin.new_token("worker").await.unwrap();
    let connection = Peer::new(&broker)
        .windows(128, 64 << 10)
        .dial(&broker)
        .await
        .unwrap();
    let mut control = Wire::open(&connection).await;
    control.control(FrameType::Hello, &shown(&token)).await;
    control.next_of(FrameType::Welcome).await;
    for id in 0..8 {
        let request = Request::Status;
        let status = RequestFrame { id, request };
        control.control(FrameType::Request, &status).await;
    }
    // The answers are longer than what it lets in.
    sleep(Duration::from_millis(300)).await;
    admin.revoke_token("worker").await.unwrap();
    let closed = timeout(PATIENCE, connection.closed()).await;
    assert_unauthorized(closed.expect("it must leave"));
    broker.shutdown().await.unwrap();
}

/// Between the check of a token and the welcome, which a peer may hold up, nothing is missed.
#[tokio::test]
async fn a_token_that_is_revoked_before_its_connection_is_welcomed_closes_it_too() {
    let (broker, admin) = guarded().await;
    let admin = with_token(&broker, &admin).await.unwrap();
    let token = admin.new_token("worker").await.unwrap();
    let connection = Peer::new(&broker)
        .windows(8, 64 << 10)
        .dial(&broker)
        .await
        .unwrap();
    let mut control = Wire::open(&connection).await;
    control.control(FrameType::Hello, &shown(&token)).await;
    sleep(Duration::from_millis(300)).await;
    admin.revoke_token("worker").await.unwrap();
    let reading = async {
        while control.next().await.is_some() {}
        std::future::pending::<()>().await;
    };
    let closed = tokio::select! {
        closed = timeout(PATIENCE, connection.closed()) => closed,
        () = reading => unreachable!("it never ends"),
    };
    assert_unauthorized(closed.expect("it must leave"));
    broker.shutdown().await.unwrap();
}

fn assert_unauthorized(closed: ConnectionError) {
    let ConnectionError::ApplicationClosed(close) = closed else {
        panic!("{closed}");
    };
    let code = u16::from(ErrorCode::Unauthorized);
    assert_eq!(u64::from(close.error_code), u64::from(code), "{close}");
}

fn shown(token: &str) -> Hello {
    Hello {
        token: Some(token.to_owned()),
        ..hello(1, 1)
    }
}

/// A broker on loopback that wants tokens, and its first.
async fn guarded() -> (EmbeddedBroker, String) {
    let started = EmbeddedBroker::start_with(|config| {
        config.require_tokens = Some(true);
        config.first_token = Some("admin".to_owned());
        config.shutdown_grace_ms = 300;
    });
    let broker = started.await.unwrap();
    let token = broker.broker().first_token().unwrap().to_owned();
    (broker, token)
}

async fn with_token(broker: &EmbeddedBroker, token: &str) -> Result<Client, Error> {
    let at = broker.broker().listen_addr();
    let url = format!("millpond://127.0.0.1:{}", at.port());
    builder(broker).token(token).connect(&url).await
}
