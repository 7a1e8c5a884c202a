//! Chat templates: from messages to the prompt that the model was trained on.
//!
//! The template is the model's own (`tokenizer.chat_template`, Jinja as Hugging Face renders it).
//! A model without one gets a plain transcript: the system messages, then `User: …` and
//! `Assistant: …` lines, ending with `Assistant:`; a new `User:` line ends the answer. A template
//! that knows no tools is told of them in the system message, and of their results by the user.

use std::sync::Arc;

use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::llama::Model;
use crate::tools::{Choice, Syntax, ToolCall};
use crate::worker::ModelInfo;

/// The most steps of a template: a hostile one cannot compute for ever.
const MAX_TEMPLATE_STEPS: u64 = 5_000_000;
/// The most bytes of a template.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// The most spaces of an indentation.
const MAX_INDENT: usize = 16;

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Its text.
    pub content: String,
    /// What an assistant's message calls.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Whose result a tool's message is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
}

impl ChatMessage {
    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of plain text.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self {
            role: role.to_owned(),
            content: content.into(),
            tool_calls: Vec::new(),
            tool_call_id: None,
        }
    }

    /// As chat templates expect it: arguments are values there, and not text.
    fn for_template(&self) -> serde_json::Value {
        let mut message = json!({ "role": self.role, "content": self.content });
        if !self.tool_calls.is_empty() {
            let call = |call: &ToolCall| {
                let arguments = serde_json::from_str::<serde_json::Value>(&call.arguments);
                let arguments = arguments.unwrap_or_else(|_| json!(call.arguments));
                json!({
                    "id": call.id,
                    "type": "function",
                    "function": { "name": call.name, "arguments": arguments },
                })
            };
            message["tool_calls"] = self.tool_calls.iter().map(call).collect();
        }
        if let Some(id) = &self.tool_call_id {
            message["tool_call_id"] = json!(id);
        }
        message
    }
}

/// Why a chat could not be made into a prompt.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template refuses these messages.
    #[error("this model's chat template refuses the messages: {message}")]
    Refused {
        /// The template's words.
        message: String,
    },
    /// The template does not work.
    #[error(
        "this model's chat template does not work: {message}\nhint: use /v1/completions, or mend tokenizer.chat_template in the model file"
    )]
    Broken {
        /// Why.
        message: String,
    },
}

/// How chats become prompts for one model.
pub struct ChatTemplate {
    kind: Kind,
    tool_syntax: Syntax,
    knows_tools: bool,
    beginning_text: String,
    end_text: String,
}

enum Kind {
    Own(Arc<Environment<'static>>),
    Broken(String),
    Plain,
}

/// What a refusing template raises; told apart from other errors by this prefix.
const REFUSAL: &str = "slmops-refusal:";

impl ChatTemplate {
    /// The template of a model that a worker loaded.
    pub fn of(info: &ModelInfo) -> Self {
        let template = info.chat_template.clone();
        Self::new(
            &info.shape.architecture,
            template,
            info.beginning_text.clone(),
            info.end_text.clone(),
        )
    }

    /// The template of a model in this process.
    pub fn of_model(model: &Model) -> Self {
        let (beginning, end) = (model.text_of(model.beginning()), model.text_of(model.end()));
        let architecture = model.metadata("general.architecture").unwrap_or_default();
        Self::new(&architecture, model.chat_template(None), beginning, end)
    }

    fn new(
        architecture: &str,
        source: Option<String>,
        beginning_text: String,
        end_text: String,
    ) -> Self {
        let tool_syntax = Syntax::of(architecture, source.as_deref().unwrap_or_default());
        let kind = match source {
            None => Kind::Plain,
            Some(source) if source.len() > MAX_TEMPLATE_BYTES => {
                Kind::Broken(format!("it is longer than {MAX_TEMPLATE_BYTES} bytes"))
            }
            Some(source) => match compile(source) {
                Ok(environment) => Kind::Own(Arc::new(environment)),
                Err(error) => Kind::Broken(describe(&error)),
            },
        };
        let knows_tools = match &kind {
            Kind::Own(environment) => environment
                .get_template("chat")
                .is_ok_and(|template| template.undeclared_variables(false).contains("tools")),
            Kind::Broken(_) | Kind::Plain => false,
        };
        Self { kind, tool_syntax, knows_tools, beginning_text, end_text }
    }

