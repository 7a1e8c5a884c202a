use super::{GgufError, Header, Value};
use crate::shape::ModelShape;

/// The dimensions that decide a model's memory, from its metadata. Where a value differs between
/// layers, the greatest counts.
///
/// # Errors
/// [`GgufError::Missing`] for the first entry that is absent or of another type.
pub fn shape(header: &Header) -> Result<ModelShape, GgufError> {
    let architecture = header.architecture()?.to_owned();
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    let optional = |suffix: &str| header.get(&key(suffix)).and_then(greatest);
    let required = |suffix: &str| {
        optional(suffix).ok_or_else(|| GgufError::Missing {
            key: key(suffix),
            expected: "a whole number below 2^32",
        })
    };
    let layers = required("block_count")?;
    let embedding = required("embedding_length")?;
    let trained_context = required("context_length")?;
    let feed_forward = optional("feed_forward_length").unwrap_or(0);
    let heads = required("attention.head_count")?;
    let kv_heads = optional("attention.head_count_kv").unwrap_or(heads);
    let default_width = embedding.checked_div(heads).unwrap_or(0);
    let key_width = optional("attention.key_length").unwrap_or(default_width);
    let value_width = optional("attention.value_length").unwrap_or(default_width);
    let tokens = header.get("tokenizer.ggml.tokens").and_then(Value::as_array);
    let vocabulary = match tokens.map(|tokens| u32::try_from(tokens.len())) {
        Some(Ok(vocabulary)) => vocabulary,
        _ => required("vocab_size")?,
    };
    Ok(ModelShape {
        parameters: header.parameters(),
        layers,
        embedding,
        feed_forward,
        heads,
        kv_heads,
        key_width,
        value_width,
        vocabulary,
        trained_context,
        architecture,
    })
}

fn greatest(value: &Value) -> Option<u32> {
    let number = match value {
        Value::Array(array) => array.max_u64()?,
        scalar => scalar.as_u64()?,
    };
    number.try_into().ok()
}
