//! What every store must do, whatever it stores in. Each check gets an empty store.

use slmops_api::audit::Role;
use slmops_api::delta::{Delta, DeltaState};
use slmops_api::device::{DesiredModel, Failure, InstalledModel, Phase, Rejection, Telemetry};
use slmops_api::evidence::{Evidence, EvidenceCounts};
use slmops_api::model::ModelShape;
use slmops_api::orders::{Lift, NewPin, Orders};
use slmops_api::report::{Estimate, EvaluationReport, MachineFacts, MeasuredWhere};
use slmops_api::rollout::{NewRollout, Outcome, RolloutPolicy, RolloutState};
use slmops_api::telemetry::Span;
use slmops_fleet_core::rollout;
use slmops_fleet_core::world::World;

use super::*;
use crate::db::{Database, Schema, params};

macro_rules! every_check {
    ($then:ident) => {
        $then! {
            invitation_makes_one_device,
            names_are_unique,
            older_reports_are_ignored,
            history_is_bounded_and_told_once,
            telemetry_counts_what_reports_add,
            telemetry_becomes_days_and_ends,
            telemetry_is_bounded_however_many_sites,
            releases_never_change,
            pages_follow_each_other,
            last_admin_stays,
            transition_is_all_or_nothing,
            generations_never_fall,
            orders_are_kept_and_told,
            quarantine_is_lifted_once,
            channels_are_kept,
            webhooks_are_told_of_each_entry_once,
            webhooks_that_do_not_listen_hold_their_cursor,
            deltas_are_leased_and_not_begun_for_ever,
            outdated_decisions_are_refused,
            rollouts_change_device_by_device,
            audit_names_every_change,
            snapshot_knows_the_newest_completed_first,
            damaged_audit_is_found,
            audit_is_checked_from_where_it_held,
        }
    };
}

pub(crate) mod sqlite {
    use super::*;

    pub(crate) async fn fresh(folder: &std::path::Path) -> SqlStore {
        let folder = folder.to_owned();
        let db = tokio::task::spawn_blocking(move || Database::open(&folder, &[SCHEMA]));
        SqlStore::new(db.await.unwrap().unwrap())
    }

    macro_rules! one_test_each {
        ($($check:ident),+ $(,)?) => {
            $(
                #[tokio::test]
                async fn $check() {
                    let folder = tempfile::tempdir().unwrap();
                    super::$check(&fresh(folder.path()).await).await;
                }
            )+
        };
    }

    every_check!(one_test_each);

    /// What version 4 kept in one document, version 5 keeps in rows, and nothing is lost.
    #[tokio::test]
    async fn rollouts_in_one_document_are_split() {
        const FIRST: Schema = Schema { migrations: SCHEMA.migrations.split_at(4).0, ..SCHEMA };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let old = tokio::task::spawn_blocking(move || Database::open(&path, &[FIRST]));
        let old = old.await.unwrap().unwrap();
        let mut record = rollout_record("r1", "1.0.0", RolloutState::Running);
        record.rollout.devices =
            ["d2", "d1"].map(|device| part(device, 0, Outcome::Updating)).to_vec();
        record.before = BTreeMap::from([("d1".parse().unwrap(), None)]);
        let text = serde_json::to_string(&record).unwrap();
        let insert =
            "INSERT INTO rollouts (id, state, final, rollout) VALUES ('r1', 'running', 0, ?1)";
        old.write(move |tx| tx.execute(insert, params![text])).await.unwrap();
        drop(old);
        let store = fresh(folder.path()).await;
        record.rollout.recount();
        assert_eq!(store.frame(vec![]).await.unwrap().rollouts, [record.clone()]);
        // Decisions that were audited before are not audited again.
        let change = RolloutChange::whole(&record);
        let again = Transition { rollouts: vec![change], ..Transition::default() };
        transition(&store, again).await.unwrap();
        assert_eq!(store.verify_audit(CheckFrom::Checkpoint).await.unwrap().entries, 0);
    }
}

mod postgres {
    use super::*;
    use crate::db::tests::{self, Server};

    async fn fresh(server: &Server, name: &str) -> SqlStore {
        let place = tests::fresh(server, name);
        let db = tokio::task::spawn_blocking(move || Database::open_postgres(place, &[SCHEMA]));
        SqlStore::new(db.await.unwrap().unwrap())
    }

    macro_rules! in_turn {
        ($($check:ident),+ $(,)?) => {
            /// One server, a database for each check.
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn every_check() {
                let server = Server::start();
                $(
                    let store = fresh(&server, stringify!($check)).await;
                    super::$check(&store).await;
                )+
            }
        };
    }

    every_check!(in_turn);
}

pub(crate) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

pub(crate) fn by() -> By {
    By { actor: "token test".to_owned(), at: at(0) }
}

pub(super) fn class(name: &str) -> DeviceClass {
    DeviceClass {
        name: name.parse().unwrap(),
        description: String::new(),
        min_memory_bytes: 0,
        quantisation: "Q4_K_M".to_owned(),
    }
}

fn facts() -> DeviceFacts {
    DeviceFacts {
        hostname: "Kitchen Pi".to_owned(),
        arch: "aarch64".to_owned(),
        kernel: "Linux 6.1".to_owned(),
        cpu: "test".to_owned(),
        cpu_features: vec![],
        cores: 4,
        memory_bytes: 1 << 30,
        memory_budget_bytes: 1 << 29,
        disk_free_bytes: 1 << 30,
        agent_version: "0.1.0".to_owned(),
        engine: "test".to_owned(),
        endpoint: None,
        time_zone: None,
        metered: false,
        shares_at: None,
        obeys: vec![],
    }
}

pub(crate) fn report(sequence: u64, phase: Phase) -> DeviceReport {
    DeviceReport {
        sequence,
        generation: 1,
        phase,
        running: None,
        previous: None,
        rejected: vec![],
        probes: vec![],
        effective: None,
        telemetry: Telemetry::default(),
        evidence: None,
        facts: facts(),
    }
}

pub(super) async fn invite(store: &impl Store, id: &str, expires: Timestamp) -> SecretHash {
    let secret = SecretHash::of(id);
    let info = InvitationInfo {
        id: id.parse().unwrap(),
        labels: BTreeMap::from([("room".to_owned(), "kitchen".to_owned())]),
        site: Some("berlin".parse().unwrap()),
        created_at: at(0),
        expires_at: expires,
        used_by: None,
    };
    store.add_invitation(by(), NewInvitationRow { info, secret }).await.unwrap();
    secret
}

fn enrolment(invitation: &str, secret: SecretHash, key: &str, device: &str) -> Enrolment {
    Enrolment {
        device: device.parse().unwrap(),
        invitation: invitation.parse().unwrap(),
        secret,
        public_key: key.to_owned(),
        name: None,
        facts: facts(),
        at: at(10),
    }
}

pub(crate) async fn join(store: &impl Store, device: &str) -> StoredDevice {
    let invitation = format!("i-{device}");
    let secret = invite(store, &invitation, at(1000)).await;
    let wanted = enrolment(&invitation, secret, &format!("key of {device}"), device);
    store.enrol(wanted).await.unwrap().device
}

