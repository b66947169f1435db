//! API tokens: made here, shown once, kept only as a hash.
//!
//! ```text
//! mp_ + 43 characters: 32 random bytes in base64url without padding
//! ```
//!
//! A token has 256 random bits, so a fast hash is enough: there is nothing to guess. Tokens are
//! looked up by their hash, whose bytes a caller cannot choose, so how long that takes tells
//! nothing of use. The prefix lets secret scanners find one that was committed by mistake.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use millpond_protocol::limits::TOKEN_BYTES;
use ring::digest;

/// A new token's text, to be shown once, and its hash.
#[must_use]
pub fn new_token() -> (String, [u8; 32]) {
    let mut secret = [0; TOKEN_BYTES];
    getrandom::fill(&mut secret).expect("Linux gives random numbers from early boot on");
    (
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(secret)),
        hash_bytes(&secret),
    )
}

/// The hash of a token's text; `None` if it is not one.
#[must_use]
pub fn hash(text: &str) -> Option<[u8; 32]> {
    let secret = URL_SAFE_NO_PAD.decode(text.strip_prefix(PREFIX)?).ok()?;
    Some(hash_bytes(&secret.try_into().ok()?))
}

fn hash_bytes(secret: &[u8; TOKEN_BYTES]) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, secret);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}

const PREFIX: &str = "mp_";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_hashes_to_what_was_kept_and_another_does_not() {
        let (text, kept) = new_token();
        let (other, _) = new_token();
        assert_eq!(text.len(), 3 + 43);
        assert_eq!(hash(&text), Some(kept));
        assert_ne!(hash(&other), Some(kept));
    }

    #[test]
    fn what_is_not_a_token_has_no_hash() {
        let (text, _) = new_token();
        let longer = format!("{text}A");
        let other_prefix = text.replace("mp_", "xx_");
        for bad in ["", "mp_", "mp_short", &text[..45], &longer, &other_prefix] {
            assert_eq!(hash(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_hash_is_sha_256_of_the_bytes() {
        let zeros = format!("mp_{}", "A".repeat(43));
        let expected = "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925";
        let bytes = hash(&zeros).unwrap();
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, expected);
    }
}