    /// How this model writes calls of tools.
    pub fn tool_syntax(&self) -> Syntax {
        self.tool_syntax
    }

    /// Whether the model brought its own template.
    pub fn is_own(&self) -> bool {
        !matches!(self.kind, Kind::Plain)
    }

    /// Texts that end an answer beside the model's own end token.
    pub fn stops(&self) -> &'static [&'static str] {
        if self.is_own() { &[] } else { &["\nUser:"] }
    }

    /// The prompt that asks for the assistant's next message.
    ///
    /// # Errors
    /// The template refuses the messages, or does not work.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, TemplateError> {
        self.render_with_tools(messages, &[], &Choice::Auto)
    }

    /// The same for a model that may call tools, defined as OpenAI does.
    ///
    /// # Errors
    /// The template refuses the messages, or does not work.
    pub fn render_with_tools(
        &self,
        messages: &[ChatMessage],
        tools: &[serde_json::Value],
        choice: &Choice,
    ) -> Result<String, TemplateError> {
        if self.knows_tools {
            return self.render_plainly(messages, tools);
        }
        let told = |message: &ChatMessage| !message.tool_calls.is_empty() || message.role == "tool";
        if tools.is_empty() && !messages.iter().any(told) {
            return self.render_plainly(messages, &[]);
        }
        self.render_plainly(&self.without_tools(messages, tools, choice), &[])
    }

    /// Messages that say in plain text what is said of tools.
    fn without_tools(
        &self,
        messages: &[ChatMessage],
        tools: &[serde_json::Value],
        choice: &Choice,
    ) -> Vec<ChatMessage> {
        let mut plain: Vec<ChatMessage> = Vec::with_capacity(messages.len() + 1);
        if !tools.is_empty() {
            plain.push(ChatMessage::new("system", self.tool_syntax.instructions(tools, choice)));
        }
        // Whether the last message is of the user and speaks of results, so that more is put to it:
        // many templates want the roles to take turns.
        let mut results = false;
        for message in messages {
            let text = match message.role.as_str() {
                "tool" => format!("<tool_response>\n{}\n</tool_response>", message.content),
                _ if message.tool_calls.is_empty() => message.content.clone(),
                _ => {
                    let calls = self.tool_syntax.write(&message.tool_calls);
                    format!("{}\n{calls}", message.content).trim_start().to_owned()
                }
            };
            let role = if message.role == "tool" { "user" } else { message.role.as_str() };
            match plain.last_mut() {
                Some(last) if last.role == "system" && role == "system" => {
                    last.content = format!("{text}\n\n{}", last.content);
                }
                Some(last) if results && role == "user" => {
                    last.content = format!("{}\n{text}", last.content);
                }
                _ => plain.push(ChatMessage::new(role, text)),
            }
            results = role == "user" && (results || message.role == "tool");
        }
        plain
    }

    fn render_plainly(
        &self,
        messages: &[ChatMessage],
        tools: &[serde_json::Value],
    ) -> Result<String, TemplateError> {
        let environment = match &self.kind {
            Kind::Own(environment) => environment,
            Kind::Broken(message) => {
                return Err(TemplateError::Broken { message: message.clone() });
            }
            Kind::Plain => return Ok(transcript(messages)),
        };
        let messages: Vec<_> = messages.iter().map(ChatMessage::for_template).collect();
        let rendered = environment.get_template("chat").and_then(|template| {
            template.render(context! {
                messages => messages,
                // As in Hugging Face's renderer: none, and not an empty list.
                tools => (!tools.is_empty()).then_some(tools),
                add_generation_prompt => true,
                bos_token => self.beginning_text,
                eos_token => self.end_text,
            })
        });
        rendered.map_err(|error| {
            let message = describe(&error);
            match message.split_once(REFUSAL) {
                Some((_, message)) => TemplateError::Refused { message: message.to_owned() },
                None => TemplateError::Broken { message },
            }
        })
    }
}

