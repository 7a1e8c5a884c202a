//! Whose signatures count here: the publisher keys from joining, and their successors.
//!
//! The hub hands out keys but cannot make one: a key counts only if the device got it when it joined,
//! or if a key that it trusts vouches for it. A key whose time is over signs and vouches no more.

use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use slmops_api::device::PublisherKey;
use slmops_artifact::signing::PublicKey;

use crate::clock::Clock;
use crate::error::AgentError;
use crate::identity::{Identity, MAX_PUBLISHER_KEYS, parse_key};
use crate::state::StateFolder;

/// The device's publisher keys, kept in its state folder.
pub struct Trust {
    state: StateFolder,
    identity: Mutex<Identity>,
    clock: Arc<Clock>,
}

impl Trust {
    /// The keys of `identity`, whose successors are kept in `state`.
    ///
    /// # Errors
    /// A kept key that is none.
    pub fn new(
        state: StateFolder,
        identity: Identity,
        clock: Arc<Clock>,
    ) -> Result<Self, AgentError> {
        for key in &identity.publisher_keys {
            parse_key(key)?;
        }
        Ok(Self { state, identity: Mutex::new(identity), clock })
    }

    /// The keys whose signatures count now.
    pub fn keys(&self) -> Vec<PublicKey> {
        let now = self.clock.guess();
        let identity = lock(&self.identity);
        let valid = identity.publisher_keys.iter().filter(|key| !key.is_expired(now));
        valid.filter_map(|key| parse_key(key).ok()).collect()
    }

    /// The keys whose time is over, by name and end.
    pub fn expired(&self) -> Vec<(String, Timestamp)> {
        let now = self.clock.guess();
        let identity = lock(&self.identity);
        let expired = identity.publisher_keys.iter().filter(|key| key.is_expired(now));
        expired.filter_map(|key| Some((key.name.clone(), key.expires_at?))).collect()
    }

    /// Takes those of the hub's keys that a trusted key vouches for, directly or through others.
    /// Says which are new; they are kept when it returns, or the next start asks again.
    pub fn learn(&self, offered: &[PublisherKey]) -> Vec<PublisherKey> {
        let now = self.clock.guess();
        let mut identity = lock(&self.identity);
        let mut learnt = Vec::new();
        loop {
            let keys = &identity.publisher_keys;
            let next = offered.iter().find(|key| {
                keys.len() < MAX_PUBLISHER_KEYS
                    && !key.is_expired(now)
                    && keys.iter().all(|known| known.id != key.id)
                    && keys.iter().any(|by| !by.is_expired(now) && key.is_endorsed_by(by))
            });
            let Some(next) = next.cloned() else { break };
            identity.publisher_keys.push(next.clone());
            learnt.push(next);
        }
        if !learnt.is_empty()
            && let Err(error) = identity.save(self.state.root())
        {
            tracing::warn!("{error}");
        }
        learnt
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use slmops_artifact::Digest;
    use slmops_artifact::signing::PrivateKey;

    use super::*;
    use crate::identity::{MeteredLink, Settings};

    fn public(key: &PrivateKey, expires_at: Option<&str>) -> PublisherKey {
        PublisherKey {
            id: key.public().id().parse().unwrap(),
            name: "key".to_owned(),
            public_key: key.public().to_pem().to_owned(),
            expires_at: expires_at.map(|at| at.parse().unwrap()),
            endorsement: None,
        }
    }

    fn trust(folder: &std::path::Path, keys: Vec<PublisherKey>) -> Trust {
        let state = StateFolder::create(folder).unwrap();
        let identity = Identity {
            device: "d1".parse().unwrap(),
            url: "https://hub".parse().unwrap(),
            ca: Digest::of(b"ca"),
            publisher_keys: keys,
            settings: Settings {
                memory_budget_bytes: 1,
                listen: "127.0.0.1:0".parse().unwrap(),
                metered: MeteredLink::No,
                otlp: None,
            },
        };
        Trust::new(state, identity, Arc::new(Clock::open(folder))).unwrap()
    }

    #[test]
    fn only_a_trusted_key_can_vouch_for_another() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second, third, thief) = (
            PrivateKey::generate(),
            PrivateKey::generate(),
            PrivateKey::generate(),
            PrivateKey::generate(),
        );
        let trust = trust(folder.path(), vec![public(&first, None)]);
        // The hub alone: no word, the word of a stranger, a word for another key or another end.
        let other = public(&second, None).endorsed(&first).endorsement;
        let strangers = [
            public(&thief, None),
            public(&thief, None).endorsed(&thief),
            PublisherKey { endorsement: other.clone(), ..public(&thief, None) },
            PublisherKey { endorsement: other, ..public(&second, Some("2999-01-01T00:00:00Z")) },
            PublisherKey { id: public(&second, None).id, ..public(&thief, None).endorsed(&first) },
        ];
        assert_eq!(trust.learn(&strangers), []);
        // A chain, whatever the order; kept over a restart.
        let chain =
            [public(&third, None).endorsed(&second), public(&second, None).endorsed(&first)];
        assert_eq!(trust.learn(&chain).len(), 2);
        assert_eq!(trust.learn(&chain), []);
        let kept = Identity::load(folder.path()).unwrap().unwrap();
        assert_eq!(kept.publisher_keys.len(), 3);
        assert_eq!(trust.keys().len(), 3);
    }

    #[test]
    fn a_key_whose_time_is_over_neither_signs_nor_vouches() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (PrivateKey::generate(), PrivateKey::generate());
        let trust = trust(folder.path(), vec![public(&old, Some("2030-01-01T00:00:00Z"))]);
        trust.clock.hear("2029-12-31T23:59:00Z".parse().unwrap());
        assert_eq!((trust.keys().len(), trust.expired().len()), (1, 0));
        trust.clock.hear("2030-01-01T00:00:00Z".parse().unwrap());
        assert_eq!((trust.keys().len(), trust.expired().len()), (0, 1));
        assert_eq!(trust.learn(&[public(&new, None).endorsed(&old)]), []);
        // The hub's word goes before a clock that is wrong, but not before the program's own age.
        trust.clock.hear("1970-01-01T00:00:00Z".parse().unwrap());
        assert_eq!(trust.clock.guess().to_string(), "2026-01-01T00:00:00Z");
        assert_eq!(trust.learn(&[public(&new, None).endorsed(&old)]).len(), 1);
    }
}
