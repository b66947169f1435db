//! What must always hold, across the parts of the state.

use crate::queue::Queue;
use crate::state::topic::Topic;

impl Queue {
    /// Asserts what must always hold. Looks at everything: for tests and debugging.
    pub fn check_invariants(&self) {
        self.producers.check_invariants();
        for topic in self.topics.values() {
            self.check_topic(topic);
        }
        for sub in self.subscriptions.values() {
            sub.leases.check_invariants();
            sub.retries.check_invariants();
            let next = self.topics.get(&sub.topic).map_or(0, |topic| topic.next);
            assert!(
                sub.floor <= sub.cursor && sub.cursor <= next,
                "floor <= cursor <= next"
            );
            assert!(!sub.done.contains(sub.floor), "the floor is not finished");
            assert!(
                sub.done.next_present(0).is_none_or(|at| at > sub.floor),
                "done is above it"
            );
            for run in sub.leases.iter() {
                assert!(run.end <= next, "what is leased exists");
                assert!(
                    self.sessions.contains_key(&run.session),
                    "leases have sessions"
                );
                for offset in run.first..run.end {
                    assert!(!sub.is_finished(offset), "what is leased is not finished");
                    assert!(!sub.again.contains(offset), "what is leased is not ready");
                    let retry = sub.retries.get(offset);
                    assert!(
                        retry.is_none_or(|retry| retry.due().is_none()),
                        "nor does it wait"
                    );
                }
            }
            for (offset, retry) in sub.retries.iter() {
                assert!(!sub.is_finished(offset), "what waits is not finished");
                let is_leased = sub.leases.get(offset).is_some();
                assert_eq!(
                    is_leased,
                    retry.due().is_none(),
                    "what does not wait is leased"
                );
                assert!(
                    retry.place().is_none_or(|at| self.pins.has_record(at)),
                    "stories stay"
                );
            }
            for offset in sub.again.iter() {
                assert!(
                    !sub.is_finished(offset) && offset < next,
                    "again is unfinished"
                );
            }
            for (offset, (topic, letter)) in &sub.dead {
                assert!(sub.is_finished(*offset), "the dead are not in the queue");
                let letters = self.topics.get(topic).map(|topic| &topic.letters);
                let letter = letters.and_then(|letters| letters.get(letter));
                assert!(letter.is_some(), "the dead have letters");
            }
        }
        for session in self.sessions.values() {
            let sub = self.subscriptions.get(&session.subscription);
            let held = sub.map(|sub| sub.leases.of(session.id)).unwrap_or_default();
            let held: u64 = held.iter().map(|run| run.end - run.first).sum();
            assert_eq!(held, session.leases, "leases are counted");
        }
    }

    fn check_topic(&self, topic: &Topic) {
        assert!(topic.first <= topic.next, "first <= next");
        let rows = &topic.index.rows;
        assert!(
            topic.first == topic.next || rows.front().is_some_and(|row| row.first <= topic.first),
            "the index covers what is kept"
        );
        for letter in topic.letters.values() {
            assert!(self.pins.has_body(letter.body), "bodies of letters stay");
            assert!(
                self.pins.has_record(letter.place),
                "stories of letters stay"
            );
        }
        for sub in topic.subscriptions.values() {
            let keeps = self
                .subscriptions
                .get(sub)
                .map_or(u64::MAX, |sub| sub.keeps());
            assert!(topic.first <= keeps, "what is not finished is kept");
            let sub = self.subscriptions.get(sub);
            let mut gone = topic.gone.iter();
            let finished = |at| sub.is_none_or(|sub| sub.is_finished(at));
            assert!(gone.all(finished), "what was let go is finished");
        }
        if let Some(head) = topic.delays.head() {
            assert!(
                self.delay_heads.contains(&(head, topic.id)),
                "delays are looked at"
            );
        }
    }
}
