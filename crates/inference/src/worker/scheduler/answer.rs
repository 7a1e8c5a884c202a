//! An answer under way: choosing its next token, and what comes of it.

use std::time::Instant;

use super::super::protocol::{Finish, FinishReason, GenerateRequest, Piece, RequestError};
use super::super::sampler::{Sampler, entropy, logprob};
use super::super::text::TextAssembler;
use super::Outcome;
use super::drafting::Drafts;
use crate::constraint::Guide;
use crate::llama::{Model, Token};

/// The entropy of one token in so many is taken: one pass over the vocabulary, which decoding a token
/// outweighs a hundred times.
const ENTROPY_EVERY: u32 = 8;

/// An answer under way.
pub(in super::super) struct Generating {
    pub(super) request_max_tokens: Option<u32>,
    pub(super) logprobs: Option<u32>,
    sampler: Sampler,
    guide: Option<Guide>,
    text: TextAssembler,
    /// The prompt, where the answer begins with it; taken when it was handed out.
    pub(super) echo: Option<Piece>,
    /// Whether nothing of its prompt comes from the cache.
    pub(super) fresh: bool,
    /// Whether the token that ends the answer is among its log-probabilities.
    shows_end: bool,
    prompt_tokens: usize,
    /// The tokens at the beginning that stay when its context is full; absent where it then ends.
    pub(super) keep: Option<usize>,
    /// How often its context was full.
    pub(super) shifts: u32,
    pub(super) drafts: Drafts,
    generated: u32,
    first_token_at: Option<Instant>,
    entropy_tokens: u32,
    entropy_nats: f64,
}

impl Generating {
    pub(in super::super) fn new(
        request: GenerateRequest,
        guide: Option<Guide>,
        prompt_tokens: usize,
        echo: Option<Piece>,
    ) -> Self {
        Self {
            request_max_tokens: request.max_tokens,
            logprobs: request.logprobs,
            sampler: Sampler::new(request.sampling),
            guide,
            text: TextAssembler::new(request.stop),
            echo,
            fresh: request.fresh,
            shows_end: request.echo,
            prompt_tokens,
            keep: None,
            shifts: 0,
            drafts: Drafts::default(),
            generated: 0,
            first_token_at: None,
            entropy_tokens: 0,
            entropy_nats: 0.0,
        }
    }

    /// Its end, and what it cost.
    fn finish(&self, reason: FinishReason, first_token_at: Instant, stage: &Stage<'_>) -> Finish {
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Finish {
            reason,
            prompt_tokens: number(self.prompt_tokens),
            cached_tokens: number(stage.cached_tokens),
            restored_tokens: number(stage.restored_tokens),
            completion_tokens: self.generated,
            context_shifts: self.shifts,
            drafted_tokens: self.drafts.drafted,
            accepted_tokens: self.drafts.accepted,
            queue_ms: (stage.started - stage.arrived).as_secs_f64() * 1e3,
            prompt_ms: (first_token_at - stage.started).as_secs_f64() * 1e3,
            decode_ms: first_token_at.elapsed().as_secs_f64() * 1e3,
            entropy_tokens: self.entropy_tokens,
            entropy_nats: self.entropy_nats,
        }
    }

    /// Tokens that may still come, at most.
    pub(super) fn most_left(&self) -> usize {
        let left = |max: u32| max.saturating_sub(self.generated) as usize;
        self.request_max_tokens.map_or(usize::MAX, left)
    }

    /// Whether the log-probability of the token after `place` of the prompt is wanted.
    pub(super) fn scores(&self, place: usize) -> bool {
        self.echo.is_some() && self.logprobs.is_some() && place + 1 < self.prompt_tokens
    }
}

/// What surrounds an answer under way.
pub(super) struct Stage<'a> {
    pub(super) model: &'a Model,
    pub(super) context_tokens: usize,
    pub(super) started: Instant,
    pub(super) arrived: Instant,
    pub(super) cached_tokens: usize,
    pub(super) restored_tokens: usize,
}

/// Chooses the next token of an answer, appends it to `tokens` and hands out its text.
pub(super) fn next_token(
    generating: &mut Generating,
    tokens: &mut Vec<Token>,
    logits: &[f32],
    stage: &Stage<'_>,
    mut emit: impl FnMut(Piece),
) -> Outcome {
    let first_token_at = *generating.first_token_at.get_or_insert_with(Instant::now);
    if generating.request_max_tokens == Some(0) {
        return Outcome::Finished(generating.finish(FinishReason::Length, first_token_at, stage));
    }
    let token = match choose(generating, tokens, logits, stage.model) {
        Ok(Some(token)) => token,
        Ok(None) => return Outcome::NoNumbers,
        Err(error) => return Outcome::Failed(error),
    };
    if generating.generated.is_multiple_of(ENTROPY_EVERY) {
        generating.entropy_tokens += 1;
        generating.entropy_nats += entropy(logits);
    }
    generating.generated += 1;
    let mut reason = None;
    let ends = stage.model.ends(token);
    let entry = generating
        .logprobs
        .filter(|_| !ends || generating.shows_end)
        .map(|top| logprob(stage.model, logits, token, top));
    if ends {
        reason = Some(FinishReason::Stop);
        if entry.is_some() {
            emit(generating.text.push(token, &[], entry).0);
        }
    } else {
        let bytes = stage.model.piece(token, false);
        let (piece, stopped) = generating.text.push(token, &bytes, entry);
        emit(piece);
        tokens.push(token);
        let complete = match generating.guide.as_mut().map(|guide| guide.take(token)).transpose() {
            Ok(complete) => complete.unwrap_or(false),
            Err(message) => return Outcome::Failed(misguided(generating, message)),
        };
        if stopped || complete {
            reason = Some(FinishReason::Stop);
        } else if generating.request_max_tokens.is_some_and(|max| generating.generated >= max)
            || (tokens.len() >= stage.context_tokens && generating.keep.is_none())
        {
            reason = Some(FinishReason::Length);
        }
        if stopped {
            generating.text = TextAssembler::new(Vec::new());
        }
    }
    let Some(reason) = reason else { return Outcome::GoesOn };
    let rest = generating.text.finish();
    if rest != Piece::default() {
        emit(rest);
    }
    Outcome::Finished(generating.finish(reason, first_token_at, stage))
}

/// Chooses the next token: the sampler's own choice where the guide allows it, which needs no look
/// at the whole vocabulary; else one among those that are allowed. Either way each token has its
/// share of what is allowed.
fn choose(
    generating: &mut Generating,
    tokens: &[Token],
    logits: &[f32],
    model: &Model,
) -> Result<Option<Token>, RequestError> {
    let Some(mut token) = generating.sampler.propose(logits, tokens) else { return Ok(None) };
    if let Some(guide) = &mut generating.guide {
        let allowed = if model.ends(token) { guide.may_end() } else { guide.allows(token) };
        let mask = match allowed {
            Ok(true) => Ok(None),
            Ok(false) => guide.mask().map(Some),
            Err(message) => Err(message),
        };
        match mask {
            Ok(None) => {}
            Ok(Some(mask)) => match generating.sampler.propose_within(&mask) {
                Some(allowed) => token = allowed,
                None => return Ok(None),
            },
            Err(message) => return Err(misguided(generating, message)),
        }
    }
    generating.sampler.choose(token);
    Ok(Some(token))
}

/// A guide that cannot go on.
fn misguided(generating: &Generating, message: String) -> RequestError {
    let parameter = generating.guide.as_ref().map_or("constraint", |guide| guide.parameter());
    RequestError::Invalid { parameter: parameter.to_owned(), message }
}
