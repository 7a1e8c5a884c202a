//! A small WebDriver client (W3C WebDriver, and ChromeDriver's way to the DevTools protocol).

use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

const CHROMIUM: &str = "/usr/bin/chromium";
const CHROMEDRIVER: &str = "/usr/bin/chromedriver";
const HINT: &str = "hint: `make setup` installs Chromium and its driver";
/// Generous: the machine may be compiling something else beside the tests.
pub const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(25);

/// How a page is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    pub name: &'static str,
    pub width: u32,
    pub height: u32,
    pub dark: bool,
    pub phone: bool,
}

/// A wide window in the light theme.
pub const DESKTOP: Screen =
    Screen { name: "light", width: 1280, height: 860, dark: false, phone: false };
/// A wide window in the dark theme.
pub const DARK: Screen = Screen { name: "dark", dark: true, ..DESKTOP };
/// A narrow phone.
pub const PHONE: Screen =
    Screen { name: "phone", width: 375, height: 812, dark: false, phone: true };
/// A narrow phone in the dark theme.
pub const PHONE_DARK: Screen = Screen { name: "phone-dark", dark: true, ..PHONE };

/// A browser of our own with a profile of its own.
#[derive(Clone)]
pub struct Browser {
    client: reqwest::Client,
    session: String,
}

/// Runs `body` in a fresh headless Chromium, and ends the browser whatever happens.
pub async fn with_browser<F: Future<Output = ()> + Send + 'static>(
    body: impl FnOnce(Browser) -> F,
) {
    let profile = tempfile::tempdir().expect("a folder for the profile");
    let (browser, mut driver) = start(profile.path()).await;
    let outcome = tokio::spawn(body(browser.clone())).await;
    let _ = browser.client.delete(&browser.session).send().await;
    let _ = driver.kill().await;
    if let Err(panicked) = outcome {
        std::panic::resume_unwind(panicked.into_panic());
    }
}

async fn start(profile: &Path) -> (Browser, Child) {
    for program in [CHROMIUM, CHROMEDRIVER] {
        assert!(Path::new(program).exists(), "{program} is missing; {HINT}");
    }
    // The process-wide default may be set by another test already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().timeout(PATIENCE).build().expect("a client");
    let mut driver = Command::new(CHROMEDRIVER)
        .arg("--port=0")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap_or_else(|error| panic!("start {CHROMEDRIVER}: {error}; {HINT}"));
    let mut lines = BufReader::new(driver.stdout.take().expect("piped")).lines();
    let port = loop {
        let line = lines.next_line().await.expect("read").expect("the driver names its port");
        if let Some((_, rest)) = line.split_once("successfully on port ") {
            break rest.trim_end_matches('.').parse::<u16>().expect("a port");
        }
    };
    // Whatever else it says must find a reader.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        &format!("--user-data-dir={}", profile.display()),
    ];
    let wanted = json!({ "capabilities": { "alwaysMatch": {
        "browserName": "chrome",
        "goog:loggingPrefs": { "browser": "ALL" },
        "goog:chromeOptions": { "binary": CHROMIUM, "args": arguments },
    }}});
    let root = format!("http://127.0.0.1:{port}");
    let made = call(client.post(format!("{root}/session")).json(&wanted)).await;
    let id = made["sessionId"].as_str().expect("a session");
    (Browser { client, session: format!("{root}/session/{id}") }, driver)
}

async fn call(request: reqwest::RequestBuilder) -> Value {
    let response = request.send().await.expect("the driver answers");
    let failed = !response.status().is_success();
    let mut answer: Value = response.json().await.expect("JSON");
    let value = answer["value"].take();
    assert!(!failed, "the driver refused: {} {}", value["error"], value["message"]);
    value
}

impl Browser {
    async fn post(&self, path: &str, body: Value) -> Value {
        call(self.client.post(format!("{}/{path}", self.session)).json(&body)).await
    }

