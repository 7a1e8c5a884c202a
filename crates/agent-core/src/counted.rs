//! What is counted of the running model: the engine's counters, told apart by manifest.

use slmops_api::evidence::{Evidence, EvidenceCounts, Replay};
use slmops_artifact::Digest;

/// Attributes the growth of the engine's counters to the model that runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counted {
    evidence: Option<Evidence>,
    /// The engine's counters when they were last looked at.
    seen: EvidenceCounts,
    /// What the prompts of a manifest that does not run yet lost against the one that does.
    replayed: Option<(Digest, Replay)>,
}

impl Counted {
    /// Goes on from what was saved before this start, whose counters begin at zero.
    pub fn from(saved: Option<Evidence>) -> Self {
        Self { evidence: saved, ..Self::default() }
    }

    /// What is counted so far, of the model that ran last.
    pub fn evidence(&self) -> Option<&Evidence> {
        self.evidence.as_ref()
    }

    /// The prompts of `manifest` were replayed. That is known of it once it runs.
    pub fn replayed(&mut self, manifest: Digest, replay: Replay) {
        self.replayed = Some((manifest, replay));
    }

    /// Takes in the engine's counters. What came between the last look at one model and the first
    /// look at the next belongs to neither, and is dropped.
    pub fn update(
        &mut self,
        running: Option<Digest>,
        counters: EvidenceCounts,
    ) -> Option<&Evidence> {
        let growth = counters.since(&self.seen);
        self.seen = counters;
        let manifest = running?;
        match &mut self.evidence {
            Some(evidence) if evidence.manifest == manifest => {
                evidence.counts = evidence.counts.plus(growth);
            }
            _ => {
                let counts = EvidenceCounts {
                    peak_memory_bytes: growth.peak_memory_bytes,
                    ..EvidenceCounts::default()
                };
                let replayed = self.replayed.take_if(|(replayed, _)| *replayed == manifest);
                let replay = replayed.map(|(_, replay)| replay);
                self.evidence = Some(Evidence { manifest, counts, replay });
            }
        }
        self.evidence.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(answered: u64, peak_memory_bytes: u64) -> EvidenceCounts {
        EvidenceCounts { answered, peak_memory_bytes, ..EvidenceCounts::default() }
    }

    #[test]
    fn a_replay_is_told_of_the_model_that_it_was_about() {
        let (old, new, newer) = (Digest::of(b"old"), Digest::of(b"new"), Digest::of(b"newer"));
        let mut counted = Counted::from(None);
        counted.update(Some(old), counters(1, 10));
        let replay = Replay { before: old, losses_nats: vec![0.5, -0.25] };
        counted.replayed(new, replay.clone());
        assert_eq!(counted.update(Some(old), counters(2, 10)).unwrap().replay, None);
        let found = counted.update(Some(new), counters(3, 10)).unwrap().clone();
        assert_eq!(found.replay, Some(replay));
        // Over a restart too, and no longer than it runs.
        let mut counted = Counted::from(Some(found.clone()));
        assert_eq!(counted.update(Some(new), counters(1, 10)).unwrap().replay, found.replay);
        assert_eq!(counted.update(Some(newer), counters(2, 10)).unwrap().replay, None);
    }

    #[test]
    fn each_model_has_its_own_numbers_over_restarts_too() {
        let (old, new) = (Digest::of(b"old"), Digest::of(b"new"));
        let mut counted = Counted::from(None);
        assert_eq!(counted.update(None, counters(0, 0)), None);
        counted.update(Some(old), counters(1, 10));
        let found = counted.update(Some(old), counters(5, 30)).unwrap().clone();
        assert_eq!((found.manifest, found.counts), (old, counters(4, 30)));
        // The agent starts again: the engine's counters begin at zero.
        let mut counted = Counted::from(Some(found));
        let found = counted.update(Some(old), counters(2, 20)).unwrap();
        assert_eq!(found.counts, counters(6, 30));
        let found = counted.update(Some(new), counters(7, 15)).unwrap();
        assert_eq!((found.manifest, found.counts), (new, counters(0, 15)));
        let found = counted.update(Some(new), counters(8, 15)).unwrap();
        assert_eq!(found.counts, counters(1, 15));
        // Between two models nothing is anyone's.
        assert_eq!(counted.update(None, counters(9, 0)), None);
        assert_eq!(counted.update(Some(new), counters(10, 15)).unwrap().counts, counters(2, 15));
    }
}
