//! What producers and consumers saw, and whether they may have.
//!
//! Every rule is one over the whole history, so that it does not matter in which order two tasks wrote it:
//! - I1, I3, I4: what was acknowledged stands once, at the offset that was told, each producer's in order;
//!   what was refused stands nowhere;
//! - a message whose acknowledgement was confirmed is never handed out again: the confirmed delivery is the
//!   highest there ever was;
//! - I5: a message that was nacked comes no earlier than its backoff allows;
//! - I7: a stream never skips an offset;
//! - I11: in the end everything is finished and was seen (`Ending`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// A producer and its sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    pub producer: u32,
    pub sequence: u64,
}

#[derive(Clone, Debug)]
pub enum Event {
    /// The broker's word on a message; `None`: nobody knows whether it was appended.
    Published { id: Id, offset: Option<u64> },
    /// It was not appended, the client said.
    Refused { id: Id },
    Delivered {
        id: Id,
        offset: u64,
        delivery: u32,
        at: Instant,
    },
    /// Confirmed.
    Acked { offset: u64, delivery: u32 },
    /// Confirmed; `at` is when it was called.
    Nacked {
        offset: u64,
        delivery: u32,
        at: Instant,
    },
    /// By the stream's consumer.
    Read { id: Id, offset: u64 },
}

/// How things stand when everything is over.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// What stands in the topic, by offset from 0.
    pub topic: Vec<Id>,
    pub backlog: u64,
    pub dead: u64,
}

/// Everything that must not be, in words.
pub fn judge(events: &[Event], ending: &Ending, backoff: Duration) -> Vec<String> {
    let mut wrong = Vec::new();
    published(events, ending, &mut wrong);
    consumed(events, ending, &mut wrong);
    retried(events, backoff, &mut wrong);
    read(events, ending, &mut wrong);
    if ending.backlog > 0 || ending.dead > 0 {
        let (backlog, dead) = (ending.backlog, ending.dead);
        wrong.push(format!("{backlog} are not finished, {dead} are dead"));
    }
    wrong
}

fn published(events: &[Event], ending: &Ending, wrong: &mut Vec<String>) {
    let mut stands = BTreeMap::new();
    let mut last: BTreeMap<u32, u64> = BTreeMap::new();
    for (offset, &id) in (0u64..).zip(&ending.topic) {
        if let Some(first) = stands.insert(id, offset) {
            wrong.push(format!("{id:?} stands twice, at {first} and {offset}"));
        }
        let before = last.insert(id.producer, id.sequence).unwrap_or(0);
        if before >= id.sequence {
            wrong.push(format!("{id:?} stands behind sequence {before}"));
        }
    }
    for event in events {
        match *event {
            Event::Published { id, offset } => match (stands.get(&id), offset) {
                (None, Some(told)) => {
                    wrong.push(format!("{id:?} was acknowledged at {told} and is lost"))
                }
                (Some(&at), Some(told)) if at != told => {
                    wrong.push(format!(
                        "{id:?} was acknowledged at {told} and stands at {at}"
                    ));
                }
                _ => {}
            },
            Event::Refused { id } if stands.contains_key(&id) => {
                wrong.push(format!("{id:?} was refused and stands"));
            }
            _ => {}
        }
    }
}

fn consumed(events: &[Event], ending: &Ending, wrong: &mut Vec<String>) {
    let mut highest: BTreeMap<u64, u32> = BTreeMap::new();
    for event in events {
        if let Event::Delivered {
            id,
            offset,
            delivery,
            ..
        } = *event
        {
            let top = highest.entry(offset).or_default();
            *top = delivery.max(*top);
            if ending.topic.get(offset as usize) != Some(&id) {
                wrong.push(format!(
                    "{id:?} was delivered as offset {offset}, which is another"
                ));
            }
        }
    }
    for offset in 0..ending.topic.len() as u64 {
        if !highest.contains_key(&offset) {
            wrong.push(format!("offset {offset} was never delivered"));
        }
    }
    for event in events {
        if let Event::Acked { offset, delivery } = *event
            && let Some(&top) = highest.get(&offset)
            && top > delivery
        {
            wrong.push(format!(
                "offset {offset} was acknowledged as delivery {delivery} and handed out up to {top}"
            ));
        }
    }
}

