//! The paired comparison: the same prompts on both versions, on the same device, right before the switch.
//!
//! It needs no other devices to compare with, so that it is what small fleets have. A prompt *fails* if its
//! answer lost more than is allowed, which makes the sign test of the losses against the allowance: if the
//! release is no worse than allowed, a prompt fails with a chance of at most 1/2. Of `n` prompts of which
//! `k` failed, with the uniform mixture over chances `p` from 1/2 to 1,
//!
//! ```text
//!         1
//!        /                                  k
//! E = 2  | (2p)^k (2 - 2p)^(n-k) dp   =   Σ  C(n+1, j)  /  ((n+1) C(n, k))
//!        /                                 j=0
//!       1/2
//! ```
//!
//! is an e-value: it grows with `k`, and has the mean 1 at the chance 1/2 (the beta-binomial mixture of
//! Robbins 1970, one-sided; the sum is the incomplete beta function at 1/2). Losses may have any
//! distribution; that the prompts are a sample of what matters is assumed.
//!
//! Devices with the same file answer alike to the last digits: ten of them are no ten times the evidence.
//! So devices' e-values are averaged, which is an e-value however they depend on each other (Vovk and
//! Wang 2021), and never multiplied.

use slmops_api::gate::{GatePolicy, Metric, MetricReading};

use super::{quantile_of, share_of_look};

/// The fewest prompts of a device that say anything.
const LEAST_PROMPTS: usize = 8;

/// What the devices of a wave lost, prompt by prompt, says at the `look`-th look (from 1); `earlier` is the
/// reading of the look before.
pub fn replayed(
    policy: &GatePolicy,
    losses_nats: &[&[f64]],
    look: u32,
    earlier: &[MetricReading],
) -> Option<MetricReading> {
    let earlier = earlier.iter().find(|reading| reading.metric == Metric::Replay).copied();
    let devices = losses_nats.iter().filter(|losses| losses.len() >= LEAST_PROMPTS);
    let (mut number, mut e_value, mut loss, mut error) = (0.0, 0.0, 0.0, 0.0);
    let allowed = policy.allowed(Metric::Replay);
    for losses in devices {
        let failed = losses.iter().filter(|loss| **loss > allowed.ln_1p()).count();
        let (mean, standard_error) = spread(losses);
        number += 1.0;
        e_value += sign_e_value(losses.len(), failed);
        loss += mean;
        // Devices that depend on each other: their errors do not cancel.
        error += standard_error;
    }
    if number == 0.0 {
        return earlier;
    }
    let so_far = earlier.map_or(0.0, |reading| reading.e_value);
    let loss = loss / number;
    Some(MetricReading {
        metric: Metric::Replay,
        e_value: so_far + share_of_look(look) * e_value / number,
        canaries: loss.exp(),
        controls: 1.0,
        loss: loss.exp_m1(),
        // The numbers do not change from look to look: all the chance of error is for one bound.
        loss_at_most: Some((loss + quantile_of(1.0) * error / number).exp_m1()),
        allowed,
        device_hours_needed: None,
    })
}

/// The mean of a device's losses and its standard error, from the spread between prompts.
fn spread(losses: &[f64]) -> (f64, f64) {
    let number = losses.len() as f64;
    let mean = losses.iter().sum::<f64>() / number;
    let squares: f64 = losses.iter().map(|loss| (loss - mean).powi(2)).sum();
    (mean, (squares / (number - 1.0).max(1.0) / number).sqrt())
}

