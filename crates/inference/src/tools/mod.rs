//! Calls of tools in the text of an answer: how each family of models writes them, the grammar that
//! holds a model to it, and the reader that finds them again.
//!
//! A call is always written `{"name": "NAME", "arguments": {…}}`, with the family's marks around it
//! and with its word for the arguments. The grammar leaves no choice in any of these characters, so
//! that the reader needs to know only this one spelling.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::constraint::{Constraint, ConstraintError};

/// The most calls in one answer.
pub const MAX_CALLS: usize = 16;

/// A function that a model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct Tool {
    /// Its name: letters, digits, `_` and `-`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// The JSON Schema of its arguments, which are an object.
    pub parameters: Value,
    /// Whether all of the schema must be understood.
    pub strict: bool,
}

impl Tool {
    /// As chat templates expect it.
    pub fn definition(&self) -> Value {
        let mut function = json!({ "name": self.name });
        if let Some(description) = &self.description {
            function["description"] = json!(description);
        }
        function["parameters"] = self.parameters.clone();
        json!({ "type": "function", "function": function })
    }
}

/// A call that a model made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// By which its result names it.
    pub id: String,
    /// The tool's name.
    pub name: String,
    /// The arguments, as JSON text.
    pub arguments: String,
}

/// Whether tools are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The model decides.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// How a family of models writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syntax {
    /// What announces calls in a text; empty where a call is the whole answer.
    trigger: &'static str,
    /// What stands from there to the first call.
    open: &'static str,
    /// Between two calls; absent where there is only one.
    between: Option<&'static str>,
    /// After the last one.
    close: &'static str,
    /// The word for the arguments.
    arguments: &'static str,
}

/// Hermes, Qwen, and what models without a way of their own are asked for.
const TAGGED: Syntax = Syntax {
    trigger: "<tool_call>",
    open: "\n",
    between: Some("\n</tool_call>\n<tool_call>\n"),
    close: "\n</tool_call>",
    arguments: "arguments",
};
/// SmolLM2: one list.
const LIST: Syntax = Syntax {
    trigger: "<tool_call>",
    open: "[",
    between: Some(", "),
    close: "]</tool_call>",
    arguments: "arguments",
};
/// Llama 3: the call alone.
const BARE: Syntax =
    Syntax { trigger: "", open: "", between: None, close: "", arguments: "parameters" };
/// Gemma.
const FENCED: Syntax = Syntax {
    trigger: "```tool_code",
    open: "\n",
    between: Some("\n```\n```tool_code\n"),
    close: "\n```",
    arguments: "parameters",
};

impl Syntax {
    /// The way of a model, told by its architecture and its chat template.
    pub fn of(architecture: &str, template: &str) -> Self {
        if template.contains("<tool_call>") {
            TAGGED
        } else if template.contains("<|python_tag|>") || template.contains("Environment: ipython") {
            BARE
        } else if template.contains("SmolLM") {
            LIST
        } else if architecture.starts_with("gemma") {
            FENCED
        } else {
            TAGGED
        }
    }

    /// What stands before the name of the called tool.
    const HEAD: &'static str = "{\"name\": \"";

    /// What stands between the name and the arguments.
    fn middle(&self) -> String {
        format!("\", \"{}\": ", self.arguments)
    }

    /// Calls as the model would have written them.
    pub fn write(&self, calls: &[ToolCall]) -> String {
        let mut text = format!("{}{}", self.trigger, self.open);
        for (index, call) in calls.iter().enumerate() {
            if index > 0 {
                text.push_str(self.between.unwrap_or("\n"));
            }
            let (name, arguments) = (&call.name, &call.arguments);
            let _ = write!(text, "{}{name}{}{arguments}}}", Self::HEAD, self.middle());
        }
        text + self.close
    }

    /// What a model whose template knows no tools is told.
    pub fn instructions(&self, tools: &[Value], choice: &Choice) -> String {
        let mut text = String::from("You may call functions. These are available:\n");
        for tool in tools {
            let _ = writeln!(text, "{}", tool["function"]);
        }
        let example = ToolCall {
            id: String::new(),
            name: "NAME".to_owned(),
            arguments: "{\"ARGUMENT\": \"VALUE\"}".to_owned(),
        };
        let when = match choice {
            Choice::Auto => "To call one, answer in exactly this form",
            Choice::Required | Choice::Named(_) => "Call one, in exactly this form",
        };
        let _ = write!(text, "{when}:\n{}", self.write(&[example]));
        text
    }

