//! The control stream of one connection: requests out, responses in, matched by id.
//!
//! A request that was written and never answered is `Lost::Sent`: whoever asked knows whether it is
//! safe to ask again.

use std::collections::BTreeMap;

use bytes::{Buf, Bytes};
use millpond_protocol::WireError;
use millpond_protocol::control::{GoAway, Request, RequestFrame, Response, ResponseFrame};
use millpond_protocol::frame::{Frame, FrameError, FrameType};
use quinn::SendStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::io::{self, FrameReader, StreamEnd};
use crate::limits::{CONTROL_PENDING_MAX, CONTROL_QUEUE};

/// One request on its way.
pub struct Ask {
    pub request: Request,
    pub answer: oneshot::Sender<Result<Response, Lost>>,
}

/// Why a request has no response.
#[derive(Debug)]
pub enum Lost {
    /// It was never written.
    Unsent,
    /// It was written; the connection broke before the answer.
    Sent,
    /// The broker refused it.
    Refused(WireError),
    /// It is too large for a control frame.
    Unsendable(Error),
}

/// The stream and the requests that wait on it.
pub struct ControlStream {
    send: SendStream,
    reader: FrameReader,
    asks: mpsc::Receiver<Ask>,
    pending: BTreeMap<u64, oneshot::Sender<Result<Response, Lost>>>,
    /// The rest of the request that is being written. Answers are read meanwhile: a broker that
    /// waits for them to be read takes no more requests.
    unwritten: Bytes,
    last_id: u64,
    leaving: CancellationToken,
}

impl ControlStream {
    pub fn new(
        send: SendStream,
        reader: FrameReader,
        leaving: CancellationToken,
    ) -> (mpsc::Sender<Ask>, Self) {
        let (sender, asks) = mpsc::channel(CONTROL_QUEUE);
        let stream = Self {
            send,
            reader,
            asks,
            pending: BTreeMap::new(),
            unwritten: Bytes::new(),
            last_id: 0,
            leaving,
        };
        (sender, stream)
    }

    /// Serves requests until the stream ends, then answers those that wait.
    pub async fn run(mut self) -> StreamEnd {
        let end = loop {
            let step = tokio::select! {
                frame = self.reader.next() => match frame {
                    Ok(frame) => self.received(&frame),
                    Err(end) => Err(end),
                },
                written = self.send.write(&self.unwritten), if !self.unwritten.is_empty() => {
                    match written {
                        Ok(bytes) => {
                            self.unwritten.advance(bytes);
                            Ok(())
                        }
                        Err(error) => Err(error.into()),
                    }
                }
                Some(ask) = self.asks.recv(), if self.may_ask() => {
                    self.ask(ask);
                    Ok(())
                }
            };
            if let Err(end) = step {
                break end;
            }
        };
        self.asks.close();
        while let Ok(ask) = self.asks.try_recv() {
            let _ = ask.answer.send(Err(Lost::Unsent));
        }
        for (_, answer) in std::mem::take(&mut self.pending) {
            let _ = answer.send(Err(Lost::Sent));
        }
        end
    }

    fn may_ask(&self) -> bool {
        self.unwritten.is_empty() && self.pending.len() < CONTROL_PENDING_MAX
    }

    fn ask(&mut self, ask: Ask) {
        self.pending.retain(|_, answer| !answer.is_closed());
        self.last_id += 1;
        let frame = RequestFrame {
            id: self.last_id,
            request: ask.request,
        };
        match io::request(&frame) {
            Ok(bytes) => {
                self.pending.insert(self.last_id, ask.answer);
                self.unwritten = bytes;
            }
            Err(error) => {
                let _ = ask.answer.send(Err(Lost::Unsendable(error)));
            }
        }
    }

    fn received(&mut self, frame: &Frame) -> Result<(), StreamEnd> {
        match frame.kind {
            FrameType::Response => {
                let response: ResponseFrame = frame.decode()?;
                // A response nobody waits for belongs to a request that was given up.
                if let Some(answer) = self.pending.remove(&response.id) {
                    let _ = answer.send(response.result.map_err(Lost::Refused));
                }
                Ok(())
            }
            FrameType::GoAway => {
                let away: GoAway = frame.decode()?;
                tracing::info!(
                    deadline_ms = away.deadline_ms,
                    reason = away.reason,
                    "the broker is going away"
                );
                self.leaving.cancel();
                Ok(())
            }
            found => Err(FrameError::Unexpected { found }.into()),
        }
    }
}

/// True if asking twice does no more than asking once.
pub fn is_repeatable(request: &Request) -> bool {
    matches!(
        request,
        Request::Ping
            | Request::TopicList { .. }
            | Request::TopicShow { .. }
            | Request::SubscriptionList { .. }
            | Request::SubscriptionShow { .. }
            | Request::SubscriptionPause { .. }
            | Request::SubscriptionResume { .. }
            | Request::DeadList { .. }
            | Request::Peek { .. }
            | Request::TokenList
            | Request::Status
            | Request::RedriveShow { .. }
            | Request::RedriveCancel { .. }
    )
}
