//! The dashboard in a real Chromium: every page on every screen, a rollout followed to its halt,
//! signing in, losing the hub, and an empty fleet. Screenshots go to [`driver::pictures`].

mod driver;
mod fleet;
mod stage;

use std::time::{Duration, Instant};

use driver::{Browser, DARK, DESKTOP, PATIENCE, PHONE, PHONE_DARK, with_browser};
use fleet::{Played, RealHub, damaged};
use slmops_api::device::{DesiredState, Phase};
use slmops_api::rollout::{Rollout, RolloutState};
use stage::{Fleet, Stage, TOKEN};

/// A page: name of its picture, path, and what must be readable on it.
type PageCheck = (&'static str, &'static str, &'static [&'static str]);

const PAGES: &[PageCheck] = &[
    (
        "fleet",
        "/",
        &[
            "Fleet",
            "7 devices in 3 classes",
            "slm fleet summary",
            "slm device list",
            "lobby-kiosk",
            "1 to 4 of 7",
            "No model",
            "272 MB",
            "within 3 min",
        ],
    ),
    ("releases", "/releases", &["smollm2-135m-instruct", "1.1.0", "overridden", "Q4_K_M"]),
    (
        "release",
        "/releases/smollm2-135m-instruct/1.0.0",
        &[
            "slm release show",
            "Quality over size",
            "17.94",
            "0.0383",
            "98.1 %",
            "9f2c41d0a7be6635",
            "real",
            "no worse",
            "In use",
            "requests that failed by our fault",
            "slm fleet telemetry --running smollm2-135m-instruct",
        ],
    ),
    (
        "release-overridden",
        "/releases/smollm2-135m-instruct/1.1.0",
        &["Released in spite of its gate", "worse", "task: arithmetic"],
    ),
    (
        "rollouts",
        "/rollouts",
        &["slm rollout list", "running", "completed", "6 of 7 devices confirmed"],
    ),
    (
        "rollout-running",
        "/rollouts/r-3f9c",
        &[
            "slm rollout why r-3f9c",
            "Wave 2",
            "Pause",
            "Waiting for kitchen",
            "needs 183 MB, offers 96.0 MB",
            "How it travelled",
            "from their site",
        ],
    ),
    ("rollout-completed", "/rollouts/r-1a07", &["completed", "baked for 10 s without a failure"]),
    (
        "device-failed",
        "/devices/kitchen",
        &[
            "Went back by itself",
            "golden-01",
            "Rejected here",
            "class medium",
            "as asked",
            "Why this variant",
        ],
    ),
    (
        "device-confirmed",
        "/devices/workshop",
        &["confirmed", "41.7", "llama.cpp b7100", "of 600 MB budget"],
    ),
    ("device-downloading", "/devices/lobby-kiosk", &["downloading 61.2 MB of 105 MB"]),
    ("device-without", "/devices/spare-01", &["no variant fits", "Nothing is desired"]),
    (
        "device-waiting",
        "/devices/press-line",
        &[
            "the disk is full",
            "Pinned to smollm2-135m-instruct 1.0.0",
            "slm device unpin press-line",
        ],
    ),
    (
        "channels",
        "/channels",
        &[
            "slm channel list",
            "edge",
            "1 204 devices",
            "5 devices, then 10 %, then the rest",
            "forced: the edge devices are at the workshop",
            "6 of 7 devices confirmed",
        ],
    ),
    (
        "held",
        "/held",
        &[
            "slm quarantine list",
            "and 1 more",
            "of no release",
            "“certified with this one”",
            "“at the workshop until May”",
            "slm device include van-12",
        ],
    ),
    (
        "webhooks",
        "/webhooks",
        &["slm webhook list", "ops.example.com", "2 given up", "no answer in time", "taken: 200"],
    ),
    (
        "audit",
        "/audit",
        &["chain holds", "slm audit verify", "rollout.halt", "Older entries (9 more)"],
    ),
];

