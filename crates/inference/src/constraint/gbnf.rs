//! GBNF, llama.cpp's notation of grammars, translated into Lark.
//!
//! A grammar without recursion becomes one regular expression. In any other each character is a
//! symbol of its own: the parser then knows no greedy tokens, and accepts exactly the language.

use std::collections::HashMap;
use std::fmt::Write as _;

/// The deepest nesting of groups.
const MAX_DEPTH: usize = 12;
/// The most rules that are written inside of each other.
const MAX_OPEN: usize = 64;
/// The most often that something is repeated by a number.
const MAX_REPEAT: u32 = 10_000;
/// The most signs of repetition after one item.
const MAX_SIGNS: u32 = 4;
/// The most bytes of a grammar as one regular expression.
const MAX_REGEX_BYTES: usize = 64 << 10;

/// A grammar in Lark.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lark {
    pub(super) text: String,
    /// Whether each character is a symbol.
    pub(super) by_character: bool,
}

enum Node {
    /// One character within these ranges; outside of them if `negated`.
    Class {
        negated: bool,
        ranges: Vec<(u32, u32)>,
    },
    Rule(usize),
    Sequence(Vec<Node>),
    Choice(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

/// Translates a grammar whose start is the rule `root`.
///
/// # Errors
/// It is no GBNF; the message says where.
pub(super) fn translate(source: &str) -> Result<Lark, String> {
    let mut parser = Parser {
        rest: source,
        line: 1,
        names: HashMap::new(),
        order: Vec::new(),
        rules: HashMap::new(),
    };
    parser.grammar()?;
    let root = *parser.names.get("root").ok_or("it has no rule `root`")?;
    let mut rules = Vec::with_capacity(parser.order.len());
    for (index, name) in parser.order.iter().enumerate() {
        let rule = parser.rules.remove(&index);
        rules.push(rule.ok_or_else(|| format!("the rule `{name}` is used and not defined"))?);
    }
    let mut regexes = Regexes { rules: &rules, known: HashMap::new(), open: Vec::new() };
    if let Some(regex) = regexes.of_rule(root) {
        return Ok(Lark { text: format!("start: /(?:{regex})/"), by_character: false });
    }
    let mut text = format!("start: r{root}\n");
    for (index, rule) in rules.iter().enumerate() {
        let _ = write!(text, "r{index}: ");
        write_lark(rule, &mut text);
        text.push('\n');
    }
    Ok(Lark { text, by_character: true })
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
    names: HashMap<String, usize>,
    /// The rules' names by index.
    order: Vec<String>,
    rules: HashMap<usize, Node>,
}

impl Parser<'_> {
    fn wrong<T>(&self, message: &str) -> Result<T, String> {
        Err(format!("line {}: {message}", self.line))
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let letter = self.peek()?;
        self.rest = &self.rest[letter.len_utf8()..];
        self.line += usize::from(letter == '\n');
        Some(letter)
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        if found {
            self.next();
        }
        found
    }

    /// Skips spaces and comments, and the ends of lines if `lines`.
    fn space(&mut self, lines: bool) {
        while let Some(letter) = self.peek() {
            match letter {
                ' ' | '\t' => {}
                '\r' | '\n' if lines => {}
                '#' => {
                    let end = self.rest.find(['\r', '\n']).unwrap_or(self.rest.len());
                    self.rest = &self.rest[end..];
                    continue;
                }
                _ => return,
            }
            self.next();
        }
    }

    fn grammar(&mut self) -> Result<(), String> {
        self.space(true);
        while !self.rest.is_empty() {
            let Some(rule) = self.name() else { return self.wrong("expected the name of a rule") };
            self.space(false);
            match self.rest.strip_prefix("::=") {
                Some(rest) => self.rest = rest,
                None => return self.wrong("expected `::=` after the name of a rule"),
            }
            self.space(true);
            let node = self.choice(0)?;
            if self.rules.insert(rule, node).is_some() {
                let message = format!("the rule `{}` is defined twice", self.order[rule]);
                return self.wrong(&message);
            }
            if !self.rest.is_empty() && !self.rest.starts_with(['\r', '\n']) {
                return self.wrong("expected the end of the line");
            }
            self.space(true);
        }
        Ok(())
    }

    /// The index of the rule whose name stands here.
    fn name(&mut self) -> Option<usize> {
        let word = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '-' | '_');
        let end = self.rest.find(|letter| !word(letter)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        if name.is_empty() {
            return None;
        }
        self.rest = rest;
        if let Some(index) = self.names.get(name) {
            return Some(*index);
        }
        self.order.push(name.to_owned());
        self.names.insert(name.to_owned(), self.order.len() - 1);
        Some(self.order.len() - 1)
    }

    fn choice(&mut self, depth: usize) -> Result<Node, String> {
        if depth > MAX_DEPTH {
            return self.wrong(&format!("groups are nested deeper than {MAX_DEPTH}"));
        }
        let mut options = vec![self.sequence(depth)?];
        while self.take('|') {
            self.space(true);
            options.push(self.sequence(depth)?);
        }
        Ok(Node::Choice(options))
    }

    fn sequence(&mut self, depth: usize) -> Result<Node, String> {
        let mut items = Vec::new();
        while let Some(letter) = self.peek() {
            let item = match letter {
                '"' => self.literal()?,
                '[' => self.class()?,
                '.' => {
                    self.next();
                    Node::Class { negated: true, ranges: Vec::new() }
                }
                '(' => {
                    self.next();
                    self.space(true);
                    let group = self.choice(depth + 1)?;
                    if !self.take(')') {
                        return self.wrong("expected `)`");
                    }
                    group
                }
                '<' | '!' => return self.wrong("tokens by name or number are not supported"),
                _ => match self.name() {
                    Some(rule) => Node::Rule(rule),
                    None => break,
                },
            };
            self.space(depth > 0);
            let item = self.repeats(item)?;
            items.push(item);
            self.space(depth > 0);
        }
        Ok(Node::Sequence(items))
    }

    /// The signs of repetition after an item.
    fn repeats(&mut self, mut item: Node) -> Result<Node, String> {
        for signs in 0.. {
            let (least, most) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    let Some(end) = self.rest.find('}') else { return self.wrong("expected `}`") };
                    let inside = &self.rest[1..end];
                    let (least, most) = match inside.split_once(',') {
                        None => (inside.trim().parse::<u32>(), Some(inside.trim().parse())),
                        Some((least, most)) if most.trim().is_empty() => {
                            (least.trim().parse(), None)
                        }
                        Some((least, most)) => {
                            (least.trim().parse(), Some(most.trim().parse::<u32>()))
                        }
                    };
                    let (Ok(least), Ok(most)) = (least, most.transpose()) else {
                        return self.wrong("expected `{m}`, `{m,}` or `{m,n}`");
                    };
                    if most.unwrap_or(least).max(least) > MAX_REPEAT {
                        return self.wrong(&format!("more than {MAX_REPEAT} repetitions"));
                    }
                    if most.is_some_and(|most| most < least) {
                        return self.wrong("the second number of `{m,n}` is the smaller one");
                    }
                    // The closing brace goes below.
                    self.rest = &self.rest[end..];
                    (least, most)
                }
                _ => return Ok(item),
            };
            if signs == MAX_SIGNS {
                return self.wrong("too many signs of repetition follow each other");
            }
            self.next();
            item = Node::Repeat(Box::new(item), least, most);
        }
        Ok(item)
    }

    fn literal(&mut self) -> Result<Node, String> {
        self.next();
        let mut items = Vec::new();
        while !self.take('"') {
            let code = self.character()?;
            items.push(Node::Class { negated: false, ranges: vec![(code, code)] });
        }
        Ok(Node::Sequence(items))
    }

    fn class(&mut self) -> Result<Node, String> {
        self.next();
        let negated = self.take('^');
        let mut ranges = Vec::new();
        while !self.take(']') {
            let first = self.character()?;
            let mut last = first;
            if self.rest.starts_with('-') && !self.rest.starts_with("-]") {
                self.next();
                last = self.character()?;
            }
            if last < first {
                return self.wrong("a range of characters ends before it begins");
            }
            ranges.push((first, last));
        }
        if ranges.is_empty() && !negated {
            return self.wrong("`[]` matches nothing");
        }
        Ok(Node::Class { negated, ranges })
    }

    fn character(&mut self) -> Result<u32, String> {
        let digits = match self.next() {
            Some('\\') => match self.next() {
                Some('x') => 2,
                Some('u') => 4,
                Some('U') => 8,
                Some('t') => return Ok(u32::from('\t')),
                Some('r') => return Ok(u32::from('\r')),
                Some('n') => return Ok(u32::from('\n')),
                Some(letter @ ('\\' | '"' | '[' | ']')) => return Ok(u32::from(letter)),
                _ => return self.wrong("an unknown escape follows `\\`"),
            },
            Some(letter) => return Ok(u32::from(letter)),
            None => return self.wrong("it ends inside of a literal or a class"),
        };
        let code = self.rest.get(..digits).and_then(|text| u32::from_str_radix(text, 16).ok());
        match code.and_then(char::from_u32) {
            Some(letter) => {
                self.rest = &self.rest[digits..];
                Ok(u32::from(letter))
            }
            None => self.wrong(&format!("expected {digits} hexadecimal digits of a character")),
        }
    }
}

