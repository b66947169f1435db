//! Identifiers, limits, message layout, frames and error codes of Millpond.
