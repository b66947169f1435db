//! One connection: handshake deadline, authentication, then a task per stream.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use millpond_protocol::control::{Hello, Welcome};
use millpond_protocol::frame::FrameType;
use millpond_protocol::limits::CONSUMER_NAME_BYTES_MAX;
use millpond_protocol::{ErrorCode, VERSION_MAX, VERSION_MIN, WireError};
use millpond_wal::storage::Storage;
use quinn::{Connection, Incoming, RecvStream, SendStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use super::frames::{FrameReader, FrameWriter, StreamError, code};
use super::{Context, Registered, consumer, control, producer, settlement};
use crate::memory::{CONNECTION_BYTES, Loan, STREAM_BYTES, Share};
use crate::shard::io::{Input, Output};
use crate::transport::Windows;
use crate::{token, transport};

/// Connections in their handshake beyond which a newcomer must prove its address first.
const UNPROVEN_MAX: usize = 256;
/// What a stream may begin with. None of them is large.
const OPENING: [FrameType; 3] = [
    FrameType::OpenProducer,
    FrameType::OpenConsumer,
    FrameType::OpenSettlements,
];
/// How long a closing connection may take to say what it has to say.
const LINGER: Duration = Duration::from_millis(200);
/// Why a connection is closed whose token was revoked.
pub const REVOKED: &str = "the token of this connection was revoked";

/// Who is at the other end of a connection.
#[derive(Clone)]
pub struct Peer {
    pub client_name: String,
    pub token: Option<String>,
    /// This connection's part of the memory budget.
    pub share: Share,
    pub windows: Arc<Windows>,
    pub connection: Connection,
}

/// Accepts connections until the endpoint is closed.
pub async fn accept<S: Storage>(context: Arc<Context<S>>, endpoint: quinn::Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        if endpoint.open_connections() >= context.config.quic.max_connections
            || *context.draining.borrow()
        {
            incoming.refuse();
            continue;
        }
        if !incoming.remote_address_validated() && context.metrics.handshakes() >= UNPROVEN_MAX {
            // An address that is proven already cannot be asked again; then it is let in.
            let _ = incoming.retry();
            continue;
        }
        let Some(room) = context.memory.session(CONNECTION_BYTES) else {
            tracing::debug!("a connection is refused: the memory for connections is used up");
            incoming.refuse();
            continue;
        };
        let tracker = context.tasks.clone();
        tracker.spawn(serve(context.clone(), incoming, room));
    }
}

/// One connection, from its handshake to its end.
///
/// The stages of a connection and of a stream are boxed one by one, because a task keeps the size of its
/// largest stage to its end, and thousands of them are idle.
fn serve<S: Storage>(
    context: Arc<Context<S>>,
    incoming: Incoming,
    room: Loan,
) -> impl Future<Output = ()> {
    let remote = incoming.remote_address();
    let welcoming = Box::pin(admitted(context.clone(), incoming));
    async move {
        if let Some((peer, control)) = welcoming.await {
            Box::pin(attend(context, remote, peer, control)).await;
        }
        drop(room);
    }
}

/// Who was welcomed in time.
async fn admitted<S: Storage>(
    context: Arc<Context<S>>,
    incoming: Incoming,
) -> Option<(Peer, Control)> {
    let deadline = Instant::now() + context.config.quic.handshake_deadline();
    let remote = incoming.remote_address();
    let _handshake = context.metrics.begin_handshake();
    let connection = match timeout_at(deadline, incoming).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            tracing::debug!(%remote, %error, "connection refused");
            return None;
        }
        Err(_) => {
            tracing::debug!(%remote, "no handshake in time");
            return None;
        }
    };
    match timeout_at(deadline, welcome(&context, connection.clone())).await {
        Ok(Ok(welcomed)) => return Some(welcomed),
        Ok(Err(error)) => tracing::debug!(%remote, %error, "connection refused"),
        Err(_) => tracing::debug!(%remote, "connection not authenticated in time"),
    }
    // Whoever watches over its token holds it as well.
    connection.close(quinn::VarInt::from_u32(0), b"");
    None
}