pub(crate) fn release(version: &str, seed: &str) -> NewRelease {
    let weights = Digest::of(format!("weights {version} {seed}").as_bytes());
    let estimate = Estimate { mean: 0.1, low: 0.05, high: 0.2, samples: 9 };
    let report = EvaluationReport {
        version: 1,
        subject: weights,
        adapter: None,
        reference: Digest::of(b"original"),
        suite: Digest::of(b"suite"),
        size_bytes: 7,
        perplexity: 20.123_456_789_012_3,
        kl_divergence: estimate,
        kl_p99: 0.3,
        top1_agreement: estimate,
        tasks: vec![],
        decode_tokens_per_s: 1.0 / 3.0,
        prompt_tokens_per_s: 2.0 / 3.0,
        time_to_first_token_ms: 0.1 + 0.2,
        peak_memory_bytes: 1,
        machine: MachineFacts {
            cpu: "test".to_owned(),
            arch: "x86_64".to_owned(),
            cores: 1,
            memory_bytes: 1,
            kernel: "test".to_owned(),
            measured: MeasuredWhere::Real,
        },
        engine: "test".to_owned(),
        finished_at: at(0),
        chunk_nll: vec![2.345_678_901_234_567, 1e-17],
        chunk_kl: vec![],
    };
    let shape = ModelShape {
        architecture: "llama".to_owned(),
        parameters: 1,
        layers: 1,
        embedding: 1,
        feed_forward: 1,
        heads: 1,
        kv_heads: 1,
        key_width: 1,
        value_width: 1,
        vocabulary: 1,
        trained_context: 128,
    };
    NewRelease {
        model: "m".parse().unwrap(),
        version: version.parse().unwrap(),
        original: Digest::of(b"original"),
        key: "0123456789abcdef".parse().unwrap(),
        variants: vec![slmops_api::model::Variant {
            name: "q4_k_m".parse().unwrap(),
            classes: vec![],
            quantisation: "Q4_K_M".to_owned(),
            manifest: Digest::of(format!("manifest {version} {seed}").as_bytes()),
            weights,
            size_bytes: 7,
            adapter: None,
            repacked_bytes: 0,
            shape,
            report,
            gate: None,
        }],
        gate_override: None,
        requires: Default::default(),
    }
}

pub(crate) fn rollout_record(id: &str, version: &str, state: RolloutState) -> RolloutRecord {
    let releases = Releases::from([(
        ("m".parse().unwrap(), version.parse().unwrap()),
        Arc::new(release(version, "")),
    )]);
    let world = World {
        now: at(20),
        listening_since: at(0),
        devices: &[],
        releases: &releases,
        quarantine: &BTreeSet::new(),
        completed: &[],
    };
    let asked = NewRollout {
        model: "m".parse().unwrap(),
        version: version.parse().unwrap(),
        policy: RolloutPolicy::default(),
        promotion: None,
    };
    let created = rollout::create(id.parse().unwrap(), asked, "token test", &world, &[]).unwrap();
    let mut record = created.record;
    record.rollout.state = state;
    record
}

pub(crate) fn assignment(device: &str, generation: u64) -> Assignment {
    let release = release("1.0.0", "");
    let variant = &release.variants[0];
    Assignment {
        device: device.parse().unwrap(),
        desired: Arc::new(DesiredState {
            generation,
            model: Some(DesiredModel {
                model: release.model.clone(),
                version: release.version.clone(),
                variant: variant.name.clone(),
                manifest: variant.manifest,
                weights: variant.weights,
                size_bytes: 7,
                predicted_memory_bytes: 9,
            }),
            runtime: Default::default(),
            confirm_timeout_s: 60,
            reason: "test".to_owned(),
            rules: Default::default(),
        }),
    }
}

pub(crate) async fn transition(
    store: &impl Store,
    transition: Transition,
) -> Result<i64, StoreError> {
    let revision = store.frame(vec![]).await?.revision;
    store.transition(by(), revision, Arc::new(transition)).await
}

async fn invitation_makes_one_device(store: &impl Store) {
    let secret = invite(store, "i1", at(1000)).await;
    let wrong = enrolment("i1", SecretHash::of("guess"), "key a", "d1");
    assert!(matches!(store.enrol(wrong).await, Err(StoreError::Forbidden { .. })));
    let unknown = enrolment("i2", secret, "key a", "d1");
    assert!(matches!(store.enrol(unknown).await, Err(StoreError::Forbidden { .. })));

    let first = store.enrol(enrolment("i1", secret, "key a", "d1")).await.unwrap();
    assert!(first.new);
    assert_eq!(first.device.labels["room"], "kitchen");
    assert_eq!(first.device.site.as_ref().unwrap().as_str(), "berlin");
    assert_eq!(first.device.name, "kitchen-pi");
    // A lost reply: the same key asks again, and gets the same device.
    let again = store.enrol(enrolment("i1", secret, "key a", "d2")).await.unwrap();
    assert_eq!((again.new, &again.device), (false, &first.device));
    // Another device does not.
    let error = store.enrol(enrolment("i1", secret, "key b", "d3")).await.unwrap_err();
    assert!(error.to_string().contains("used before"), "{error}");
    assert_eq!(store.invitations().await.unwrap()[0].used_by, Some("d1".parse().unwrap()));
    let error = store.withdraw_invitation(by(), "i1".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }));

    let secret = invite(store, "i-old", at(5)).await;
    let error = store.enrol(enrolment("i-old", secret, "key c", "d4")).await.unwrap_err();
    assert!(error.to_string().contains("expired"), "{error}");
    store.withdraw_invitation(by(), "i-old".parse().unwrap()).await.unwrap();
    let error = store.enrol(enrolment("i-old", secret, "key c", "d4")).await.unwrap_err();
    assert!(matches!(error, StoreError::Forbidden { .. }));
    assert_eq!(store.devices(PageRequest::default()).await.unwrap().items.len(), 1);

    // A device that was shut out does not come back by its old invitation.
    store.revoke_device(by(), "d1".parse().unwrap()).await.unwrap();
    let secret = SecretHash::of("i1");
    assert!(store.enrol(enrolment("i1", secret, "key a", "d5")).await.is_err());
}

async fn names_are_unique(store: &impl Store) {
    assert_eq!(join(store, "d1").await.name, "kitchen-pi");
    assert_eq!(join(store, "d2").await.name, "kitchen-pi-2");
    let secret = invite(store, "i9", at(1000)).await;
    let mut wanted = enrolment("i9", secret, "key z", "d9");
    wanted.name = Some("kitchen-pi".to_owned());
    let error = store.enrol(wanted.clone()).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
    // The invitation is still good.
    wanted.name = Some("stove".to_owned());
    assert_eq!(store.enrol(wanted).await.unwrap().device.name, "stove");
    let by_name = store.device("stove".to_owned()).await.unwrap();
    assert_eq!(by_name, store.device("d9".to_owned()).await.unwrap());
    assert!(matches!(
        store.device("nobody".to_owned()).await,
        Err(StoreError::NotFound { kind: "device", .. })
    ));
}

