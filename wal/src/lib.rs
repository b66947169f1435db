//! The append-only segmented write-ahead log of Millpond.
