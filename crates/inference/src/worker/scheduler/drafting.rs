//! Speculative decoding (Leviathan et al., *Fast Inference from Transformers via Speculative Decoding*,
//! 2023): cheap guesses of what comes next, which the model checks in one step.
//!
//! Each token is chosen from the model's own logits in its turn, as without guesses; a guess counts only
//! where it is the token that was chosen. So the answer, its log-probabilities, constraints and stop
//! strings are what they would be without.

use std::sync::Arc;

use super::super::sampler::{log_sum_exp, most_probable};
use super::admission::Running;
use super::{Output, Scheduler, Work};
use crate::llama::{Batch, Context, EngineError, Token};

/// Tokens at the end of a text that must stand earlier in it, at least, and how many are looked at.
const LEAST_MATCH: usize = 2;
const LONGEST_MATCH: usize = 8;
/// How sure the draft model is of a token that it guesses, at least.
const LEAST_CONFIDENCE: f64 = 0.4;
/// The most steps without a guess after guesses that were wrong.
const LONGEST_REST: u32 = 31;

/// Where guesses come from.
pub(in super::super) enum Drafter {
    /// From what stands in the prompt and the answer already (prompt lookup).
    Ngram { limit: usize },
    /// From a smaller model of the same vocabulary.
    Model(Box<DraftModel>),
}

/// How well guesses do in one answer.
pub(super) struct Drafts {
    pub(super) drafted: u32,
    pub(super) accepted: u32,
    /// How many are guessed next.
    length: usize,
    /// Steps without guesses: still to come, and the next time.
    rest: u32,
    next_rest: u32,
    /// Of the step under way: how many were guessed, and how many of them were right.
    now: (usize, usize),
}

impl Default for Drafts {
    fn default() -> Self {
        Self { drafted: 0, accepted: 0, length: usize::MAX, rest: 0, next_rest: 1, now: (0, 0) }
    }
}

impl Drafts {
    fn begin(&mut self, count: usize) {
        self.now = (count, 0);
        self.drafted += u32::try_from(count).unwrap_or(u32::MAX);
    }

    fn count_right(&mut self) {
        self.now.1 += 1;
        self.accepted += 1;
    }

    /// Guesses more where all were right, fewer where some were not, and none for a while where the
    /// only one was not: a wrong guess costs as much as a right one saves.
    fn learn(&mut self, limit: usize) {
        let (count, right) = std::mem::take(&mut self.now);
        match count {
            0 => {}
            _ if right == count => self.length = (2 * count).min(limit),
            1 => {
                self.rest = self.next_rest;
                self.next_rest = (2 * self.next_rest + 1).min(LONGEST_REST);
            }
            _ => self.length = right.max(count / 2).max(1),
        }
        if right > 0 {
            self.next_rest = 1;
        }
    }
}

/// What followed the last tokens when they stood there before: the longest match, and the latest of
/// equals.
fn ngram(tokens: &[Token], limit: usize) -> &[Token] {
    let matched = |end: usize| {
        let pairs = tokens[..end].iter().rev().zip(tokens.iter().rev());
        pairs.take(LONGEST_MATCH).take_while(|(a, b)| a == b).count()
    };
    let mut best = (LEAST_MATCH - 1, tokens.len());
    for end in (LEAST_MATCH..tokens.len()).rev() {
        let length = matched(end);
        if length > best.0 {
            best = (length, end);
            if length == LONGEST_MATCH {
                break;
            }
        }
    }
    let (_, begin) = best;
    &tokens[begin..tokens.len().min(begin + limit)]
}

/// A smaller model that runs beside the one that answers.
pub(in super::super) struct DraftModel {
    context: Context,
    batch: Batch,
    limit: usize,
    /// The tokens in the engine's memory, by sequence.
    held: Vec<Vec<Token>>,
}

/// One answer that wants guesses.
struct Wish<'a> {
    sequence: usize,
    tokens: &'a [Token],
    count: usize,
}

impl DraftModel {
    pub(in super::super) fn new(context: Context, limit: usize) -> Self {
        let held = vec![Vec::new(); context.sequences() as usize];
        Self { context, batch: Batch::new(), limit, held }
    }

