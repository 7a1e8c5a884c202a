//! Choosing the next token from logits.

use std::collections::HashMap;

use llguidance::toktrie::SimpleVob;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::protocol::{Sampling, TokenLogprob};
use crate::llama::{Model, Token};

/// How many candidates are sorted first, before falling back to all.
const FIRST_CANDIDATES: usize = 256;

/// Logits that are computed side by side.
const LANES: usize = 32;
/// The exponent below which a weight is nothing.
const LEAST_EXPONENT: f32 = -80.0;

/// Chooses the tokens of one request.
pub(super) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// How often each token was generated.
    generated: HashMap<Token, u32>,
    /// Reused between calls.
    logits: Vec<f32>,
    candidates: Vec<(Token, f32)>,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling) -> Self {
        let seed = sampling.seed.unwrap_or_else(rand::random);
        Self {
            sampling,
            random: ChaCha8Rng::seed_from_u64(seed),
            generated: HashMap::new(),
            logits: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// A token to follow `history`; absent when no logit is a finite number. It is chosen once
    /// [`Sampler::choose`] was told so.
    pub(super) fn propose(&mut self, logits: &[f32], history: &[Token]) -> Option<Token> {
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        self.bias(history);
        self.draw_or_take()
    }

    /// Another one in place of the one that was just proposed, among those that `mask` allows.
    pub(super) fn propose_within(&mut self, mask: &SimpleVob) -> Option<Token> {
        for (token, logit) in self.logits.iter_mut().enumerate() {
            if token >= mask.len() || !mask.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
        self.draw_or_take()
    }

    /// Notes that this token is the next one.
    pub(super) fn choose(&mut self, token: Token) {
        *self.generated.entry(token).or_insert(0) += 1;
    }

    fn draw_or_take(&mut self) -> Option<Token> {
        match self.sampling.temperature {
            temperature if temperature > 0.0 => self.draw(temperature),
            _ => most_probable(&self.logits),
        }
    }

    fn bias(&mut self, history: &[Token]) {
        let Self { sampling, logits, generated, .. } = self;
        for (token, bias) in &sampling.logit_bias {
            if let Some(logit) = at(logits, *token) {
                *logit += bias;
            }
        }
        if sampling.repeat_penalty != 1.0 {
            let start = history.len().saturating_sub(sampling.repeat_last_n as usize);
            let mut recent = history[start..].to_vec();
            recent.sort_unstable();
            recent.dedup();
            for token in recent {
                if let Some(logit) = at(logits, token) {
                    match *logit > 0.0 {
                        true => *logit /= sampling.repeat_penalty,
                        false => *logit *= sampling.repeat_penalty,
                    }
                }
            }
        }
        if sampling.frequency_penalty != 0.0 || sampling.presence_penalty != 0.0 {
            for (token, count) in generated {
                if let Some(logit) = at(logits, *token) {
                    *logit -=
                        sampling.frequency_penalty * *count as f32 + sampling.presence_penalty;
                }
            }
        }
    }

    fn draw(&mut self, temperature: f32) -> Option<Token> {
        let Self { sampling, random, logits, candidates, .. } = self;
        let largest = logits[most_probable(logits)? as usize];
        // Probabilities relative to the most probable token: the common factor cancels out.
        candidates.clear();
        candidates.extend(logits.iter().enumerate().filter_map(|(token, logit)| {
            let weight = ((logit - largest) / temperature).exp();
            (weight > 0.0).then_some((token as Token, weight))
        }));
        let descending =
            |a: &(Token, f32), b: &(Token, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let top_k = sampling.top_k as usize;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, descending);
            candidates.truncate(top_k);
        }
        if sampling.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|(_, weight)| f64::from(*weight)).sum();
            let wanted = total * f64::from(sampling.top_p);
            // Sorting a whole vocabulary is slow, and seldom needed.
            let mut sorted = candidates.len().min(FIRST_CANDIDATES);
            if sorted < candidates.len() {
                candidates.select_nth_unstable_by(sorted - 1, descending);
                let first: f64 = candidates[..sorted].iter().map(|(_, w)| f64::from(*w)).sum();
                if first < wanted {
                    sorted = candidates.len();
                }
            }
            candidates[..sorted].sort_unstable_by(descending);
            let mut sum = 0.0;
            let kept = candidates[..sorted].iter().position(|(_, weight)| {
                sum += f64::from(*weight);
                sum >= wanted
            });
            candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
        }
        if sampling.min_p > 0.0 {
            candidates.retain(|(_, weight)| *weight >= sampling.min_p);
        }
        let total: f64 = candidates.iter().map(|(_, weight)| f64::from(*weight)).sum();
        let mut left = random.random::<f64>() * total;
        for (token, weight) in candidates.iter() {
            left -= f64::from(*weight);
            if left < 0.0 {
                return Some(*token);
            }
        }
        candidates.last().map(|(token, _)| *token)
    }
}

fn at(logits: &mut [f32], token: Token) -> Option<&mut f32> {
    logits.get_mut(usize::try_from(token).ok()?)
}

