//! The parameters that hold an answer to a shape: `response_format`, `regex` and `grammar`.

use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use super::tools::Form;
use crate::constraint::Constraint;

/// The longest name of a schema.
const MAX_NAME_CHARS: usize = 64;

/// Takes `response_format`, `regex` and `grammar`, of which there may be one.
pub(super) fn constraint(fields: &mut Fields) -> Result<Option<Constraint>, ApiError> {
    let format = match fields.take("response_format") {
        Some(value) => format("response_format", value, Form::Nested)?,
        None => None,
    };
    one_of(format, fields)
}

/// Takes `text`, `regex` and `grammar`, of which one may ask for a shape.
pub(super) fn text_constraint(fields: &mut Fields) -> Result<Option<Constraint>, ApiError> {
    let format = match fields.take("text") {
        Some(Value::Object(text)) => {
            let mut text = Fields::new(text);
            let format = match text.take("format") {
                Some(value) => format("text.format", value, Form::Flat)?,
                None => None,
            };
            text.finish()?;
            format
        }
        Some(_) => return Err(ApiError::parameter("text", "expected an object".to_owned())),
        None => None,
    };
    one_of(format, fields)
}

/// Takes `regex` and `grammar`; there may be only one shape.
fn one_of(format: Option<Constraint>, fields: &mut Fields) -> Result<Option<Constraint>, ApiError> {
    let regex = fields.text("regex")?.map(|regex| {
        Constraint::regex("regex", &regex).map_err(|error| ApiError::constraint("regex", &error))
    });
    let grammar = fields.text("grammar")?.map(|grammar| {
        let constraint = Constraint::gbnf("grammar", &grammar);
        constraint.map_err(|error| ApiError::constraint("grammar", &error))
    });
    let mut all = format.into_iter().map(Ok).chain(regex).chain(grammar);
    let first = all.next().transpose()?;
    match all.next().transpose()? {
        Some(second) => {
            let message = "only one of a format, regex and grammar".to_owned();
            Err(ApiError::parameter(&second.parameter, message))
        }
        None => Ok(first),
    }
}

/// A format as `response_format` and the `format` of a response's `text` say it: absent for text.
fn format(name: &str, value: Value, form: Form) -> Result<Option<Constraint>, ApiError> {
    let wrong = |message: &str| ApiError::parameter(name, message.to_owned());
    let Value::Object(value) = value else { return Err(wrong("expected an object")) };
    let mut fields = Fields::new(value);
    let constraint = match fields.text("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(Constraint::json_object(name)),
        Some("json_schema") if form == Form::Flat => return json_schema(name, fields).map(Some),
        Some("json_schema") => match fields.take("json_schema") {
            Some(Value::Object(schema)) => Some(json_schema(name, Fields::new(schema))?),
            _ => return Err(wrong("expected an object `json_schema`")),
        },
        _ => return Err(wrong("expected the type text, json_object or json_schema")),
    };
    fields.finish()?;
    Ok(constraint)
}

/// A schema with its name; `strict` says whether all of it must be understood.
fn json_schema(parameter: &str, mut fields: Fields) -> Result<Constraint, ApiError> {
    let wrong = |message: &str| ApiError::parameter(parameter, message.to_owned());
    match fields.text("name")? {
        Some(name) if (1..=MAX_NAME_CHARS).contains(&name.chars().count()) => {}
        _ => return Err(wrong("the schema needs a name of 1 to 64 characters")),
    }
    let _ = fields.text("description")?;
    let strict = fields.flag("strict")?.unwrap_or(false);
    let schema = fields.take("schema").ok_or_else(|| wrong("the `schema` is missing"))?;
    fields.finish()?;
    let constraint = Constraint::json(parameter, &schema, !strict);
    constraint.map_err(|error| ApiError::constraint(parameter, &error))
}