fn describe(error: &minijinja::Error) -> String {
    let mut message = error.detail().map_or_else(|| error.to_string(), str::to_owned);
    if !message.starts_with(REFUSAL)
        && let Some(line) = error.line()
    {
        message.push_str(&format!(" (line {line})"));
    }
    message
}

/// An environment that renders as Hugging Face's `apply_chat_template` does.
fn compile(source: String) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(MAX_TEMPLATE_STEPS));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSAL}{message}")))
    });
    environment.add_function("strftime_now", |format: String| -> Result<String, _> {
        let now = jiff::Zoned::now();
        jiff::fmt::strtime::format(&format, &now).map_err(|error| {
            minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"))
        })
    });
    environment.add_template_owned("chat", source)?;
    Ok(environment)
}

/// JSON as Python writes it, which is what models were trained on: with spaces, and nothing escaped
/// for HTML.
fn tojson(value: &Value, options: minijinja::value::Kwargs) -> Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?;
    for plain in ["ensure_ascii", "separators", "sort_keys"] {
        let _ = options.get::<Option<Value>>(plain)?;
    }
    options.assert_all_used()?;
    let mut text = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent.min(MAX_INDENT));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, Spaced)),
    };
    written.map_err(|error| {
        minijinja::Error::new(ErrorKind::BadSerialization, format!("tojson: {error}"))
    })?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// `{"a": 1, "b": 2}`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn transcript(messages: &[ChatMessage]) -> String {
    let mut prompt = String::new();
    for message in messages {
        match message.role.as_str() {
            "system" => prompt.push_str(&format!("{}\n\n", message.content)),
            "assistant" => prompt.push_str(&format!("Assistant: {}\n", message.content)),
            _ => prompt.push_str(&format!("User: {}\n", message.content)),
        }
    }
    prompt.push_str("Assistant:");
    prompt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: Option<&str>) -> ChatTemplate {
        let shape = slmops_artifact::shape::ModelShape {
            architecture: "llama".to_owned(),
            parameters: 0,
            layers: 0,
            embedding: 0,
            feed_forward: 0,
            heads: 0,
            kv_heads: 0,
            key_width: 0,
            value_width: 0,
            vocabulary: 0,
            trained_context: 0,
        };
        ChatTemplate::of(&ModelInfo {
            shape,
            file_type: String::new(),
            tensor_bytes: 0,
            chat_template: source.map(str::to_owned),
            beginning_text: "<s>".to_owned(),
            end_text: "</s>".to_owned(),
            adds_beginning: true,
            load_ms: 0,
        })
    }

    fn render(source: Option<&str>) -> Result<String, String> {
        let system = ChatMessage::new("system", "Be brief.");
        let messages = [system, ChatMessage::user(" Hi ")];
        template(source).render(&messages).map_err(|error| error.to_string())
    }

    #[test]
    fn templates_render_as_hugging_face_does() {
        let source = "{%- if messages[0]['role'] == 'system' %}\n    {{- bos_token + messages[0].content.strip() + '|' }}\n{%- endif %}\n{% for m in messages[1:] %}\n    {% if loop.first %}\n{{ m['content'].strip().upper().startswith('H') }} {{ m | tojson }}\n    {% endif %}\n{% endfor %}{% if add_generation_prompt %}go{% endif %}";
        assert_eq!(
            render(Some(source)).as_deref(),
            Ok("<s>Be brief.|True {\"role\": \"user\", \"content\": \" Hi \"}\ngo"),
        );
        assert_eq!(render(None).as_deref(), Ok("Be brief.\n\nUser:  Hi \nAssistant:"));
    }

    #[test]
    fn a_template_may_refuse() {
        let refused = render(Some("{{ raise_exception('no system message, please') }}"));
        assert_eq!(
            refused.expect_err("it refuses"),
            "this model's chat template refuses the messages: no system message, please"
        );
    }

    #[test]
    fn hostile_and_broken_templates_are_errors() {
        for source in [
            "{% for",
            "{{ nothing.of.that.kind }}",
            "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        ] {
            let error = render(Some(source)).expect_err(source);
            assert!(error.contains("does not work"), "{error}");
            assert!(error.contains("hint: "), "{error}");
        }
    }

    /// The heart of Qwen's template.
    const QWEN: &str = "{%- if tools %}\n    {{- '<tools>' }}\n    {%- for tool in tools %}\n        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '</tools>\\n' }}\n{%- endif %}\n{%- for message in messages %}\n    {%- if message.tool_calls %}\n        {%- for tool_call in message.tool_calls %}\n            {%- if tool_call.function is defined %}\n                {%- set tool_call = tool_call.function %}\n            {%- endif %}\n            {{- '<tool_call>\\n{\"name\": \"' + tool_call.name + '\", \"arguments\": ' + (tool_call.arguments | tojson) + '}\\n</tool_call>\\n' }}\n        {%- endfor %}\n    {%- else %}\n        {{- message.role + ': ' + message.content + '\\n' }}\n    {%- endif %}\n{%- endfor %}";

    fn with_tools(source: Option<&str>, tools: bool) -> String {
        let call = |name: &str| ToolCall {
            id: "call_1".to_owned(),
            name: name.to_owned(),
            arguments: "{\"city\":\"Ulm\"}".to_owned(),
        };
        let assistant = ChatMessage {
            tool_calls: vec![call("weather"), call("time")],
            ..ChatMessage::new("assistant", "")
        };
        let result = |content: &str| ChatMessage {
            tool_call_id: Some("call_1".to_owned()),
            ..ChatMessage::new("tool", content)
        };
        let messages = [
            ChatMessage::new("system", "Be brief."),
            ChatMessage::user("How is Ulm?"),
            assistant,
            result("sunny"),
            result("noon"),
            ChatMessage::user("And?"),
        ];
        let tools = if tools { vec![json!({ "function": { "name": "weather" } })] } else { vec![] };
        template(source)
            .render_with_tools(&messages, &tools, &Choice::Auto)
            .expect("the template works")
    }

    #[test]
    fn a_template_that_knows_tools_renders_them() {
        assert_eq!(
            with_tools(Some(QWEN), true),
            "<tools>{\"function\": {\"name\": \"weather\"}}</tools>\nsystem: Be brief.\nuser: How is Ulm?\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Ulm\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"time\", \"arguments\": {\"city\": \"Ulm\"}}\n</tool_call>\ntool: sunny\ntool: noon\nuser: And?\n"
        );
        assert!(with_tools(Some(QWEN), false).starts_with("system: Be brief.\n"));
    }

    #[test]
    fn other_templates_are_told_in_plain_text() {
        let alternating = "{% for m in messages %}{% if loop.index0 > 1 and m.role == loop.previtem.role %}{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
        let calls = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\":\"Ulm\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"time\", \"arguments\": {\"city\":\"Ulm\"}}\n</tool_call>";
        let rest = format!(
            "user: How is Ulm?\nassistant: {calls}\nuser: <tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\nAnd?\n"
        );
        assert_eq!(with_tools(Some(alternating), false), format!("system: Be brief.\n{rest}"));
        let told = with_tools(Some(alternating), true);
        assert!(told.starts_with("system: Be brief.\n\nYou may call functions."), "{told}");
        assert!(told.contains("\n{\"name\":\"weather\"}\n"), "{told}");
        assert!(told.ends_with(&rest), "{told}");
    }

    #[test]
    fn the_date_can_be_asked_for() {
        let date = render(Some("{{ strftime_now('%Y-%m-%d') }}")).expect("a date");
        assert!(date.starts_with("20") && date.len() == 10, "{date}");
    }
}
