//! The Millpond client: producers, subscriptions, workers.
