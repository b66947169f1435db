//! API tokens.

use millpond_protocol::ErrorCode;

use crate::effect::Outcome;
use crate::queue::{At, Queue};
use crate::state::dirty;
use crate::state::token::{TOKENS_MAX, Token};

impl Queue {
    pub(crate) fn token_add(&mut self, at: At, name: &str, hash: &[u8; 32]) -> Outcome {
        if self.tokens.by_name.contains_key(name) {
            return Outcome::error(
                ErrorCode::AlreadyExists,
                "a token of this name exists; revoke it first or choose another name",
            );
        }
        if self.tokens.by_name.len() >= TOKENS_MAX {
            return Outcome::error(
                ErrorCode::LimitReached,
                format!("there are {TOKENS_MAX} tokens; revoke some first"),
            );
        }
        self.dirty.mark(dirty::TOKENS);
        let token = Token {
            hash: *hash,
            created_at: at.stamp,
        };
        self.tokens.by_name.insert(name.to_owned(), token);
        Outcome::Done
    }

    pub(crate) fn token_revoke(&mut self, name: &str) -> Outcome {
        self.dirty.mark(dirty::TOKENS);
        match self.tokens.by_name.remove(name) {
            Some(_) => Outcome::Done,
            None => Outcome::error(ErrorCode::UnknownToken, "there is no token of this name"),
        }
    }
}