async fn older_reports_are_ignored(store: &impl Store) {
    let id = join(store, "d1").await.id;
    let record = |sequence, phase| {
        store.record_report(at(30), id.clone(), None, Arc::new(report(sequence, phase)))
    };
    assert_eq!(record(5, Phase::Staged).await.unwrap(), ReportOutcome::News);
    assert_eq!(record(5, Phase::Confirmed).await.unwrap(), ReportOutcome::Stale);
    assert_eq!(record(4, Phase::Confirmed).await.unwrap(), ReportOutcome::Stale);
    assert_eq!(record(6, Phase::Staged).await.unwrap(), ReportOutcome::Counters);
    assert_eq!(record(7, Phase::Confirmed).await.unwrap(), ReportOutcome::News);
    let stored = store.device("d1".to_owned()).await.unwrap();
    assert_eq!(stored.report, Some(report(7, Phase::Confirmed)));
    assert_eq!(stored.last_seen, at(30));
    let unknown = store
        .record_report(at(1), "d7".parse().unwrap(), None, Arc::new(report(1, Phase::Idle)))
        .await;
    assert!(matches!(unknown, Err(StoreError::NotFound { .. })));
}

async fn history_is_bounded_and_told_once(store: &impl Store) {
    let id = join(store, "d1").await.id;
    let progress = |done_bytes| Phase::Downloading { done_bytes, total_bytes: 100 };
    let mut sequence = 0;
    let mut phases = vec![progress(1), progress(50), progress(100), Phase::Verified];
    let failure = Failure::Crash;
    phases.push(Phase::RolledBack { failure: failure.clone() });
    for phase in phases {
        sequence += 1;
        let mut report = report(sequence, phase.clone());
        if matches!(phase, Phase::RolledBack { .. }) {
            let manifest = Digest::of(b"bad");
            report.rejected = vec![Rejection { manifest, generation: 1, failure: failure.clone() }];
        }
        store.record_report(at(sequence as i64), id.clone(), None, Arc::new(report)).await.unwrap();
    }
    let history = store.history(id.clone(), PageRequest::default()).await.unwrap().items;
    let told: Vec<&str> = history.iter().rev().map(|event| event.what.as_str()).collect();
    assert_eq!(told.len(), 5, "{told:?}");
    assert!(told[0].starts_with("joined"), "{told:?}");
    assert_eq!(told[1], "downloading");
    assert!(told[3].starts_with("went back: the worker died"), "{told:?}");
    assert!(told[4].starts_with("rejected sha256:"), "{told:?}");
}

/// A report by which a device runs a version and has counted so much of it.
pub(super) fn counted(
    sequence: u64,
    version: &str,
    answered: u64,
    errors: u64,
    ms: f64,
) -> DeviceReport {
    let variant = &release(version, "").variants[0];
    let manifest = variant.manifest;
    let (model, version) = ("m".parse().unwrap(), version.parse().unwrap());
    let (variant, weights) = (variant.name.clone(), variant.weights);
    let counts = EvidenceCounts {
        serving_s: answered as f64,
        answered,
        errors,
        first_tokens: answered,
        first_token_ln_ms: answered as f64 * ms.ln(),
        decoded_tokens: answered * 20,
        decode_ms: answered as f64 * 1000.0,
        peak_memory_bytes: 200 << 20,
        ..EvidenceCounts::default()
    };
    DeviceReport {
        running: Some(InstalledModel { model, version, variant, manifest, weights }),
        evidence: Some(Evidence { manifest, counts, replay: None }),
        ..report(sequence, Phase::Confirmed)
    }
}

fn group(class: &str, site: &str) -> Option<Group> {
    Some(Group { class: class.parse().unwrap(), site: site.parse().ok() })
}

async fn tell(
    store: &impl Store,
    at: Timestamp,
    device: &str,
    group: Option<Group>,
    report: DeviceReport,
) {
    store.record_report(at, device.parse().unwrap(), group, Arc::new(report)).await.unwrap();
}

async fn telemetry_counts_what_reports_add(store: &impl Store) {
    for device in ["d1", "d2"] {
        join(store, device).await;
    }
    let (large, small) = (group("large", "rome"), group("small", ""));
    tell(store, at(10), "d1", large.clone(), counted(1, "1.0.0", 100, 1, 50.0)).await;
    // Told again, and older: neither counts.
    tell(store, at(11), "d1", large.clone(), counted(1, "1.0.0", 100, 1, 50.0)).await;
    tell(store, at(20), "d1", large.clone(), counted(2, "1.0.0", 150, 3, 50.0)).await;
    tell(store, at(21), "d2", small.clone(), counted(1, "1.0.0", 150, 0, 800.0)).await;
    // Its counters began anew, since it serves another manifest.
    tell(store, at(30), "d1", large.clone(), counted(3, "1.1.0", 7, 7, 90.0)).await;
    // Nothing runs, so nothing is counted.
    tell(store, at(40), "d2", small.clone(), report(2, Phase::Idle)).await;
    let later = at(3600 + 10);
    tell(store, later, "d1", large.clone(), counted(4, "1.1.0", 8, 7, 90.0)).await;

    let ask = async |query: TelemetryQuery| store.telemetry(query, at(0)).await.unwrap();
    let all = TelemetryQuery::default;
    let found = ask(all()).await;
    let names: Vec<String> = found.iter().map(|series| series.version.to_string()).collect();
    assert_eq!(names, ["1.1.0", "1.0.0"]);
    let [first, second] = &found[0].points[..] else { panic!("{found:?}") };
    assert_eq!(second.start.duration_since(first.start).as_secs(), 3600);
    assert_eq!(first.start.as_second() % 3600, 0);
    assert_eq!((first.answered, first.errors, second.answered, second.errors), (7, 7, 1, 0));
    let [old] = &found[1].points[..] else { panic!("{found:?}") };
    assert_eq!((old.reports, old.answered, old.errors, old.crashes), (3, 300, 3, 0));
    assert_eq!(old.decoded_tokens, 300 * 20);
    let quantiles = old.first_token_ms.unwrap();
    assert!((48.0..52.0).contains(&quantiles.p05), "{quantiles:?}");
    assert!((760.0..840.0).contains(&quantiles.p95), "{quantiles:?}");
    assert!((19.0..21.0).contains(&old.tokens_per_s.unwrap().p50));
    assert!((old.memory_bytes.unwrap().p50 / f64::from(200 << 20) - 1.0).abs() < 0.05);

    let of = |class: &str, site: &str| TelemetryQuery {
        class: class.parse().ok(),
        site: site.parse().ok(),
        ..all()
    };
    assert_eq!(ask(of("small", "")).await[0].points[0].answered, 150);
    assert_eq!(ask(of("", "rome")).await[1].points[0].answered, 150);
    assert_eq!(ask(of("small", "rome")).await, []);
    let wanted = TelemetryQuery {
        model: "m".parse().ok(),
        version: "1.0.0".parse().ok(),
        span: Some(Span::Day),
        ..all()
    };
    let days = ask(wanted).await;
    assert_eq!(days.len(), 1);
    assert_eq!(days[0].points[0].answered, 300);
    assert_eq!(days[0].points[0].start.as_second() % (24 * 3600), 0);
    let since = at(3600 * 2);
    assert_eq!(store.telemetry(all(), since).await.unwrap(), []);
}

