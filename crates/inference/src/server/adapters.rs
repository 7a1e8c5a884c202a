//! LoRA adapters: `GET`, `POST` and `DELETE /lora-adapters`, and how requests choose among them.

use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::{App, read_json};
use crate::host::ModelSpec;
use crate::worker::{AdapterChoice, AdapterFile, AdapterUse, Worker};

pub(super) const PATH: &str = "/lora-adapters";

/// What a request asks of: a model, under the name that was asked for, with adapters.
pub(super) struct Asked {
    pub(super) spec: Arc<ModelSpec>,
    pub(super) name: String,
    pub(super) adapters: AdapterChoice,
}

/// Takes `model` and `lora`. A model's name with `:` and an adapter's name asks for that adapter alone.
pub(super) async fn asked(app: &App, fields: &mut Fields) -> Result<Asked, ApiError> {
    let model = fields.text("model")?;
    let listed = fields.take("lora");
    let (spec, worker) = app.host.worker().await?;
    let named = match &model {
        Some(model) if !spec.answers_to(model) => match adapter_named(&spec, &worker, model) {
            Some(adapter) => Some(adapter.name),
            None => return Err(ApiError::unknown_model(model, &spec.id)),
        },
        _ => None,
    };
    let (name, adapters) = match (named, listed) {
        (Some(_), Some(_)) => {
            let message = "the model's name chooses an adapter already".to_owned();
            return Err(ApiError::parameter("lora", message));
        }
        (Some(adapter), None) => (format!("{}:{adapter}", spec.id), AdapterChoice::Named(adapter)),
        (None, Some(listed)) => (spec.id.clone(), AdapterChoice::These(uses("lora", &listed)?)),
        (None, None) => (spec.id.clone(), AdapterChoice::Common),
    };
    Ok(Asked { spec, name, adapters })
}

/// The adapter that a model's name such as `smol:till` asks for.
pub(super) fn adapter_named(spec: &ModelSpec, worker: &Worker, name: &str) -> Option<AdapterFile> {
    let adapters = worker.adapters().into_iter();
    let mut asked = adapters.filter(|adapter| {
        name.strip_suffix(&adapter.name)
            .and_then(|rest| rest.strip_suffix(':'))
            .is_some_and(|model| spec.answers_to(model))
    });
    asked.next()
}

/// `[{"id": 0, "scale": 0.5}]`.
fn uses(parameter: &str, value: &Value) -> Result<Vec<AdapterUse>, ApiError> {
    let read = |entry: &Value| {
        let entry = entry.as_object()?;
        let known = entry.keys().all(|key| key == "id" || key == "scale");
        let id = u32::try_from(entry.get("id")?.as_u64()?).ok()?;
        known.then_some(AdapterUse { id, scale: entry.get("scale")?.as_f64()? as f32 })
    };
    let entries = value.as_array().and_then(|entries| entries.iter().map(read).collect());
    entries.ok_or_else(|| {
        let message = r#"expected a list such as [{"id": 0, "scale": 0.5}]"#.to_owned();
        ApiError::parameter(parameter, message)
    })
}

fn object(adapter: &AdapterFile) -> Value {
    json!({
        "id": adapter.id,
        "name": adapter.name,
        "path": adapter.path,
        "scale": adapter.scale,
    })
}

pub(super) async fn list(State(app): State<App>) -> Response {
    let adapters = app.host.current().map(|(_, worker)| worker.adapters()).unwrap_or_default();
    axum::Json(adapters.iter().map(object).collect::<Vec<_>>()).into_response()
}

/// Loads an adapter, or sets the scales of those that are loaded.
pub(super) async fn change(State(app): State<App>, body: Body) -> Result<Response, ApiError> {
    may_change(&app)?;
    let (_, worker) = app.host.worker().await?;
    let mut fields = match read_json(body).await? {
        scales @ Value::Array(_) => {
            worker.scale_adapters(&uses("scale", &scales)?)?;
            return Ok(axum::Json(json!({ "success": true })).into_response());
        }
        Value::Object(fields) => Fields::of_path(PATH, fields),
        _ => {
            let message = "expected a list of scales, or an object with a path".to_owned();
            return Err(ApiError::invalid(message));
        }
    };
    let path = fields.text("path")?.map(PathBuf::from);
    let path = path.ok_or_else(|| ApiError::parameter("path", "it is missing".to_owned()))?;
    if !path.is_absolute() {
        let message = "expected an absolute path on this machine".to_owned();
        return Err(ApiError::parameter("path", message));
    }
    let stem = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let name = fields.text("name")?.unwrap_or_else(stem);
    let scale = fields.number("scale")?.unwrap_or(1.0);
    fields.finish()?;
    let adapter = worker.load_adapter(name, path, scale).await?;
    Ok((StatusCode::CREATED, axum::Json(object(&adapter))).into_response())
}

pub(super) async fn unload(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    may_change(&app)?;
    let id = id.parse().map_err(|_| ApiError::parameter("id", "expected a number".to_owned()))?;
    let (_, worker) = app.host.worker().await?;
    worker.unload_adapter(id).await?;
    Ok(axum::Json(json!({ "success": true })).into_response())
}

fn may_change(app: &App) -> Result<(), ApiError> {
    match app.options.changes_adapters {
        true => Ok(()),
        false => Err(ApiError::fixed_adapters()),
    }
}
