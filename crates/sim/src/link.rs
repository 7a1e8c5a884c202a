//! Links: when there is a connection, and how long bytes take.

use crate::spec::{LinkSpec, OfflineHours};
use crate::time::{DAY, HOUR, SECOND, Time};

/// A download arrives in pieces of about this long, so that it is seen to move.
const PIECE_MS: u64 = 30 * SECOND;
/// The smallest piece in bytes.
const MIN_PIECE_BYTES: u64 = 16 << 10;

/// The link of one group.
pub(crate) struct Link {
    pub latency_ms: u64,
    pub loss: f64,
    bits_per_s: u64,
    /// Parts of the day in milliseconds, from and to, none across midnight.
    offline: Vec<(u64, u64)>,
    pub site: Option<Pipe>,
    metered: bool,
    /// Until when every byte costs although it usually does not.
    metered_until: Time,
    /// What devices get from each other goes through this.
    pub lan: Option<Pipe>,
}

/// What several devices share. Its bytes go one piece after the other, in the order in which they
/// were asked for: everyone who downloads gets the same share.
pub(crate) struct Pipe {
    bits_per_s: u64,
    free_at: u64,
    /// Devices that download through it.
    pub active: u64,
}

impl Pipe {
    pub(crate) fn new(bits_per_s: u64) -> Self {
        Self { bits_per_s, free_at: 0, active: 0 }
    }

    /// When `bytes` that are asked for now are through.
    fn carry(&mut self, now: u64, bytes: u64) -> u64 {
        self.free_at = self.free_at.max(now) + duration_ms(bytes, self.bits_per_s);
        self.free_at
    }
}

fn duration_ms(bytes: u64, bits_per_s: u64) -> u64 {
    (u128::from(bytes) * 8 * u128::from(SECOND)).div_ceil(u128::from(bits_per_s)) as u64
}

impl Link {
    pub(crate) fn new(spec: &LinkSpec) -> Self {
        let ms = |hour: f64| (hour * HOUR as f64) as u64;
        let part = |hours: &OfflineHours| {
            let (from, to) = (ms(hours.from_hour), ms(hours.to_hour));
            match from < to {
                true => vec![(from, to)],
                false => vec![(from, DAY), (0, to)],
            }
        };
        Self {
            latency_ms: u64::from(spec.latency_ms).max(1),
            loss: spec.loss,
            bits_per_s: spec.bits_per_s,
            offline: spec.offline.iter().flat_map(part).collect(),
            site: spec.site_bits_per_s.map(Pipe::new),
            metered: spec.metered,
            metered_until: Time(0),
            lan: spec.lan_bits_per_s.map(Pipe::new),
        }
    }

    /// Whether the time of day allows a connection.
    pub(crate) fn is_online(&self, now: Time) -> bool {
        let of_day = now.0 % DAY;
        !self.offline.iter().any(|(from, to)| (*from..*to).contains(&of_day))
    }

    /// Whether every byte over it costs.
    pub(crate) fn is_metered(&self, now: Time) -> bool {
        self.metered || now < self.metered_until
    }

    /// Lets every byte cost for a while.
    pub(crate) fn meter(&mut self, until: Time) {
        self.metered_until = self.metered_until.max(until);
    }

    /// Without offline hours, losses and costs from now on.
    pub(crate) fn heal(&mut self) {
        self.offline.clear();
        self.loss = 0.0;
        (self.metered, self.metered_until) = (false, Time(0));
    }

    /// The size of the next piece of a download, and when it is there.
    pub(crate) fn piece(&mut self, hub: Option<&mut Pipe>, now: Time, left: u64) -> (u64, Time) {
        let share = |pipe: &Pipe| pipe.bits_per_s / pipe.active.max(1);
        let mut rate = self.bits_per_s;
        rate = self.site.iter().map(share).fold(rate, u64::min);
        rate = hub.iter().map(|pipe| share(pipe)).fold(rate, u64::min);
        let bytes = (rate / 8 * PIECE_MS / SECOND).max(MIN_PIECE_BYTES).min(left);
        let mut there_at = now.0 + duration_ms(bytes, self.bits_per_s);
        let pipes = self.site.as_mut().into_iter().chain(hub);
        for pipe in pipes {
            there_at = there_at.max(pipe.carry(now.0, bytes));
        }
        (bytes, Time(there_at))
    }

    /// The same of a download from another device of the group.
    pub(crate) fn peer_piece(&mut self, now: Time, left: u64) -> (u64, Time) {
        let lan = self.lan.as_mut().expect("devices get models from each other over one");
        let rate = lan.bits_per_s / lan.active.max(1);
        let bytes = (rate / 8 * PIECE_MS / SECOND).max(MIN_PIECE_BYTES).min(left);
        (bytes, Time(lan.carry(now.0, bytes)))
    }
}