async fn telemetry_becomes_days_and_ends(store: &impl Store) {
    join(store, "d1").await;
    let day = 24 * 3600;
    for number in 0..10 {
        // Twice a day.
        let report = counted(number + 1, "1.0.0", (number + 1) * 10, 0, 50.0);
        let when = at(number as i64 * day / 2);
        tell(store, when, "d1", group("small", "rome"), report).await;
    }
    let ask = async |span| {
        let query = TelemetryQuery { span: Some(span), ..TelemetryQuery::default() };
        let found = store.telemetry(query, at(-day)).await.unwrap();
        let points = found.first().map(|series| series.points.clone()).unwrap_or_default();
        let answered: Vec<u64> = points.iter().map(|point| point.answered).collect();
        (answered.len(), answered.iter().sum::<u64>(), points)
    };
    let (hours, answered, _) = ask(Span::Hour).await;
    assert_eq!((hours, answered), (10, 100));
    let (count, answered, whole) = ask(Span::Day).await;
    assert_eq!(answered, 100);

    // Hours of whole days are folded, day by day, and nothing is lost or counted twice.
    let keep = Keep { hours_s: 2 * day as u64, days_s: 100 * day as u64 };
    let now = at(5 * day);
    let mut rounds = 0;
    while store.fold_telemetry(now, keep).await.unwrap() {
        rounds += 1;
        let (_, answered, _) = ask(Span::Day).await;
        assert_eq!(answered, 100, "after {rounds} days");
    }
    assert!((3..=4).contains(&rounds), "{rounds}");
    let (hours, _, _) = ask(Span::Hour).await;
    assert!((3..=5).contains(&hours), "{hours}");
    assert_eq!(ask(Span::Day).await, (count, 100, whole));
    assert!(!store.fold_telemetry(now, keep).await.unwrap());

    // A device of a day that was folded already still counts.
    let late = counted(11, "1.0.0", 105, 0, 50.0);
    tell(store, at(0), "d1", group("small", "rome"), late).await;
    while store.fold_telemetry(now, keep).await.unwrap() {}
    assert_eq!(ask(Span::Day).await.1, 105);

    // Days end, and so do hours that were never folded.
    let short = Keep { hours_s: day as u64, days_s: day as u64 };
    while store.fold_telemetry(at(60 * day), short).await.unwrap() {}
    assert_eq!(ask(Span::Day).await.0, 0);
    assert_eq!(ask(Span::Hour).await.0, 0);
}

async fn telemetry_is_bounded_however_many_sites(store: &impl Store) {
    join(store, "d1").await;
    let sites = 520_u64;
    for number in 0..sites {
        let report = counted(number + 1, "1.0.0", number + 1, 0, 50.0);
        tell(store, at(0), "d1", group("small", &format!("s{number}")), report).await;
    }
    let of = async |site: Option<&str>| {
        let site = site.map(|site| site.parse().unwrap());
        let query = TelemetryQuery { site, ..TelemetryQuery::default() };
        let found = store.telemetry(query, at(-3600)).await.unwrap();
        found.first().map_or(0, |series| series.points[0].answered)
    };
    assert_eq!(of(None).await, sites, "all of it is counted");
    assert_eq!(of(Some("s499")).await, 1);
    assert_eq!(of(Some("s510")).await, 0, "sites beyond the bound are not told apart");
}

async fn releases_never_change(store: &impl Store) {
    let registered = store.add_release(by(), release("1.0.0", "a")).await.unwrap();
    assert!(matches!(registered, Registered::New(_)));
    // Numbers included: what went in comes out.
    let same = store.add_release(by(), release("1.0.0", "a")).await.unwrap();
    assert!(matches!(same, Registered::Same(_)));
    let error = store.add_release(by(), release("1.0.0", "b")).await.unwrap_err();
    assert!(error.to_string().contains("two releases of the same version"), "{error}");
    let stored = store.release("m".parse().unwrap(), "1.0.0".parse().unwrap()).await.unwrap();
    assert_eq!(stored.release, release("1.0.0", "a"));
    assert!(store.release("m".parse().unwrap(), "2.0.0".parse().unwrap()).await.is_err());
}

async fn pages_follow_each_other(store: &impl Store) {
    for number in 0..5 {
        store.add_release(by(), release(&format!("1.{number}.0"), "")).await.unwrap();
        join(store, &format!("d{number}")).await;
    }
    let mut versions = Vec::new();
    let mut page = PageRequest { cursor: None, limit: 2 };
    loop {
        let found = store.releases(page.clone()).await.unwrap();
        versions.extend(found.items.iter().map(|release| release.release.version.to_string()));
        let Some(cursor) = found.cursor else { break };
        assert_eq!(found.items.len(), 2);
        page.cursor = Some(cursor);
    }
    assert_eq!(versions, ["1.4.0", "1.3.0", "1.2.0", "1.1.0", "1.0.0"]);
    let mut names = Vec::new();
    let mut page = PageRequest { cursor: None, limit: 2 };
    loop {
        let found = store.devices(page.clone()).await.unwrap();
        names.extend(found.items.into_iter().map(|device| device.name));
        let Some(cursor) = found.cursor else { break };
        page.cursor = Some(cursor);
    }
    assert_eq!(names.len(), 5);
    assert!(names.is_sorted());
    let bad = PageRequest { cursor: Some("'; DROP TABLE".to_owned()), limit: 2 };
    assert!(matches!(store.audit(bad).await, Err(StoreError::Conflict { .. })));
}

async fn last_admin_stays(store: &impl Store) {
    let token = |id: &str, role| Token {
        id: id.parse().unwrap(),
        name: id.to_owned(),
        role,
        created_at: at(0),
        expires_at: None,
    };
    for (id, role) in [("t1", Role::Admin), ("t2", Role::Viewer)] {
        store.add_token(by(), token(id, role), SecretHash::of(id)).await.unwrap();
    }
    assert_eq!(store.token(SecretHash::of("t2")).await.unwrap().unwrap().role, Role::Viewer);
    assert_eq!(store.token(SecretHash::of("t3")).await.unwrap(), None);
    let error = store.delete_token(by(), "t1".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }));
    store.add_token(by(), token("t3", Role::Admin), SecretHash::of("t3")).await.unwrap();
    store.delete_token(by(), "t1".parse().unwrap()).await.unwrap();
    assert_eq!(store.token(SecretHash::of("t1")).await.unwrap(), None);
    assert_eq!(store.tokens().await.unwrap().len(), 2);
}

