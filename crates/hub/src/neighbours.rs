//! Who at a site has which model file, as far as this hub has heard: so that a site pulls each file
//! over its line about once.
//!
//! Everything here is in memory and comes anew with the next reports. It never decides what a
//! device is to run, only where it may get that from. Start reading at [`Neighbours::advise`].

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use slmops_api::delta::MAX_PEERS;
use slmops_api::{DeviceId, SiteName};
use slmops_artifact::Digest;

/// Whoever was not heard of for so many seconds is not named to others.
const FRESH_S: i64 = 600;
/// How long a site waits for the device that gets a file first, in seconds, while that is heard of.
const MAX_SEED_S: i64 = 600;
/// The device that gets a file first was heard of within so many seconds, or another one takes over.
const ALIVE_S: i64 = 75;
/// Files of sites that are remembered; with more, the oldest are forgotten.
const MAX_FILES: usize = 4096;
/// Devices that are remembered for one file of a site.
const MAX_HOLDERS: usize = 32;

/// Who has what, by site and file.
#[derive(Default)]
pub struct Neighbours {
    files: Mutex<HashMap<(SiteName, Digest), Spread>>,
}

/// How far a file has spread at a site.
#[derive(Default)]
struct Spread {
    /// Devices that have it: where, and when they said so.
    holders: BTreeMap<DeviceId, (String, Timestamp)>,
    /// The device that gets it first, and since when.
    seed: Option<(DeviceId, Timestamp)>,
    touched: Timestamp,
}

/// Where a device may get a file from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advice {
    /// From the hub.
    Hub,
    /// From these, and if they fail from the hub.
    Peers(Vec<String>),
    /// Another device of the site is getting it: ask again.
    Wait,
}

impl Neighbours {
    /// A device of a site shares this file at this address.
    pub fn has(
        &self,
        site: SiteName,
        weights: Digest,
        device: DeviceId,
        address: String,
        at: Timestamp,
    ) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let spread = touch(&mut files, site, weights, at);
        spread.holders.retain(|_, (_, heard)| is_within(*heard, at, FRESH_S));
        if spread.holders.len() < MAX_HOLDERS || spread.holders.contains_key(&device) {
            spread.holders.insert(device, (address, at));
        }
    }

    /// A device of a site will not get what it was to get: another one may be the first.
    pub fn gave_up(&self, site: &SiteName, device: &DeviceId) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        for ((of, _), spread) in files.iter_mut() {
            if of == site {
                spread.seed.take_if(|(seed, _)| seed == device);
            }
        }
    }

    /// Where a device may get a file from. `last_seen` says when a device was last heard of.
    pub fn advise(
        &self,
        site: SiteName,
        weights: Digest,
        device: &DeviceId,
        now: Timestamp,
        last_seen: impl Fn(&DeviceId) -> Option<Timestamp>,
    ) -> Advice {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let spread = touch(&mut files, site, weights, now);
        let fresh = |holder: &(&DeviceId, &(String, Timestamp))| {
            holder.0 != device && is_within(holder.1.1, now, FRESH_S)
        };
        let holders: Vec<&String> =
            spread.holders.iter().filter(fresh).map(|(_, (address, _))| address).collect();
        if !holders.is_empty() {
            // Each device begins with another one, so that they share the work.
            let first = Digest::of(device.as_str().as_bytes()).as_bytes()[0] as usize;
            let turn = holders.iter().cycle().skip(first % holders.len());
            let peers = turn.take(MAX_PEERS.min(holders.len())).map(|it| (*it).clone()).collect();
            return Advice::Peers(peers);
        }
        let is_coming = |(seed, since): &(DeviceId, Timestamp)| {
            seed != device
                && is_within(*since, now, MAX_SEED_S)
                && last_seen(seed).is_some_and(|seen| is_within(seen, now, ALIVE_S))
        };
        if spread.seed.as_ref().is_some_and(is_coming) {
            return Advice::Wait;
        }
        if spread.seed.as_ref().is_none_or(|(seed, _)| seed != device) {
            spread.seed = Some((device.clone(), now));
        }
        Advice::Hub
    }
}