/// Whether the page has loaded its data and hears of changes.
const READY: &str = "return document.querySelector('.page-head h1') !== null \
     && !document.querySelector('main').hasAttribute('aria-busy') \
     && document.querySelector('.live[data-state=live]') !== null";

/// What sticks out to the right of the window, though it should not.
const OVERFLOW: &str = "return document.documentElement.scrollWidth <= window.innerWidth ? '' : \
     [...document.querySelectorAll('main *, header *')] \
       .filter((it) => it.getBoundingClientRect().right > window.innerWidth + 1) \
       .map((it) => it.tagName + '.' + it.getAttribute('class')).join(' ')";

/// Interactive elements and pictures without a name for those who cannot see them; and ids that
/// are there twice.
const NAMELESS: &str = "const named = (it) => it.innerText?.trim() || it.getAttribute('aria-label') \
       || it.title || it.labels?.length; \
     const nameless = [...document.querySelectorAll('a, button, input, [role=img], [role=region]')] \
       .filter((it) => !named(it)).map((it) => it.outerHTML.slice(0, 120)); \
     const ids = [...document.querySelectorAll('[id]')].map((it) => it.id); \
     return [...nameless, ...ids.filter((id, at) => ids.indexOf(id) !== at)].join('; ')";

async fn open(browser: &Browser, stage: &Stage, path: &str) {
    browser.open(&stage.page(path)).await;
    browser.wait_for(&format!("{path} to be ready"), READY).await;
}

async fn assert_calm(browser: &Browser, place: &str) {
    assert_eq!(browser.complaints().await, Vec::<String>::new(), "{place}: complaints");
}

