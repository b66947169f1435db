//! Names of topics and subscriptions.

use crate::limits::NAME_BYTES_MAX;

/// Why a name cannot be used. The caller must choose another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name must have 1 to {NAME_BYTES_MAX} bytes, this one has {0}")]
    Length(usize),
    #[error("a name may have letters, digits, '-', '_'{dot}; {found:?} is none of them")]
    Character { found: char, dot: &'static str },
}

/// Checks a topic's name: 1 to 200 ASCII letters, digits, `-`, `_` and `.`.
pub fn check_topic(name: &str) -> Result<(), NameError> {
    check(name, true)
}

/// Checks a subscription's name: as a topic's but without dots, so that the name of its
/// dead-letter topic, `TOPIC.SUBSCRIPTION.dead`, can be taken apart again.
pub fn check_subscription(name: &str) -> Result<(), NameError> {
    check(name, false)
}

/// The dead-letter topic that a subscription gets unless another is named.
#[must_use]
pub fn default_dead_letter(topic: &str, subscription: &str) -> String {
    format!("{topic}.{subscription}.dead")
}

fn check(name: &str, dots: bool) -> Result<(), NameError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(NameError::Length(name.len()));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || (dots && c == '.');
    match name.chars().find(|&c| !allowed(c)) {
        Some(found) => Err(NameError::Character {
            found,
            dot: if dots { " and '.'" } else { "" },
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscription_name_has_no_dots() {
        assert_eq!(check_topic("orders.eu-1"), Ok(()));
        assert!(check_subscription("orders.eu").is_err());
        assert_eq!(check_topic(""), Err(NameError::Length(0)));
        assert!(check_topic("a b").is_err());
    }
}