    /// Holds an answer to calls of `tools` written in this way; to text or calls where the model
    /// decides. `text` is what other text is held to.
    ///
    /// # Errors
    /// A schema cannot be used, or all of them are too long.
    pub fn constraint(
        &self,
        tools: &[Tool],
        choice: &Choice,
        parallel: bool,
        text: Option<&Constraint>,
    ) -> Result<Constraint, ConstraintError> {
        let quoted = |text: &str| Value::from(text).to_string();
        let allowed: Vec<&Tool> = match choice {
            Choice::Named(name) => tools.iter().filter(|tool| tool.name == *name).collect(),
            Choice::Auto | Choice::Required => tools.iter().collect(),
        };
        let more = match self.between.filter(|_| parallel) {
            Some(between) => format!(" ({} call){{0,{}}}", quoted(between), MAX_CALLS - 1),
            None => String::new(),
        };
        let close = match self.close {
            "" => String::new(),
            close => format!(" {}", quoted(close)),
        };
        let open = match self.open {
            "" => String::new(),
            open => format!("{} ", quoted(open)),
        };
        let mut grammar = String::new();
        match choice {
            Choice::Required | Choice::Named(_) => {
                let trigger = match self.trigger {
                    "" => String::new(),
                    trigger => format!("{} ", quoted(trigger)),
                };
                let _ = writeln!(grammar, "start: {trigger}{open}call{more}{close}");
            }
            Choice::Auto => {
                let names: Vec<&str> = allowed.iter().map(|tool| tool.name.as_str()).collect();
                // Text that begins as a call is one, announced or not.
                let is_call = format!("\\{}({})\"(?s:.*)", Self::HEAD, names.join("|"));
                let mut options = vec![match text {
                    Some(text) => {
                        let _ = writeln!(grammar, "text: {}", text.expression());
                        "text"
                    }
                    None => "TEXT",
                }];
                match text {
                    None => options.push("call"),
                    Some(_) if self.trigger.is_empty() => return Err(ConstraintError::Wrong {
                        message: "this model announces no calls, so that they cannot be told from other JSON\nhint: leave response_format out, or ask for calls by tool_choice".to_owned(),
                    }),
                    Some(_) => {}
                }
                let mut not_text = format!("~/{is_call}/");
                if !self.trigger.is_empty() {
                    options.push("calls");
                    let _ = write!(not_text, " & ~/(?s:.*){}(?s:.*)/", self.trigger);
                    match text {
                        // Text that is held to something is all or nothing.
                        Some(_) => {
                            let trigger = quoted(self.trigger);
                            let _ = writeln!(grammar, "calls: {trigger} {open}call{more}{close}");
                        }
                        None => {
                            let _ = writeln!(
                                grammar,
                                "calls: lead {open}call{more}{close}\nlead[lazy]: LEAD\nLEAD: /(?s:.*){}/ & ~/{is_call}/",
                                self.trigger
                            );
                        }
                    }
                }
                if text.is_none() {
                    let _ = writeln!(grammar, "TEXT: /(?s:.*)/ & {not_text}");
                }
                let _ = writeln!(grammar, "start: {}", options.join(" | "));
            }
        }
        let calls: Vec<String> = (0..allowed.len()).map(|index| format!("call_{index}")).collect();
        let _ = writeln!(grammar, "call: {}", calls.join(" | "));
        for (index, tool) in allowed.iter().enumerate() {
            let head = quoted(&format!("{}{}{}", Self::HEAD, tool.name, self.middle()));
            let arguments = Constraint::json("tools", &tool.parameters, !tool.strict)?;
            let _ = writeln!(grammar, "call_{index}: {head} args_{index} \"}}\"");
            let _ = writeln!(grammar, "args_{index}: {}", arguments.expression());
        }
        Constraint::lark("tools", grammar)
    }
}

/// What [`Reader`] finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Text for a person.
    Text(String),
    /// A call begins; its index counts from 0.
    Begin {
        /// Which call.
        index: usize,
        /// The tool's name.
        name: String,
    },
    /// More of the arguments of the last call that began.
    Arguments {
        /// Which call.
        index: usize,
        /// JSON text.
        text: String,
    },
}

/// Finds calls in an answer that comes in pieces.
pub struct Reader {
    syntax: Syntax,
    names: Vec<String>,
    state: State,
    /// Text that is not decided yet.
    held: String,
    calls: usize,
    /// Whether text was given out.
    spoke: bool,
}

enum State {
    /// Text, or the announcement of calls.
    Text,
    /// Up to the first call.
    Open,
    /// A call up to its name.
    Head,
    /// Its name and what follows, up to the arguments.
    Name,
    Arguments(Nesting),
    /// After the arguments.
    After,
    /// What follows the calls is nobody's.
    Over,
}