/// See the module's text.
fn sign_e_value(prompts: usize, failed: usize) -> f64 {
    let choose = |n: usize, k: usize| {
        let terms = (0..k.min(n - k)).map(|i| (n - i) as f64 / (i + 1) as f64);
        terms.product::<f64>()
    };
    let tail: f64 = (0..=failed).map(|j| choose(prompts + 1, j)).sum();
    tail / ((prompts + 1) as f64 * choose(prompts, failed))
}

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::super::{FIRST_LOOKS_S, harm};
    use super::*;

    /// By the definition: a sum over ten thousand chances.
    #[test]
    fn it_is_the_mixture_and_its_mean_is_one() {
        for prompts in [8, 9, 32, 64] {
            let mut mean = 0.0;
            for failed in 0..=prompts {
                let got = sign_e_value(prompts, failed);
                let steps = 10_000;
                let likelihood = |step: usize| {
                    let p = 0.5 + (step as f64 + 0.5) / f64::from(steps) / 2.0;
                    (2.0 * p).powi(failed as i32) * (2.0 - 2.0 * p).powi((prompts - failed) as i32)
                };
                let wanted = (0..steps as usize).map(likelihood).sum::<f64>() / f64::from(steps);
                // The error of the midpoint rule.
                assert!(
                    (got / wanted - 1.0).abs() < 1e-3,
                    "{failed} of {prompts}: {got}, {wanted}"
                );
                let chance =
                    (1..=failed).map(|i| (prompts + 1 - i) as f64 / i as f64).product::<f64>()
                        * 0.5_f64.powi(prompts as i32);
                mean += chance * got;
            }
            assert!((mean - 1.0).abs() < 1e-9, "{prompts}: {mean}");
        }
        assert!((sign_e_value(9, 9) - 102.3).abs() < 0.1);
    }

    /// How the losses of a fleet come about.
    #[derive(Clone, Copy, Debug)]
    enum World {
        /// One file everywhere: the same losses.
        Identical,
        /// Processors differ a little.
        Heterogeneous,
        /// All prompts are a little worse, up to the allowance.
        Shifted,
        /// A few prompts lose or gain very much.
        HeavyTailed,
        /// Slow devices, which get no further than some prompts.
        Sparse,
    }

    /// Each device's losses: `effect` nats more than the release that changes nothing.
    fn fleet(world: World, canaries: usize, effect: f64, random: &mut Random) -> Vec<Vec<f64>> {
        let shift = if matches!(world, World::Shifted) { 0.1_f64.ln_1p() } else { 0.0 };
        let prompts: Vec<f64> = (0..36)
            .map(|_| {
                let rare = matches!(world, World::HeavyTailed) && random.next() < 0.1;
                0.2 * random.normal() * if rare { 20.0 } else { 1.0 } + shift + effect
            })
            .collect();
        let device = |random: &mut Random| {
            let own = if matches!(world, World::Heterogeneous) { 0.1 } else { 0.0 };
            let number = match world {
                World::Sparse => 4 + (random.next() * 10.0) as usize,
                _ => prompts.len(),
            };
            prompts[..number].iter().map(|loss| loss + own * random.normal()).collect()
        };
        (0..canaries).map(|_| device(random)).collect()
    }

    fn read(policy: &GatePolicy, fleet: &[Vec<f64>], looks: u32) -> Vec<MetricReading> {
        let losses: Vec<&[f64]> = fleet.iter().map(Vec::as_slice).collect();
        (1..=looks).fold(Vec::new(), |earlier, look| {
            replayed(policy, &losses, look, &earlier).into_iter().collect()
        })
    }

    /// Named, as a small fleet would: its weight is the most it can have.
    fn named() -> GatePolicy {
        GatePolicy { allow: [(Metric::Replay, 100)].into(), ..GatePolicy::default() }
    }

    /// 10,000 releases that lose no more than is allowed, in each world: whatever the loss looks like.
    #[test]
    fn no_false_alarms_in_a_replay() {
        let worlds = [
            World::Identical,
            World::Heterogeneous,
            World::Shifted,
            World::HeavyTailed,
            World::Sparse,
        ];
        for world in worlds {
            let (runs, mut random) = (10_000, Random::new(17));
            let alarm = |_: &u64| {
                let mut readings = read(&named(), &fleet(world, 3, 0.0, &mut random), 10);
                readings.iter_mut().for_each(|reading| reading.loss = f64::INFINITY);
                // Alone in its policy, with half of all weight given to those that are not named.
                2.0 * harm(&named(), &readings) >= 100.0
            };
            let alarms = (0..runs).filter(alarm).count();
            println!("{world:?}: {alarms} false alarms in {runs}");
            assert!(alarms <= 100, "{world:?}: {alarms} of {runs}");
        }
    }

    /// One canary of five devices sees a loss of 0.5 nats at its first look, and what loses nothing passes.
    #[test]
    fn a_small_fleet_can_tell() {
        let mut random = Random::new(3);
        let mut halted = 0;
        let mut passed = 0;
        for _ in 0..200 {
            let worse = read(&named(), &fleet(World::Identical, 1, 0.5, &mut random), 1);
            halted += u32::from(harm(&named(), &worse) >= 100.0);
            let same = read(&named(), &fleet(World::Identical, 1, 0.0, &mut random), 1);
            assert_eq!(harm(&named(), &same), 0.0);
            passed += u32::from(same[0].loss_at_most.unwrap() <= same[0].allowed);
        }
        assert!(halted >= 190, "{halted} of 200 halted");
        assert!(passed >= 120, "{passed} of 200 passed");
        assert_eq!(replayed(&named(), &[&[1.0; LEAST_PROMPTS - 1]], 1, &[]), None);
        assert_eq!(replayed(&named(), &[], 1, &[]), None);
    }

    /// `make gate-curves`: the table of docs/gates.md for small fleets.
    #[test]
    #[ignore = "makes a table; run by make gate-curves"]
    fn replay_curves() {
        println!(
            "| fleet | canaries | loss | halted | let through | neither |\n|---|---|---|---|---|---|"
        );
        for (devices, canaries) in [(5, 1), (10, 2), (20, 4)] {
            for loss in [0.0_f64, 0.05, 0.1, 0.2, 0.3, 0.5] {
                let mut random = Random::new(devices);
                let (mut halted, mut through) = (0, 0);
                let runs = 1_000;
                for _ in 0..runs {
                    let fleet = fleet(World::Heterogeneous, canaries, loss.ln_1p(), &mut random);
                    // A day's looks; the last is the greatest.
                    let looks = (24 * 3_600 / FIRST_LOOKS_S).min(24);
                    let readings = read(&named(), &fleet, looks);
                    let halts = harm(&named(), &readings) >= 100.0;
                    let passes = readings[0].loss_at_most.is_some_and(|most| most <= 0.1);
                    halted += u32::from(halts);
                    through += u32::from(passes && !halts);
                }
                let share = |number: u32| f64::from(number) * 100.0 / f64::from(runs);
                println!(
                    "| {devices} | {canaries} | {:.0} % | {:.0} % | {:.0} % | {:.0} % |",
                    loss * 100.0,
                    share(halted),
                    share(through),
                    share(runs - halted - through)
                );
            }
        }
    }
}
