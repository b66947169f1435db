//! A snapshot of the state machine whose chunks hold anything: it is restored or refused, and what was
//! restored can be looked at and written again.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use millpond_fuzz::Cut;
use millpond_protocol::Stamp;
use millpond_queue::{Options, Queue};

fuzz_target!(|input: &[u8]| {
    let mut input = Cut(input);
    let mut chunks = Vec::new();
    while !input.is_empty() {
        let id = input.u64();
        chunks.push((id, Bytes::copy_from_slice(input.piece())));
    }
    let Ok(mut queue) = Queue::restore(Options::default(), chunks.into_iter()) else {
        return;
    };
    let _ = queue.memory_bytes();
    for topic in queue.topics(None, 100) {
        if let Some(id) = queue.topic_id(&topic.name) {
            let _ = queue.subscriptions([id], Stamp(1), usize::MAX);
        }
    }
    let _ = queue.snapshot();
});
