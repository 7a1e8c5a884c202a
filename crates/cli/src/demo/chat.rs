//! One question to a device's endpoint, its answer shown as it is made.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{Context, Failure, Result};

/// The longest line of an answer's stream, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(120);

/// How an answer came.
pub struct Answer {
    /// Pieces of text received.
    pub pieces: u32,
    /// Until the first one.
    pub first: Duration,
    /// Until the last one.
    pub total: Duration,
}

/// Asks `question` and prints the answer to stdout piece by piece.
pub async fn ask(endpoint: &str, question: &str, max_tokens: u32) -> Result<Answer> {
    let what = || format!("ask {endpoint}");
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build().internal(what)?;
    let body = json!({
        "messages": [{ "role": "user", "content": question }],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": true,
    });
    let started = Instant::now();
    let request = client.post(format!("{endpoint}/v1/chat/completions")).json(&body);
    let mut response = request.send().await.internal(what)?;
    if !response.status().is_success() {
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        return Err(Failure::internal(format!("{}: {status} {text}", what())));
    }
    let mut answer = Answer { pieces: 0, first: Duration::ZERO, total: Duration::ZERO };
    let mut pending = Vec::new();
    let mut stdout = std::io::stdout();
    while let Some(chunk) = response.chunk().await.internal(what)? {
        pending.extend_from_slice(&chunk);
        if pending.len() > MAX_LINE_BYTES {
            return Err(Failure::internal(format!("{}: a line of the answer is too long", what())));
        }
        // Server-sent events (HTML standard, 9.2.6): `data: …` lines; `[DONE]` is OpenAI's end.
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let Some(data) = line.trim_end().strip_prefix("data:") else { continue };
            let Ok(event) = serde_json::from_str::<Value>(data.trim()) else { continue };
            if let Some(error) = event.pointer("/error/message").and_then(Value::as_str) {
                return Err(Failure::internal(format!("{}: {error}", what())));
            }
            let text = event.pointer("/choices/0/delta/content").and_then(Value::as_str);
            if let Some(text) = text.filter(|text| !text.is_empty()) {
                if answer.pieces == 0 {
                    answer.first = started.elapsed();
                }
                answer.pieces += 1;
                let shown = text.replace('\n', "\n     ");
                // A closed stdout ends the demo's talk, not the demo.
                let _ = stdout.write_all(shown.as_bytes()).and_then(|()| stdout.flush());
            }
        }
    }
    println!();
    answer.total = started.elapsed();
    if answer.pieces == 0 {
        return Err(Failure::internal(format!("{}: the answer is empty", what())));
    }
    Ok(answer)
}