/// The token with the largest logit, the first among equals; absent when none is finite.
pub(super) fn most_probable(logits: &[f32]) -> Option<Token> {
    // Lanes that do not wait for each other, and no branch: eight times as fast as one after the other.
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let larger = |largest: &mut f32, logit: f32| {
        let logit = if logit.abs() < f32::INFINITY { logit } else { f32::NEG_INFINITY };
        *largest = if logit > *largest { logit } else { *largest };
    };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(largest, logit)| larger(largest, *logit));
    }
    lanes.iter_mut().zip(rest).for_each(|(largest, logit)| larger(largest, *logit));
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let is_largest = |logit: &f32| *logit == largest;
    let any = |chunk: &[f32; LANES]| chunk.iter().fold(false, |any, it| any | is_largest(it));
    let begin = chunks.iter().position(any).unwrap_or(chunks.len()) * LANES;
    let place = logits[begin..].iter().position(is_largest)?;
    (largest > f32::NEG_INFINITY).then_some((begin + place) as Token)
}

/// The logarithm of the sum of the exponentials of `logits`: subtracting it from a logit gives the
/// token's log-probability in nats.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    f64::from(largest) + sum.ln()
}

/// The entropy of the distribution that `logits` mean, in nats; 0 where they are no numbers. Within
/// 10⁻⁴ of it: it is taken beside every eighth token and must cost less than the choice itself.
pub(super) fn entropy(logits: &[f32]) -> f64 {
    let Some(largest) = most_probable(logits).map(|token| logits[token as usize]) else {
        return 0.0;
    };
    let (mut sums, mut weighed) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let mut add = |chunk: &[f32]| {
        for ((sum, weighed), logit) in sums.iter_mut().zip(&mut weighed).zip(chunk) {
            let below = *logit - largest;
            // What is no number has no weight, as what is too small for one.
            let below = if below > LEAST_EXPONENT { below } else { LEAST_EXPONENT };
            let weight = exp(below);
            *sum += weight;
            *weighed += weight * below;
        }
    };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    chunks.iter().for_each(|chunk| add(chunk));
    add(rest);
    let total = |lanes: [f32; LANES]| lanes.into_iter().map(f64::from).sum::<f64>();
    let (sum, weighed) = (total(sums), total(weighed));
    (sum.ln() - weighed / sum).max(0.0)
}

/// The exponential function between [`LEAST_EXPONENT`] and 0, to 2 in 10⁷, without a branch or a call, so
/// that the compiler computes several at once. Polynomial: Cephes, `expf` (Moshier, 1992).
fn exp(exponent: f32) -> f32 {
    // Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = exponent * std::f32::consts::LOG2_E + ROUND;
    let whole = rounded - ROUND;
    // The logarithm of 2 in two parts: the first one times a small whole number is exact.
    let rest = exponent - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let polynomial = [8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5]
        .into_iter()
        .fold(1.398_2e-3 + 1.987_569_1e-4 * rest, |sum, factor| sum * rest + factor);
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    (polynomial * rest * rest + rest + 1.0) * power
}

