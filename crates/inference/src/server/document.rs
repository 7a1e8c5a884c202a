//! `docs/endpoint-openapi.json`: what the endpoint says of itself at `/openapi.json`, and the list of the
//! parameters that each path takes. One that the document does not name cannot be taken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use serde_json::Value;

const TEXT: &str = include_str!("../../../../docs/endpoint-openapi.json");

/// The names of the parameters of each path's body.
static PARAMETERS: LazyLock<BTreeMap<String, BTreeSet<String>>> = LazyLock::new(|| {
    let document: Value = serde_json::from_str(TEXT).expect("the document is JSON");
    let names = |operation: &Value| {
        let schema = &operation["post"]["requestBody"]["content"]["application/json"]["schema"];
        let pointer = schema["$ref"].as_str()?.strip_prefix('#')?;
        let properties = document.pointer(pointer)?["properties"].as_object()?;
        Some(properties.keys().cloned().collect())
    };
    let paths = document["paths"].as_object().into_iter().flatten();
    paths.filter_map(|(path, operation)| Some((path.clone(), names(operation)?))).collect()
});

/// The names of the parameters that a path takes in its body.
pub(super) fn parameters(path: &str) -> Option<&'static BTreeSet<String>> {
    PARAMETERS.get(path)
}

/// `GET /openapi.json`.
pub(super) async fn show() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], TEXT).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To mend it, write what is missing into `docs/endpoint-openapi.json`, or take out what is not there.
    #[test]
    fn every_route_is_in_the_document_and_the_other_way_round() {
        let document: Value = serde_json::from_str(TEXT).unwrap();
        let written: BTreeSet<&str> =
            document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let routed: BTreeSet<&str> = crate::server::routes()
            .iter()
            .map(|(path, _)| *path)
            .filter(|path| *path != "/")
            .collect();
        assert_eq!(written, routed, "change docs/endpoint-openapi.json");
    }
}
