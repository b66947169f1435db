//! Every bound that both sides must agree on, with what it costs.

/// Longest payload of one message, in bytes (16 MiB).
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;
/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 1024;
/// Longest header block (all names and values and their lengths), in bytes.
pub const HEADERS_BYTES_MAX: usize = 64 << 10;
/// Most headers on one message.
pub const HEADERS_MAX: usize = 256;
/// Longest encoded message: fixed part, key, headers, payload.
pub const MESSAGE_BYTES_MAX: usize =
    crate::message::FIXED_BYTES + KEY_BYTES_MAX + HEADERS_BYTES_MAX + PAYLOAD_BYTES_MAX;
/// Longest block of headers that the broker adds to a delivery, in bytes.
pub const EXTRA_BYTES_MAX: usize = 8 << 10;
/// Longest body of a publish frame. One message of the largest size must fit, with the frame's fixed fields.
pub const PUBLISH_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 4096;
/// Longest frame body. One message of the largest size must fit, with what the broker adds to it and with
/// its frame's fixed fields; so must the record of whatever was published by one frame.
pub const FRAME_BYTES_MAX: usize = MESSAGE_BYTES_MAX + EXTRA_BYTES_MAX + 4096;
/// Longest body of a control frame, in bytes; a larger answer is paged.
pub const CONTROL_BYTES_MAX: usize = 4 << 20;
/// Longest body of an answer, in bytes: one message of the largest size must fit on a page, with what
/// is told about it.
pub const RESPONSE_BYTES_MAX: usize = MESSAGE_BYTES_MAX + (64 << 10);
/// Producers that are open on one publish stream at a time; a client opens another stream for more.
/// Each costs the broker about 400 bytes.
pub const STREAM_PRODUCERS_MAX: usize = 4096;
/// The least UDP payload that either side takes, in bytes: an Ethernet frame's. More where its MTU is set higher;
/// the other side sends no more.
pub const UDP_PAYLOAD_MIN: u16 = 1_472;
/// Most messages in one publish frame.
pub const BATCH_MESSAGES_MAX: u32 = 4096;
/// Bytes of messages after which a client closes a publish batch (one larger message goes alone).
pub const BATCH_BYTES_TARGET: usize = 256 << 10;
/// Most deliveries in one deliver frame.
pub const DELIVER_MESSAGES_MAX: u32 = 4096;
/// Most acknowledgements in one frame.
pub const SETTLE_ROWS_MAX: u32 = 8192;
/// Most settlements with a reason in one frame. The log keeps each with its message's history.
pub const SETTLE_ITEMS_MAX: usize = 2_048;
/// Most offsets by which dead letters are chosen.
pub const DEAD_OFFSETS_MAX: usize = 1_000;
/// Most offsets that the acknowledgements of one frame may cover together.
pub const SETTLE_OFFSETS_MAX: u64 = 65_536;
/// Longest topic or subscription name, in bytes.
pub const NAME_BYTES_MAX: usize = 200;
/// Longest producer id, in bytes.
pub const PRODUCER_ID_BYTES_MAX: usize = 200;
/// Longest consumer name, in bytes.
pub const CONSUMER_NAME_BYTES_MAX: usize = 200;
/// Most messages of a subscription that may be leased at once.
pub const MAX_IN_FLIGHT_MAX: u32 = 1_000_000;
/// Longest body of a frame that tells a consumer of its leases, in bytes: each is a name of at most 15.
pub const LEASES_BYTES_MAX: usize = 15 * MAX_IN_FLIGHT_MAX as usize + (64 << 10);
/// Longest reason of a nack or reject, in bytes; the client cuts longer ones at a character boundary.
pub const REASON_BYTES_MAX: usize = 1024;
/// Longest delay of a publish or a nack, in milliseconds (30 days).
pub const DELAY_MS_MAX: u64 = 30 * 24 * 3_600 * 1_000;
/// Longest per-message time to live, in milliseconds (30 days); a topic's may be longer.
pub const TTL_MS_MAX: u64 = DELAY_MS_MAX;
/// Most failures whose history a dead letter tells.
pub const HISTORY_MAX: usize = 10;
/// Batches per producer whose original offsets are remembered for duplicates.
pub const DEDUP_BATCHES_MAX: usize = 1024;
/// Most rows in one page of a listing.
pub const PAGE_ROWS_MAX: u32 = 1000;
/// Most steps of a backoff list.
pub const BACKOFF_LIST_MAX: usize = 64;
/// Bytes of one API token before encoding.
pub const TOKEN_BYTES: usize = 32;

const _: () = assert!(CONTROL_BYTES_MAX <= FRAME_BYTES_MAX);
const _: () = assert!(CONTROL_BYTES_MAX <= RESPONSE_BYTES_MAX);
const _: () = assert!(BATCH_BYTES_TARGET <= PUBLISH_BYTES_MAX);
const _: () = assert!(FRAME_BYTES_MAX < u32::MAX as usize);
const _: () = assert!(DELAY_MS_MAX <= u32::MAX as u64 && TTL_MS_MAX <= u32::MAX as u64);