    async fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.post("goog/cdp/execute", json!({ "cmd": command, "params": parameters })).await
    }

    /// Opens an address in a document of its own, even where only the fragment differs.
    pub async fn open(&self, url: &str) {
        self.post("url", json!({ "url": "about:blank" })).await;
        self.post("url", json!({ "url": url })).await;
    }

    /// Takes on the size and the theme of a screen.
    pub async fn look_as(&self, screen: Screen) {
        let Screen { width, height, phone, .. } = screen;
        let size = json!({
            "width": width, "height": height, "mobile": phone,
            "deviceScaleFactor": if phone { 2 } else { 1 },
        });
        self.devtools("Emulation.setDeviceMetricsOverride", size).await;
        let theme = if screen.dark { "dark" } else { "light" };
        let feature = json!({ "features": [{ "name": "prefers-color-scheme", "value": theme }] });
        self.devtools("Emulation.setEmulatedMedia", feature).await;
    }

    /// Runs a script's body in the page and gives back what it returns.
    pub async fn run(&self, script: &str) -> Value {
        self.post("execute/sync", json!({ "script": script, "args": [] })).await
    }

    /// Waits until a script's body returns something true.
    pub async fn wait_for(&self, what: &str, script: &str) -> Value {
        let started = Instant::now();
        loop {
            let value = self.run(script).await;
            if !matches!(value, Value::Null | Value::Bool(false)) {
                return value;
            }
            if started.elapsed() > PATIENCE {
                let shown = self.text("body").await;
                panic!("waited {PATIENCE:?} for {what}; the page shows:\n{shown}");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until an element's text holds this.
    pub async fn wait_for_text(&self, selector: &str, text: &str) {
        let script = format!(
            "return [...document.querySelectorAll({})].some((it) => it.innerText.includes({}))",
            json!(selector),
            json!(text)
        );
        self.wait_for(&format!("`{text}` in {selector}"), &script).await;
    }

    /// The text that people see in the first such element.
    pub async fn text(&self, selector: &str) -> String {
        let script = format!("return document.querySelector({})?.innerText ?? ''", json!(selector));
        self.run(&script).await.as_str().unwrap_or_default().to_owned()
    }

    /// Clicks the first such element as a person would; it must be reachable.
    pub async fn click(&self, selector: &str) {
        let element = self.find(selector).await;
        self.post(&format!("element/{element}/click"), json!({})).await;
    }

    /// Types into the first such element.
    pub async fn type_into(&self, selector: &str, text: &str) {
        let element = self.find(selector).await;
        self.post(&format!("element/{element}/value"), json!({ "text": text })).await;
    }

    /// Presses one key in the page, as named by WebDriver's table of keys.
    pub async fn press(&self, key: char) {
        let keys = json!([{ "type": "keyDown", "value": key }, { "type": "keyUp", "value": key }]);
        let actions = json!({ "actions": [{ "type": "key", "id": "keys", "actions": keys }] });
        self.post("actions", actions).await;
    }

    async fn find(&self, selector: &str) -> String {
        let wanted = json!({ "using": "css selector", "value": selector });
        let found = self.post("element", wanted).await;
        let id = found.as_object().and_then(|it| it.values().next()).and_then(Value::as_str);
        id.unwrap_or_else(|| panic!("no element {selector}")).to_owned()
    }

    /// What the console, the network and the security policy complained of since the last call.
    pub async fn complaints(&self) -> Vec<String> {
        let entries = self.post("se/log", json!({ "type": "browser" })).await;
        let entries = entries.as_array().cloned().unwrap_or_default();
        let text = |entry: &Value| entry["message"].as_str().unwrap_or_default().to_owned();
        entries.iter().map(text).collect()
    }

    /// Pictures the whole page into the screenshots' folder.
    pub async fn picture(&self, name: &str, screen: Screen) {
        let height = self.run("return document.documentElement.scrollHeight").await;
        let parameters = json!({
            "format": "png", "captureBeyondViewport": true,
            "clip": { "x": 0, "y": 0, "width": screen.width, "height": height, "scale": 1 },
        });
        let picture = self.devtools("Page.captureScreenshot", parameters).await;
        let data = picture["data"].as_str().expect("a picture");
        let bytes = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, data).unwrap();
        let folder = pictures();
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(format!("{name}-{}.png", screen.name)), bytes).unwrap();
    }
}

/// Where the screenshots go: `SLM_SCREENSHOTS`, or a folder among the build's outputs.
pub fn pictures() -> PathBuf {
    match std::env::var_os("SLM_SCREENSHOTS") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("screenshots"),
    }
}
