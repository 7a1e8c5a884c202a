//! What the files promise to a browser, without one.

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use tower::ServiceExt;

use super::{PAGES, assets, router};

async fn get(path: &str, tag: Option<&str>) -> axum::response::Response {
    let mut request = Request::get(path);
    if let Some(tag) = tag {
        request = request.header(header::IF_NONE_MATCH, tag);
    }
    let request = request.body(Body::empty()).expect("a request");
    router::<()>().oneshot(request).await.expect("infallible")
}

#[tokio::test]
async fn every_page_and_file_answers_with_strict_headers() {
    let pages = PAGES.iter().map(|path| path.replace(['{', '}'], ""));
    let files = assets::all().iter().map(|asset| format!("/assets/{}", asset.path));
    for path in pages.chain(files).chain(["/favicon.ico".to_owned(), "/assets/none".to_owned()]) {
        let response = get(&path, None).await;
        let expected = if path == "/assets/none" { StatusCode::NOT_FOUND } else { StatusCode::OK };
        assert_eq!(response.status(), expected, "{path}");
        let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{path}: {policy}");
        assert!(!policy.contains("unsafe"), "{path}: {policy}");
        assert_eq!(response.headers()[header::X_CONTENT_TYPE_OPTIONS], "nosniff", "{path}");
        assert_eq!(response.headers()[header::REFERRER_POLICY], "no-referrer", "{path}");
    }
}

#[tokio::test]
async fn a_known_file_is_not_sent_again() {
    let first = get("/assets/main.js", None).await;
    let tag = first.headers()[header::ETAG].to_str().unwrap().to_owned();
    for known in [tag.clone(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".to_owned()] {
        let again = get("/assets/main.js", Some(&known)).await;
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED, "{known}");
        assert_eq!(again.headers()[header::ETAG].to_str().unwrap(), tag);
    }
    assert_eq!(get("/assets/main.js", Some("\"other\"")).await.status(), StatusCode::OK);
}

#[test]
fn every_file_in_the_folder_is_embedded() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dashboard/assets");
    let mut folders = vec![root.clone()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(&root).unwrap().display().to_string());
            }
        }
    }
    found.sort();
    let embedded: Vec<_> = assets::all().iter().map(|asset| asset.path.to_owned()).collect();
    assert_eq!(embedded, found);
}

#[test]
fn no_file_brings_in_another_host_or_builds_markup_from_text() {
    for asset in assets::all() {
        let text = std::str::from_utf8(asset.bytes).unwrap();
        for outside in text.match_indices("://") {
            let start = outside.0.saturating_sub(8);
            let around = &text[start..(outside.0 + 40).min(text.len())];
            assert!(
                around.contains("www.w3.org") || around.contains("://…"),
                "{}: names another host: {around}",
                asset.path
            );
        }
        for forbidden in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("]
        {
            assert!(!text.contains(forbidden), "{}: uses {forbidden}", asset.path);
        }
        if asset.media_type.starts_with("text/html") {
            assert!(!text.contains("style="), "an inline style in {}", asset.path);
            assert!(!text.contains("<style"), "an inline style in {}", asset.path);
            let handler = |word: &str| word.starts_with("on") && word.contains('=');
            assert!(!text.split_whitespace().any(handler), "an inline handler in {}", asset.path);
        }
    }
}