fn touch(
    files: &mut HashMap<(SiteName, Digest), Spread>,
    site: SiteName,
    weights: Digest,
    at: Timestamp,
) -> &mut Spread {
    let key = (site, weights);
    if files.len() >= MAX_FILES && !files.contains_key(&key) {
        let oldest =
            files.iter().min_by_key(|(_, spread)| spread.touched).map(|(key, _)| key.clone());
        oldest.map(|oldest| files.remove(&oldest));
    }
    let spread = files.entry(key).or_default();
    spread.touched = at;
    spread
}

fn is_within(then: Timestamp, now: Timestamp, seconds: i64) -> bool {
    now.duration_since(then).as_secs() < seconds
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn id(name: &str) -> DeviceId {
        name.parse().unwrap()
    }

    fn advise(neighbours: &Neighbours, device: &str, second: i64) -> Advice {
        let site = "s".parse().unwrap();
        // All but `gone` were heard of just now.
        let last_seen = |asked: &DeviceId| (asked.as_str() != "gone").then(|| at(second));
        neighbours.advise(site, Digest::of(b"m"), &id(device), at(second), last_seen)
    }

    #[test]
    fn one_gets_it_first_and_the_others_from_that_one() {
        let neighbours = Neighbours::default();
        assert_eq!(advise(&neighbours, "a", 0), Advice::Hub);
        assert_eq!(advise(&neighbours, "b", 1), Advice::Wait);
        assert_eq!(advise(&neighbours, "a", 2), Advice::Hub, "it asks again after a break");
        let site: SiteName = "s".parse().unwrap();
        neighbours.has(site.clone(), Digest::of(b"m"), id("a"), "http://a".to_owned(), at(3));
        assert_eq!(advise(&neighbours, "b", 4), Advice::Peers(vec!["http://a".to_owned()]));
        assert_eq!(advise(&neighbours, "a", 4), Advice::Hub, "nobody is its own peer");
        for device in ["b", "c", "d"] {
            let address = format!("http://{device}");
            neighbours.has(site.clone(), Digest::of(b"m"), id(device), address, at(5));
        }
        let Advice::Peers(peers) = advise(&neighbours, "e", 6) else { panic!("there are peers") };
        assert_eq!(peers.len(), MAX_PEERS);
        // None of another site, and none that was not heard of for long.
        let other =
            neighbours.advise("t".parse().unwrap(), Digest::of(b"m"), &id("x"), at(6), |_| None);
        assert_eq!(other, Advice::Hub);
        assert_eq!(advise(&neighbours, "f", 5 + FRESH_S), Advice::Hub);
    }

    #[test]
    fn a_first_one_that_fails_holds_nobody_up() {
        let neighbours = Neighbours::default();
        let site: SiteName = "s".parse().unwrap();
        assert_eq!(advise(&neighbours, "a", 0), Advice::Hub);
        neighbours.gave_up(&site, &id("a"));
        assert_eq!(advise(&neighbours, "gone", 1), Advice::Hub);
        // The second one is not heard of any more.
        assert_eq!(advise(&neighbours, "b", 2), Advice::Hub);
        assert_eq!(advise(&neighbours, "c", 3), Advice::Wait);
        assert_eq!(advise(&neighbours, "c", 2 + MAX_SEED_S), Advice::Hub, "or takes too long");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let neighbours = Neighbours::default();
        for number in 0..MAX_FILES as i64 + 10 {
            let weights = Digest::of(&number.to_le_bytes());
            neighbours.has("s".parse().unwrap(), weights, id("a"), String::new(), at(number));
        }
        assert_eq!(neighbours.files.lock().unwrap().len(), MAX_FILES);
    }
}
