//! Taking something out of use while others may still be using it.
//!
//! Owns the count of pins on a segment and the moment at which it may go. Readers pin what they
//! read; the owner retires it, after which nobody can pin it any more; when the last pin is dropped, it
//! comes out of [`Retirement::free`], exactly once, and only then its file is unlinked. So a reader
//! never finds the file gone, space that is counted as free is free, and neither side waits for
//! the other.
//!
//! Invariants: `pins` only falls once `RETIRED` is set; whoever makes the state `RETIRED` with no pins,
//! the owner or the last reader, is the only one who hands it out.
//!
//! It deliberately does no I/O: unlinking is the owner's, by a job of its own.

use std::ops::Deref;

use crate::sync::{Arc, AtomicUsize, Mutex, Ordering};

/// What was retired and is pinned by nobody any more, until the owner takes it. Bounded by what the
/// owner has retired itself.
#[derive(Debug)]
pub struct Retirement<T> {
    free: FreeList<T>,
}

/// `None` once the owner is gone: then there is nobody to hand anything to.
type FreeList<T> = Arc<Mutex<Option<Vec<Arc<Slot<T>>>>>>;

impl<T> Retirement<T> {
    pub fn new() -> Retirement<T> {
        Retirement {
            free: Arc::new(Mutex::new(Some(Vec::new()))),
        }
    }

    /// Puts `value` to use.
    pub fn hold(&self, value: T) -> Held<T> {
        Held(Arc::new(Slot {
            state: AtomicUsize::new(0),
            value,
            free: self.free.clone(),
        }))
    }

    /// Everything that has become free since the last call.
    pub fn free(&self) -> Vec<Freed<T>> {
        let free = self.free.lock().replace(Vec::new());
        free.into_iter().flatten().map(Freed).collect()
    }
}

impl<T> Drop for Retirement<T> {
    fn drop(&mut self) {
        // A slot points to the list and the list to the slot.
        let left = self.free.lock().take();
        drop(left);
    }
}

impl<T> Default for Retirement<T> {
    fn default() -> Retirement<T> {
        Retirement::new()
    }
}

/// Something in use. Clones are the same thing and pin nothing; dropping one retires nothing.
#[derive(Debug)]
pub struct Held<T>(Arc<Slot<T>>);