/// A token's log-probability beside those of the `top` most probable tokens.
pub(super) fn logprob(model: &Model, logits: &[f32], token: Token, top: u32) -> TokenLogprob {
    let normaliser = log_sum_exp(logits);
    let entry = |token: Token| TokenLogprob {
        token,
        bytes: model.piece(token, true),
        logprob: logits.get(token as usize).map(|logit| f64::from(*logit) - normaliser),
        top: Vec::new(),
    };
    let mut entries = Vec::new();
    let top = (top as usize).min(logits.len());
    if top > 0 {
        let mut order: Vec<Token> = (0..logits.len() as Token).collect();
        let descending = |a: &Token, b: &Token| {
            logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
        };
        order.select_nth_unstable_by(top - 1, descending);
        order.truncate(top);
        order.sort_unstable_by(descending);
        entries = order.into_iter().map(entry).collect();
    }
    TokenLogprob { top: entries, ..entry(token) }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Sampler {
        fn sample(&mut self, logits: &[f32], history: &[Token]) -> Option<Token> {
            let token = self.propose(logits, history)?;
            self.choose(token);
            Some(token)
        }
    }

    fn shares(sampling: Sampling, logits: &[f32]) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..4000 {
            let mut sampler = Sampler::new(Sampling { seed: Some(seed), ..sampling.clone() });
            counts[sampler.sample(logits, &[]).expect("finite") as usize] += 1.0 / 4000.0;
        }
        counts
    }

    fn check(sampling: Sampling, wanted: &[f64]) {
        let logits: Vec<f32> = [0.4_f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let found = shares(sampling, &logits);
        // 4,000 draws: the standard error of a share is below 0.8 %.
        let close = found.iter().zip(wanted).all(|(found, wanted)| (found - wanted).abs() < 0.035);
        assert!(close, "{found:?} is not {wanted:?}");
    }

    #[test]
    fn draws_follow_the_distribution() {
        let base = Sampling::default();
        check(base.clone(), &[0.4, 0.3, 0.2, 0.1]);
        check(Sampling { temperature: 0.0, ..base.clone() }, &[1.0, 0.0, 0.0, 0.0]);
        check(Sampling { temperature: 0.5, ..base.clone() }, &[0.533, 0.3, 0.133, 0.033]);
        check(Sampling { top_k: 2, ..base.clone() }, &[0.571, 0.429, 0.0, 0.0]);
        check(Sampling { top_p: 0.75, ..base.clone() }, &[0.444, 0.333, 0.222, 0.0]);
        check(Sampling { top_p: 0.0, ..base.clone() }, &[1.0, 0.0, 0.0, 0.0]);
        check(Sampling { min_p: 0.6, ..base.clone() }, &[0.571, 0.429, 0.0, 0.0]);
        check(
            Sampling { logit_bias: vec![(0, -100.0), (9, 5.0)], ..base.clone() },
            &[0.0, 0.5, 0.333, 0.167],
        );
    }

    #[test]
    fn what_a_mask_allows_is_drawn_as_its_share() {
        let logits: Vec<f32> = [0.4_f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let mask = SimpleVob::from_slice(&[false, true, false, true]);
        let mut counts = [0_u32; 4];
        for seed in 0..4000 {
            let mut sampler = Sampler::new(Sampling { seed: Some(seed), ..Sampling::default() });
            let mut token = sampler.propose(&logits, &[]).expect("finite");
            if !mask.get(token as usize) {
                token = sampler.propose_within(&mask).expect("two are allowed");
            }
            counts[token as usize] += 1;
        }
        assert_eq!((counts[0], counts[2]), (0, 0));
        let share = f64::from(counts[1]) / 4000.0;
        // The standard error is 0.7 %.
        assert!((share - 0.75).abs() < 0.035, "{counts:?}");
    }

    #[test]
    fn penalties_speak_of_what_was_generated() {
        let logits = [1.0, 0.9, 0.0];
        let mut sampler = Sampler::new(Sampling { presence_penalty: 0.5, ..Sampling::greedy() });
        let tokens: Vec<_> = (0..3).map(|_| sampler.sample(&logits, &[0, 0, 0])).collect();
        assert_eq!(tokens, [Some(0), Some(1), Some(0)]);
        let mut sampler = Sampler::new(Sampling { repeat_penalty: 2.0, ..Sampling::greedy() });
        assert_eq!(sampler.sample(&logits, &[0]), Some(1));
        assert_eq!(sampler.sample(&logits, &[2]), Some(0));
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let logits: Vec<f32> = (0..1000).map(|index| (index % 17) as f32 / 5.0).collect();
        let run = |seed| {
            let mut sampler =
                Sampler::new(Sampling { seed: Some(seed), top_p: 0.9, ..Sampling::default() });
            (0..20).map(|_| sampler.sample(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn numbers_that_are_none_are_refused() {
        let mut sampler = Sampler::new(Sampling::default());
        assert_eq!(sampler.sample(&[f32::NAN, f32::NAN], &[]), None);
        assert_eq!(sampler.sample(&[f32::NAN, 1.0, f32::NEG_INFINITY], &[]), Some(1));
        assert_eq!(sampler.sample(&[], &[]), None);
        // The first of equals, wherever the lanes end.
        for length in [1, 31, 32, 33, 100] {
            let mut logits = vec![-1.0; length];
            logits[length - 1] = f32::INFINITY;
            assert_eq!(most_probable(&logits), (length > 1).then_some(0), "{length}");
            logits[length / 2] = 2.0;
            logits[length - 1] = 2.0;
            assert_eq!(most_probable(&logits), Some((length / 2) as Token), "{length}");
        }
    }

    #[test]
    fn the_entropy_is_that_of_the_distribution() {
        let by_definition = |logits: &[f32]| {
            let normaliser = log_sum_exp(logits);
            let of = |logit: &f32| f64::from(*logit) - normaliser;
            logits.iter().map(of).map(|p| if p.is_finite() { -p * p.exp() } else { 0.0 }).sum()
        };
        let spread = |scale: f32| (0..49_155).map(|at| (at * 7919 % 1000) as f32 * scale).collect();
        let of_two = vec![f32::NEG_INFINITY, 2.0, 2.0, -500.0];
        for logits in
            [vec![0.0; 49_152], spread(0.02), spread(0.3), of_two, vec![5.0], vec![-1e4; 40]]
        {
            let (found, wanted): (f64, f64) = (entropy(&logits), by_definition(&logits));
            assert!((found - wanted).abs() < 1e-4, "{found} is not {wanted}");
        }
        assert_eq!((entropy(&[]), entropy(&[f32::NAN; 3])), (0.0, 0.0));
    }

    #[test]
    fn log_probabilities_sum_to_one() {
        let logits = [3.0_f32, -2.0, 0.5, 1000.0_f32.ln()];
        let normaliser = log_sum_exp(&logits);
        let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - normaliser).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }
}
