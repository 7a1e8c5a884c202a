//! An endpoint as a client sees it: ours, or a peer's.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::error::{Context as _, Failure, Result};

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// An OpenAI-compatible endpoint.
#[derive(Clone)]
pub struct Endpoint {
    client: reqwest::Client,
    url: String,
}

/// One streamed answer.
pub struct Answer {
    /// From the request to the first text, in seconds.
    pub first_s: f64,
    /// From the first text to the last, in seconds.
    pub rest_s: f64,
    /// Tokens of the prompt that had to be computed, where it says so.
    pub prompt_tokens: Option<u64>,
    /// Tokens generated.
    pub tokens: u64,
    /// When each text came.
    pieces: Vec<Instant>,
}

/// What came of a request under load.
pub struct Outcome {
    /// HTTP status; 0 if there was none.
    pub status: u16,
    /// From the request to the whole answer, in seconds.
    pub seconds: f64,
}

impl Endpoint {
    pub fn new(url: &str) -> Result<Self> {
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE);
        let client = client.tcp_nodelay(true).build().internal(|| "make a client".to_owned())?;
        Ok(Self { client, url: url.trim_end_matches('/').to_owned() })
    }

    /// The most probable continuation of a text, streamed.
    pub async fn stream(&self, prompt: &str, max_tokens: u64) -> Result<Answer> {
        let what = || format!("ask {}", self.url);
        let body = json!({
            "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": true,
            "ignore_eos": true, "stream_options": { "include_usage": true },
        });
        let started = Instant::now();
        let request = self.client.post(format!("{}/v1/completions", self.url)).json(&body);
        let response = request.send().await.user(what)?.error_for_status().user(what)?;
        let mut pieces = response.bytes_stream();
        let (mut buffer, mut texts) = (Vec::new(), Vec::new());
        let (mut prompt_tokens, mut tokens) = (None, 0);
        while let Some(piece) = pieces.next().await {
            buffer.extend_from_slice(&piece.user(what)?);
            while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = buffer.drain(..end + 2).collect();
                let event = event.strip_prefix(b"data: ").unwrap_or_default();
                let Ok(event) = serde_json::from_slice::<Value>(event) else { continue };
                if event["choices"][0]["text"].as_str().is_some_and(|text| !text.is_empty()) {
                    texts.push(Instant::now());
                }
                let usage = &event["usage"];
                let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
                if let Some(known) = usage["prompt_tokens"].as_u64() {
                    prompt_tokens = Some(known.saturating_sub(cached));
                }
                tokens = usage["completion_tokens"].as_u64().unwrap_or(tokens);
            }
        }
        let (Some(first), Some(last)) = (texts.first(), texts.last()) else {
            return Err(Failure::user(format!("{} gave no text", self.url)));
        };
        if tokens == 0 {
            // It does not count them; what is not one character of its own is rare.
            tokens = texts.len() as u64;
        }
        Ok(Answer {
            first_s: (*first - started).as_secs_f64(),
            rest_s: (*last - *first).as_secs_f64(),
            prompt_tokens,
            tokens,
            pieces: texts,
        })
    }

    /// The beginning of a text that has `most` tokens, or all of it where it has no more.
    pub async fn text_of(&self, text: &str, most: usize) -> Result<String> {
        let what = || format!("ask {}", self.url);
        let mut letters: Vec<char> = text.chars().collect();
        loop {
            let text: String = letters.iter().collect();
            let body = json!({ "content": text, "add_special": true });
            let request = self.client.post(format!("{}/tokenize", self.url)).json(&body);
            let answer = request.send().await.user(what)?.error_for_status().user(what)?;
            let answer: Value = answer.json().await.user(what)?;
            let count = answer["tokens"].as_array().map_or(0, Vec::len);
            if count <= most || letters.len() <= 1 {
                return Ok(text);
            }
            // As many as it should be, by what a letter takes, and fewer each time.
            letters.truncate((letters.len() * most / count).min(letters.len() - 1).max(1));
        }
    }

    /// One token after a text, whole.
    pub async fn one_token(&self, prompt: &str) -> Outcome {
        let body = json!({ "prompt": prompt, "max_tokens": 1, "temperature": 0 });
        let started = Instant::now();
        let request = self.client.post(format!("{}/v1/completions", self.url)).json(&body);
        let status = match request.send().await {
            Ok(response) => {
                let status = response.status().as_u16();
                response.bytes().await.map_or(0, |_| status)
            }
            Err(_) => 0,
        };
        Outcome { status, seconds: started.elapsed().as_secs_f64() }
    }

    /// Several answers at the same time; tokens per second of all together, while all of them run: from
    /// the moment at which each has its first until the first of them ends. Where they never all run,
    /// from the first of all to the last.
    pub async fn streams(&self, prompts: &[String], max_tokens: u64) -> Result<f64> {
        let answers = join_all(prompts.iter().map(|prompt| self.stream(prompt, max_tokens))).await;
        let answers = answers.into_iter().collect::<Result<Vec<_>>>()?;
        let begin = answers.iter().filter_map(|answer| answer.pieces.first()).max();
        let end = answers.iter().filter_map(|answer| answer.pieces.last()).min();
        let (Some(begin), Some(end)) = (begin, end) else { return Ok(0.0) };
        if begin >= end {
            let begin = answers.iter().filter_map(|answer| answer.pieces.first()).min();
            let end = answers.iter().filter_map(|answer| answer.pieces.last()).max();
            let (Some(begin), Some(end)) = (begin, end) else { return Ok(0.0) };
            let seconds = end.saturating_duration_since(*begin).as_secs_f64();
            let tokens: u64 = answers.iter().map(|answer| answer.tokens).sum();
            return Ok(tokens as f64 / seconds.max(1e-9));
        }
        let of = |answer: &Answer| {
            let within = |at: &&Instant| *at > begin && *at <= end;
            // A character may be made of several tokens.
            let each = answer.tokens as f64 / answer.pieces.len() as f64;
            answer.pieces.iter().filter(within).count() as f64 * each
        };
        let seconds = end.saturating_duration_since(*begin).as_secs_f64();
        Ok(answers.iter().map(of).sum::<f64>() / seconds.max(1e-9))
    }

    /// `clients` of them ask again and again, until `requests` were made.
    pub async fn crowd(&self, clients: usize, requests: usize, prompts: &[String]) -> Vec<Outcome> {
        let next = std::sync::atomic::AtomicUsize::new(0);
        let next = &next;
        let client = async move || {
            let mut outcomes = Vec::new();
            loop {
                let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if number >= requests {
                    return outcomes;
                }
                let outcome = self.one_token(&prompts[number % prompts.len()]).await;
                if outcome.status == 429 {
                    // As it is asked to, a little later.
                    tokio::time::sleep(Duration::from_millis(200 + (number as u64 % 100) * 8))
                        .await;
                }
                outcomes.push(outcome);
            }
        };
        join_all((0..clients).map(|_| client())).await.into_iter().flatten().collect()
    }
}
