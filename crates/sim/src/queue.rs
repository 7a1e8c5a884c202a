//! The event queue: who is looked at next, entries by (time, sequence), for fleets that no cache holds.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::time::Time;

/// Entries of the same 2^6 ms share a slot. A slot is put in order once it is due, when it is all in
/// the fastest cache; one heap of everything is most of the work of a large fleet.
const SLOT_BITS: u32 = 6;
/// Slots ahead, which is a little more than a minute: devices poll more often than that.
const SLOTS: u64 = 1 << 10;

/// Who is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Agenda,
    Hub,
    Device(u32),
}

/// An entry as one number: time, sequence, who, from the highest bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry(u128);

impl Entry {
    const TIME_BITS: u32 = 48;
    const SEQUENCE_BITS: u32 = 48;
    const WHO_BITS: u32 = u128::BITS - Self::TIME_BITS - Self::SEQUENCE_BITS;
    const AGENDA: u32 = u32::MAX;
    const HUB: u32 = u32::MAX - 1;

    fn new(at: Time, sequence: u64, who: Who) -> Self {
        assert!(sequence >> Self::SEQUENCE_BITS == 0, "a run has fewer than 2^48 entries");
        // What is never due is due after the longest simulation.
        let at = at.0.min((1 << Self::TIME_BITS) - 1);
        let who = match who {
            Who::Agenda => Self::AGENDA,
            Who::Hub => Self::HUB,
            Who::Device(number) => number,
        };
        let moment = u128::from(at) << Self::SEQUENCE_BITS | u128::from(sequence);
        Self(moment << Self::WHO_BITS | u128::from(who))
    }

    fn at(self) -> Time {
        Time((self.0 >> (Self::SEQUENCE_BITS + Self::WHO_BITS)) as u64)
    }

    fn sequence(self) -> u64 {
        (self.0 >> Self::WHO_BITS) as u64 & ((1 << Self::SEQUENCE_BITS) - 1)
    }

    fn who(self) -> Who {
        match self.0 as u32 {
            Self::AGENDA => Who::Agenda,
            Self::HUB => Who::Hub,
            number => Who::Device(number),
        }
    }

    fn slot(self) -> u64 {
        self.at().0 >> SLOT_BITS
    }
}

/// The queue.
pub(crate) struct EventQueue {
    sequence: u64,
    /// The slot that is due.
    slot: u64,
    /// What is in it, and what was pushed for a time before it.
    due: BinaryHeap<Reverse<Entry>>,
    /// The next [`SLOTS`] slots, each at its number modulo [`SLOTS`], in no order.
    ahead: Vec<Vec<Reverse<Entry>>>,
    waiting_ahead: usize,
    /// All that is later.
    far: BinaryHeap<Reverse<Entry>>,
}

impl EventQueue {
    pub(crate) fn new() -> Self {
        Self {
            sequence: 0,
            slot: 0,
            due: BinaryHeap::new(),
            ahead: vec![Vec::new(); SLOTS as usize],
            waiting_ahead: 0,
            far: BinaryHeap::new(),
        }
    }

    /// Adds an entry, and says its sequence number. Of entries for the same time, the one that was
    /// pushed first comes first.
    pub(crate) fn push(&mut self, at: Time, who: Who) -> u64 {
        self.sequence += 1;
        self.place(Reverse(Entry::new(at, self.sequence, who)));
        self.sequence
    }

    fn place(&mut self, entry: Reverse<Entry>) {
        let slot = entry.0.slot();
        if slot <= self.slot {
            self.due.push(entry);
        } else if slot < self.slot + SLOTS {
            self.ahead[(slot % SLOTS) as usize].push(entry);
            self.waiting_ahead += 1;
        } else {
            self.far.push(entry);
        }
    }

    /// Takes out the first entry, unless it is for a time after `end`.
    pub(crate) fn pop(&mut self, end: Time) -> Option<(Time, u64, Who)> {
        while self.due.is_empty() {
            self.turn()?;
        }
        let Reverse(first) = *self.due.peek()?;
        if first.at() > end {
            return None;
        }
        self.due.pop();
        Some((first.at(), first.sequence(), first.who()))
    }

    /// Goes on to the next slot in which there may be something. None when there is nothing at all.
    fn turn(&mut self) -> Option<()> {
        self.slot = match self.waiting_ahead {
            0 => self.far.peek()?.0.slot(),
            _ => self.slot + 1,
        };
        let mut slot = std::mem::take(&mut self.ahead[(self.slot % SLOTS) as usize]);
        self.waiting_ahead -= slot.len();
        self.due.extend(slot.drain(..));
        self.ahead[(self.slot % SLOTS) as usize] = slot;
        while self.far.peek().is_some_and(|first| first.0.slot() < self.slot + SLOTS) {
            let first = self.far.pop()?;
            self.place(first);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng as _;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    /// Against one sorted list, with times near, far, equal, past and never.
    #[test]
    fn entries_come_in_the_order_of_time_and_sequence() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let (mut queue, mut list) = (EventQueue::new(), Vec::new());
        let mut now = Time(0);
        for _ in 0..20_000 {
            let ahead = [0, 1, 70, 30_000, 65_536, 400_000][rng.random_range(0..6)];
            let never = rng.random_bool(0.001);
            let at = if never { Time(u64::MAX) } else { Time(now.0 + rng.random_range(0..=ahead)) };
            let who = match rng.random_range(0..20) {
                0 => Who::Agenda,
                1 => Who::Hub,
                _ => Who::Device(rng.random_range(0..1_000)),
            };
            list.push((at, queue.push(at, who), who));
            let end = Time(now.0 + rng.random_range(0..2_000));
            if rng.random_bool(0.6) {
                let first = list.iter().copied().filter(|it| it.0 <= end);
                let first = first.min_by_key(|(at, sequence, _)| (*at, *sequence));
                assert_eq!(queue.pop(end), first);
                list.retain(|it| Some(*it) != first);
                now = first.map_or(end, |first| first.0);
            }
        }
        assert_eq!(queue.pop(Time(0)), None);
    }
}