async fn transition_is_all_or_nothing(store: &impl Store) {
    join(store, "d1").await;
    store.add_release(by(), release("1.0.0", "")).await.unwrap();
    let audited = store.verify_audit(CheckFrom::Checkpoint).await.unwrap().entries;
    let bad = Transition {
        rollouts: vec![RolloutChange::whole(&rollout_record("r1", "1.0.0", RolloutState::Running))],
        assignments: vec![assignment("d1", 2), assignment("d1", 2)],
        ..Transition::default()
    };
    assert!(transition(store, bad).await.is_err());
    assert!(store.rollout("r1".parse().unwrap()).await.is_err());
    assert_eq!(store.device("d1".to_owned()).await.unwrap().desired.generation, 1);
    assert_eq!(store.verify_audit(CheckFrom::Checkpoint).await.unwrap().entries, audited);

    let good = Transition {
        rollouts: vec![RolloutChange::whole(&rollout_record("r1", "1.0.0", RolloutState::Running))],
        assignments: vec![assignment("d1", 2)],
        quarantined: vec![(Digest::of(b"x"), "small".parse().unwrap())],
        ..Transition::default()
    };
    transition(store, good).await.unwrap();
    let frame = store.frame(vec![]).await.unwrap();
    assert_eq!(frame.rollouts.len(), 1);
    let devices = store.devices_after(None, 9).await.unwrap();
    assert_eq!((devices.len(), devices[0].desired.generation), (1, 2));
    assert!(store.devices_after(Some(devices[0].id.clone()), 9).await.unwrap().is_empty());
    assert_eq!(frame.quarantine.len(), 1);
    let verdict = store.verify_audit(CheckFrom::Checkpoint).await.unwrap();
    // The decision, the assignment, the quarantine.
    assert_eq!((verdict.entries, verdict.broken), (audited + 3, None));
}

async fn outdated_decisions_are_refused(store: &impl Store) {
    join(store, "d1").await;
    let assign = |generation| Transition {
        assignments: vec![assignment("d1", generation)],
        ..Transition::default()
    };
    let seen = store.frame(vec![]).await.unwrap().revision;
    let decide =
        |revision, generation| store.transition(by(), revision, Arc::new(assign(generation)));
    let next = decide(seen, 2).await.unwrap();
    assert!(next > seen);
    assert!(matches!(decide(seen, 3).await, Err(StoreError::Outdated)));
    // What operators change counts as well; what devices say does not.
    store
        .record_report(at(40), "d1".parse().unwrap(), None, Arc::new(report(9, Phase::Idle)))
        .await
        .unwrap();
    store.put_class(by(), class("small")).await.unwrap();
    assert!(matches!(decide(next, 3).await, Err(StoreError::Outdated)));
    assert_eq!(store.device("d1".to_owned()).await.unwrap().desired.generation, 2);
    decide(store.frame(vec![]).await.unwrap().revision, 3).await.unwrap();
}

pub(crate) fn part(device: &str, wave: u32, outcome: Outcome) -> RolloutDevice {
    RolloutDevice {
        device: device.parse().unwrap(),
        name: format!("name of {device}"),
        wave,
        variant: None,
        manifest: None,
        generation: None,
        started_at: None,
        held: None,
        due_at: None,
        finished_at: None,
        outcome,
        fit: "fits".to_owned(),
        unready: false,
    }
}

async fn rollouts_change_device_by_device(store: &impl Store) {
    let id: RolloutId = "r1".parse().unwrap();
    let mut record = rollout_record("r1", "1.0.0", RolloutState::Running);
    record.rollout.waves = 2;
    let devices = [("d5", 0), ("d4", 0), ("d3", 1), ("d2", 1), ("d1", 1)];
    record.rollout.devices =
        devices.iter().map(|(device, wave)| part(device, *wave, Outcome::Pending)).collect();
    record.before = BTreeMap::from([("d4".parse().unwrap(), None)]);
    let put = |change| Transition { rollouts: vec![change], ..Transition::default() };
    transition(store, put(RolloutChange::whole(&record))).await.unwrap();
    let stored = store.frame(vec![]).await.unwrap().rollouts;
    record.rollout.recount();
    assert_eq!(stored, [record.clone()]);
    assert_eq!(store.rollout(id.clone()).await.unwrap(), record.rollout);

    // One confirms, one joins, one is left out; only those are written.
    let change = RolloutChange {
        parts: vec![
            RolloutPart { position: 1, part: part("d4", 0, Outcome::Confirmed), before: None },
            RolloutPart { position: 9, part: part("d6", 1, Outcome::Away), before: Some(None) },
        ],
        gone: vec!["d3".parse().unwrap()],
        ..RolloutChange::whole(&record)
    };
    transition(store, put(change)).await.unwrap();
    let stored = store.frame(vec![]).await.unwrap().rollouts.remove(0);
    let order: Vec<&str> = stored.rollout.devices.iter().map(|d| d.device.as_str()).collect();
    assert_eq!(order, ["d5", "d4", "d2", "d1", "d6"]);
    assert_eq!(stored.rollout.devices[1].outcome, Outcome::Confirmed);
    assert_eq!(stored.before.keys().map(|d| d.as_str()).collect::<Vec<_>>(), ["d6"]);

    // Lists carry counts but no devices; those come page by page.
    let listed = store.rollouts(PageRequest::default()).await.unwrap().items.remove(0);
    assert_eq!((listed.devices.len(), listed.total().devices()), (0, 5));
    let mut request = PageRequest { cursor: None, limit: 2 };
    let mut seen = Vec::new();
    loop {
        let page = store.rollout_devices(id.clone(), request.clone()).await.unwrap();
        seen.extend(page.items.into_iter().map(|device| device.device.to_string()));
        request.cursor = page.cursor;
        if request.cursor.is_none() {
            break;
        }
    }
    assert_eq!(seen, order);
    request.cursor = Some("nonsense".to_owned());
    assert!(store.rollout_devices(id, request).await.is_err());
    let unknown = store.rollout_devices("r9".parse().unwrap(), PageRequest::default()).await;
    assert!(matches!(unknown, Err(StoreError::NotFound { .. })));
}

async fn generations_never_fall(store: &impl Store) {
    join(store, "d1").await;
    let assign = |generation| Transition {
        assignments: vec![assignment("d1", generation)],
        ..Transition::default()
    };
    transition(store, assign(5)).await.unwrap();
    for generation in [5, 4, 1, 0] {
        assert!(transition(store, assign(generation)).await.is_err());
    }
    assert_eq!(store.device("d1".to_owned()).await.unwrap().desired.generation, 5);
}