fn retried(events: &[Event], backoff: Duration, wrong: &mut Vec<String>) {
    let mut nacked = BTreeMap::new();
    for event in events {
        if let Event::Nacked {
            offset,
            delivery,
            at,
        } = *event
        {
            nacked.insert((offset, delivery), at);
        }
    }
    for event in events {
        let Event::Delivered {
            offset,
            delivery,
            at,
            ..
        } = *event
        else {
            continue;
        };
        let Some(&before) = nacked.get(&(offset, delivery.wrapping_sub(1))) else {
            continue;
        };
        // The broker stamps in whole steps of its own clock, which is slewed a little.
        if at + Duration::from_millis(2) < before + backoff {
            let early = before + backoff - at;
            wrong.push(format!("offset {offset} came {early:?} before it was due"));
        }
    }
}

fn read(events: &[Event], ending: &Ending, wrong: &mut Vec<String>) {
    let mut next = 0;
    let mut seen = BTreeSet::new();
    for event in events {
        let Event::Read { id, offset } = *event else {
            continue;
        };
        if offset > next {
            wrong.push(format!("the stream went on at {offset} and not at {next}"));
        }
        next = next.max(offset + 1);
        seen.insert(offset);
        if ending.topic.get(offset as usize) != Some(&id) {
            wrong.push(format!(
                "{id:?} was read as offset {offset}, which is another"
            ));
        }
    }
    if seen.len() != ending.topic.len() {
        let (seen, all) = (seen.len(), ending.topic.len());
        wrong.push(format!("the stream read {seen} of {all}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Duration = Duration::from_millis(100);

    fn id(sequence: u64) -> Id {
        Id {
            producer: 1,
            sequence,
        }
    }

    fn delivered(sequence: u64, offset: u64, delivery: u32, at: Instant) -> Event {
        Event::Delivered {
            id: id(sequence),
            offset,
            delivery,
            at,
        }
    }

    /// Two messages, of which the first is nacked once, and a third that was refused.
    fn good() -> (Vec<Event>, Ending) {
        let start = Instant::now();
        let told = |sequence, offset| Event::Published {
            id: id(sequence),
            offset: Some(offset),
        };
        let events = vec![
            told(1, 0),
            told(2, 1),
            Event::Refused { id: id(3) },
            delivered(1, 0, 1, start),
            Event::Nacked {
                offset: 0,
                delivery: 1,
                at: start,
            },
            delivered(1, 0, 2, start + BACKOFF),
            Event::Acked {
                offset: 0,
                delivery: 2,
            },
            delivered(2, 1, 1, start),
            Event::Acked {
                offset: 1,
                delivery: 1,
            },
            Event::Read {
                id: id(1),
                offset: 0,
            },
            Event::Read {
                id: id(2),
                offset: 1,
            },
        ];
        let topic = vec![id(1), id(2)];
        (
            events,
            Ending {
                topic,
                ..Ending::default()
            },
        )
    }

    /// A good history that is made bad by `change` is found out, in these words.
    fn found(words: &str, change: impl FnOnce(&mut Vec<Event>, &mut Ending)) {
        let (mut events, mut ending) = good();
        change(&mut events, &mut ending);
        let wrong = judge(&events, &ending, BACKOFF);
        assert!(
            wrong.iter().any(|text| text.contains(words)),
            "{words}: {wrong:?}"
        );
    }

    #[test]
    fn a_good_history_is_good() {
        let (events, ending) = good();
        assert_eq!(judge(&events, &ending, BACKOFF), Vec::<String>::new());
    }

    #[test]
    fn every_lie_in_a_history_is_found() {
        found("is lost", |_, ending| {
            ending.topic.pop();
        });
        found("stands twice", |_, ending| ending.topic.push(id(2)));
        found("stands behind", |_, ending| ending.topic.reverse());
        found("and stands at", |events, _| {
            events[0] = Event::Published {
                id: id(1),
                offset: Some(1),
            };
        });
        found("was refused and stands", |_, ending| {
            ending.topic.push(id(3))
        });
        found("was never delivered", |events, _| {
            events.remove(7);
        });
        found("which is another", |events, _| {
            events[7] = delivered(1, 1, 1, Instant::now());
        });
        found("handed out up to 3", |events, _| {
            let late = Instant::now() + 9 * BACKOFF;
            events.push(delivered(1, 0, 3, late));
        });
        found("before it was due", |events, _| {
            events[5] = delivered(1, 0, 2, Instant::now());
        });
        found("went on at 1", |events, _| events.swap(9, 10));
        found("the stream read 1 of 2", |events, _| {
            events.pop();
        });
        found("4 are not finished", |_, ending| ending.backlog = 4);
    }
}
