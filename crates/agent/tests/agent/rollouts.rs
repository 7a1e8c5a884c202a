//! What comes of each kind of release and of each misbehaviour of the hub.

use slmops_agent::identity::MeteredLink;
use slmops_api::device::{DeviceReport, Failure, Phase, WaitCause};
use slmops_api::probe::ReplayPrompt;
use slmops_api::rules::{DeviceRules, Metered};
use slmops_artifact::Digest;
use slmops_artifact::signing::PrivateKey;

use crate::Device;
use crate::fake_hub::{FakeHub, Release, public, runtime};

#[tokio::test(flavor = "multi_thread")]
async fn a_release_is_confirmed_and_serves() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    assert_ne!(device.ask().await, 200);
    let release = Release::good("1.0.0");
    let generation = hub.ship(&release);
    let report = hub.confirmed(generation).await;

    let running = report.running.unwrap();
    assert_eq!(running.weights, Digest::of(&release.weights));
    assert_eq!(running.version.to_string(), "1.0.0");
    let effective = report.effective.unwrap();
    assert_eq!(effective.differences(&runtime()), []);
    // The golden probe, and the request through the endpoint.
    let names: Vec<&str> = report.probes.iter().map(|probe| probe.name.as_str()).collect();
    assert_eq!(names, ["golden-01", "endpoint"]);
    assert!(report.probes.iter().all(|probe| probe.passed));
    assert!(report.telemetry.downloaded_bytes >= release.weights.len() as u64);
    assert!(report.facts.endpoint.unwrap().starts_with("http://127.0.0.1:"));
    assert_eq!(device.ask().await, 200);

    // What the owner can see.
    let outbox = slmops_agent::outbox::read(device.path()).unwrap().join("\n");
    assert!(outbox.contains("POST /v1/enrol") && outbox.contains("phase=confirmed"), "{outbox}");
    assert!(outbox.contains("secret=(hidden)") && !outbox.contains("Alice"), "{outbox}");

    // Sequence numbers grow, over a restart too; so does use.
    device.stop().await;
    let before = hub.lock().reports.last().unwrap().sequence;
    device.start();
    let after = hub
        .report("a confirmation after the restart", |report| {
            report.sequence > before && report.phase == Phase::Confirmed
        })
        .await;
    assert!(after.telemetry.requests >= 1);
    let sequences: Vec<u64> = hub.lock().reports.iter().map(|report| report.sequence).collect();
    assert!(sequences.is_sorted_by(|a, b| a < b), "{sequences:?}");
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_releases_are_taken_back_and_the_good_one_keeps_answering() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;

    let cases = [
        ("probes", Release::failing("1.1.0")),
        ("load", Release::truncated("1.2.0")),
        ("signature", Release { stranger: true, ..Release::good("1.3.0") }),
        ("signature", Release { tampered: true, ..Release::good("1.4.0") }),
        ("signature", Release { unsigned: true, ..Release::good("1.5.0") }),
    ];
    for (expected, release) in cases {
        let generation = hub.ship(&release);
        let report = hub.rolled_back(generation).await;
        let Phase::RolledBack { failure } = &report.phase else { unreachable!() };
        let failure = serde_json::to_value(failure).unwrap();
        assert_eq!(failure["failure"], expected, "{}", release.version);
        assert_eq!(report.running.as_ref().unwrap().version.to_string(), "1.0.0");
        assert_eq!(report.rejected.last().unwrap().generation, generation);
        assert_eq!(device.ask().await, 200, "{}", release.version);
    }
    // The names of the probes that failed are the evidence.
    let reports = hub.lock().reports.clone();
    let named = reports.iter().any(|report| {
        matches!(&report.phase, Phase::RolledBack { failure: Failure::Probes { results } }
            if results[0].name == "golden-01" && !results[0].passed)
    });
    assert!(named);

    // A rejected manifest is not even downloaded again.
    let before = hub.lock().blob_requests.len();
    let model = hub.publish(&Release::failing("1.1.0"));
    let generation = hub.want(Some(model), runtime());
    hub.rolled_back(generation).await;
    assert_eq!(hub.lock().blob_requests.len(), before);

    // Going back is a new generation that names the old model: at once, and confirmed.
    let model = hub.publish(&Release::good("1.0.0"));
    let generation = hub.want(Some(model), runtime());
    hub.confirmed(generation).await;
    assert_eq!(hub.lock().blob_requests.len(), before);

    // Only what the ledger names is left on the disk: weights and probes.
    let blobs = std::fs::read_dir(device.path().join("blobs")).unwrap();
    let files = blobs.filter(|file| file.as_ref().unwrap().file_type().unwrap().is_file()).count();
    assert_eq!(files, 2);
    device.stop().await;
}

