//! Connecting, asking, and what is said when that fails.

mod fake;

use std::time::Duration;

use fake::{FakeBroker, patient};
use millpond_client::{
    Client, DeadFilter, Error, ErrorClass, ErrorCode, Offset, Request, Response, TopicConfig,
    WireError,
};
use millpond_protocol::frame::FrameType;

#[tokio::test]
async fn the_token_and_the_name_are_told_first() {
    let broker = FakeBroker::start();
    let url = broker.url();
    let builder = broker.client().token("secret").name("billing");
    let connecting = tokio::spawn(async move { builder.connect(&url).await });
    let (_connection, hello, mut control) = broker.hello().await;
    assert_eq!(hello.token.as_deref(), Some("secret"));
    assert_eq!(hello.client_name, "billing");
    let refusal = WireError::new(ErrorCode::Unauthorized, "the token is not known");
    control.write(FrameType::Error, &refusal).await;
    let error = patient(connecting).await.unwrap().err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Unauthorized));
    assert_eq!(error.to_string(), "the token is not known");
}

#[tokio::test]
async fn a_hello_that_is_too_long_is_the_clients_fault() {
    let broker = FakeBroker::start();
    let url = broker.url();
    let connecting = broker.client().name("n".repeat(5_000)).connect(&url);
    let error = tokio::select! {
        result = patient(connecting) => result.err().unwrap(),
        _ = broker.hello() => panic!("it cannot be said"),
    };
    assert_eq!(error.code(), Some(ErrorCode::TooLarge));
    assert_eq!(error.class(), ErrorClass::RequestFatal);
}

#[tokio::test]
async fn a_client_that_has_connected_says_so_at_once() {
    let broker = FakeBroker::start();
    let (client, _connection) = broker.connected().await;
    assert!(client.is_connected() && client.welcome().is_some());
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_explained() {
    let broker = FakeBroker::start();
    let stranger = FakeBroker::start();
    let url = broker.url();
    let connecting = Client::builder().ca_pem(stranger.ca_pem).connect(&url);
    let error = tokio::select! {
        result = connecting => result.err().unwrap(),
        _ = broker.hello() => panic!("the handshake must fail"),
    };
    assert!(
        error
            .to_string()
            .contains("not signed by the CA that was given"),
        "{error}"
    );
}

#[tokio::test]
async fn nobody_listening_is_explained_within_the_timeout() {
    let broker = FakeBroker::start();
    let (builder, url) = (broker.client(), broker.url());
    drop(broker.stop().await);
    let limit = Duration::from_millis(200);
    let error = patient(builder.connect_timeout(limit).connect(&url)).await;
    let error = error.err().unwrap();
    assert!(matches!(error, Error::Connect(_)), "{error:?}");
    assert!(
        error.to_string().contains("is the broker running"),
        "{error}"
    );
}

#[tokio::test]
async fn answers_find_their_questions_in_any_order() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let ask = |name: &'static str| {
        let client = client.clone();
        tokio::spawn(async move { client.new_token(name).await })
    };
    let (first, second) = (ask("a"), ask("b"));
    let one = connection.request().await;
    let two = connection.request().await;
    for (id, request) in [two, one] {
        let Request::TokenNew { name } = request else {
            panic!("{request:?}")
        };
        let token = format!("token of {name}");
        let response = Response::Token { name, token };
        connection.respond(id, Ok(response)).await;
    }
    assert_eq!(patient(first).await.unwrap(), Ok("token of a".to_owned()));
    assert_eq!(patient(second).await.unwrap(), Ok("token of b".to_owned()));
}