    fn propose(&mut self, wishes: &[Wish<'_>]) -> Result<Vec<Vec<Token>>, EngineError> {
        let mut guesses = vec![Vec::new(); wishes.len()];
        // What this model has not read yet; the last of it speaks of the first guess.
        let mut unread: Vec<(usize, Vec<Token>)> = Vec::new();
        for (at, wish) in wishes.iter().enumerate() {
            let held = &mut self.held[wish.sequence];
            let known = held.iter().zip(wish.tokens).take_while(|(a, b)| a == b).count();
            let known = known.min(wish.tokens.len() - 1);
            let place = u32::try_from(known).unwrap_or(u32::MAX);
            self.context.truncate(wish.sequence as u32, place);
            held.truncate(known);
            unread.push((at, wish.tokens[known..].to_vec()));
        }
        while !unread.is_empty() {
            let sequences = unread.iter().map(|(at, tokens)| (wishes[*at].sequence, &tokens[..]));
            let found = self.read(sequences.collect())?;
            let guessed = std::mem::take(&mut unread).into_iter().zip(found);
            for ((at, _), guess) in guessed {
                let Some(token) = guess else { continue };
                guesses[at].push(token);
                if guesses[at].len() < wishes[at].count {
                    unread.push((at, vec![token]));
                }
            }
        }
        Ok(guesses)
    }

    /// Reads more of some sequences; what follows each of them, where that is certain enough.
    fn read(&mut self, all: Vec<(usize, &[Token])>) -> Result<Vec<Option<Token>>, EngineError> {
        let limit = self.context.batch_tokens() as usize;
        let mut found = vec![None; all.len()];
        let mut last = Vec::new();
        self.batch.clear();
        for (at, (sequence, tokens)) in all.into_iter().enumerate() {
            for (index, token) in tokens.iter().enumerate() {
                if self.batch.len() == limit {
                    self.compute(&mut last, &mut found)?;
                }
                let place = u32::try_from(self.held[sequence].len()).unwrap_or(u32::MAX);
                let wanted = index + 1 == tokens.len();
                let place = self.batch.push(*token, place, sequence as u32, wanted);
                self.held[sequence].push(*token);
                if wanted {
                    last.push((place, at));
                }
            }
        }
        self.compute(&mut last, &mut found)?;
        Ok(found)
    }

    fn compute(
        &mut self,
        last: &mut Vec<(usize, usize)>,
        found: &mut [Option<Token>],
    ) -> Result<(), EngineError> {
        if let Err(error) = self.context.decode(&mut self.batch) {
            // Parts of the batch may be in memory.
            self.context.clear();
            self.held.iter_mut().for_each(Vec::clear);
            return Err(error);
        }
        for (place, at) in last.drain(..) {
            let Some(logits) = self.context.logits(place) else { continue };
            let Some(token) = most_probable(logits) else { continue };
            let probability = (f64::from(logits[token as usize]) - log_sum_exp(logits)).exp();
            found[at] = (probability >= LEAST_CONFIDENCE).then_some(token);
        }
        self.batch.clear();
        Ok(())
    }
}

impl Drafter {
    fn limit(&self) -> usize {
        match self {
            Self::Ngram { limit } => *limit,
            Self::Model(model) => model.limit,
        }
    }
}

impl Scheduler {
    /// Guesses for answers under way that are computed next, by sequence: none where none are made.
    pub(super) fn draft(&mut self, answering: &[usize]) -> Vec<Vec<Token>> {
        let mut guesses = vec![Vec::new(); answering.len()];
        let Some(drafter) = &mut self.drafter else { return guesses };
        let limit = drafter.limit();
        let mut counts = vec![0; answering.len()];
        for (at, index) in answering.iter().enumerate() {
            let Some(Running { task, .. }) = &mut self.slots[*index].running else { continue };
            let Work::Generate(generating) = &mut task.work else { continue };
            if generating.drafts.rest > 0 {
                generating.drafts.rest -= 1;
                continue;
            }
            // One token comes without a guess.
            let room = self.context_tokens.saturating_sub(task.tokens.len() + 1);
            let most = generating.most_left().saturating_sub(1);
            counts[at] = generating.drafts.length.min(limit).min(room).min(most);
        }
        let wish = |(at, count): (usize, usize)| {
            let running = self.slots[answering[at]].running.as_ref().filter(|_| count > 0)?;
            let tokens = &running.task.tokens[..];
            Some((at, Wish { sequence: answering[at], tokens, count }))
        };
        let wishes = counts.into_iter().enumerate().filter_map(wish);
        match drafter {
            Drafter::Ngram { .. } => {
                for (at, wish) in wishes {
                    guesses[at] = ngram(wish.tokens, wish.count).to_vec();
                }
            }
            Drafter::Model(model) => {
                let (places, wishes): (Vec<_>, Vec<_>) = wishes.unzip();
                match model.propose(&wishes) {
                    Ok(found) => {
                        places.into_iter().zip(found).for_each(|(at, it)| guesses[at] = it);
                    }
                    // Without guesses the answer is the same.
                    Err(error) => eprintln!("worker: the draft model: {error}"),
                }
            }
        }
        guesses
    }