/// Accepts the streams of a connection until it is closed.
async fn attend<S: Storage>(
    context: Arc<Context<S>>,
    remote: SocketAddr,
    peer: Peer,
    (send, reader): Control,
) {
    let _open = context.metrics.open_connection();
    tracing::debug!(%remote, client = peer.client_name, "connection opened");
    let connection = peer.connection.clone();
    let of_control = control::run(
        context.clone(),
        peer.clone(),
        FrameWriter::new(send),
        reader,
    );
    context
        .tasks
        .spawn(end_with(connection.clone(), Box::pin(of_control)));
    let mut allowance = transport::Allowance::new(&context.config.quic);
    while let Ok((send, recv)) = connection.accept_bi().await {
        let used = allowance.take(&connection);
        let Some(room) = context.memory.session(STREAM_BYTES) else {
            FrameWriter::new(send).reset(ErrorCode::Memory);
            continue;
        };
        let open = context.metrics.open_stream();
        let opening = Box::pin(opened(context.clone(), peer.clone(), send, recv));
        context.tasks.spawn(async move {
            if let Some(session) = opening.await {
                session.await;
            }
            drop((open, used, room));
        });
    }
    tracing::debug!(%remote, client = peer.client_name, "connection closed");
}

/// The connection lives as long as its control stream.
async fn end_with(
    connection: Connection,
    control: impl Future<Output = Option<WireError>> + Unpin,
) {
    let (reason, text) = match control.await {
        Some(error) => (code(error.code), error.message),
        None => (
            quinn::VarInt::from_u32(0),
            "the client closed its control stream".to_owned(),
        ),
    };
    // Lets the last frame arrive before the close overtakes it.
    let _ = Box::pin(timeout(LINGER, connection.closed())).await;
    connection.close(reason, text.as_bytes());
}

type Control = (SendStream, FrameReader);

/// `Hello`, authentication, `Welcome`.
async fn welcome<S: Storage>(
    context: &Arc<Context<S>>,
    connection: Connection,
) -> Result<(Peer, Control), StreamError> {
    let gone = |error: quinn::ConnectionError| StreamError::Gone(error.to_string());
    let (send, recv) = connection.accept_bi().await.map_err(gone)?;
    let (mut writer, mut reader) = (FrameWriter::new(send), FrameReader::new(recv));
    match greet(context, &connection, &mut reader).await {
        Ok((hello, token)) => {
            transport::admit(&connection, &context.config.quic);
            let welcome = Welcome {
                version: hello.version_max.min(VERSION_MAX),
                store_id: context.store_id,
                recovery_epoch: context.recovery_epoch,
                broker_version: env!("CARGO_PKG_VERSION").to_owned(),
            };
            writer.write_control(FrameType::Welcome, &welcome).await?;
            let share = context.memory.connection(token.as_deref());
            let windows = Windows::new(
                connection.clone(),
                context.memory.clone(),
                &context.config.quic,
            );
            let peer = Peer {
                client_name: hello.client_name,
                token,
                share,
                windows: Arc::new(windows),
                connection,
            };
            Ok((peer, (writer.into_inner(), reader)))
        }
        Err(StreamError::Refused(error)) => {
            writer.end(&error).await;
            let _ = timeout(LINGER, connection.closed()).await;
            connection.close(code(error.code), error.message.as_bytes());
            Err(error.into())
        }
        Err(error) => Err(error),
    }
}

async fn greet<S: Storage>(
    context: &Arc<Context<S>>,
    connection: &Connection,
    reader: &mut FrameReader,
) -> Result<(Hello, Option<String>), StreamError> {
    let frame = reader
        .next_of(&[FrameType::Hello])
        .await?
        .ok_or_else(|| StreamError::Gone("it said nothing".to_owned()))?;
    let hello: Hello = frame.decode()?;
    if hello.version_min > VERSION_MAX || hello.version_max < VERSION_MIN {
        let text = format!(
            "this broker speaks protocol versions {VERSION_MIN} to {VERSION_MAX}; use a client that does"
        );
        return Err(WireError::new(ErrorCode::Version, text).into());
    }
    if hello.client_name.len() > CONSUMER_NAME_BYTES_MAX {
        let text = format!("a client's name has at most {CONSUMER_NAME_BYTES_MAX} bytes");
        return Err(WireError::new(ErrorCode::Malformed, text).into());
    }
    let token = authenticate(context, connection, hello.token.as_deref()).await?;
    Ok((hello, token))
}

