//! The chat page in a headless Chromium. `SLM_SCREENSHOTS` names a folder for pictures of it.

use std::sync::Arc;

use slmops_api::runtime::RuntimeConfig;
use slmops_inference::server::{KeyLimits, Keys, ServerOptions};

use crate::server::{Endpoint, named};
use crate::support::{glass, runtime, smollm2};

#[allow(dead_code, reason = "the hub's tests use more of it")]
#[path = "../../../hub/tests/it/browser/driver.rs"]
mod driver;

use driver::{DARK, DESKTOP, PHONE, with_browser};

/// The escape key in WebDriver's table of keys.
const ESCAPE: char = '\u{e00c}';
const ANSWERED: &str = "return !document.querySelector('.running') \
    && document.querySelectorAll('.assistant .below button').length / 2";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_tried_by_hand() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.toml");
    let key = Keys::create(&file, "page", KeyLimits::default()).unwrap();
    let keys = Some(Arc::new(Keys::open(&file).unwrap()));
    let endpoint = Endpoint::with_options(ServerOptions { keys, ..Default::default() }).await;
    let url = endpoint.url.clone();
    let (status, page) = endpoint.get("/").await;
    assert_eq!(status, 200);
    assert!(!page.contains("https://"), "nothing from elsewhere");
    let real = smollm2();
    let runtime = match real {
        Some(_) => RuntimeConfig { context_tokens: 1024, ..RuntimeConfig::default() },
        None => runtime(),
    };
    let model = named("tiny", real.unwrap_or_else(glass), runtime);
    let endpoint = Arc::new(endpoint);
    let serving = Arc::clone(&endpoint);
    with_browser(async move |browser| {
        browser.look_as(DESKTOP).await;
        browser.open(&url).await;
        browser.wait_for_text("#state", "loading").await;
        serving.load(model).await;
        browser.wait_for_text("#state", "ready").await;
        assert_eq!(browser.text("h1").await, "tiny");
        // The browser complains of the 503 itself.
        browser.complaints().await;

        // Without a key it says so, and shows where one goes.
        browser.type_into("#message", "Which city is the capital of France?\u{e007}").await;
        browser.wait_for_text("#chat .error", "a key is needed").await;
        browser.type_into("#key", &key).await;
        browser.type_into("#system", "Answer in one sentence.").await;
        browser.run("document.getElementById('limit').value = 40").await;
        browser.run("document.getElementById('temperature').value = 0").await;
        browser.click("#more").await;
        browser.complaints().await;
        // The question is still there.
        browser.type_into("#message", "\u{e007}").await;
        browser.wait_for("an answer", &format!("{ANSWERED} === 1")).await;
        let below = browser.text("#chat li:last-child .below").await;
        for fact in ["tokens", "tokens/s", "first after", "prompt"] {
            assert!(below.contains(fact), "{below}");
        }
        assert!(!browser.text("#chat li:last-child .text").await.trim().is_empty());
        for screen in [DESKTOP, DARK, PHONE] {
            browser.look_as(screen).await;
            let wide = browser.run("return document.documentElement.scrollWidth").await;
            assert!(wide.as_u64().unwrap() <= u64::from(screen.width), "{wide}");
            browser.picture("chat", screen).await;
        }
        browser.click("#more").await;
        browser.picture("chat-settings", PHONE).await;
        browser.look_as(DESKTOP).await;
        browser.picture("chat-settings", DESKTOP).await;
        browser.click("#chat li:last-child .below button").await;
        let judged = "return document.querySelector('.below button[aria-pressed=true]')?.innerText";
        assert_eq!(browser.wait_for("the verdict", judged).await, "Good");

        // Markup that a model or a person writes is text.
        browser.run("document.getElementById('limit').value = ''").await;
        browser.type_into("#message", "<img src=x onerror=alert(1)>\u{e007}").await;
        browser
            .wait_for("a second answer begins", "return !!document.querySelector('.running')")
            .await;
        browser.press(ESCAPE).await;
        browser.wait_for("it is over", "return !document.querySelector('.running')").await;
        assert_eq!(browser.run("return document.querySelectorAll('#chat img').length").await, 0);

        // Nothing is kept in the browser.
        let kept = "return localStorage.length + sessionStorage.length + document.cookie.length";
        assert_eq!(browser.run(kept).await, 0);
        browser.click("#clear").await;
        assert_eq!(browser.run("return document.querySelectorAll('#chat li').length").await, 0);
        assert_eq!(browser.complaints().await, Vec::<String>::new());
    })
    .await;
    assert_eq!(endpoint.host.evidence().thumbs_up, 1);
    Arc::into_inner(endpoint).expect("the last one").stop().await;
}