    /// Puts guesses after the last token of a sequence into the batch, as many as there is room for.
    pub(super) fn feed_draft(
        &mut self,
        index: usize,
        guesses: &[Token],
        output_room: &mut usize,
        outputs: &mut Vec<Output>,
    ) {
        let Some(Running { task, .. }) = &mut self.slots[index].running else { return };
        let Work::Generate(generating) = &mut task.work else { return };
        let room = (self.batch_tokens - self.batch.len()).min(*output_room);
        let guesses = &guesses[..guesses.len().min(room)];
        *output_room -= guesses.len();
        generating.drafts.begin(guesses.len());
        for (place, guess) in (task.tokens.len()..).zip(guesses) {
            let position = u32::try_from(place).expect("a context is shorter");
            let at = self.batch.push(*guess, position, index as u32, true);
            outputs.push(Output { slot: index, index: at, place, guess: Some(*guess) });
        }
    }

    /// Whether the token at an output's place is the one that was chosen, so that what the model says after
    /// it counts. What was no guess always is.
    pub(super) fn holds(&mut self, output: &Output) -> bool {
        let Some(guess) = output.guess else { return true };
        let slot = &mut self.slots[output.slot];
        let Some(Running { task, .. }) = &mut slot.running else { return false };
        let Work::Generate(generating) = &mut task.work else { return false };
        let chosen = task.tokens.get(output.place) == Some(&guess);
        let right = chosen && slot.held.len() == output.place;
        if right {
            slot.held.push(guess);
            generating.drafts.count_right();
        }
        right
    }

    /// Forgets what was guessed wrong.
    pub(super) fn settle_drafts(&mut self, outputs: &[Output]) {
        let Some(limit) = self.drafter.as_ref().map(Drafter::limit) else { return };
        let mut settled = None;
        for index in outputs.iter().filter(|it| it.guess.is_some()).map(|it| it.slot) {
            if settled.replace(index) == Some(index) {
                continue;
            }
            let slot = &mut self.slots[index];
            let held = u32::try_from(slot.held.len()).expect("a context is shorter");
            self.context.truncate(index as u32, held);
            if let Some(Running { task, .. }) = &mut slot.running
                && let Work::Generate(generating) = &mut task.work
            {
                generating.drafts.learn(limit);
            }
        }
    }
}

/// Whether two models mean the same by every token.
pub(in super::super) fn same_vocabulary(
    one: &Arc<crate::llama::Model>,
    other: &Arc<crate::llama::Model>,
) -> bool {
    let same = |token: Token| {
        one.piece(token, true) == other.piece(token, true) && one.ends(token) == other.ends(token)
    };
    one.vocabulary() == other.vocabulary()
        && one.beginning() == other.beginning()
        && (0..one.vocabulary().cast_signed()).all(same)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_guessed() {
        let check = |tokens: &[Token], limit, wanted: &[Token]| {
            assert_eq!(ngram(tokens, limit), wanted, "{tokens:?}");
        };
        check(&[1, 2, 3, 4, 1, 2], 8, &[3, 4, 1, 2]);
        check(&[1, 2, 3, 4, 1, 2], 2, &[3, 4]);
        check(&[1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 1, &[4]);
        // The longer match counts, also where it is older.
        check(&[7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2], 1, &[3]);
        check(&[5, 5, 5, 5], 3, &[5]);
        check(&[1, 2, 3, 4], 3, &[]);
        check(&[1, 2, 3, 2], 3, &[]);
        check(&[1], 3, &[]);
        check(&[], 3, &[]);
    }

    #[test]
    fn wrong_guesses_grow_rare_and_right_ones_long() {
        let mut drafts = Drafts { length: 4, ..Drafts::default() };
        let mut step = |count, right| {
            drafts.begin(count);
            (0..right).for_each(|_| drafts.count_right());
            drafts.learn(8);
            (drafts.length, std::mem::take(&mut drafts.rest))
        };
        assert_eq!(step(4, 4), (8, 0));
        assert_eq!(step(8, 8), (8, 0));
        assert_eq!(step(8, 1), (4, 0));
        assert_eq!(step(4, 0), (2, 0));
        assert_eq!(step(2, 0), (1, 0));
        assert_eq!([step(1, 0), step(1, 0), step(1, 0)], [(1, 1), (1, 3), (1, 7)]);
        assert_eq!([step(1, 1), step(2, 0)], [(2, 0), (1, 0)]);
        assert_eq!(step(1, 0), (1, 1));
    }
}
