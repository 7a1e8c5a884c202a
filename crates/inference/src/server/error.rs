//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use std::time::Duration;

use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::chat::TemplateError;
use crate::constraint::ConstraintError;
use crate::host::HostError;
use crate::worker::{RequestError, WorkerError};

/// After how long a client should try again where nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// An error that a client sees.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    parameter: Option<String>,
    message: String,
    retry_after: Option<Duration>,
    /// Whether it is about the prompt, whose parameter has another name at each path.
    about_prompt: bool,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: String) -> Self {
        Self {
            status,
            kind,
            code,
            parameter: None,
            message,
            retry_after: None,
            about_prompt: false,
        }
    }

    pub(super) fn invalid(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", "invalid_request", message)
    }

    pub(super) fn parameter(parameter: &str, message: String) -> Self {
        let parameter_error = Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            "invalid_value",
            format!("{parameter}: {message}"),
        );
        Self { parameter: Some(parameter.to_owned()), ..parameter_error }
    }

    /// A parameter that OpenAI knows and this server does not follow.
    pub(super) fn unsupported(parameter: &str, message: String) -> Self {
        Self { code: "unsupported_parameter", ..Self::parameter(parameter, message) }
    }

    pub(super) fn unknown_parameter(parameter: &str) -> Self {
        let message = "it is no parameter of this endpoint\nhint: leave it out".to_owned();
        Self { code: "unknown_parameter", ..Self::parameter(parameter, message) }
    }

    pub(super) fn unknown_model(asked: &str, served: &str) -> Self {
        let asked: String = asked.chars().take(200).collect();
        let message = format!(
            "the model `{asked}` does not exist here\nhint: this endpoint serves `{served}`"
        );
        let error =
            Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "model_not_found", message);
        Self { parameter: Some("model".to_owned()), ..error }
    }

    pub(super) fn too_large(limit_bytes: usize) -> Self {
        let message = format!("the request's body is larger than {limit_bytes} bytes");
        let status = StatusCode::PAYLOAD_TOO_LARGE;
        Self::new(status, "invalid_request_error", "request_too_large", message)
    }

    pub(super) fn too_slow() -> Self {
        let message = "the rest of the request's body did not come".to_owned();
        let status = StatusCode::REQUEST_TIMEOUT;
        Self::new(status, "invalid_request_error", "request_timeout", message)
    }

    pub(super) fn not_found(method: &Method, path: &str) -> Self {
        let path: String = path.chars().take(200).collect();
        let message = format!("there is no {method} {path}\nhint: GET /v1/models lists the models");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", "unknown_url", message)
    }

    pub(super) fn wrong_method(method: &Method, path: &str) -> Self {
        let message = format!("{path} does not take {method}");
        let status = StatusCode::METHOD_NOT_ALLOWED;
        Self::new(status, "invalid_request_error", "method_not_allowed", message)
    }

    /// Adapters are as they were configured.
    pub(super) fn fixed_adapters() -> Self {
        let message = "the adapters of this endpoint cannot be changed over HTTP".to_owned();
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", "adapters_fixed", message)
    }

    pub(super) fn foreign_origin() -> Self {
        let message = "pages of other machines may not call this endpoint".to_owned();
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", "foreign_origin", message)
    }

    /// Whoever asks has no key that is known here.
    pub(super) fn unauthorised(why: &str) -> Self {
        let message = format!("{why}\nhint: send `Authorization: Bearer KEY`");
        let status = StatusCode::UNAUTHORIZED;
        Self::new(status, "invalid_request_error", "invalid_api_key", message)
    }

    /// A key has used up what it may use for the moment.
    pub(super) fn too_many(message: String, again_after: Duration) -> Self {
        let status = StatusCode::TOO_MANY_REQUESTS;
        let error = Self::new(status, "rate_limit_error", "rate_limit_exceeded", message);
        Self { retry_after: Some(again_after), ..error }
    }

    /// A constraint that is refused.
    pub(super) fn constraint(parameter: &str, error: &ConstraintError) -> Self {
        match error {
            ConstraintError::Wrong { .. } | ConstraintError::TooComplex => {
                Self::parameter(parameter, error.to_string())
            }
            ConstraintError::Check(_) => {
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                Self::new(status, "server_error", "engine_error", error.to_string())
            }
        }
    }

    fn busy(status: StatusCode, kind: &'static str, code: &'static str, message: String) -> Self {
        Self { retry_after: Some(RETRY_AFTER), ..Self::new(status, kind, code, message) }
    }

    /// Names the parameter that holds the prompt where the prompt is at fault.
    pub(super) fn of_prompt(mut self, parameter: &str) -> Self {
        if self.about_prompt {
            self.parameter = Some(parameter.to_owned());
        }
        self
    }

    /// As a response that failed says it: its codes are few.
    pub(super) fn of_response(&self) -> Value {
        let code = match self.kind {
            "server_error" => "server_error",
            "rate_limit_error" => "rate_limit_exceeded",
            _ => "invalid_prompt",
        };
        json!({ "code": code, "message": self.message })
    }

    pub(super) fn body(&self) -> Value {
        json!({ "error": {
            "message": self.message,
            "type": self.kind,
            "param": self.parameter,
            "code": self.code,
        } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(after) = self.retry_after {
            let seconds = HeaderValue::from(after.as_secs_f64().ceil() as u64);
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

impl From<HostError> for ApiError {
    fn from(error: HostError) -> Self {
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        match error {
            HostError::NoModel => {
                Self::busy(unavailable, "server_error", "model_not_loaded", error.to_string())
            }
            HostError::Restarting => {
                Self::busy(unavailable, "server_error", "model_restarting", error.to_string())
            }
            HostError::Worker(error) => error.into(),
        }
    }
}

impl From<WorkerError> for ApiError {
    fn from(error: WorkerError) -> Self {
        let message = error.to_string();
        match error {
            WorkerError::Request(RequestError::Invalid { parameter, message }) => {
                Self::parameter(&parameter, message)
            }
            WorkerError::Request(RequestError::ContextLength { .. }) => {
                let code = "context_length_exceeded";
                Self { code, about_prompt: true, ..Self::invalid(message) }
            }
            WorkerError::Request(RequestError::QueueFull { .. }) => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                Self::busy(status, "rate_limit_error", "queue_full", message)
            }
            WorkerError::Template(TemplateError::Refused { .. }) => {
                Self { code: "invalid_value", about_prompt: true, ..Self::invalid(message) }
            }
            WorkerError::Died { .. } | WorkerError::Draining => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Self::busy(status, "server_error", "worker_died", message)
            }
            _ => {
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                Self::new(status, "server_error", "engine_error", message)
            }
        }
    }
}