/// How deep in a JSON object a text is.
#[derive(Default)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// Takes a character; true if it ends the object.
    fn ends(&mut self, letter: char) -> bool {
        if self.in_string {
            match letter {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match letter {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

impl Reader {
    /// For an answer that was held to [`Syntax::constraint`]. Calls of these tools are found where
    /// nothing announces them, too.
    pub fn new(syntax: Syntax, tools: &[Tool]) -> Self {
        let names = tools.iter().map(|tool| tool.name.clone()).collect();
        Self { syntax, names, state: State::Text, held: String::new(), calls: 0, spoke: false }
    }

    /// Calls that began so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes a piece of the answer.
    pub fn push(&mut self, piece: &str) -> Vec<Found> {
        self.held.push_str(piece);
        let mut found = Vec::new();
        while self.step(&mut found) {}
        found
    }

    /// The answer is over: what was held back is text after all, or the rest of arguments.
    pub fn finish(&mut self) -> Option<Found> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Text if !held.is_empty() => Some(Found::Text(held)),
            _ => None,
        }
    }

    /// Decides a part of what is held; whether more can be decided now.
    fn step(&mut self, found: &mut Vec<Found>) -> bool {
        match &mut self.state {
            State::Text => self.text(found),
            State::Open => self.expect(self.syntax.open, State::Head),
            State::Head => self.expect(Syntax::HEAD, State::Name),
            State::Name => {
                let middle = self.syntax.middle();
                let Some((name, rest)) = self.held.split_once(&middle) else { return false };
                let name = name.to_owned();
                self.held = rest.to_owned();
                self.state = State::Arguments(Nesting::default());
                found.push(Found::Begin { index: self.calls, name });
                self.calls += 1;
                true
            }
            State::Arguments(nesting) => {
                let end = self.held.char_indices().find(|(_, letter)| nesting.ends(*letter));
                let (length, over) = match end {
                    Some((place, letter)) => (place + letter.len_utf8(), true),
                    None => (self.held.len(), false),
                };
                let text: String = self.held.drain(..length).collect();
                if !text.is_empty() {
                    found.push(Found::Arguments { index: self.calls - 1, text });
                }
                if over {
                    self.state = State::After;
                }
                over
            }
            State::After => {
                // The brace that ends the call, and then another one or the end.
                let between = self.syntax.between.map(|between| format!("}}{between}"));
                match between {
                    Some(between) if self.held.starts_with(&between) => {
                        self.held.drain(..between.len());
                        self.state = State::Head;
                        true
                    }
                    Some(between) if between.starts_with(&self.held) => false,
                    _ => {
                        self.state = State::Over;
                        true
                    }
                }
            }
            State::Over => {
                self.held.clear();
                false
            }
        }
    }

    /// Takes `literal` from the front of what is held, and goes on in `next`.
    fn expect(&mut self, literal: &str, next: State) -> bool {
        if self.held.starts_with(literal) {
            self.held.drain(..literal.len());
            self.state = next;
            return true;
        }
        // The grammar allows nothing else; what is cut off ends here.
        if !literal.starts_with(&self.held) {
            self.state = State::Over;
        }
        false
    }

    fn text(&mut self, found: &mut Vec<Found>) -> bool {
        // A call as the whole answer.
        if !self.spoke {
            let heads = self.names.iter().map(|name| format!("{}{name}\"", Syntax::HEAD));
            for head in heads {
                if self.held.starts_with(&head) {
                    self.state = State::Head;
                    return true;
                }
                if head.starts_with(&self.held) {
                    return false;
                }
            }
        }
        let trigger = self.syntax.trigger;
        let announced = (!trigger.is_empty()).then(|| self.held.find(trigger)).flatten();
        // White space before calls is nobody's; whether it is before calls is not known yet.
        let undecided = match announced {
            Some(place) => place,
            None => {
                let longest = trigger.len().min(self.held.len());
                let begins = |length: &usize| {
                    self.held.is_char_boundary(self.held.len() - length)
                        && trigger.starts_with(&self.held[self.held.len() - length..])
                };
                self.held.len() - (1..=longest).rev().find(begins).unwrap_or(0)
            }
        };
        let text = self.held[..undecided].trim_end();
        let length = if trigger.is_empty() { undecided } else { text.len() };
        if length > 0 {
            let text: String = self.held.drain(..length).collect();
            found.push(Found::Text(text));
            self.spoke = true;
        }
        match announced {
            Some(place) => {
                self.held.drain(..place - length + trigger.len());
                self.state = State::Open;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests;
