//! The async runtime of a process that is a broker.

use std::num::NonZeroUsize;

use tokio::runtime::{Builder, Runtime};

/// A runtime whose workers leave one core to the shard's thread, where there are several. With as many
/// workers as cores one thread too many waits for its turn, and a kernel lets a core go idle rather than
/// move a thread to it that has just run elsewhere.
///
/// # Errors
/// The system has no thread to give.
pub fn runtime() -> std::io::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    Builder::new_multi_thread()
        .worker_threads(cores.saturating_sub(1).max(1))
        .enable_all()
        .build()
}
