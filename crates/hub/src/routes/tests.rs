use axum::body::Body;
use axum::http::header;
use slmops_api::problem::Problem;
use tower::ServiceExt as _;

use super::*;

/// Calls a service that is at work on as many calls as `free` leaves room for.
async fn call_with(free: usize) -> Response {
    let calls = Arc::new(Semaphore::new(free));
    let app = Router::new()
        .route("/", get(|| async { "taken on" }))
        .layer(middleware::from_fn_with_state(Arc::clone(&calls), admit));
    let response = app.oneshot(Request::new(Body::empty())).await.unwrap();
    // The permit comes back whatever the answer.
    assert_eq!(calls.available_permits(), free);
    response
}

#[tokio::test]
async fn devices_are_turned_away_to_different_moments() {
    assert_eq!(call_with(1).await.status(), StatusCode::OK);
    let mut moments = std::collections::BTreeSet::new();
    for _ in 0..100 {
        let response = call_with(0).await;
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        let after = response.headers()[header::RETRY_AFTER].to_str().unwrap();
        moments.insert(after.parse::<u64>().unwrap());
        let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
        let problem: Problem = serde_json::from_slice(&body).unwrap();
        assert_eq!((problem.status, problem.kind.as_str()), (429, "urn:slmops:busy"));
    }
    assert!(moments.iter().all(|after| (2..=30).contains(after)), "{moments:?}");
    assert!(moments.len() > 10, "{moments:?}");
}
