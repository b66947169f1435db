//! Every bound of the client, with what it costs.
//!
//! Bounds that both sides must agree on stand in `millpond_protocol::limits`.

use std::time::Duration;

use millpond_protocol::limits::MESSAGE_BYTES_MAX;

/// The longest time that a setting may name, a year; a longer one is taken as this, so that it can be
/// added to any time of day.
pub const SETTING_MAX: Duration = Duration::from_secs(365 * 24 * 3_600);

/// How long the first connection may take, handshake included; shared by the host's addresses.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the first attempt to come back may take; each further one may take twice as long. An
/// attempt that was begun before the broker listens learns of it late.
pub const REDIAL_TIMEOUT_FIRST: Duration = Duration::from_millis(250);
/// The longest that one attempt may take; shared by the host's addresses.
pub const REDIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a control request, or the opening of a producer or consumer, may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a message may wait for credit, and then for its acknowledgement.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// How long closing may wait for what is still on its way.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of a producer's stream may take to reach the broker.
pub const FINISH_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a stopped worker lets running handlers finish.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Consecutive failures after which requests fail at once.
pub const BREAKER_FAILURES: u32 = 5;
/// How long they do so before one of them is let through as a probe; doubles with each failed one.
pub const BREAKER_COOLDOWN: Duration = Duration::from_secs(1);
/// The longest such time.
pub const BREAKER_COOLDOWN_MAX: Duration = Duration::from_secs(30);

/// The wait before the first attempt to reconnect.
pub const RECONNECT_FIRST: Duration = Duration::from_millis(10);
/// The longest wait between attempts to reconnect.
pub const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// The wait after a stream was refused for a moment, when the broker names none.
pub const REFUSED_WAIT: Duration = Duration::from_millis(50);
/// The longest wait that a broker's `retry_after` may ask for.
pub const REFUSED_WAIT_MAX: Duration = Duration::from_secs(5);
/// Times that a stream may end at once, without any progress, before its handle gives up.
pub const STREAM_RETRIES_MAX: u32 = 8;

/// QUIC: silence after which a ping is sent.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// QUIC: silence after which the connection is lost.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(6);
/// QUIC: first guess of the round trip; small, so that a lost first packet is soon sent again.
pub const INITIAL_RTT: Duration = Duration::from_millis(50);
/// QUIC: bytes that one stream may have on the way to this client.
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// QUIC: the same for all streams of the connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// QUIC: bytes written and not acknowledged by the other side, over all streams.
pub const SEND_WINDOW_BYTES: u64 = 16 << 20;
/// UDP payload bytes that path discovery tries at most, unless configured.
pub const MTU_DEFAULT: u16 = 1_452;
/// The least UDP payload that QUIC works with.
pub const MTU_MIN: u16 = 1_200;
/// Above it segmentation offload stops working.
pub const MTU_MAX: u16 = 6_400;
/// QUIC: packets after which the broker is asked to acknowledge, instead of every second one.
pub const ACK_EVERY_PACKETS: u32 = 10;
/// QUIC: longest the broker is asked to sit on an acknowledgement.
pub const ACK_DELAY_MAX: Duration = Duration::from_millis(5);
/// Kernel buffer asked for on the UDP socket, in bytes, each way. Best effort.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// Chunks taken off a stream at once.
pub const READ_CHUNKS: usize = 32;
/// Bytes of a buffer in which pieces of messages are put together, many to a buffer.
pub const JOINED_BYTES: usize = 64 << 10;
/// Pieces of a frame that are kept as they came, however small they are.
pub const PIECES_MIN: usize = 64;
/// Bytes that further pieces have on the average; smaller ones are put together.
pub const PIECE_BYTES_MIN: usize = 512;
/// Pieces that there is room for while none is there; 32 bytes each.
pub const PIECES_KEPT: usize = 512;

/// Control requests waiting to be written.
pub const CONTROL_QUEUE: usize = 64;
/// Control requests written and not answered.
pub const CONTROL_PENDING_MAX: usize = 1_024;
/// Pages that a listing is read through: 10 million rows.
pub const LIST_PAGES_MAX: usize = 10_000;

/// Messages of one producer that are queued or unacknowledged.
pub const PRODUCER_WINDOW_MESSAGES: usize = 65_536;
/// Bytes of them; they are kept to be sent again.
pub const PRODUCER_WINDOW_BYTES: usize = 32 << 20;
/// Bytes that a publish stream's writer takes from its producers for one write; one frame more at most.
pub const WRITE_BYTES_TARGET: usize = 256 << 10;
/// Messages of one frame that are copied behind others into one piece, in bytes; larger ones are not.
pub const COPY_BYTES_MAX: usize = 8 << 10;
/// Frames of one producer that are unanswered while small batches still go out at once.
pub const GATHER_FRAMES: usize = 4;
/// Bytes of a batch that goes out however many are unanswered.
pub const GATHER_BYTES: usize = 16 << 10;
/// The least capacity of a batch's buffer, in bytes.
pub const BATCH_CAPACITY_MIN: usize = 4 << 10;

/// Deliveries that a consumer holds unsettled.
pub const PREFETCH_MESSAGES: u32 = 1_000;
/// Bytes of them.
pub const PREFETCH_BYTES: u64 = 32 << 20;
/// Settlements waiting for their answer beyond which no further delivery is asked for.
pub const SETTLEMENTS_PENDING_MAX: usize = 131_072;
/// Names of lost leases remembered until their deliveries are settled, or come too late; about 3 MiB.
pub const LOST_LEASES_MAX: usize = 65_536;
/// After this a dropped delivery comes again: the default policy's first backoff.
pub const DROPPED_DELAY_MS: u64 = 1_000;

const _: () = assert!(PRODUCER_WINDOW_BYTES > MESSAGE_BYTES_MAX);
const _: () = assert!(PREFETCH_BYTES > MESSAGE_BYTES_MAX as u64);
const _: () = assert!(CONNECTION_WINDOW_BYTES >= STREAM_WINDOW_BYTES);
const _: () = assert!(MTU_MIN <= MTU_DEFAULT && MTU_DEFAULT <= MTU_MAX);
const _: () = assert!(
    millpond_protocol::limits::SETTLE_ITEMS_MAX
        * (millpond_protocol::limits::REASON_BYTES_MAX + 64)
        <= millpond_protocol::limits::CONTROL_BYTES_MAX
);
