//! A UDP relay between clients and a broker that does to packets what networks do: loses, repeats,
//! reorders, delays and damages them, lets them through in one direction only, and gives a client another
//! address in the middle of a connection.
//!
//! What happens to a packet is decided by the seed and by which packet of its direction it is, so a run is
//! repeated as far as the two sides send the same packets at the same times.
//!
//! `in + repeated = out + lost + cut + overflowed + waiting`

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::rng::Rng;

/// What a network does, in each direction alike unless it says otherwise. Shares are of 1,000 packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub lost: u32,
    pub repeated: u32,
    pub damaged: u32,
    /// Held back for up to `reorder_ms`, so that later ones overtake them.
    pub reordered: u32,
    pub reorder_ms: u64,
    /// Every packet takes between these, in ms.
    pub delay_ms: (u64, u64),
    /// Nothing passes from clients to the broker.
    pub cut_up: bool,
    /// Nothing passes from the broker to clients.
    pub cut_down: bool,
}

/// What was done to packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub packets: u64,
    pub lost: u64,
    pub repeated: u64,
    pub damaged: u64,
    pub reordered: u64,
    pub cut: u64,
    pub overflowed: u64,
    pub moves: u64,
}

/// A running relay; it ends when this is dropped.
pub struct Proxy {
    pub address: SocketAddr,
    orders: mpsc::UnboundedSender<Order>,
    task: JoinHandle<()>,
}

enum Order {
    Faults(Faults),
    Move,
    Tell(tokio::sync::oneshot::Sender<Done>),
}

impl Proxy {
    pub async fn start(broker: SocketAddr, seed: u64) -> Proxy {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = front.local_addr().unwrap();
        let (orders, ordered) = mpsc::unbounded_channel();
        let relay = Relay {
            front: Arc::new(front),
            broker,
            flows: Vec::new(),
            faults: Faults::default(),
            up: Rng::new(seed),
            down: Rng::new(seed ^ 0x5555),
            waiting: BinaryHeap::new(),
            sent: 0,
            done: Done::default(),
        };
        Proxy {
            address,
            orders,
            task: tokio::spawn(relay.run(ordered)),
        }
    }

    pub fn set(&self, faults: Faults) {
        self.order(Order::Faults(faults));
    }

    /// Every client's packets come from another address from now on; its old one is closed.
    pub fn move_clients(&self) {
        self.order(Order::Move);
    }

    pub async fn done(&self) -> Done {
        let (tell, told) = tokio::sync::oneshot::channel();
        self.order(Order::Tell(tell));
        told.await.expect("the relay runs")
    }

    fn order(&self, order: Order) {
        assert!(self.orders.send(order).is_ok(), "the relay runs");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Relay {
    front: Arc<UdpSocket>,
    broker: SocketAddr,
    flows: Vec<Flow>,
    faults: Faults,
    up: Rng,
    down: Rng,
    waiting: BinaryHeap<Reverse<Packet>>,
    /// Packets that were put into `waiting`, which keeps those of one instant in order.
    sent: u64,
    done: Done,
}

/// One client and the socket that speaks for it.
struct Flow {
    client: SocketAddr,
    upstream: Arc<UdpSocket>,
    listener: JoinHandle<()>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due: Instant,
    number: u64,
    to: To,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum To {
    /// Of this flow.
    Broker(usize),
    Client(SocketAddr),
}

impl Relay {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let (heard, mut from_broker) = mpsc::channel::<(SocketAddr, Vec<u8>)>(WAITING_MAX);
        let front = Arc::clone(&self.front);
        let mut buffer = vec![0; 65_536];
        loop {
            let due = self.waiting.peek().map(|Reverse(packet)| packet.due);
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Order::Faults(faults)) => self.faults = faults,
                    Some(Order::Move) => self.move_flows(&heard).await,
                    Some(Order::Tell(tell)) => {
                        let _ = tell.send(self.done);
                    }
                    None => return,
                },
                Ok((bytes, client)) = front.recv_from(&mut buffer) => {
                    let flow = self.flow(client, &heard).await;
                    self.take(To::Broker(flow), buffer[..bytes].to_vec());
                }
                Some((client, bytes)) = from_broker.recv() => self.take(To::Client(client), bytes),
                () = sleep_until(due.unwrap_or_else(far)), if due.is_some() => {}
            }
            self.send_due().await;
        }
    }

    /// Decides what becomes of a packet.
    fn take(&mut self, to: To, mut bytes: Vec<u8>) {
        let faults = self.faults;
        self.done.packets += 1;
        let (rng, is_cut) = match to {
            To::Broker(_) => (&mut self.up, faults.cut_up),
            To::Client(_) => (&mut self.down, faults.cut_down),
        };
        if is_cut {
            self.done.cut += 1;
            return;
        }
        if rng.permille(faults.lost) {
            self.done.lost += 1;
            return;
        }
        let mut copies = 1;
        if rng.permille(faults.repeated) {
            self.done.repeated += 1;
            copies = 2;
        }
        if rng.permille(faults.damaged) {
            self.done.damaged += 1;
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << rng.below(8);
        }
        for _ in 0..copies {
            let (least, most) = faults.delay_ms;
            let mut delay_us = least * 1_000 + rng.below((most - least) * 1_000 + 1);
            if rng.permille(faults.reordered) {
                self.done.reordered += 1;
                delay_us += rng.below(faults.reorder_ms * 1_000 + 1);
            }
            if self.waiting.len() >= WAITING_MAX {
                self.done.overflowed += 1;
                continue;
            }
            self.sent += 1;
            self.waiting.push(Reverse(Packet {
                due: Instant::now() + Duration::from_micros(delay_us),
                number: self.sent,
                to,
                bytes: bytes.clone(),
            }));
        }
    }

    async fn send_due(&mut self) {
        let now = Instant::now();
        while self
            .waiting
            .peek()
            .is_some_and(|Reverse(packet)| packet.due <= now)
        {
            let Some(Reverse(packet)) = self.waiting.pop() else {
                return;
            };
            // Nobody may be there: then the packet is lost.
            let _ = match packet.to {
                To::Broker(flow) => {
                    let upstream = &self.flows[flow].upstream;
                    upstream.send_to(&packet.bytes, self.broker).await
                }
                To::Client(client) => self.front.send_to(&packet.bytes, client).await,
            };
        }
    }

    async fn flow(
        &mut self,
        client: SocketAddr,
        heard: &mpsc::Sender<(SocketAddr, Vec<u8>)>,
    ) -> usize {
        if let Some(known) = self.flows.iter().position(|flow| flow.client == client) {
            return known;
        }
        self.flows.push(Flow::new(client, heard.clone()).await);
        self.flows.len() - 1
    }

    async fn move_flows(&mut self, heard: &mpsc::Sender<(SocketAddr, Vec<u8>)>) {
        for flow in &mut self.flows {
            flow.listener.abort();
            *flow = Flow::new(flow.client, heard.clone()).await;
            self.done.moves += 1;
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for flow in &self.flows {
            flow.listener.abort();
        }
    }
}

