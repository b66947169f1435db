//! Messages, settlements and policies from small numbers.
use millpond_protocol::control::{Outcome as Said, RejectKind};
use millpond_protocol::policy::{Backoff, Jitter, OnLimit};
use millpond_protocol::{Message, Offset, SubscriptionConfig, TopicConfig};
use millpond_queue::StartPosition;

pub fn position(b: u8) -> StartPosition {
    match b % 4 {
        0 => StartPosition::Earliest,
        1 => StartPosition::Latest,
        _ => StartPosition::At(Offset(u64::from(b / 4))),
    }
}

pub fn message(b: u8, c: u8, i: u64) -> Message {
    let mut message = Message::new(vec![b; usize::from(c) % 60]);
    let kind = (u64::from(b / 12) * 31 + u64::from(c / 5) * 7 + i) % 16;
    match kind {
        0 => message.delay_ms = 100,
        1 => message.delay_ms = 5_000,
        2 => message.ttl_ms = 3_000,
        3 => message.max_attempts = 1,
        4 => message.max_attempts = 3,
        5 => message.backoff_initial_ms = 20,
        6 => (message.delay_ms, message.ttl_ms) = (2_000, 1_000),
        _ => {}
    }
    message
}

/// `None`: an ack.
pub fn said(what: u8, i: usize, c: u8) -> Option<Said> {
    let nack = |delay_ms| Said::Nack {
        delay_ms,
        code: u32::from(c % 3),
        reason: "no".to_owned(),
    };
    Some(match what {
        0 => return None,
        1 | 2 => nack(None),
        3 => nack(Some(u64::from(c) * 10)),
        4 => Said::Reject {
            kind: RejectKind::Rejected,
            code: 5,
            reason: "bad".to_owned(),
        },
        5 => Said::Release { delay_ms: None },
        6 => Said::Release {
            delay_ms: Some(u64::from(c) * 10),
        },
        // Something of each.
        _ => return said((i as u8).wrapping_add(c) % 7, i, c),
    })
}

pub fn topic_config(b: u8, c: u8) -> TopicConfig {
    TopicConfig {
        retention_ms: [0, 0, 0, 5_000][usize::from(b % 4)],
        max_bytes: (c % 8 == 7).then_some(2_000),
        max_messages: (b % 8 > 4).then_some(4 + u64::from(c % 16)),
        on_limit: [OnLimit::RefusePublish, OnLimit::DeadLetter, OnLimit::Drop][usize::from(c % 3)],
        ttl_ms: (c % 8 == 3).then_some(4_000),
    }
}

pub fn subscription_config(b: u8, c: u8) -> SubscriptionConfig {
    SubscriptionConfig {
        lease_ms: [30_000, 5_000, 1_000][usize::from(b % 3)],
        processing_timeout_ms: [300_000, 2_000, 100][usize::from(c % 3)],
        hold_max_ms: [60_000, 3_000][usize::from(c / 3 % 2)],
        backoff: match b / 3 % 5 {
            0 => Backoff::Fixed { wait_ms: 1_000 },
            1 => Backoff::default(),
            2 => Backoff::Fixed { wait_ms: 0 },
            3 => Backoff::List {
                waits_ms: vec![10, 0, 500],
            },
            _ => Backoff::Exponential {
                initial_ms: 3,
                multiplier_milli: 1_500,
                max_ms: 50,
            },
        },
        jitter: [Jitter::None, Jitter::None, Jitter::Equal, Jitter::Full][usize::from(c / 6 % 4)],
        max_attempts: [16, 2, 1, 3][usize::from(b / 15 % 4)],
        max_deliveries: [100, 100, 3][usize::from(c / 24 % 3)],
        max_age_ms: (c / 72 % 3 == 2).then_some(20_000),
        max_in_flight: [100_000, 100_000, 3][usize::from(b / 60 % 3)],
        ..SubscriptionConfig::default()
    }
}
