//! From tokens to text: whole characters, and never a part of a stop string.

use std::collections::VecDeque;

use super::protocol::{Piece, TokenLogprob};
use crate::llama::Token;

/// Gathers an answer's bytes and gives out what can no longer change.
pub(super) struct TextAssembler {
    stops: Vec<String>,
    /// Bytes of a character whose end has not come.
    partial: Vec<u8>,
    /// Text that may be the start of a stop string.
    held: String,
    /// Bytes given out so far, and bytes that came in so far.
    given_bytes: usize,
    taken_bytes: usize,
    /// Tokens not given out yet, each with the place in the answer where it begins.
    tokens: VecDeque<(usize, Token, Option<TokenLogprob>)>,
}

impl TextAssembler {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            partial: Vec::new(),
            held: String::new(),
            given_bytes: 0,
            taken_bytes: 0,
            tokens: VecDeque::new(),
        }
    }

    /// Takes a token's bytes; returns what can be given out, and whether a stop string came.
    pub(super) fn push(
        &mut self,
        token: Token,
        bytes: &[u8],
        logprob: Option<TokenLogprob>,
    ) -> (Piece, bool) {
        self.tokens.push_back((self.taken_bytes, token, logprob));
        self.partial.extend_from_slice(bytes);
        let text = take_characters(&mut self.partial);
        self.taken_bytes += text.len();
        // The place of a token that begins inside a character is where that character begins.
        let searched_from = self.held.len();
        self.held.push_str(&text);
        if let Some(end) = self.find_stop(searched_from) {
            self.held.truncate(end);
            return (self.give(end, true), true);
        }
        let kept = self.possible_stop_bytes();
        let ready = self.held.len() - kept;
        (self.give(ready, false), false)
    }

    /// What is left at the end of the answer.
    pub(super) fn finish(&mut self) -> Piece {
        if !self.partial.is_empty() {
            let text = String::from_utf8_lossy(&self.partial).into_owned();
            self.partial.clear();
            self.taken_bytes += text.len();
            self.held.push_str(&text);
        }
        let ready = self.held.len();
        self.give(ready, false)
    }

    /// Gives out the first `ready` bytes that are held and the tokens that begin in them.
    fn give(&mut self, ready: usize, last: bool) -> Piece {
        let rest = self.held.split_off(ready);
        let text = std::mem::replace(&mut self.held, rest);
        self.given_bytes += text.len();
        let mut piece = Piece { text, ..Piece::default() };
        let open = !self.held.is_empty() || !self.partial.is_empty() || last;
        while let Some((begin, ..)) = self.tokens.front()
            && (*begin < self.given_bytes || (!open && *begin == self.given_bytes))
        {
            let (_, token, logprob) = self.tokens.pop_front().expect("there is a front");
            piece.tokens.push(token);
            piece.logprobs.extend(logprob);
        }
        piece
    }

    /// Where the earliest stop string begins, looking only where the new text can take part.
    fn find_stop(&self, new_from: usize) -> Option<usize> {
        let longest = self.stops.iter().map(String::len).max()?;
        let mut from = new_from.saturating_sub(longest);
        while !self.held.is_char_boundary(from) {
            from -= 1;
        }
        let found = self.stops.iter().filter_map(|stop| self.held[from..].find(stop.as_str()));
        found.min().map(|at| from + at)
    }

    /// The length of the longest end of the held text that begins a stop string.
    fn possible_stop_bytes(&self) -> usize {
        let begins = |stop: &String| {
            let most = stop.len().saturating_sub(1).min(self.held.len());
            (1..=most).rev().find(|length| {
                let start = self.held.len() - length;
                stop.as_bytes().starts_with(&self.held.as_bytes()[start..])
            })
        };
        let longest = self.stops.iter().filter_map(begins).max().unwrap_or(0);
        // Stop strings are whole characters, so a match begins at one; an accidental match of
        // bytes inside a character is widened to its start.
        let mut start = self.held.len() - longest;
        while !self.held.is_char_boundary(start) {
            start -= 1;
        }
        self.held.len() - start
    }
}

/// Takes the complete characters from the front of `bytes`; wrong bytes become U+FFFD.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(std::str::from_utf8(&bytes[..valid]).expect("checked just now"));
                match error.error_len() {
                    Some(wrong) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        bytes.drain(..valid + wrong);
                    }
                    None => {
                        bytes.drain(..valid);
                        return text;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `pieces` as tokens 0, 1, … and returns the text, its pieces and the tokens given out.
    fn check(stops: &[&str], pieces: &[&[u8]], text: &str, tokens: &[Token], stopped: bool) {
        let mut assembler = TextAssembler::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let (mut found, mut given, mut ended) = (String::new(), Vec::new(), false);
        for (token, bytes) in pieces.iter().enumerate() {
            let (piece, stop) = assembler.push(token as Token, bytes, None);
            found.push_str(&piece.text);
            given.extend(piece.tokens);
            if stop {
                ended = true;
                break;
            }
        }
        if !ended {
            let piece = assembler.finish();
            found.push_str(&piece.text);
            given.extend(piece.tokens);
        }
        assert_eq!((found.as_str(), given.as_slice(), ended), (text, tokens, stopped));
    }

    #[test]
    fn characters_come_whole() {
        check(&[], &[b"a", b"\xe2", b"\x82", b"\xac", b"!"], "a€!", &[0, 1, 2, 3, 4], false);
        check(&[], &[b"a\xff", b"b"], "a\u{fffd}b", &[0, 1], false);
        check(&[], &[b"a", b"\xe2\x82"], "a\u{fffd}", &[0, 1], false);
        check(&[], &[b"", b"x", b""], "x", &[0, 1, 2], false);
    }

    #[test]
    fn a_stop_string_is_never_shown() {
        check(&["END"], &[b"one E", b"N", b"D two"], "one ", &[0], true);
        check(&["END"], &[b"one E", b"N", b"o"], "one ENo", &[0, 1, 2], false);
        check(&["END"], &[b"one", b"END"], "one", &[0], true);
        check(&["END"], &[b"EN"], "EN", &[0], false);
        check(&["\n\n", "b"], &[b"a\n", b"\nb"], "a", &[0], true);
        check(&["aab"], &[b"a", b"a", b"a", b"b"], "a", &[0], true);
        check(&["", "x"], &[b"y", b"x"], "y", &[0], true);
        check(&["é"], &[b"caf", b"\xc3", b"\xa9s"], "caf", &[0], true);
        check(
            &["ẞ"],
            "ạ".as_bytes().chunks(1).collect::<Vec<_>>().as_slice(),
            "ạ",
            &[0, 1, 2],
            false,
        );
    }
}