async fn look_at(pages: &'static [PageCheck]) {
    with_browser(move |browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        for (name, path, contents) in pages {
            browser.look_as(PHONE).await;
            open(&browser, &stage, path).await;
            let shown = browser.run("return document.body.textContent").await.to_string();
            for content in *contents {
                assert!(shown.contains(content), "{name}: no `{content}` in:\n{shown}");
            }
            assert_eq!(browser.run(NAMELESS).await, "", "{name}: without a name");
            let address = browser.run("return location.href").await;
            assert_eq!(address, format!("{}{path}", stage.url), "{name}: the token stays");
            for screen in [PHONE, PHONE_DARK, DARK, DESKTOP] {
                browser.look_as(screen).await;
                assert_eq!(browser.run(OVERFLOW).await, "", "{name} is wider than {screen:?}");
                browser.picture(name, screen).await;
            }
            assert_calm(&browser, name).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_of_releases_and_rollouts_on_every_screen() {
    look_at(&PAGES[..PAGES.len() / 2]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_page_of_devices_and_the_audit_on_every_screen() {
    look_at(&PAGES[PAGES.len() / 2..]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_is_followed_to_its_halt() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        browser.look_as(DESKTOP).await;
        open(&browser, &stage, "/rollouts/r-3f9c").await;
        // A mark that a reload would wipe out.
        browser.run("window.unloaded = false").await;

        // An operator pauses it and goes on, each time after being asked.
        for (verb, state) in [("pause", "paused"), ("resume", "running")] {
            browser.click(&format!(".actions [data-key={verb}]")).await;
            browser.wait_for_text("dialog", &format!("slm rollout {verb} r-3f9c")).await;
            browser.click("dialog button.primary").await;
            browser.wait_for_text(".title-row", state).await;
        }
        // Nothing is done when the person thinks better of it; Escape is no.
        browser.click(".actions [data-key=abort]").await;
        browser.wait_for_text("dialog", "Abort").await;
        browser.press('\u{E00C}').await;
        browser.wait_for("the dialog to close", "return !document.querySelector('dialog')").await;
        assert_eq!(stage.fleet.lock().unwrap().acts, ["r-3f9c pause", "r-3f9c resume"]);
        // A refusal is said, whatever the page thought of the token.
        browser.click(".actions [data-key=abort]").await;
        browser.click("dialog button.primary").await;
        browser.wait_for_text(".toasts", "needs an operator").await;
        let refused = browser.complaints().await;
        assert!(refused.iter().all(|line| line.contains("403")), "{refused:?}");

        stage.change("rollout", "r-3f9c", |fleet| {
            fleet.rollouts[0] = fleet.halted.clone();
        });
        browser.wait_for_text(".title-row", "halted").await;
        let shown = browser.text("main").await;
        for wanted in
            ["8 of 9 probes failed", "golden-01", "−2.92", "halted in wave 1", "not told yet"]
        {
            assert!(shown.contains(wanted), "no `{wanted}` in:\n{shown}");
        }
        let failing = "return document.querySelectorAll('#why')[0].closest('section') \
             .querySelectorAll('tr[data-tone=bad]').length";
        assert_eq!(browser.run(failing).await, 8, "each failing probe is marked");
        assert_eq!(browser.text("#announcer").await, "The rollout is now halted");
        assert_eq!(browser.run("return window.unloaded").await, false, "the page was not reloaded");
        assert_calm(&browser, "halted rollout").await;
        for screen in [DESKTOP, DARK, PHONE, PHONE_DARK] {
            browser.look_as(screen).await;
            assert_eq!(browser.run(OVERFLOW).await, "", "wider than {}", screen.name);
            browser.picture("rollout-halted", screen).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_signs_in_filters_and_walks_by_keyboard() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        browser.look_as(PHONE).await;
        browser.open(&format!("{}/audit", stage.url)).await;
        browser.wait_for_text("main", "Sign in").await;
        assert_eq!(browser.run(OVERFLOW).await, "");
        browser.picture("sign-in", PHONE).await;
        browser.look_as(DESKTOP).await;
        browser.picture("sign-in", DESKTOP).await;
        assert_calm(&browser, "sign in").await;

        browser.type_into("#token", "slmt_wrong\u{E007}").await;
        browser.wait_for_text("main [role=alert]", "unknown to the hub").await;
        browser.type_into("#token", &format!("{TOKEN}\u{E007}")).await;
        browser.wait_for("the page that was asked for", READY).await;
        browser.wait_for_text("h1", "Audit").await;
        let refused = browser.complaints().await;
        assert!(refused.iter().all(|line| line.contains("401")), "{refused:?}");

        // Older entries come when asked for, and stay when newer ones arrive.
        browser.click(".more button").await;
        let all = "return document.querySelectorAll('.log > li').length === 24";
        browser.wait_for("all entries", all).await;
        stage.change("audit", "24", |_| {});
        browser.click(".log > li:last-child summary").await;
        browser.wait_for_text(".log > li:last-child", "nothing: the first").await;

        // The links are real ones, and the way back works without loading anew.
        browser.run("window.unloaded = false").await;
        browser.click(".top nav a[href='/']").await;
        browser.wait_for_text("h1", "Fleet").await;
        browser.type_into("#filter", "class=small").await;
        let rows = "return [...document.querySelectorAll('#devices')].length === 1 && \
             [...document.getElementById('devices').closest('section').querySelectorAll('tbody th')] \
             .map((it) => it.innerText).join(' ') === 'gate-sensor spare-01'";
        browser.wait_for("two devices", rows).await;
        browser.wait_for_text("main", "slm device list class=small").await;
        // A change elsewhere neither takes the focus nor the words.
        stage.change("device", "d-7c1e0a", |fleet| {
            fleet.devices.retain(|device| device.name != "workshop");
        });
        browser.wait_for_text(".lead", "6 devices").await;
        let kept = "return document.activeElement.id + ' ' + document.activeElement.value";
        assert_eq!(browser.run(kept).await, "filter class=small");
        browser.run("history.back()").await;
        browser.wait_for_text("h1", "Audit").await;
        assert_eq!(browser.run("return window.unloaded").await, false);

        // The first stop of the keyboard skips what is the same on every page.
        open(&browser, &stage, "/releases/smollm2-135m-instruct/1.0.0").await;
        browser.press('\u{E004}').await;
        assert_eq!(
            browser.run("return document.activeElement.innerText").await,
            "Skip to the content"
        );
        browser.run("document.querySelector('.point').focus()").await;
        let tip = "return getComputedStyle(document.querySelector('.tip')).visibility";
        assert_eq!(browser.run(tip).await, "visible", "the focused point says its numbers");
        browser.picture("chart-focus", DESKTOP).await;

        // A chosen theme wins over the system's, and is kept.
        let dark = "return getComputedStyle(document.body).colorScheme + ' ' \
             + getComputedStyle(document.documentElement).backgroundColor";
        let light = browser.run(dark).await;
        for _ in 0..2 {
            browser.click(".top-tools button[title^=Theme]").await;
        }
        assert_eq!(browser.run("return document.documentElement.dataset.theme").await, "dark");
        assert_ne!(browser.run(dark).await, light);
        open(&browser, &stage, "/").await;
        assert_eq!(browser.run("return document.documentElement.dataset.theme").await, "dark");

        // The JSON behind a page, and the call that gives it.
        browser.click(".page-tools .quiet").await;
        browser.wait_for_text("dialog pre", "\"last_seen\"").await;
        browser.picture("json", DESKTOP).await;
        browser.click("dialog button.primary").await;
        browser.click(".top-tools button[title='Sign out']").await;
        browser.wait_for_text("h1", "Sign in").await;
        assert_eq!(browser.run("return sessionStorage.length").await, 0);
        assert_calm(&browser, "signed out").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_fleet_is_searched_and_turned_over_page_by_page() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        browser.look_as(DESKTOP).await;
        open(&browser, &stage, "/").await;
        browser.run("window.unloaded = false").await;
        let names = "return [...document.getElementById('devices').closest('section') \
             .querySelectorAll('tbody th')].map((it) => it.innerText).join(' ')";
        let first = "gate-sensor kitchen lobby-kiosk press-line";
        assert_eq!(browser.run(names).await, first);
        browser.click(".pages button:last-child").await;
        browser.wait_for_text(".pages", "5 to 7 of 7").await;
        assert_eq!(browser.run(names).await, "spare-01 van-12 workshop");
        // Something that changes elsewhere does not turn the page.
        stage.change("device", "d-7c1e0a", |_| {});
        browser.click(".pages button:first-child").await;
        browser.wait_for_text(".pages", "1 to 4 of 7").await;

        // What a state is called is the same in the hub's counts and on the page's rows.
        for (state, shown) in [
            ("confirmed", "gate-sensor workshop"),
            ("updating", "lobby-kiosk"),
            ("failed", "kitchen"),
            ("waiting", "press-line"),
            ("silent", "van-12"),
            ("idle", "spare-01"),
        ] {
            browser.click(&format!(".choices [data-key={state}]")).await;
            browser.wait_for(state, &format!("{names} === '{shown}'")).await;
            let chips = "return [...new Set([...document.getElementById('devices') \
                 .closest('section').querySelectorAll('tbody td:nth-child(2)')] \
                 .map((it) => it.innerText))].join()";
            let label = if state == "idle" { "no model" } else { state };
            assert_eq!(browser.run(chips).await, label);
            let address = browser.run("return location.search").await;
            assert_eq!(address, format!("?state={state}"));
            browser.click(&format!(".choices [data-key={state}]")).await;
            browser.wait_for("all", "return location.search === ''").await;
        }

        // A site's devices; the filter is in the address, and can be sent.
        browser.click("[aria-labelledby=sites] button.link").await;
        browser.wait_for_text("main", "slm device list --to site=berlin-3").await;
        browser.picture("fleet-filtered", DESKTOP).await;
        let address = browser.run("return location.pathname + location.search").await;
        assert_eq!(address, "/?selector=site%3Dberlin-3");
        open(&browser, &stage, "/?selector=site%3Dberlin-3&state=waiting").await;
        assert_eq!(browser.run(names).await, "press-line");
        browser.click("button.choice[data-key=selector]").await;
        browser.wait_for("the state alone", "return location.search === '?state=waiting'").await;
        browser.type_into("#filter", "nobody").await;
        browser.wait_for_text("main", "No device matches").await;
        assert_calm(&browser, "a searched fleet").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_stream_is_shown_and_found_again() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        browser.look_as(DESKTOP).await;
        open(&browser, &stage, "/devices/gate-sensor").await;
        stage.cut_events(true);
        browser.wait_for_text(".live", "reconnecting").await;
        browser.picture("reconnecting", DESKTOP).await;
        stage.cut_events(false);
        browser.wait_for_text(".live", "live").await;
        // What happened meanwhile is caught up with.
        stage.change("device", "d-b20f77", |fleet| {
            for device in &mut fleet.devices {
                if let Some(report) = &mut device.report {
                    report.telemetry.tokens_per_s = 12.5;
                }
            }
        });
        browser.wait_for_text(".figure", "12.5").await;
        let refused = browser.complaints().await;
        assert!(refused.iter().all(|line| line.contains("/v1/events")), "{refused:?}");
        // Who may only look is offered no lever.
        stage.fleet.lock().unwrap().role = slmops_api::audit::Role::Viewer;
        open(&browser, &stage, "/rollouts/r-3f9c").await;
        browser.wait_for_text(".actions", "sign in with an operator's token").await;
        assert_eq!(
            browser.run("return document.querySelectorAll('.actions button').length").await,
            0
        );
        // What is not there is said, with the next step.
        browser.open(&stage.page("/devices/nobody")).await;
        browser.wait_for_text("main [role=alert]", "hint: look again").await;
        browser.open(&stage.page("/rollouts/nothing")).await;
        browser.wait_for_text("main [role=alert]", "there is no such rollout").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_hub_says_what_to_do_next() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::empty()).await;
        for screen in [DESKTOP, PHONE_DARK] {
            browser.look_as(screen).await;
            for (name, path, command) in [
                ("empty-fleet", "/", "slm device invite > invite.txt"),
                ("empty-releases", "/releases", "slm ship model.gguf --to all"),
                ("empty-rollouts", "/rollouts", "slm rollout start"),
                ("empty-audit", "/audit", "slm token create"),
                ("empty-channels", "/channels", "slm channel set edge"),
                ("empty-webhooks", "/webhooks", "slm webhook add"),
            ] {
                open(&browser, &stage, path).await;
                browser.wait_for_text(".empty", command).await;
                assert_eq!(browser.run(OVERFLOW).await, "", "{path}");
                assert_calm(&browser, path).await;
                browser.picture(name, screen).await;
            }
            open(&browser, &stage, "/held").await;
            browser.wait_for_text("main", "Nothing is quarantined").await;
            browser.wait_for_text(".command", "slm device pin till-7").await;
            assert_eq!(browser.run(OVERFLOW).await, "");
            browser.picture("empty-held", screen).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_delivered_again_from_the_page() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        browser.look_as(DESKTOP).await;
        open(&browser, &stage, "/webhooks").await;
        browser.run("window.unloaded = false").await;
        let shown = browser.text("main").await;
        assert!(!shown.contains("hidden"), "the receiver's secret: {shown}");
        browser.click("button[aria-label='Deliver entry 17 again']").await;
        browser.wait_for_text("dialog", "slm webhook redeliver w-ops --sequence 17").await;
        browser.click("dialog button.primary").await;
        browser.wait_for_text(".title-row", "1 given up").await;
        browser.click("button[data-key=all]").await;
        browser.wait_for_text("dialog", "slm webhook redeliver w-ops").await;
        browser.click("dialog button.primary").await;
        let none = "return !document.querySelector('main').innerText.includes('Dead letters')";
        browser.wait_for("no dead letter", none).await;
        let acts = stage.fleet.lock().unwrap().acts.clone();
        assert_eq!(acts, ["w-ops redeliver Some(17)", "w-ops redeliver None"]);
        assert_eq!(browser.run("return window.unloaded").await, false);
        assert_calm(&browser, "dead letters").await;
        // Who may only look is told so.
        stage.fleet.lock().unwrap().role = slmops_api::audit::Role::Viewer;
        open(&browser, &stage, "/webhooks").await;
        browser.wait_for_text("main", "sign in with an operator's token").await;
        let refused = browser.complaints().await;
        assert!(refused.iter().all(|line| line.contains("403")), "{refused:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_in_use_is_drawn_beside_the_one_before() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        browser.look_as(DESKTOP).await;
        open(&browser, &stage, "/releases/smollm2-135m-instruct/1.1.0").await;
        let lines = "return [...document.querySelectorAll('.timeline-chart')] \
             .map((it) => it.querySelectorAll('.series path.line').length).join()";
        assert_eq!(browser.run(lines).await, "2,2,2,2", "two versions in four charts");
        let names = browser.text("[aria-labelledby=use] .legend").await;
        assert!(names.contains("1.1.0") && names.contains("1.0.0"), "{names}");
        let said =
            "return document.querySelector('.timeline-chart svg').getAttribute('aria-label')";
        let said = browser.run(said).await.to_string();
        assert!(said.contains("tokens per second, median, last: 1.1.0 "), "{said}");
        browser.picture("release-in-use", DESKTOP).await;
        browser.click("[aria-labelledby=use] [data-key=day]").await;
        browser.wait_for_text("main", "--by-day").await;
        // Nothing counted is said, and nothing breaks.
        stage.change("release", "", |fleet| fleet.telemetry.clear());
        browser.wait_for_text("main", "No device has counted anything of it").await;
        assert_calm(&browser, "a release in use").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_from_outside_stay_text() {
    with_browser(|browser| async move {
        let stage = Stage::start(Fleet::busy()).await;
        let hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>";
        stage.change("device", "", |fleet| {
            for device in &mut fleet.devices {
                device.facts.hostname = hostile.to_owned();
                device.facts.cpu = hostile.to_owned();
                device.labels.insert("note".to_owned(), hostile.to_owned());
                device.desired.reason = hostile.to_owned();
            }
            fleet.rollouts[0].waiting_for = hostile.to_owned();
            for entry in &mut fleet.audit {
                entry.object = hostile.to_owned();
                entry.actor = "a".repeat(400);
            }
        });
        browser.look_as(PHONE).await;
        for path in ["/", "/devices/kitchen", "/devices/spare-01", "/rollouts/r-3f9c", "/audit"] {
            open(&browser, &stage, path).await;
            let injected = "return document.querySelectorAll('main script, main img[src=x]').length";
            assert_eq!(browser.run(injected).await, 0, "{path}");
            assert_eq!(browser.run(OVERFLOW).await, "", "{path}");
            assert_calm(&browser, path).await;
        }
        // And were one to get in, the policy would stop it, and this test would hear of it.
        browser
            .run("const s = document.createElement('div'); s.setAttribute('style', 'color: red'); document.body.append(s)")
            .await;
        let heard = browser.complaints().await;
        assert!(heard.iter().any(|line| line.contains("Content Security Policy")), "{heard:?}");
    })
    .await;
}

/// Waits until the hub wants this version of a device.
async fn told(hub: &RealHub, device: &Played, version: &str) -> DesiredState {
    let started = Instant::now();
    loop {
        let desired = hub.desired(device).await;
        if desired.model.as_ref().is_some_and(|model| model.version.to_string() == version) {
            return desired;
        }
        assert!(started.elapsed() < PATIENCE, "{} is not told to run {version}", device.name);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_hub_is_followed_from_its_first_device_to_a_halt() {
    with_browser(|browser| async move {
        let hub = RealHub::start().await;
        let fixture = Fleet::busy();
        let page = |path: &str| format!("{}{path}#token={}", hub.url, hub.token);
        browser.look_as(DESKTOP).await;
        browser.open(&page("/")).await;
        browser.wait_for_text(".empty", "slm device invite").await;
        browser.run("window.unloaded = false").await;

        // Devices appear as they join.
        let mut devices =
            [hub.join("alpha", 600_000_000).await, hub.join("beta", 600_000_000).await];
        browser.wait_for_text(".lead", "2 devices in 1 class").await;
        browser.wait_for_text("tbody", "joined").await;

        // The first release is confirmed wave by wave.
        let first = hub.release(&fixture.releases[0]).await;
        let rollout = hub.roll_out(&first).await;
        browser.wait_for_text(".banner", "wave 1 of 2").await;
        browser.click(".banner").await;
        browser.wait_for_text(".title-row", "running").await;
        let state = hub.get::<Rollout>(&format!("/v1/rollouts/{}", rollout.id)).await;
        let canary = devices.iter().position(|it| it.name == state.devices[0].name).unwrap();
        for index in [canary, 1 - canary] {
            let desired = told(&hub, &devices[index], "1.0.0").await;
            hub.report(&mut devices[index], &desired, Phase::Verified).await;
            hub.report(&mut devices[index], &desired, Phase::Confirmed).await;
        }
        browser.wait_for_text(".title-row", "completed").await;
        browser.wait_for_text(".standing", "2 of 2 devices confirmed").await;
        assert_eq!(browser.run("return window.unloaded").await, false, "nothing was reloaded");

        // The second one fails on its canary, and the page says why.
        let second = hub.release(&fixture.releases[1]).await;
        let rollout = hub.roll_out(&second).await;
        let path = format!("/rollouts/{}", rollout.id);
        browser.open(&page(&path)).await;
        browser.wait_for_text(".title-row", "running").await;
        let state = hub.get::<Rollout>(&format!("/v1{path}")).await;
        let canary = devices.iter().position(|it| it.name == state.devices[0].name).unwrap();
        let desired = told(&hub, &devices[canary], "1.1.0").await;
        hub.report(&mut devices[canary], &desired, damaged()).await;
        browser.wait_for_text(".title-row", "halted").await;
        browser
            .wait_for_text("main", "3 of 4 probes failed: golden-01, golden-03, golden-04")
            .await;
        browser.wait_for_text(".member", "not told yet").await;
        browser.picture("hub-halted", DESKTOP).await;
        let state = hub.get::<Rollout>(&format!("/v1{path}")).await;
        assert_eq!(state.state, RolloutState::Halted);
        let other = &devices[1 - canary];
        let spared = hub.desired(other).await.model.map(|model| model.version.to_string());
        assert_eq!(spared.as_deref(), Some("1.0.0"), "the rest never hears of 1.1.0");

        // An operator takes it back from the page; the canary is told to run what it ran.
        browser.click(".actions [data-key=rollback]").await;
        browser.click("dialog button.primary").await;
        browser.wait_for_text(".title-row", "rolled back").await;
        told(&hub, &devices[canary], "1.0.0").await;

        // Every page reads what the hub itself writes.
        let device = format!("/devices/{}", devices[canary].name);
        for (name, path, wanted) in [
            ("hub-fleet", "/", "smollm2-135m-instruct 1.0.0"),
            (
                "hub-release",
                "/releases/smollm2-135m-instruct/1.1.0",
                "Released in spite of its gate",
            ),
            ("hub-releases", "/releases", "1.1.0"),
            ("hub-rollouts", "/rollouts", "rolled back"),
            ("hub-device", &device, "Rejected here"),
            ("hub-audit", "/audit", "chain holds"),
        ] {
            for screen in [DESKTOP, PHONE] {
                browser.look_as(screen).await;
                browser.open(&page(path)).await;
                browser.wait_for(path, READY).await;
                browser.wait_for_text("main", wanted).await;
                assert_eq!(browser.run(OVERFLOW).await, "", "{path}");
                browser.picture(name, screen).await;
            }
        }
        assert_calm(&browser, "a real hub").await;
        // A hub that goes away is said to be away.
        hub.stop().await;
        browser.wait_for_text(".live", "reconnecting").await;
    })
    .await;
}
