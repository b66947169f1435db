//! Golden bytes of the formats.