/// The name of the token that was shown; `None` where none is needed and none was shown.
async fn authenticate<S: Storage>(
    context: &Arc<Context<S>>,
    connection: &Connection,
    shown: Option<&str>,
) -> Result<Option<String>, StreamError> {
    let refused = |text: &str| StreamError::Refused(WireError::new(ErrorCode::Unauthorized, text));
    let Some(shown) = shown else {
        return if context.config.tokens_required() {
            Err(refused(
                "this broker wants a token; give one with --token or MILLPOND_TOKEN",
            ))
        } else {
            Ok(None)
        };
    };
    let (tell, told) = oneshot::channel();
    let (context_too, connection) = (Arc::clone(context), connection.clone());
    let watching = watch(context_too, connection, token::hash(shown), tell);
    // A task of its own: whatever becomes of the handshake, it comes to its end.
    context.tasks.spawn(watching);
    match told.await {
        Ok(Some(name)) => Ok(Some(name)),
        Ok(None) => Err(refused(
            "the token is not known here; it may have been revoked",
        )),
        // It is closed, or the broker stops.
        Err(_) => Err(StreamError::Gone("its token was not looked up".to_owned())),
    }
}

/// Tells whose token that is, and watches over it while its connection lasts: from the question on no
/// revocation is missed, whatever the peer reads.
async fn watch<S: Storage>(
    context: Arc<Context<S>>,
    connection: Connection,
    hash: Option<[u8; 32]>,
    tell: oneshot::Sender<Option<String>>,
) {
    let Ok(Registered {
        id, mut outputs, ..
    }) = context.register().await
    else {
        return;
    };
    let watching = async {
        let input = Input::Authenticate { stream: id, hash };
        context.shard.input(input).await.ok()?;
        let name = loop {
            if let Output::Authenticated { name } = outputs.recv().await {
                break name;
            }
        };
        // Whoever asked may have gone; then the connection is closed.
        let _ = tell.send(name.clone());
        let name = name?;
        loop {
            match outputs.recv().await {
                Output::Revoked { token } if token == name => return Some(()),
                _ => {}
            }
        }
    };
    let revoked = tokio::select! {
        revoked = watching => revoked,
        _ = connection.closed() => None,
    };
    context.unregister(id).await;
    if revoked.is_some() {
        // The control stream says why, and closes the connection, unless it is not read.
        let _ = timeout(2 * LINGER, connection.closed()).await;
        connection.close(code(ErrorCode::Unauthorized), REVOKED.as_bytes());
    }
}

/// The code with which a draining broker closes what is left.
pub fn closing_code() -> quinn::VarInt {
    code(ErrorCode::Draining)
}

/// What a stream does, as its first frame says; `None` if it is over before that.
async fn opened<S: Storage>(
    context: Arc<Context<S>>,
    peer: Peer,
    send: SendStream,
    recv: RecvStream,
) -> Option<Session> {
    let (writer, mut reader) = (FrameWriter::new(send), FrameReader::new(recv));
    let deadline = context.config.quic.handshake_deadline();
    let first = match timeout(deadline, reader.next_of(&OPENING)).await {
        Ok(Ok(Some(frame))) => frame,
        Ok(Err(StreamError::Refused(error))) => {
            writer.end(&error).await;
            return None;
        }
        Ok(_) => return None,
        Err(_) => {
            let text = "a stream must say what it is for within the handshake deadline";
            let error = WireError::new(ErrorCode::Malformed, text);
            writer.end(&error).await;
            return None;
        }
    };
    Some(match first.kind {
        FrameType::OpenProducer => Box::pin(producer::run(context, peer, writer, reader, first)),
        FrameType::OpenConsumer => Box::pin(consumer::run(context, peer, writer, reader, first)),
        _ => Box::pin(settlement::run(context, peer, writer, reader, first)),
    })
}

type Session = Pin<Box<dyn Future<Output = ()> + Send>>;