async fn orders_are_kept_and_told(store: &impl Store) {
    join(store, "d1").await;
    let id: DeviceId = "d1".parse().unwrap();
    let order = async |change: OrdersChange| {
        let device = store.order_device(by(), id.clone(), change).await.unwrap();
        assert_eq!(store.device("d1".to_owned()).await.unwrap(), device);
        device.orders.as_deref().cloned().unwrap_or_default()
    };
    let pin = |reason: &str| {
        OrdersChange::Pin(NewPin {
            model: "m".parse().unwrap(),
            version: "1.0.0".parse().unwrap(),
            reason: reason.to_owned(),
        })
    };
    let audited = store.verify_audit(CheckFrom::Checkpoint).await.unwrap().entries;
    assert_eq!(order(OrdersChange::Unpin(None)).await, Orders::default());
    let first = order(pin("why")).await;
    assert_eq!(first.pin.as_ref().unwrap().by, "token test");
    assert_eq!(order(pin("why")).await, first);
    assert_ne!(order(pin("because")).await, first);
    let both = order(OrdersChange::Exclude("away \"now\"".to_owned())).await;
    assert!(both.pin.is_some() && both.exclusion.is_some());
    assert!(order(OrdersChange::Unpin(None)).await.pin.is_none());
    assert_eq!(order(OrdersChange::Include(None)).await, Orders::default());
    assert_eq!(store.device("d1".to_owned()).await.unwrap().orders, None);
    let verdict = store.verify_audit(CheckFrom::Checkpoint).await.unwrap();
    assert_eq!((verdict.entries, verdict.broken), (audited + 5, None));
    let history = store.history(id.clone(), PageRequest::default()).await.unwrap().items;
    assert_eq!(history[0].what, "included by token test");
    let nobody = store.order_device(by(), "d9".parse().unwrap(), OrdersChange::Include(None)).await;
    assert!(matches!(nobody, Err(StoreError::NotFound { .. })));
}

async fn quarantine_is_lifted_once(store: &impl Store) {
    let (manifest, class): (Digest, ClassName) = (Digest::of(b"x"), "small".parse().unwrap());
    let quarantined =
        Transition { quarantined: vec![(manifest, class.clone())], ..Transition::default() };
    transition(store, quarantined).await.unwrap();
    let rows = store.quarantine().await.unwrap();
    assert_eq!((rows.len(), rows[0].since, &rows[0].rollout), (1, Some(by().at), &None));
    let lift = Lift { manifest, class, reason: "tried again".to_owned() };
    store.lift(by(), lift.clone()).await.unwrap();
    assert!(store.frame(vec![]).await.unwrap().quarantine.is_empty());
    assert!(matches!(store.lift(by(), lift).await, Err(StoreError::NotFound { .. })));
    let entries = store.audit(PageRequest::default()).await.unwrap().items;
    assert_eq!((entries[0].action.as_str(), entries.len()), ("manifest.lift", 2));
}

async fn channels_are_kept(store: &impl Store) {
    let channel = |waves| Channel {
        name: "beta".parse().unwrap(),
        after: Some("edge".parse().unwrap()),
        policy: RolloutPolicy { waves, ..RolloutPolicy::default() },
    };
    store.put_channel(by(), channel(vec![])).await.unwrap();
    let changed = channel(vec![slmops_api::rollout::WaveSize::Rest]);
    store.put_channel(by(), changed.clone()).await.unwrap();
    assert_eq!(store.channels().await.unwrap(), [changed]);
    store.delete_channel(by(), "beta".parse().unwrap()).await.unwrap();
    assert!(store.delete_channel(by(), "beta".parse().unwrap()).await.is_err());
    assert_eq!(store.verify_audit(CheckFrom::Checkpoint).await.unwrap().entries, 3);
}

pub(super) fn wanted(from: &str, devices: u64) -> Wanted {
    let digest = |text: &str| Digest::of(text.as_bytes());
    let (from, to, manifest) = (digest(from), digest("new"), digest("manifest"));
    Wanted { model: "m".parse().unwrap(), from, to, manifest, devices }
}

async fn deltas_are_leased_and_not_begun_for_ever(store: &impl Store) {
    let model: ModelName = "m".parse().unwrap();
    let new = store.want_deltas(at(0), vec![wanted("few", 1), wanted("many", 5)]).await.unwrap();
    assert_eq!(new, 2);
    // Again is nothing new, but counts anew.
    assert_eq!(store.want_deltas(at(1), vec![wanted("few", 2)]).await.unwrap(), 0);
    let job = store.lease_delta(at(10), at(20)).await.unwrap().unwrap();
    assert_eq!((job.from, job.devices, job.attempts), (wanted("many", 5).from, 5, 1));
    let other = store.lease_delta(at(10), at(20)).await.unwrap().unwrap();
    assert_eq!((other.from, other.devices), (wanted("few", 2).from, 2));
    assert_eq!(store.lease_delta(at(10), at(20)).await.unwrap(), None);
    assert!(store.keep_delta(job.clone(), at(30)).await.unwrap());

    // Whoever had the other one is gone; the next one has it, and the first cannot finish it.
    let taken = store.lease_delta(at(20), at(30)).await.unwrap().unwrap();
    assert_eq!((taken.from, taken.attempts), (other.from, 2));
    assert!(!store.keep_delta(other.clone(), at(40)).await.unwrap());
    store.finish_delta(other, Made::Failed("late".to_owned()), at(20)).await.unwrap();
    store.finish_delta(taken, Made::Later("away".to_owned()), at(60)).await.unwrap();
    assert_eq!(store.lease_delta(at(30), at(40)).await.unwrap().unwrap().from, job.from);
    for expected in [&job.from, &wanted("few", 0).from] {
        let last = store.lease_delta(at(60), at(70)).await.unwrap().unwrap();
        assert_eq!((&last.from, last.attempts), (expected, 3));
    }
    // Nobody finishes either: they are given up.
    assert_eq!(store.lease_delta(at(80), at(90)).await.unwrap(), None);
    let listed = store.deltas(model.clone()).await.unwrap();
    let states: Vec<DeltaState> = listed.iter().map(|job| job.state).collect();
    assert_eq!(states, [DeltaState::Failed, DeltaState::Failed]);
    assert_eq!(listed[0].why, "it was begun and never finished");

    store.want_deltas(at(100), vec![wanted("more", 9)]).await.unwrap();
    let job = store.lease_delta(at(100), at(110)).await.unwrap().unwrap();
    let delta = Delta {
        from: job.from,
        to: job.to,
        to_bytes: 1 << 40,
        blob: job.manifest,
        bytes: 7,
        header_bytes: 3,
    };
    store.finish_delta(job, Made::Ready(delta.clone()), at(100)).await.unwrap();
    let listed = store.deltas(model).await.unwrap();
    assert_eq!((listed[0].state, listed[0].delta.as_ref()), (DeltaState::Ready, Some(&delta)));
    assert_eq!(store.deltas("other".parse().unwrap()).await.unwrap(), []);
}

pub(super) async fn webhook(store: &impl Store, id: &str, events: &[&str]) -> WebhookId {
    let id: WebhookId = id.parse().unwrap();
    let asked = NewWebhook {
        url: "https://example.com/hook?key=hidden".to_owned(),
        events: events.iter().map(|event| (*event).to_owned()).collect(),
        ca_pem: None,
        retry: Default::default(),
    };
    let secret = crate::auth::new_webhook_secret();
    store.add_webhook(by(), id.clone(), asked, secret.clone()).await.unwrap();
    let rows = store.webhooks().await.unwrap();
    assert!(rows.iter().any(|row| row.webhook.id == id && row.secret == secret));
    id
}

