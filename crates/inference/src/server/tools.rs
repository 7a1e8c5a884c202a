//! The parameters `tools`, `tool_choice` and `parallel_tool_calls`, and calls in answers.

use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;
use crate::constraint::Constraint;
use crate::tools::{Choice, Found, Reader, Syntax, Tool, ToolCall};

/// The most tools of one request.
const MAX_TOOLS: usize = 128;
/// The longest name of a tool.
const MAX_NAME_CHARS: usize = 64;

/// The tools of one request, and how they may be used.
pub(super) struct ToolUse {
    pub(super) tools: Vec<Tool>,
    pub(super) choice: Choice,
    pub(super) parallel: bool,
}

/// How a function is written in a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `{"type": "function", "function": {"name": …}}`, as in chats.
    Nested,
    /// `{"type": "function", "name": …}`, as in responses.
    Flat,
}

/// Takes `tools`, `tool_choice` and `parallel_tool_calls`; absent where none may be called.
pub(super) fn tool_use(fields: &mut Fields, form: Form) -> Result<Option<ToolUse>, ApiError> {
    let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
    let choice = fields.take("tool_choice");
    let tools = match fields.take("tools") {
        None => Vec::new(),
        Some(Value::Array(tools)) if tools.len() > MAX_TOOLS => {
            return Err(ApiError::parameter("tools", format!("more than {MAX_TOOLS} tools")));
        }
        Some(Value::Array(tools)) => {
            let tools = tools.into_iter().enumerate();
            tools.map(|(index, value)| tool(index, value, form)).collect::<Result<Vec<_>, _>>()?
        }
        Some(_) => return Err(ApiError::parameter("tools", "expected an array".to_owned())),
    };
    for (index, tool) in tools.iter().enumerate() {
        if tools[..index].iter().any(|other| other.name == tool.name) {
            let message = format!("two tools are named `{}`", tool.name);
            return Err(ApiError::parameter("tools", message));
        }
    }
    let choice = choice_of(choice, &tools, form)?;
    if tools.is_empty() && choice.as_ref().is_some_and(|choice| *choice != Choice::Auto) {
        return Err(ApiError::parameter("tool_choice", "only with `tools`".to_owned()));
    }
    Ok(choice.filter(|_| !tools.is_empty()).map(|choice| ToolUse { tools, choice, parallel }))
}

/// Absent for `none`.
fn choice_of(value: Option<Value>, tools: &[Tool], form: Form) -> Result<Option<Choice>, ApiError> {
    let wrong = |message: String| ApiError::parameter("tool_choice", message);
    match value {
        None => Ok(Some(Choice::Auto)),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Ok(None),
            "auto" => Ok(Some(Choice::Auto)),
            "required" => Ok(Some(Choice::Required)),
            _ => Err(wrong("expected none, auto, required or a function".to_owned())),
        },
        Some(value) => {
            let name = match form {
                Form::Nested => &value["function"]["name"],
                Form::Flat => &value["name"],
            };
            match (value["type"].as_str(), name.as_str()) {
                (Some("function"), Some(name)) if tools.iter().any(|tool| tool.name == name) => {
                    Ok(Some(Choice::Named(name.to_owned())))
                }
                (Some("function"), Some(_)) => {
                    Err(wrong("it names none of the `tools`".to_owned()))
                }
                (Some(kind), _) if kind != "function" => {
                    let message = "only tools of type `function` are supported".to_owned();
                    Err(ApiError::unsupported("tool_choice", message))
                }
                _ => {
                    let message = "expected none, auto, required or a function by its name";
                    Err(wrong(message.to_owned()))
                }
            }
        }
    }
}

