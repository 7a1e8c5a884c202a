//! Exponential back-off with jitter.

use rand::Rng;

use crate::Millis;

/// The longest `Retry-After` that is honoured, in milliseconds: one hour.
pub const MAX_RETRY_AFTER_MS: u64 = 3_600_000;

/// How often something has failed in a row.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Forgets the failures so far.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Notes one more failure and says when to try again: between half of and the whole of
    /// `base · 2ⁿ` (at most `cap`), so that a fleet that lost its hub does not come back as one;
    /// never before the server's `retry_after_ms`.
    pub(crate) fn fail(
        &mut self,
        now: Millis,
        (base_ms, cap_ms): (u64, u64),
        retry_after_ms: Option<u64>,
        rng: &mut impl Rng,
    ) -> Millis {
        let doublings = self.failures.min(32);
        self.failures = self.failures.saturating_add(1);
        let whole = base_ms.saturating_mul(1 << doublings).min(cap_ms).max(1);
        let jittered = rng.random_range(whole.div_ceil(2)..=whole);
        now + jittered.max(retry_after_ms.unwrap_or(0).min(MAX_RETRY_AFTER_MS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    #[test]
    fn delays_double_up_to_the_cap_and_honour_the_server() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut backoff = Backoff::default();
        for expected in [100, 200, 400, 800, 1000, 1000] {
            let at = backoff.fail(Millis(5), (100, 1000), None, &mut rng).0 - 5;
            assert!((expected / 2..=expected).contains(&at), "{at} for {expected}");
        }
        assert_eq!(backoff.fail(Millis(0), (100, 1000), Some(9_000), &mut rng), Millis(9_000));
        let hour = backoff.fail(Millis(0), (100, 1000), Some(u64::MAX), &mut rng);
        assert_eq!(hour, Millis(MAX_RETRY_AFTER_MS));
        backoff.reset();
        assert!(backoff.fail(Millis(0), (100, 1000), None, &mut rng) <= Millis(100));
        let far = backoff.fail(Millis(u64::MAX), (u64::MAX, u64::MAX), None, &mut rng);
        assert_eq!(far, Millis(u64::MAX));
    }
}