async fn webhooks_are_told_of_each_entry_once(store: &impl Store) {
    store.put_class(by(), class("before")).await.unwrap();
    let id = webhook(store, "w1", &["class.*"]).await;
    let other = webhook(store, "w2", &["*"]).await;
    assert_eq!(store.webhook_work_at(other.clone(), at(20)).await.unwrap(), None);
    for name in ["a", "b"] {
        store.put_class(by(), class(name)).await.unwrap();
    }
    store.test_webhook(by(), id.clone()).await.unwrap();
    assert_eq!(store.webhook_work_at(id.clone(), at(20)).await.unwrap(), Some(at(20)));
    let lease = async |id: &WebhookId, now: i64, limit: u32| {
        store.lease_deliveries(id.clone(), at(now), at(now + 10), limit).await.unwrap()
    };
    let told = |leased: &[Leased]| -> Vec<(String, String)> {
        leased.iter().map(|it| (it.entry.action.clone(), it.entry.object.clone())).collect()
    };
    let first = lease(&id, 20, 2).await;
    let put = |name: &str| ("class.put".to_owned(), name.to_owned());
    assert_eq!(told(&first), [put("a"), put("b")]);
    // What is leased is nobody else's until the lease ends; a test is for its webhook alone.
    let rest = lease(&id, 20, 9).await;
    assert_eq!(told(&rest), [("webhook.test".to_owned(), "w1".to_owned())]);
    assert_eq!(told(&lease(&other, 20, 9).await), [put("a"), put("b")]);
    assert_eq!(store.webhook_work_at(id.clone(), at(20)).await.unwrap(), Some(at(30)));
    assert_eq!(lease(&id, 30, 9).await.len(), 3);
    let attempted = |leased: &Leased, state: DeliveryState| Attempted {
        sequence: leased.entry.sequence,
        attempts: leased.attempts,
        state,
        next_at: at(100),
        last: "503".to_owned(),
    };
    let results = vec![
        attempted(&first[0], DeliveryState::Delivered),
        attempted(&first[1], DeliveryState::Pending),
        attempted(&rest[0], DeliveryState::Dead),
    ];
    store.finish_deliveries(id.clone(), results.clone()).await.unwrap();
    // A lease that ran out changes nothing afterwards.
    let late = vec![attempted(&first[1], DeliveryState::Dead)];
    store.finish_deliveries(id.clone(), late).await.unwrap();
    let state = async |wanted: Option<DeliveryState>| -> Vec<(u64, u32)> {
        let page = store.deliveries(id.clone(), wanted, PageRequest::default()).await.unwrap();
        page.items.iter().map(|it| (it.sequence, it.attempts)).collect()
    };
    let sequence = |leased: &Leased| leased.entry.sequence;
    assert_eq!(state(Some(DeliveryState::Pending)).await, [(sequence(&first[1]), 1)]);
    assert_eq!(state(Some(DeliveryState::Dead)).await, [(sequence(&rest[0]), 1)]);
    assert_eq!(state(None).await.len(), 3);
    assert_eq!(store.redeliver(by(), id.clone(), None).await.unwrap(), 1);
    assert_eq!(store.redeliver(by(), id.clone(), Some(sequence(&first[0]))).await.unwrap(), 1);
    assert!(store.redeliver(by(), id.clone(), Some(9999)).await.is_err());
    assert_eq!(state(Some(DeliveryState::Pending)).await.len(), 3);
    store.remove_webhook(by(), id.clone()).await.unwrap();
    for gone in [
        store.remove_webhook(by(), id.clone()).await,
        store.test_webhook(by(), id.clone()).await,
        store.deliveries(id.clone(), None, PageRequest::default()).await.map(|_| ()),
    ] {
        assert!(matches!(gone, Err(StoreError::NotFound { .. })));
    }
    let entries = store.audit(PageRequest::default()).await.unwrap().items;
    assert!(!serde_json::to_string(&entries).unwrap().contains("hidden"));
    assert_eq!(store.verify_audit(CheckFrom::Checkpoint).await.unwrap().broken, None);
}

async fn webhooks_that_do_not_listen_hold_their_cursor(store: &impl Store) {
    let id = webhook(store, "w1", &["class.*"]).await;
    let bound = webhooks::MAX_PENDING as usize;
    for number in 0..bound + 5 {
        store.put_class(by(), class(&format!("c{number}"))).await.unwrap();
    }
    let mut taken = Vec::new();
    for _ in 0..4 {
        let leased = store.lease_deliveries(id.clone(), at(20), at(900), 9999).await.unwrap();
        taken.extend(leased);
    }
    assert_eq!(taken.len(), bound, "no more wait than may");
    let done = |leased: &Leased| Attempted {
        sequence: leased.entry.sequence,
        attempts: 0,
        state: DeliveryState::Delivered,
        next_at: at(20),
        last: "200".to_owned(),
    };
    store.finish_deliveries(id.clone(), taken.iter().map(done).collect()).await.unwrap();
    let rest = store.lease_deliveries(id.clone(), at(20), at(900), 9999).await.unwrap();
    assert_eq!(rest.len(), 5, "and nothing was lost");
    store.finish_deliveries(id.clone(), rest.iter().map(done).collect()).await.unwrap();
    let request = PageRequest { cursor: None, limit: MAX_PAGE };
    let kept = store.deliveries(id.clone(), None, request).await.unwrap();
    assert_eq!(kept.items.len(), MAX_PAGE as usize);
    let row = &store.webhooks().await.unwrap()[0].webhook;
    assert_eq!((row.pending, row.dead), (0, 0));
}