/// Otherwise both sides could wait for each other to read.
#[tokio::test]
async fn answers_are_read_while_a_large_request_is_being_written() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let ask = || {
        let client = client.clone();
        let offsets = (1 << 40..).take(200_000).map(Offset).collect();
        let filter = DeadFilter {
            offsets,
            ..DeadFilter::default()
        };
        tokio::spawn(async move { client.purge_dead_letters("t", "s", filter).await })
    };
    let asked = [ask(), ask(), ask()];
    let (first, _) = connection.request().await;
    // More than the client has room for unread, before anything more of it is read.
    let nobodys = Response::Token {
        name: "n".repeat(1 << 20),
        token: String::new(),
    };
    patient(async {
        for _ in 0..8 {
            connection.respond(u64::MAX, Ok(nobodys.clone())).await;
        }
    })
    .await;
    let mut ids = vec![first];
    for _ in 1..asked.len() {
        ids.push(connection.request().await.0);
    }
    for id in ids {
        connection
            .respond(id, Ok(Response::Purged { count: 1 }))
            .await;
    }
    for answer in asked {
        assert_eq!(patient(answer).await.unwrap(), Ok(1));
    }
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_only_where_that_is_harmless() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let asking = {
        let client = client.clone();
        tokio::spawn(async move { client.tokens().await })
    };
    let creating = {
        let client = client.clone();
        tokio::spawn(async move { client.create_topic("t", TopicConfig::default()).await })
    };
    connection.request().await;
    connection.request().await;
    connection.break_off();
    let mut connection = broker.accept().await;
    let (id, again) = connection.request().await;
    assert_eq!(again, Request::TokenList);
    connection.respond(id, Ok(Response::Tokens(vec![]))).await;
    assert_eq!(patient(asking).await.unwrap(), Ok(vec![]));
    let error = patient(creating).await.unwrap().unwrap_err();
    assert_eq!(error, Error::Ambiguous);
}

#[tokio::test]
async fn a_busy_broker_is_asked_again() {
    let broker = FakeBroker::start();
    let (client, mut connection) = broker.connected().await;
    let asking = tokio::spawn(async move { client.ping().await });
    let (id, _) = connection.request().await;
    let busy = WireError::new(ErrorCode::Busy, "busy").retry_after(1);
    connection.respond(id, Err(busy)).await;
    let (id, _) = connection.request().await;
    connection.respond(id, Ok(Response::Done)).await;
    assert_eq!(patient(asking).await.unwrap(), Ok(()));
}

#[tokio::test]
async fn after_too_many_unanswered_requests_the_next_fails_at_once() {
    let broker = FakeBroker::start();
    let builder = broker
        .client()
        .request_timeout(Duration::from_millis(30))
        .circuit_breaker(2, Duration::from_secs(60));
    let (client, _connection) = broker.connected_as(builder).await;
    for _ in 0..2 {
        let error = client.ping().await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    }
    let error = client.ping().await.unwrap_err();
    assert!(matches!(error, Error::CircuitOpen { .. }), "{error:?}");
    assert_eq!(error.class(), ErrorClass::Retriable);
}

#[tokio::test]
async fn the_circuit_closes_when_the_broker_is_back() {
    let broker = FakeBroker::start();
    let builder = broker.client().circuit_breaker(1, Duration::from_secs(60));
    let (client, connection) = broker.connected_as(builder).await;
    connection.break_off();
    let stopped = broker.stop().await;
    patient(async {
        while !matches!(
            client.producer("t").open().await,
            Err(Error::CircuitOpen { .. })
        ) {}
    })
    .await;
    let broker = stopped.start_again().await;
    let mut connection = broker.accept().await;
    let pinging = patient(async {
        while !client.is_connected() {
            tokio::task::yield_now().await;
        }
        client.ping().await
    });
    let answering = async {
        let (id, _) = connection.request().await;
        connection.respond(id, Ok(Response::Done)).await;
    };
    let (pinged, ()) = tokio::join!(pinging, answering);
    assert_eq!(pinged, Ok(()));
}

#[tokio::test]
async fn closing_the_client_tells_the_broker() {
    let broker = FakeBroker::start();
    let (client, connection) = broker.connected().await;
    let other = client.clone();
    patient(client.close()).await;
    let reason = patient(connection.connection.closed()).await;
    assert!(
        matches!(reason, quinn::ConnectionError::ApplicationClosed(_)),
        "{reason:?}"
    );
    assert_eq!(other.ping().await, Err(Error::Closed));
}
