//! What the broker answered, matched to what was sent.

use std::time::{Duration, Instant};

use millpond_protocol::control::PublishRefused;
use millpond_protocol::hot::{AckKind, AckRow, PublishAck};
use millpond_protocol::{ErrorClass, ErrorCode, Sequence};

use super::super::batch::Accepted;
use super::{Pipeline, Pressure, Verdict};
use crate::backoff::retry_after;
use crate::completion::Wakeups;
use crate::error::Error;
use crate::limits::REFUSED_WAIT;

impl Pipeline {
    /// Acknowledgements and credit.
    pub fn acked(&mut self, ack: &PublishAck, wakeups: &mut Wakeups) -> Result<(), String> {
        if let Some(credit) = &mut self.credit {
            credit.max_messages = credit.max_messages.max(ack.credit.max_messages);
            credit.max_bytes = credit.max_bytes.max(ack.credit.max_bytes);
        }
        for row in &ack.rows {
            self.row(row, wakeups)?;
        }
        let pressure = ack.pressure.map(|reason| Pressure {
            reason,
            retry_after: retry_after(Some(ack.retry_after_ms)),
        });
        // What was refused stays pressed until something is accepted again.
        if pressure.is_some() || self.last_refusal.is_none() {
            self.pressure = pressure;
        }
        self.recovered();
        Ok(())
    }

    /// A frame of which nothing was appended.
    pub fn refused(
        &mut self,
        refused: &PublishRefused,
        now: Instant,
        wakeups: &mut Wakeups,
    ) -> Result<Verdict, String> {
        let Some(mut batch) = self.sent.pop_front() else {
            return Err("it refused a publish that was not sent".to_owned());
        };
        if batch.previous != refused.previous || batch.unanswered() != refused.count {
            self.sent.push_front(batch);
            return Err("it refused a publish out of order".to_owned());
        }
        let code = refused.error.code;
        let error = Error::from(refused.error.clone());
        self.accepted = self.accepted.max(refused.last_accepted);
        let first_of_round = !self.recovering;
        self.recovering = true;
        self.tip = refused.last_accepted;
        let verdict = match (code, code.class()) {
            (ErrorCode::SequenceGap, _) => {
                if first_of_round && self.refused_rounds > 0 {
                    self.hold(REFUSED_WAIT, now);
                }
                Verdict::Fine
            }
            (_, ErrorClass::Backpressure | ErrorClass::Retriable) => {
                let wait = retry_after(refused.error.retry_after_ms);
                self.hold(wait, now);
                if code.class() == ErrorClass::Backpressure {
                    self.pressure = Some(Pressure {
                        reason: code,
                        retry_after: wait,
                    });
                }
                self.last_refusal = Some(error);
                Verdict::Fine
            }
            (ErrorCode::ProducerStateExpired, _) | (_, ErrorClass::Ambiguous) => Verdict::Reopen,
            (_, ErrorClass::HandleFatal) => Verdict::Fatal(error),
            _ if batch.unanswered() == 1 => {
                self.finish(&mut batch, Err(error), wakeups);
                self.dropped(&batch);
                Verdict::Fine
            }
            _ => {
                batch.alone = true;
                Verdict::Fine
            }
        };
        self.take_back(batch);
        self.recovered();
        Ok(verdict)
    }

    fn row(&mut self, row: &AckRow, wakeups: &mut Wakeups) -> Result<(), String> {
        let mut left = row.count;
        let mut offset = row.offset;
        let mut whole = Sequence(0);
        while left > 0 {
            let Some(mut batch) = self.sent.pop_front() else {
                return Err("it acknowledged more than was sent".to_owned());
            };
            let count = left.min(batch.unanswered());
            let ours = batch.in_doubt && batch.first > self.inherited;
            let accepted = Accepted {
                offset: (row.kind != AckKind::DuplicateUnknown).then_some(offset),
                duplicate: row.kind != AckKind::Appended && !ours,
            };
            batch.answer(count, Ok(accepted), wakeups);
            left -= count;
            offset.0 = offset.0.saturating_add(u64::from(count));
            if batch.unanswered() == 0 {
                whole = batch.last;
                self.pending.take(u64::from(batch.count), batch.bytes.len());
            } else {
                whole = Sequence(0);
                self.sent.push_front(batch);
            }
        }
        if whole != Sequence(0) && whole != row.last_sequence {
            return Err(format!(
                "it acknowledged sequence {} where {whole} was sent",
                row.last_sequence
            ));
        }
        self.accepted = self.accepted.max(row.last_sequence);
        self.last_refusal = None;
        if self.recovering {
            self.tip = self.tip.max(self.accepted);
        } else {
            self.refused_rounds = 0;
        }
        Ok(())
    }

    fn hold(&mut self, wait: Duration, now: Instant) {
        let until = now + wait;
        self.hold_until = Some(self.hold_until.map_or(until, |at| at.max(until)));
    }

    /// Ends a round of refusals once nothing more is under way.
    fn recovered(&mut self) {
        if self.recovering && self.sent.is_empty() {
            self.recovering = false;
            self.refused_rounds += 1;
            self.requeue();
        }
    }
}