impl<T> Held<T> {
    /// Keeps it in use for as long as the pin lives; `None` once it is retired.
    pub fn pin(&self) -> Option<Pin<T>> {
        let mut state = self.0.state.load(Ordering::Relaxed);
        loop {
            if state & RETIRED != 0 {
                return None;
            }
            let pinned = self.0.state.compare_exchange_weak(
                state,
                state + PIN,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match pinned {
                Ok(_) => return Some(Pin(self.0.clone())),
                Err(now) => state = now,
            }
        }
    }

    /// No new pins from now on. It comes out of [`Retirement::free`] at once, or with its last pin.
    pub fn retire(&self) {
        // Acquire pairs with the releases of earlier pins, in case this call is the last user.
        let before = self.0.state.fetch_or(RETIRED, Ordering::AcqRel);
        if before == 0 {
            Slot::set_free(&self.0);
        }
    }
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Held<T> {
        Held(self.0.clone())
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

/// One use of something that may be retired meanwhile.
#[derive(Debug)]
pub struct Pin<T>(Arc<Slot<T>>);

impl<T> Deref for Pin<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

impl<T> Drop for Pin<T> {
    fn drop(&mut self) {
        // Release what was done under this pin; acquire what was done under the others.
        let before = self.0.state.fetch_sub(PIN, Ordering::AcqRel);
        if before == PIN | RETIRED {
            Slot::set_free(&self.0);
        }
    }
}

/// Something that nobody uses any more.
#[derive(Debug)]
pub struct Freed<T>(Arc<Slot<T>>);

impl<T> Freed<T> {
    /// The thing itself, if there is no handle to it left that could still look at it.
    pub fn into_inner(self) -> Option<T> {
        let slot = Arc::try_unwrap(self.0).ok()?;
        Some(slot.value)
    }
}

impl<T> Deref for Freed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

#[derive(Debug)]
struct Slot<T> {
    /// The number of pins times [`PIN`], and [`RETIRED`].
    state: AtomicUsize,
    value: T,
    free: FreeList<T>,
}

impl<T> Slot<T> {
    fn set_free(slot: &Arc<Slot<T>>) {
        if let Some(free) = &mut *slot.free.lock() {
            free.push(slot.clone());
        }
    }
}

const RETIRED: usize = 1;
const PIN: usize = 2;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn freed(retirement: &Retirement<u32>) -> Vec<u32> {
        retirement.free().iter().map(|freed| **freed).collect()
    }

    #[test]
    fn what_nobody_pins_is_free_at_once() {
        let retirement = Retirement::new();
        let held = retirement.hold(7);
        assert_eq!(*held, 7);
        drop(held.pin().expect("in use"));
        assert!(freed(&retirement).is_empty());
        held.retire();
        assert_eq!(freed(&retirement), [7]);
        assert!(held.pin().is_none());
    }

    #[test]
    fn the_last_pin_frees() {
        let retirement = Retirement::new();
        let held = retirement.hold(7);
        let (first, second) = (held.pin().expect("in use"), held.pin().expect("in use"));
        held.retire();
        drop(held);
        drop(second);
        assert!(freed(&retirement).is_empty());
        assert_eq!(*first, 7);
        drop(first);
        assert_eq!(freed(&retirement), [7]);
        assert!(freed(&retirement).is_empty());
    }

    #[test]
    fn nothing_is_kept_for_an_owner_that_is_gone() {
        let retirement = Retirement::new();
        let alive = std::sync::Arc::new(());
        let (early, late) = (
            retirement.hold(alive.clone()),
            retirement.hold(alive.clone()),
        );
        let pin = late.pin();
        early.retire();
        late.retire();
        drop((retirement, early, late));
        drop(pin);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
    }

    #[test]
    fn only_the_last_handle_gives_out_what_is_free() {
        let retirement = Retirement::new();
        let (held, other) = (retirement.hold(7), retirement.hold(8));
        held.retire();
        other.retire();
        drop(held);
        let taken: Vec<_> = retirement
            .free()
            .into_iter()
            .map(Freed::into_inner)
            .collect();
        assert_eq!(taken, [Some(7), None]);
        assert_eq!(*other, 8);
    }

    #[test]
    fn retiring_twice_frees_once() {
        let retirement = Retirement::new();
        let held = retirement.hold(7);
        held.retire();
        held.clone().retire();
        assert_eq!(freed(&retirement), [7]);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::*;

    /// Stands for a file: reads must not overlap with, nor follow, its removal. Loom's cell panics
    /// on any overlap that the orderings do not exclude.
    struct File {
        there: UnsafeCell<bool>,
    }

    fn file() -> File {
        File {
            there: UnsafeCell::new(true),
        }
    }

    fn read(pin: &Pin<File>) {
        pin.there.with(|there| assert!(!there.is_null()));
    }

    #[test]
    fn a_file_is_removed_once_and_never_under_a_reader() {
        loom::model(|| {
            let retirement = Retirement::new();
            let held = retirement.hold(file());
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    let held = held.clone();
                    thread::spawn(move || {
                        if let Some(pin) = held.pin() {
                            read(&pin);
                        }
                    })
                })
                .collect();
            held.retire();
            let mut removed = remove_freed(&retirement);
            for reader in readers {
                reader.join().unwrap();
            }
            removed += remove_freed(&retirement);
            assert_eq!(removed, 1);
            assert!(held.pin().is_none());
        });
    }

    #[test]
    fn two_pins_of_one_reader_and_a_retirement_free_once() {
        loom::model(|| {
            let retirement = Retirement::new();
            let held = retirement.hold(file());
            let pin = held.pin().expect("in use");
            let reader = {
                let held = held.clone();
                thread::spawn(move || {
                    let second = held.pin();
                    read(&pin);
                    drop(pin);
                    second.iter().for_each(read);
                })
            };
            held.retire();
            let mut removed = remove_freed(&retirement);
            reader.join().unwrap();
            removed += remove_freed(&retirement);
            assert_eq!(removed, 1);
        });
    }

    #[test]
    fn an_owner_that_goes_keeps_nothing_from_a_reader() {
        loom::model(|| {
            let retirement = Retirement::new();
            let held = retirement.hold(file());
            let reader = {
                let held = held.clone();
                thread::spawn(move || {
                    if let Some(pin) = held.pin() {
                        read(&pin);
                    }
                })
            };
            held.retire();
            // Loom also notices if the slot and the list keep each other alive.
            drop(retirement);
            reader.join().unwrap();
            assert!(held.pin().is_none());
        });
    }

    fn remove_freed(retirement: &Retirement<File>) -> usize {
        let freed = retirement.free();
        for file in &freed {
            // An exclusive access, as far as loom is concerned.
            file.there.with_mut(|there| assert!(!there.is_null()));
        }
        freed.len()
    }
}