/// A class as a regular expression.
fn class(negated: bool, ranges: &[(u32, u32)]) -> String {
    if ranges.is_empty() {
        return r"[\x{0}-\x{10FFFF}]".to_owned();
    }
    let mut text = String::from(if negated { "[^" } else { "[" });
    for (first, last) in ranges {
        let _ = write!(text, r"\x{{{first:X}}}");
        if last > first {
            let _ = write!(text, r"-\x{{{last:X}}}");
        }
    }
    text.push(']');
    text
}

fn repeat(least: u32, most: Option<u32>) -> String {
    match (least, most) {
        (0, None) => "*".to_owned(),
        (1, None) => "+".to_owned(),
        (0, Some(1)) => "?".to_owned(),
        (least, None) => format!("{{{least},}}"),
        (least, Some(most)) => format!("{{{least},{most}}}"),
    }
}

/// Rules as regular expressions.
struct Regexes<'a> {
    rules: &'a [Node],
    known: HashMap<usize, Option<String>>,
    /// The rules that are being written: one that comes again is recursive.
    open: Vec<usize>,
}

impl Regexes<'_> {
    /// Absent where the rule is recursive, or too long as a regular expression.
    fn of_rule(&mut self, rule: usize) -> Option<String> {
        if let Some(known) = self.known.get(&rule) {
            return known.clone();
        }
        if self.open.contains(&rule) || self.open.len() > MAX_OPEN {
            return None;
        }
        self.open.push(rule);
        let rules = self.rules;
        let regex = self.of(&rules[rule]).filter(|regex| regex.len() <= MAX_REGEX_BYTES);
        self.open.pop();
        self.known.insert(rule, regex.clone());
        regex
    }

    fn of(&mut self, node: &Node) -> Option<String> {
        let all = |parts: &[Node], between: &str, this: &mut Self| {
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                if index > 0 {
                    text.push_str(between);
                }
                text.push_str(&this.of(part)?);
                if text.len() > MAX_REGEX_BYTES {
                    return None;
                }
            }
            Some(text)
        };
        match node {
            Node::Class { negated, ranges } => Some(class(*negated, ranges)),
            Node::Rule(rule) => self.of_rule(*rule).map(|regex| format!("(?:{regex})")),
            Node::Sequence(items) => all(items, "", self),
            Node::Choice(options) => all(options, "|", self).map(|regex| format!("(?:{regex})")),
            Node::Repeat(item, least, most) => {
                self.of(item).map(|regex| format!("(?:{regex}){}", repeat(*least, *most)))
            }
        }
    }
}

fn write_lark(node: &Node, text: &mut String) {
    match node {
        Node::Class { negated, ranges } => {
            let _ = write!(text, "/{}/", class(*negated, ranges));
        }
        Node::Rule(rule) => {
            let _ = write!(text, "r{rule}");
        }
        Node::Sequence(items) if items.is_empty() => text.push_str("\"\""),
        Node::Sequence(items) => {
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(' ');
                }
                write_lark(item, text);
            }
        }
        Node::Choice(options) => {
            text.push('(');
            for (index, option) in options.iter().enumerate() {
                if index > 0 {
                    text.push_str(" | ");
                }
                write_lark(option, text);
            }
            text.push(')');
        }
        Node::Repeat(item, least, most) => {
            text.push('(');
            write_lark(item, text);
            text.push(')');
            text.push_str(&repeat(*least, *most));
        }
    }
}