/// The running version and the new one answer the same prompts on the device, right before the switch.
#[tokio::test(flavor = "multi_thread")]
async fn the_prompts_of_a_release_are_replayed_on_both_versions() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let prompts = ["Alice was beginning to", "The rabbit ran into the", "Once upon a time"];
    let replay = |prompt: &str| ReplayPrompt {
        prompt: prompt.to_owned(),
        raw: true,
        answer: " get very tired of sitting by her sister".to_owned(),
    };
    let replaying = |version| {
        let mut release = Release::good(version);
        release.probes.replay = prompts.map(replay).to_vec();
        release
    };
    let first = hub.confirmed(hub.ship(&replaying("1.0.0"))).await;
    let before = first.running.unwrap().manifest;
    assert_eq!(first.evidence.unwrap().replay, None, "nothing ran before");

    let same = hub.confirmed(hub.ship(&replaying("1.1.0"))).await;
    let evidence = same.evidence.unwrap();
    assert_eq!(evidence.manifest, same.running.unwrap().manifest);
    let replayed = evidence.replay.unwrap();
    assert_eq!((replayed.before, replayed.losses_nats.len()), (before, prompts.len()));
    assert!(replayed.losses_nats.iter().all(|loss| loss.abs() < 0.05), "{replayed:?}");

    // Passes its lenient probe, and knows no language any more.
    let mut worse = replaying("1.2.0");
    let half = worse.weights.len() / 2;
    worse.weights[half..].fill(0);
    let generation = hub.ship(&worse);
    let worse = hub.confirmed(generation).await.evidence.unwrap();
    let replayed = worse.replay.unwrap();
    assert_eq!(replayed.before, evidence.manifest);
    // More than a gate allows.
    assert!(replayed.losses_nats.iter().all(|loss| *loss > 0.1), "{replayed:?}");

    // Nothing of the text leaves the device; the numbers are kept over a restart.
    let outbox = slmops_agent::outbox::read(device.path()).unwrap().join("\n");
    assert!(!outbox.contains("Alice") && !outbox.contains("rabbit"), "{outbox}");
    device.stop().await;
    let sequence = hub.lock().reports.last().unwrap().sequence;
    device.start();
    let after = hub.report("a report after the restart", |report| {
        report.sequence > sequence && report.phase == Phase::Confirmed && report.evidence.is_some()
    });
    assert_eq!(after.await.evidence.unwrap().replay, Some(replayed));
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_download_goes_on_where_it_stopped() {
    let hub = FakeHub::start().await;
    hub.lock().faults.cut = vec![700_000, 1_000_000];
    let mut device = Device::join(&hub).await;
    let release = Release::good("1.0.0");
    let generation = hub.ship(&release);
    hub.confirmed(generation).await;
    let requests = hub.lock().blob_requests.clone();
    let large: Vec<_> = requests.iter().filter(|(_, sent)| *sent > 10_000).collect();
    let starts: Vec<u64> = large.iter().map(|(start, _)| *start).collect();
    assert_eq!(starts.len(), 3, "{requests:?}");
    assert!(starts[0] == 0 && starts[1] > 0 && starts[2] > starts[1], "{requests:?}");
    let sent: u64 = large.iter().map(|(_, sent)| sent).sum();
    // What was in flight when a connection broke may come twice.
    assert!(sent < release.weights.len() as u64 + 1_700_000, "{requests:?}");
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_is_never_the_models_fault() {
    let hub = FakeHub::start().await;
    {
        let mut world = hub.lock();
        world.faults.ignore_ranges = true;
        world.faults.cut = vec![500_000];
        world.faults.flips = 1;
        world.faults.unauthorised = 2;
    }
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    let report = hub.confirmed(generation).await;
    assert_eq!(report.rejected, []);

    // A busy hub is left alone for as long as it asks.
    hub.lock().faults.unavailable = Some(1);
    let generation = hub.ship(&Release::good("1.1.0"));
    assert_eq!(device.ask().await, 200);
    hub.lock().faults.unavailable = None;
    let report = hub.confirmed(generation).await;
    assert_eq!(report.rejected, []);
    assert_eq!(report.previous.unwrap().version.to_string(), "1.0.0");
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_source_lacks_or_damages_is_rejected() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let release = Release::good("1.0.0");
    hub.lock().faults.missing.insert(Digest::of(&release.weights));
    let generation = hub.ship(&release);
    let report = hub.rolled_back(generation).await;
    assert_eq!(report.phase, Phase::RolledBack { failure: Failure::Digest });
    assert_eq!(report.running, None);

    hub.lock().faults.flips = 1_000;
    let generation = hub.ship(&Release::good("1.1.0"));
    let report = hub.rolled_back(generation).await;
    assert_eq!(report.phase, Phase::RolledBack { failure: Failure::Digest });
    hub.lock().faults.flips = 0;

    let generation = hub.ship(&Release::good("1.2.0"));
    assert_eq!(hub.confirmed(generation).await.rejected.len(), 2);
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn serves_unchanged_when_the_hub_is_gone() {
    let mut hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;
    hub.vanish().await;
    assert_eq!(device.ask().await, 200);
    device.stop().await;
    assert_eq!(device.ask().await, 0);
    device.start();
    crate::until("it serves without a hub", || async { device.ask().await == 200 }).await;

    let generation = hub.ship(&Release::good("1.1.0"));
    hub.come_back().await;
    hub.confirmed(generation).await;
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_configuration_restarts_the_same_model() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let model = hub.publish(&Release::good("1.0.0"));
    let generation = hub.want(Some(model.clone()), runtime());
    hub.confirmed(generation).await;
    let downloads = hub.lock().blob_requests.len();

    let mut narrow = runtime();
    narrow.context_tokens = 64;
    let generation = hub.want(Some(model.clone()), narrow);
    let report = hub.confirmed(generation).await;
    assert_eq!(report.effective.unwrap().context_tokens, 64);

    // More context than the model was trained for: the configuration is to blame, not the model.
    let mut wide = runtime();
    wide.context_tokens = 4096;
    let generation = hub.want(Some(model.clone()), wide);
    let report = hub.rolled_back(generation).await;
    let settings = vec!["context_tokens".to_owned()];
    let failure = Failure::Configuration { settings };
    assert_eq!(report.phase, Phase::RolledBack { failure });
    assert_eq!(report.rejected, []);
    assert_eq!(report.effective.unwrap().context_tokens, 64);
    assert_eq!(device.ask().await, 200);

    let generation = hub.want(Some(model), runtime());
    hub.confirmed(generation).await;
    assert_eq!(hub.lock().blob_requests.len(), downloads);
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_fetched_again() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let release = Release::good("1.0.0");
    let generation = hub.ship(&release);
    hub.confirmed(generation).await;
    device.stop().await;
    let path = device.state().blob(Digest::of(&release.weights));
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&path, bytes).unwrap();
    let before = hub.lock().reports.last().unwrap().sequence;
    device.start();
    hub.report("a new confirmation", |report| {
        report.sequence > before && report.phase == Phase::Confirmed
    })
    .await;
    assert_eq!(std::fs::read(&path).unwrap(), release.weights);
    assert_eq!(device.ask().await, 200);
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_no_more_is_never_the_models_fault() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;

    // A folder in the way of the ledger's temporary file stands for a disk that cannot be written.
    let in_the_way = device.path().join("ledger.json.new");
    std::fs::create_dir(&in_the_way).unwrap();
    let generation = hub.ship(&Release::good("1.1.0"));
    let waiting = |cause: WaitCause| {
        move |report: &DeviceReport| report.phase == Phase::Waiting { cause, until: None }
    };
    let report = hub.report("it waits for its folder", waiting(WaitCause::Storage)).await;
    assert_eq!(report.running.unwrap().version.to_string(), "1.0.0");
    assert_eq!(device.ask().await, 200);
    std::fs::remove_dir(&in_the_way).unwrap();
    assert_eq!(hub.confirmed(generation).await.rejected, []);

    // A model larger than the disk.
    let model = hub.publish(&Release { claimed_bytes: Some(1 << 39), ..Release::good("1.2.0") });
    hub.want(Some(model), runtime());
    let report = hub.report("it waits for space", waiting(WaitCause::DiskFull)).await;
    assert_eq!(report.running.unwrap().version.to_string(), "1.1.0");
    assert_eq!(report.rejected, []);
    let generation = hub.ship(&Release::good("1.3.0"));
    hub.confirmed(generation).await;
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_release_is_kept_over_a_restart_and_goes_on_when_told() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    let facts = hub.confirmed(generation).await.facts;
    assert!(DeviceRules::ALL.iter().all(|rule| facts.obeys.iter().any(|known| known == rule)));

    // Held while it comes in: neither fetched further nor switched to.
    hub.lock().faults.slow = Some(4 << 10);
    let release = Release::good("1.1.0");
    hub.ship(&release);
    hub.report("a download", |report| matches!(report.phase, Phase::Downloading { .. })).await;
    let generation = hub.rules(DeviceRules { hold: true, ..DeviceRules::default() });
    let held = Phase::Waiting { cause: WaitCause::Held, until: None };
    let report = hub.report("it is held", |report| report.phase == held).await;
    assert_eq!(report.generation, generation);
    let fetched = hub.lock().blob_requests.len();
    device.stop().await;
    let text = device.status();
    assert!(text.contains("1.1.0") && text.contains("the release fits"), "{text}");
    device.start();
    let last = report.sequence;
    let again = |report: &DeviceReport| report.sequence > last && report.phase == held;
    let report = hub.report("it is held after a restart", again).await;
    assert_eq!(report.running.unwrap().version.to_string(), "1.0.0");
    assert_eq!(hub.lock().blob_requests.len(), fetched);
    assert!(device.status().contains("waits: the rollout is held"), "{}", device.status());
    assert_eq!(device.ask().await, 200);

    hub.lock().faults.slow = None;
    let generation = hub.rules(DeviceRules::default());
    let report = hub.confirmed(generation).await;
    assert_eq!(report.running.unwrap().version.to_string(), "1.1.0");
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_staged_before_its_time_is_switched_to_in_time_without_the_hub() {
    let mut hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;
    let model = hub.publish(&Release::good("1.1.0"));
    let now = jiff::Timestamp::now();
    let at = now + jiff::SignedDuration::from_hours(48);
    hub.rules(DeviceRules { activate_at: Some(at), ..DeviceRules::default() });
    hub.lock().desired.model = Some(model);
    hub.rules(DeviceRules { activate_at: Some(at), ..DeviceRules::default() });
    let waits = Phase::Prestaged { cause: WaitCause::NotBefore, until: Some(at) };
    let report = hub.report("it is staged before its time", |it| it.phase == waits).await;
    assert_eq!(report.running.unwrap().version.to_string(), "1.0.0");
    let text = device.status();
    assert!(text.contains("is here and genuine; it waits for its time, until"), "{text}");

    // Sooner, and then the hub is gone: it restarts, trusts its clock, and switches by itself.
    let at = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(8);
    let soon = hub.rules(DeviceRules { activate_at: Some(at), ..DeviceRules::default() });
    hub.report("it heard", |it| it.generation == soon && it.phase.held().is_some()).await;
    device.stop().await;
    hub.vanish().await;
    device.start();
    let waited = tokio::time::Instant::now();
    while !device.status().contains("serves     glass 1.1.0") {
        assert!(waited.elapsed().as_secs() < 60, "{}", device.status());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!(jiff::Timestamp::now() >= at);
    assert_eq!(device.ask().await, 200);
    hub.come_back().await;
    hub.confirmed(soon).await;
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_metered_link_defers_a_download_until_its_owner_says_otherwise() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    device.stop().await;
    device.set_metered(MeteredLink::Yes);
    device.start();
    let model = hub.publish(&Release::good("1.0.0"));
    hub.lock().desired.model = Some(model);
    let generation = hub.rules(DeviceRules { metered: Metered::Defer, ..DeviceRules::default() });
    let waits = Phase::Waiting { cause: WaitCause::Metered, until: None };
    let report = hub.report("it waits for another link", |it| it.phase == waits).await;
    assert!(report.facts.metered && hub.lock().blob_requests.is_empty());
    device.stop().await;
    device.set_metered(MeteredLink::No);
    device.start();
    hub.confirmed(generation).await;
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_keeps_to_its_rate() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let release = Release::good("1.0.0");
    let bytes = release.weights.len() as f64;
    let rate = 1_000_000;
    let model = hub.publish(&release);
    hub.lock().desired.model = Some(model);
    let rules = DeviceRules { max_rate_bytes_per_s: Some(rate), ..DeviceRules::default() };
    let generation = hub.rules(rules);
    hub.report("a download", |report| matches!(report.phase, Phase::Downloading { .. })).await;
    let began = std::time::Instant::now();
    hub.report("all of it", |report| {
        !matches!(report.phase, Phase::Idle | Phase::Downloading { .. })
            && report.generation == generation
    })
    .await;
    // A quarter of a second may come at once, and reports of progress come late by 50 ms.
    let (took_s, expected_s) = (began.elapsed().as_secs_f64(), bytes / rate as f64);
    assert!(took_s > expected_s * 0.9 - 0.4, "{took_s} s, not {expected_s} s");
    assert!(took_s < expected_s * 1.5 + 2.0, "{took_s} s, not {expected_s} s");
    hub.confirmed(generation).await;
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_wish_ends_the_work_on_the_old_one() {
    let hub = FakeHub::start().await;
    hub.lock().faults.slow = Some(4 << 10);
    let mut device = Device::join(&hub).await;
    hub.ship(&Release::good("1.0.0"));
    hub.report("a download", |report| matches!(report.phase, Phase::Downloading { .. })).await;
    let generation = hub.ship(&Release::good("2.0.0"));
    hub.lock().faults.slow = None;
    let report = hub.confirmed(generation).await;
    assert_eq!(report.running.unwrap().version.to_string(), "2.0.0");
    assert_eq!(report.previous, None);

    // An older wish that arrives late changes nothing.
    {
        let mut world = hub.lock();
        world.desired.generation = 1;
        world.desired.model = None;
    }
    hub.changed.send_modify(|count| *count += 1);
    let last = hub.lock().reports.last().unwrap().sequence;
    let report = hub.report("three more reports", |report| report.sequence > last + 3).await;
    assert_eq!((report.generation, report.phase), (generation, Phase::Confirmed));
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_key_is_followed_by_its_successor_and_by_no_other() {
    let mut hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;

    // A key that the hub alone hands out is no publisher.
    let first = std::mem::replace(&mut hub.publisher, PrivateKey::generate());
    let successor = public(&hub.publisher);
    hub.lock().trusted.push(successor.clone());
    let generation = hub.ship(&Release::good("1.1.0"));
    let refused = Phase::RolledBack { failure: Failure::Signature };
    assert_eq!(hub.rolled_back(generation).await.phase, refused);
    assert_eq!(device.ask().await, 200);

    // On the word of the first key it is one, for a device that joined long ago too.
    hub.lock().trusted.pop();
    hub.lock().trusted.push(successor.endorsed(&first));
    let generation = hub.ship(&Release::good("1.2.0"));
    assert_eq!(hub.confirmed(generation).await.running.unwrap().version.to_string(), "1.2.0");
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_key_signs_no_more() {
    let hub = FakeHub::start().await;
    let hour_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(1);
    hub.lock().trusted[0].expires_at = Some(hour_ago);
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    let refused = Phase::RolledBack { failure: Failure::Signature };
    assert_eq!(hub.rolled_back(generation).await.phase, refused);
    device.stop().await;
}