async fn audit_names_every_change(store: &impl Store) {
    join(store, "d1").await;
    let id: DeviceId = "d1".parse().unwrap();
    store.put_class(by(), class("small")).await.unwrap();
    store.delete_class(by(), "small".parse().unwrap()).await.unwrap();
    assert!(store.delete_class(by(), "small".parse().unwrap()).await.is_err());
    let place = slmops_api::blueprint::Layer::Device(id.clone());
    let blueprint = StoredBlueprint { place: place.clone(), toml: "# quoted \" text".to_owned() };
    store.put_blueprint(by(), blueprint.clone()).await.unwrap();
    assert_eq!(store.blueprints().await.unwrap(), [blueprint]);
    store.delete_blueprint(by(), place).await.unwrap();
    let label = |key: &str, value: Option<&str>| (key.to_owned(), value.map(str::to_owned));
    let labels = BTreeMap::from([label("a", Some("b")), label("c", Some("d"))]);
    let change = DeviceChange { labels, site: Some(None) };
    let changed = store.change_device(by(), id.clone(), change).await.unwrap();
    let before = changed.labels.clone();
    assert_eq!((changed.site, &before["a"], &before["c"]), (None, &"b".into(), &"d".into()));
    // Each label by itself: what is not named stays.
    let labels = BTreeMap::from([label("c", None), label("e", Some("f"))]);
    let change = DeviceChange { labels, site: None };
    let changed = store.change_device(by(), id.clone(), change).await.unwrap();
    assert_eq!(changed.labels.len(), before.len());
    assert!(changed.labels.contains_key("a") && !changed.labels.contains_key("c"));
    let key = PublisherKey {
        id: "0123456789abcdef".parse().unwrap(),
        name: "ci".to_owned(),
        public_key: "pem".to_owned(),
        expires_at: None,
        endorsement: None,
    };
    store.add_key(by(), key.clone()).await.unwrap();
    store.add_key(by(), key.clone()).await.unwrap();
    assert_eq!(store.keys().await.unwrap(), [key]);
    store.revoke_device(by(), id.clone()).await.unwrap();
    store.revoke_device(by(), id).await.unwrap();
    let entries = store.audit(PageRequest::default()).await.unwrap().items;
    let actions: Vec<&str> = entries.iter().rev().map(|entry| entry.action.as_str()).collect();
    assert_eq!(
        actions,
        [
            "invitation.create",
            "device.enrol",
            "class.put",
            "class.delete",
            "blueprint.put",
            "blueprint.delete",
            "device.update",
            "device.update",
            "key.add",
            "device.revoke",
        ]
    );
    assert_eq!(entries[0].sequence, 10);
    assert_eq!(entries[0].actor, "token test");
    let text = serde_json::to_string(&entries).unwrap();
    assert!(!text.contains(&SecretHash::of("i-d1").to_string()), "a secret's hash is no detail");
    assert_eq!(store.verify_audit(CheckFrom::Checkpoint).await.unwrap().broken, None);
}

async fn snapshot_knows_the_newest_completed_first(store: &impl Store) {
    for version in ["1.0.0", "1.1.0"] {
        store.add_release(by(), release(version, "")).await.unwrap();
    }
    let put = |record: RolloutRecord| Transition {
        rollouts: vec![RolloutChange::whole(&record)],
        ..Transition::default()
    };
    for (id, version) in [("r1", "1.0.0"), ("r2", "1.1.0")] {
        transition(store, put(rollout_record(id, version, RolloutState::Running))).await.unwrap();
    }
    // The one that was begun first is completed last.
    for (id, version) in [("r2", "1.1.0"), ("r1", "1.0.0")] {
        let record = rollout_record(id, version, RolloutState::Completed);
        transition(store, put(record)).await.unwrap();
    }
    let snapshot = store.frame(vec![]).await.unwrap();
    let completed: Vec<&str> = snapshot.completed.iter().map(|c| c.id.as_str()).collect();
    assert_eq!(completed, ["r1", "r2"]);
    assert!(snapshot.rollouts.is_empty());
    let also = store.frame(vec!["r2".parse().unwrap()]).await.unwrap();
    assert_eq!(also.rollouts.len(), 1);
    transition(store, put(rollout_record("r1", "1.0.0", RolloutState::RolledBack))).await.unwrap();
    assert_eq!(store.frame(vec![]).await.unwrap().completed.len(), 1);
}

async fn damaged_audit_is_found(store: &SqlStore) {
    for name in ["a", "b", "c"] {
        store.put_class(by(), class(name)).await.unwrap();
    }
    let verdict = store.verify_audit(CheckFrom::Checkpoint).await.unwrap();
    assert_eq!((verdict.entries, &verdict.broken), (3, &None));
    for (damage, mend, expected) in [
        (
            "UPDATE audit SET actor = 'nobody' WHERE sequence = 2",
            "UPDATE audit SET actor = 'token test' WHERE sequence = 2",
            "entry 2 was changed",
        ),
        (
            "UPDATE audit SET sequence = 9 WHERE sequence = 3",
            "UPDATE audit SET sequence = 3 WHERE sequence = 9",
            "entry 3 is missing: 9 follows 2",
        ),
        (
            "UPDATE audit SET details = '{' WHERE sequence = 1",
            "UPDATE audit SET details = details",
            "entry 1 cannot be read",
        ),
    ] {
        let change =
            |sql: &'static str| store.database().write(move |tx| tx.execute(sql, params![]));
        change(damage).await.unwrap();
        let broken = store.verify_audit(CheckFrom::Checkpoint).await.unwrap().broken.expect(damage);
        assert!(broken.contains(expected), "{broken}");
        change(mend).await.unwrap();
    }
}

async fn audit_is_checked_from_where_it_held(store: &SqlStore) {
    let all = u64::from(MAX_CHECKED) + 700;
    let entry = |number: u64| AuditDraft {
        action: "test.entry",
        object: number.to_string(),
        details: serde_json::json!({}),
    };
    let many = Transition { audit: (1..=all).map(entry).collect(), ..Transition::default() };
    transition(store, many).await.unwrap();
    let check = async |from| {
        let found = store.verify_audit(from).await.unwrap();
        (found.from, found.entries, found.broken, found.cursor)
    };
    // A bounded part at a time, and no entry twice.
    let (from, entries, broken, cursor) = check(CheckFrom::Checkpoint).await;
    assert_eq!((from, entries, &broken), (0, u64::from(MAX_CHECKED), &None));
    assert!(cursor.is_some());
    let (from, entries, broken, cursor) = check(CheckFrom::Checkpoint).await;
    assert_eq!((from, entries, broken, cursor), (u64::from(MAX_CHECKED), all, None, None));
    // So few are not worth a write: they are checked again.
    assert_eq!(check(CheckFrom::Checkpoint).await.0, u64::from(MAX_CHECKED));

    let change = async |sql: &'static str| {
        store.database().write(move |tx| tx.execute(sql, params![])).await.unwrap();
    };
    // What was changed long ago is found by looking at all of it.
    change("UPDATE audit SET actor = 'nobody' WHERE sequence = 7").await;
    assert_eq!(check(CheckFrom::Checkpoint).await.2, None);
    let broken = check(CheckFrom::start()).await.2.expect("found");
    assert!(broken.contains("entry 7 was changed"), "{broken}");
    change("UPDATE audit SET actor = 'token test' WHERE sequence = 7").await;
    let (_, entries, _, cursor) = check(CheckFrom::start()).await;
    assert_eq!(entries, u64::from(MAX_CHECKED));
    let rest = parse_cursor(&cursor.unwrap()).unwrap();
    assert_eq!(check(rest).await, (entries, all, None, None));

    // A chain that was made anew, or cut off, where it had been checked.
    change("UPDATE audit SET hash = previous WHERE sequence = 10000").await;
    for from in [CheckFrom::Checkpoint, rest] {
        let broken = check(from).await.2.expect("found");
        assert!(broken.contains("entry 10000 has another hash than"), "{broken}");
    }
    change("DELETE FROM audit WHERE sequence > 9000").await;
    let broken = check(CheckFrom::Checkpoint).await.2.expect("found");
    assert!(broken.contains("entry 10000, which was checked before, is gone"), "{broken}");
    for bad in
        ["", "7", "7.", "x.sha256:00", "-1.sha256:00", "7.sha256:00", "99999999999999999999."]
    {
        assert_eq!(parse_cursor(bad), None, "{bad}");
    }
}
