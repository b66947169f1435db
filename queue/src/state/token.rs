//! API tokens: names and hashes, never the tokens.

use std::collections::BTreeMap;

use millpond_protocol::Stamp;
use serde::{Deserialize, Serialize};

/// Most tokens that can exist at one time.
pub const TOKENS_MAX: usize = 10_000;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    pub by_name: BTreeMap<String, Token>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    pub hash: [u8; 32],
    pub created_at: Stamp,
}
