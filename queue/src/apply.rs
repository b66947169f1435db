//! What each kind of record does to the state.

mod dead;
mod expire;
pub(crate) mod loss;
mod producers;
mod sessions;
mod settle;
mod subscriptions;
mod tokens;
mod topics;

pub(crate) use dead::Meant;

use millpond_protocol::ErrorCode;

use crate::effect::Outcome;

fn unknown_topic() -> Outcome {
    Outcome::error(
        ErrorCode::UnknownTopic,
        "the topic does not exist; create it first",
    )
}

fn unknown_subscription() -> Outcome {
    Outcome::error(
        ErrorCode::UnknownSubscription,
        "the subscription does not exist; create it first",
    )
}
