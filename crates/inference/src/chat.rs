//! Chat templates: from messages to the prompt that the model was trained on.
//!
//! The template is the model's own (`tokenizer.chat_template`, Jinja as Hugging Face renders it).
//! A model without one gets a plain transcript: the system messages, then `User: …` and
//! `Assistant: …` lines, ending with `Assistant:`; a new `User:` line ends the answer.

use std::sync::Arc;

use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::llama::Model;
use crate::worker::ModelInfo;

/// The most steps of a template: a hostile one cannot compute for ever.
const MAX_TEMPLATE_STEPS: u64 = 5_000_000;
/// The most bytes of a template.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl ChatMessage {
    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_owned(), content: content.into() }
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
        Self::new(template, info.beginning_text.clone(), info.end_text.clone())
    }

    /// The template of a model in this process.
    pub fn of_model(model: &Model) -> Self {
        let (beginning, end) = (model.text_of(model.beginning()), model.text_of(model.end()));
        Self::new(model.chat_template(None), beginning, end)
    }

    fn new(source: Option<String>, beginning_text: String, end_text: String) -> Self {
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
        Self { kind, beginning_text, end_text }
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
        let environment = match &self.kind {
            Kind::Own(environment) => environment,
            Kind::Broken(message) => {
                return Err(TemplateError::Broken { message: message.clone() });
            }
            Kind::Plain => return Ok(transcript(messages)),
        };
        let rendered = environment.get_template("chat").and_then(|template| {
            template.render(context! {
                messages => messages,
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
        let system = ChatMessage { role: "system".to_owned(), content: "Be brief.".to_owned() };
        let messages = [system, ChatMessage::user(" Hi ")];
        template(source).render(&messages).map_err(|error| error.to_string())
    }

    #[test]
    fn templates_render_as_hugging_face_does() {
        let source = "{%- if messages[0]['role'] == 'system' %}\n    {{- bos_token + messages[0].content.strip() + '|' }}\n{%- endif %}\n{% for m in messages[1:] %}\n    {% if loop.first %}\n{{ m['content'].strip().upper().startswith('H') }} {{ m | tojson }}\n    {% endif %}\n{% endfor %}{% if add_generation_prompt %}go{% endif %}";
        assert_eq!(
            render(Some(source)).as_deref(),
            Ok("<s>Be brief.|True {\"role\":\"user\",\"content\":\" Hi \"}\ngo"),
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

    #[test]
    fn the_date_can_be_asked_for() {
        let date = render(Some("{{ strftime_now('%Y-%m-%d') }}")).expect("a date");
        assert!(date.starts_with("20") && date.len() == 10, "{date}");
    }
}
