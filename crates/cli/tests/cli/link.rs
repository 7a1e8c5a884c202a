//! A bad network between a device and the hub: a TCP proxy that delays, loses, throttles, cuts and
//! truncates. It needs no rights and no kernel module.
//!
//! TCP hides lost packets behind retransmissions, so a loss shows as a delay: each piece that is lost
//! waits for the retransmission timeout, which doubles for as long as it is lost again (RFC 6298).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// The payload of one packet in bytes.
const PACKET_BYTES: usize = 1_400;
/// The first retransmission timeout: Linux's least.
const RETRANSMIT_MS: u64 = 200;
/// The longest.
const MAX_RETRANSMIT_MS: u64 = 3_200;
/// Packets under way in one direction of one connection.
const WINDOW: usize = 64;

/// What is wrong with a link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Toxics {
    /// Milliseconds one way.
    pub latency_ms: u64,
    /// The share of packets that are lost, and sent again.
    pub loss: f64,
    /// Bits per second of one connection in one direction; no limit if absent.
    pub bits_per_s: Option<u64>,
    /// Each connection breaks after so many bytes from the hub, or up to twice as many.
    pub breaks_after_bytes: Option<u64>,
    /// No packet gets through.
    pub cut: Option<Cut>,
}

/// How a link is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cut {
    /// Connections end, and new ones do too.
    Refused,
    /// Nothing is heard; connections go on when the cut ends.
    Silent,
}

/// A link that can be made bad at any time.
pub struct Link {
    /// Where the hub seems to be.
    pub address: SocketAddr,
    toxics: watch::Sender<Toxics>,
    carried: Arc<AtomicU64>,
    // Dropped last: it ends every connection.
    _runtime: tokio::runtime::Runtime,
}

impl Link {
    /// A good link to the hub at `hub`.
    pub fn to(hub: SocketAddr, seed: u64) -> Self {
        Self::to_any(vec![hub], seed)
    }

    /// A good link to the first of these hubs that lives, in an order of the link's own.
    pub fn to_any(mut hubs: Vec<SocketAddr>, seed: u64) -> Self {
        hubs.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let hubs: Arc<[SocketAddr]> = hubs.into();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("a bound address");
        let (toxics, seen) = watch::channel(Toxics::default());
        let carried = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&carried);
        runtime.spawn(async move {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            while let Ok((device, _)) = listener.accept().await {
                let wire = Wire {
                    toxics: seen.clone(),
                    carried: Arc::clone(&counted),
                    random: ChaCha8Rng::seed_from_u64(random.random()),
                };
                tokio::spawn(wire.connect(device, Arc::clone(&hubs)));
            }
        });
        Self { address, toxics, carried, _runtime: runtime }
    }

    /// From now on.
    pub fn set(&self, toxics: Toxics) {
        self.toxics.send_replace(toxics);
    }

    /// Bytes that it has carried to the device so far.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Wire {
    toxics: watch::Receiver<Toxics>,
    carried: Arc<AtomicU64>,
    random: ChaCha8Rng,
}

impl Wire {
    async fn connect(mut self, device: TcpStream, hubs: Arc<[SocketAddr]>) {
        if self.is_heard().await.is_err() {
            return;
        }
        // A list is tried one by one.
        let Ok(hub) = TcpStream::connect(&hubs[..]).await else { return };
        let breaks_after = self.toxics.borrow().breaks_after_bytes;
        let breaks_after = breaks_after.map(|bytes| self.random.random_range(bytes..=2 * bytes));
        let (from_device, to_device) = device.into_split();
        let (from_hub, to_hub) = hub.into_split();
        let up = self.clone().carry(from_device, to_hub, None, false);
        let down = self.carry(from_hub, to_device, breaks_after, true);
        // Whichever direction ends takes the other with it.
        tokio::select! {
            () = up => {}
            () = down => {}
        }
    }

    /// Waits for the end of a silent cut; an error says that the connection ends.
    async fn is_heard(&mut self) -> Result<(), ()> {
        let toxics = self.toxics.wait_for(|toxics| toxics.cut != Some(Cut::Silent)).await;
        match toxics.map_err(|_| ())?.cut {
            None => Ok(()),
            Some(_) => Err(()),
        }
    }

    async fn carry(
        mut self,
        from: OwnedReadHalf,
        to: OwnedWriteHalf,
        breaks_after: Option<u64>,
        counts: bool,
    ) {
        let (packets, under_way) = mpsc::channel(WINDOW);
        let receive = self.clone().receive(under_way, to, counts);
        tokio::pin!(receive);
        tokio::select! {
            // Everything under way arrives before the end does.
            () = self.send(from, packets, breaks_after) => receive.await,
            () = &mut receive => {}
        }
    }

    async fn send(
        &mut self,
        mut from: OwnedReadHalf,
        packets: mpsc::Sender<(Instant, Vec<u8>)>,
        breaks_after: Option<u64>,
    ) {
        let mut left = breaks_after.unwrap_or(u64::MAX);
        let mut line_free_at = Instant::now();
        let mut packet = vec![0; PACKET_BYTES];
        while let Ok(size @ 1..) = from.read(&mut packet).await {
            left = left.saturating_sub(size as u64);
            if left == 0 {
                return;
            }
            let toxics = *self.toxics.borrow();
            let mut delay_ms = toxics.latency_ms;
            let mut retransmit_ms = RETRANSMIT_MS;
            while toxics.loss > 0.0 && self.random.random_bool(toxics.loss) {
                delay_ms += retransmit_ms;
                retransmit_ms = (2 * retransmit_ms).min(MAX_RETRANSMIT_MS);
            }
            line_free_at = line_free_at.max(Instant::now());
            if let Some(bits_per_s) = toxics.bits_per_s {
                line_free_at += Duration::from_secs_f64(size as f64 * 8.0 / bits_per_s as f64);
            }
            let due = line_free_at + Duration::from_millis(delay_ms);
            if packets.send((due, packet[..size].to_vec())).await.is_err() {
                return;
            }
        }
    }

    async fn receive(
        mut self,
        mut packets: mpsc::Receiver<(Instant, Vec<u8>)>,
        mut to: OwnedWriteHalf,
        counts: bool,
    ) {
        while let Some(packet) = self.unless_cut(packets.recv()).await.flatten() {
            let (due, packet) = packet;
            let arrives = self.unless_cut(tokio::time::sleep_until(due)).await;
            if arrives.is_none() || to.write_all(&packet).await.is_err() {
                return;
            }
            if counts {
                self.carried.fetch_add(packet.len() as u64, Ordering::Relaxed);
            }
        }
    }

    /// What comes of `work`, once the link is not cut silently; nothing if the cut ends connections.
    async fn unless_cut<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            self.is_heard().await.ok()?;
            tokio::select! {
                done = &mut work => {
                    self.is_heard().await.ok()?;
                    return Some(done);
                }
                changed = self.toxics.changed() => changed.ok()?,
            }
        }
    }
}
