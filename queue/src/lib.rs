//! The pure state machine of Millpond: topics, leases, retries, dead letters.