fn tool(index: usize, value: Value, form: Form) -> Result<Tool, ApiError> {
    let path = format!("tools[{index}]");
    let wrong = |message: &str| ApiError::parameter(&path, message.to_owned());
    let Value::Object(value) = value else { return Err(wrong("expected an object")) };
    let mut outer = Fields::new(value);
    match outer.text("type")?.as_deref() {
        Some("function") => {}
        Some(_) => {
            let message = "only tools of type `function` are supported".to_owned();
            return Err(ApiError::unsupported(&path, message));
        }
        None => return Err(wrong("its type is missing")),
    }
    let mut fields = match form {
        Form::Flat => outer,
        Form::Nested => {
            let function = outer.take("function");
            outer.finish()?;
            let Some(Value::Object(function)) = function else {
                return Err(wrong("expected an object `function`"));
            };
            Fields::new(function)
        }
    };
    let name = fields.text("name")?.unwrap_or_default();
    let letter = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-');
    if !(1..=MAX_NAME_CHARS).contains(&name.len()) || !name.chars().all(letter) {
        return Err(wrong("a name has 1 to 64 letters, digits, `_` and `-`"));
    }
    let description = fields.text("description")?;
    let strict = fields.flag("strict")?.unwrap_or(false);
    let mut parameters = match fields.take("parameters") {
        None => Map::from_iter([("properties".to_owned(), json!({}))]),
        Some(Value::Object(parameters)) => parameters,
        Some(_) => return Err(wrong("expected the parameters as a JSON Schema")),
    };
    fields.finish()?;
    match parameters.get("type") {
        None => {
            parameters.insert("type".to_owned(), json!("object"));
        }
        Some(Value::String(kind)) if kind == "object" => {}
        Some(_) => return Err(wrong("the parameters must be of type `object`")),
    }
    Ok(Tool { name, description, parameters: Value::Object(parameters), strict })
}

impl ToolUse {
    /// Holds an answer to this use; `text` is what other text is held to.
    pub(super) fn constraint(
        &self,
        syntax: Syntax,
        text: Option<&Constraint>,
    ) -> Result<Constraint, ApiError> {
        if let Some(text) = text
            && !text.is_expression()
        {
            let message = "a recursive grammar cannot be used with tools".to_owned();
            return Err(ApiError::parameter(&text.parameter, message));
        }
        syntax
            .constraint(&self.tools, &self.choice, self.parallel, text)
            .map_err(|error| ApiError::constraint("tools", &error))
    }

    /// The tools as chat templates expect them.
    pub(super) fn definitions(&self) -> Vec<Value> {
        self.tools.iter().map(Tool::definition).collect()
    }
}

/// A new id of a call.
pub(super) fn new_call_id() -> String {
    format!("call_{:016x}", rand::random::<u64>())
}

/// An answer's text without its calls, and these.
pub(super) fn read_whole(mut reader: Reader, text: &str) -> (String, Vec<ToolCall>) {
    let mut found = reader.push(text);
    found.extend(reader.finish());
    let (mut content, mut calls) = (String::new(), Vec::<ToolCall>::new());
    for found in found {
        match found {
            Found::Text(text) => content.push_str(&text),
            Found::Begin { name, .. } => {
                calls.push(ToolCall { id: new_call_id(), name, arguments: String::new() });
            }
            Found::Arguments { index, text } => calls[index].arguments.push_str(&text),
        }
    }
    (content, calls)
}

/// Calls as OpenAI writes them.
pub(super) fn written(calls: &[ToolCall]) -> Value {
    let call = |call: &ToolCall| {
        json!({
            "id": call.id,
            "type": "function",
            "function": { "name": call.name, "arguments": call.arguments },
        })
    };
    calls.iter().map(call).collect()
}

/// Takes the `tool_calls` of an assistant's message in the history.
pub(super) fn past_calls(path: &str, fields: &mut Fields) -> Result<Vec<ToolCall>, ApiError> {
    let wrong = || {
        let message = "expected calls with an id and a function, whose arguments are a string";
        ApiError::parameter(path, message.to_owned())
    };
    let calls = match fields.take("tool_calls") {
        None => return Ok(Vec::new()),
        Some(Value::Array(calls)) => calls,
        Some(_) => return Err(wrong()),
    };
    let call = |call: &Value| {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let function = &call["function"];
        if !matches!(call["type"].as_str(), Some("function")) && !call["type"].is_null() {
            return None;
        }
        Some(ToolCall {
            id: text(&call["id"])?,
            name: text(&function["name"])?,
            arguments: text(&function["arguments"])?,
        })
    };
    calls.iter().map(call).collect::<Option<_>>().ok_or_else(wrong)
}