impl Flow {
    async fn new(client: SocketAddr, heard: mpsc::Sender<(SocketAddr, Vec<u8>)>) -> Flow {
        let upstream = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let upstream = Arc::new(upstream);
        let socket = Arc::clone(&upstream);
        let listener = tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            // An error is a broker that is away for a moment.
            loop {
                if let Ok((bytes, _)) = socket.recv_from(&mut buffer).await
                    && heard
                        .send((client, buffer[..bytes].to_vec()))
                        .await
                        .is_err()
                {
                    return;
                }
            }
        });
        Flow {
            client,
            upstream,
            listener,
        }
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3_600)
}

/// Packets on their way; more are dropped, as in a router whose queue is full.
const WAITING_MAX: usize = 8_192;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    const SILENCE: Duration = Duration::from_millis(300);

    /// A broker that sends everything back, and a client of it.
    async fn echo(faults: Faults, seed: u64) -> (Proxy, UdpSocket, JoinHandle<()>) {
        let broker = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let proxy = Proxy::start(broker.local_addr().unwrap(), seed).await;
        let task = tokio::spawn(async move {
            let mut buffer = [0; 64];
            while let Ok((bytes, from)) = broker.recv_from(&mut buffer).await {
                broker.send_to(&buffer[..bytes], from).await.unwrap();
            }
        });
        proxy.set(faults);
        let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        client.connect(proxy.address).await.unwrap();
        (proxy, client, task)
    }

    /// Sends a hundred numbered packets; those that come back, until it is silent.
    async fn echoes(client: &UdpSocket) -> Vec<u8> {
        for n in 0..100u8 {
            client.send(&[n]).await.unwrap();
        }
        let mut back = Vec::new();
        let mut buffer = [0; 64];
        while let Ok(Ok(_)) = timeout(SILENCE, client.recv(&mut buffer)).await {
            back.push(buffer[0]);
        }
        back
    }

    #[tokio::test]
    async fn without_faults_everything_comes_back() {
        let (proxy, client, task) = echo(Faults::default(), 1).await;
        let back = echoes(&client).await;
        assert_eq!(back, (0..100).collect::<Vec<u8>>());
        proxy.move_clients();
        assert_eq!(echoes(&client).await.len(), 100);
        let done = proxy.done().await;
        assert_eq!((done.packets, done.lost, done.moves), (400, 0, 1));
        task.abort();
    }

    #[tokio::test]
    async fn the_same_seed_loses_the_same_packets() {
        let faults = Faults {
            lost: 300,
            ..Faults::default()
        };
        let mut runs = Vec::new();
        for _ in 0..2 {
            let (_proxy, client, task) = echo(faults, 7).await;
            runs.push(echoes(&client).await);
            task.abort();
        }
        assert_eq!(runs[0], runs[1]);
        assert!((20..80).contains(&runs[0].len()), "{}", runs[0].len());
    }

    #[tokio::test]
    async fn a_cut_lets_nothing_through_in_its_direction() {
        for (cut_up, cut_down) in [(true, false), (false, true)] {
            let faults = Faults {
                cut_up,
                cut_down,
                ..Faults::default()
            };
            let (proxy, client, task) = echo(faults, 1).await;
            assert!(echoes(&client).await.is_empty());
            let done = proxy.done().await;
            let packets = if cut_up { 100 } else { 200 };
            assert_eq!((done.packets, done.cut), (packets, 100));
            task.abort();
        }
    }
}
