//! The shape of an answer, found out while it passes: whether it goes in circles, refuses, or is JSON
//! that is none. Nothing of its text outlives it, and no more than [`MAX_JSON_BYTES`] of it are held.

use std::collections::VecDeque;

use serde::de::IgnoredAny;

use crate::llama::Token;
use crate::worker::Piece;

/// The bytes at its beginning in which an answer refuses, if it does.
const REFUSAL_BYTES: usize = 120;
/// How refusals begin, in English and lower case. A model that speaks another language is not
/// caught; one that says such a thing without refusing is. Only how often this changes counts.
const REFUSALS: [&str; 14] = [
    "i can't ",
    "i can’t ",
    "i cannot ",
    "i won't ",
    "i won’t ",
    "i'm sorry, but",
    "i’m sorry, but",
    "i am sorry, but",
    "i'm unable to",
    "i’m unable to",
    "i am unable to",
    "i'm not able to",
    "i am not able to",
    "as an ai",
];
/// An answer goes in circles when this many of its last tokens are the same few again and again.
const CIRCLE_TOKENS: usize = 32;
/// These few are at most so many.
const CIRCLE_PERIOD: usize = 8;
/// Answers that look like JSON and are longer are not judged, in bytes.
const MAX_JSON_BYTES: usize = 64 * 1024;

/// What is found out of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    /// Its end is the same few tokens again and again.
    pub repetitive: bool,
    /// It begins with a refusal.
    pub refusal: bool,
    /// It begins like JSON; whether it is.
    pub json: Option<bool>,
}

/// An answer that passes.
#[derive(Debug, Default)]
pub(crate) struct Shape {
    text: String,
    /// Whether the text no longer needs to be kept for being JSON.
    no_json: bool,
    recent: VecDeque<Token>,
}

impl Shape {
    /// Takes in what was generated.
    pub(crate) fn piece(&mut self, piece: &Piece) {
        for token in &piece.tokens {
            if self.recent.len() == CIRCLE_TOKENS {
                self.recent.pop_front();
            }
            self.recent.push_back(*token);
        }
        if !self.no_json || self.text.len() < REFUSAL_BYTES {
            self.text.push_str(&piece.text);
            let begins = json_of(&self.text);
            let other = begins.chars().next().is_some_and(|first| first != '{' && first != '[');
            // Backticks may yet become the fence of a code block.
            self.no_json |= (other && !begins.starts_with('`')) || self.text.len() > MAX_JSON_BYTES;
        }
    }

    /// What the answer was, now that it is over.
    pub(crate) fn findings(&self) -> Findings {
        let end = self.text.char_indices().map(|(at, _)| at).find(|at| *at >= REFUSAL_BYTES);
        let head = self.text[..end.unwrap_or(self.text.len())].to_lowercase();
        let json = json_of(&self.text);
        let looks = !self.no_json && json.starts_with(['{', '[']);
        Findings {
            repetitive: goes_in_circles(&self.recent),
            refusal: REFUSALS.iter().any(|refusal| head.contains(refusal)),
            json: looks.then(|| serde_json::from_str::<IgnoredAny>(json).is_ok()),
        }
    }
}

/// The text without the fence of a code block around it.
fn json_of(text: &str) -> &str {
    let text = text.trim();
    let Some(rest) = text.strip_prefix("```") else { return text };
    // The language's name may come in pieces.
    let rest = match rest.strip_prefix("json") {
        Some(rest) => rest,
        None if "json".starts_with(rest) => "",
        None => rest,
    };
    rest.strip_suffix("```").unwrap_or(rest).trim()
}

fn goes_in_circles(recent: &VecDeque<Token>) -> bool {
    let circles =
        |period: usize| recent.iter().zip(recent.iter().skip(period)).all(|(a, b)| a == b);
    recent.len() == CIRCLE_TOKENS && (1..=CIRCLE_PERIOD).any(circles)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(pieces: &[&str]) -> Findings {
        let mut shape = Shape::default();
        for text in pieces {
            shape.piece(&Piece { text: (*text).to_owned(), ..Piece::default() });
        }
        shape.findings()
    }

    #[test]
    fn json_is_told_from_what_only_begins_like_it() {
        for (pieces, json) in [
            (&["{\"a\"", ": [1, 2]}"][..], Some(true)),
            (&[" \n[", "]"], Some(true)),
            (&["```", "js", "on\n{\"a\": 1}", "\n```"], Some(true)),
            (&["```json\n{\"a\": 1"], Some(false)),
            (&["{\"a\": ", "nope}"], Some(false)),
            (&["{\"a\": 1} and more"], Some(false)),
            (&["It is {\"a\": 1}"], None),
            (&["`x` is a name"], None),
            (&[""], None),
            (&[], None),
        ] {
            assert_eq!(findings(pieces).json, json, "{pieces:?}");
        }
        let long = "[0,".repeat(MAX_JSON_BYTES);
        assert_eq!(findings(&[&long]).json, None, "too long to be judged");
    }

    #[test]
    fn refusals_are_at_the_beginning() {
        assert!(findings(&["I'm sor", "ry, but I cannot help."]).refusal);
        assert!(findings(&["As an AI, I have no opinion"]).refusal);
        assert!(!findings(&["Of course."]).refusal);
        let late = format!("{} I cannot say.", "Äpfel ".repeat(40));
        assert!(!findings(&[&late]).refusal);
    }

    #[test]
    fn circles_are_at_the_end() {
        let repetitive = |tokens: &[Token]| {
            let mut shape = Shape::default();
            for token in tokens {
                shape.piece(&Piece { tokens: vec![*token], ..Piece::default() });
            }
            shape.findings().repetitive
        };
        let line: Vec<Token> = (0..200).collect();
        assert!(!repetitive(&line));
        let same = vec![7; CIRCLE_TOKENS];
        assert!(repetitive(&same));
        assert!(!repetitive(&same[1..]), "too short to tell");
        let circle: Vec<Token> = line.iter().copied().chain((0..40).map(|i| i % 5)).collect();
        assert!(repetitive(&circle));
        let wide: Vec<Token> = (0..90).map(|i| i % 9).collect();
        assert!(!repetitive(&wide));
        let left: Vec<Token> = circle.into_iter().chain([1_000]).collect();
        assert!(!repetitive(&left), "it found its way out");
    }
}
