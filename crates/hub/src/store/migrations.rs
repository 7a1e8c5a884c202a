//! Tables of every earlier version come up to date with what is in them, on both databases.
//!
//! `testdata/schema/` has a dump for each version of the tables there ever was, as SQLite's and as
//! PostgreSQL's own SQL. A new migration needs one more, which the first test that misses it names.

use std::fs;
use std::path::PathBuf;

use slmops_api::audit::Role;
use slmops_api::rollout::RolloutState;

use super::conformance::*;
use super::*;
use crate::auth::{Auth, HubSecret, LookupError, Operator, Principals};
use crate::blobs::Blobs;
use crate::db::tests::Server;
use crate::db::tests::server::run;
use crate::db::{Database, Postgres, params};
use crate::registry::{self, Reference, Registry};

const SCHEMAS: [crate::db::Schema; 2] = [SCHEMA, registry::SCHEMA];

/// Set, the dumps of the newest version are written.
const REGENERATE: &str = "SLM_REGENERATE";

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("testdata/schema")
}

/// The name of the newest version of all tables.
fn newest() -> String {
    let versions =
        SCHEMAS.map(|schema| format!("{}-{}", schema.component, schema.migrations.len()));
    versions.join("_")
}

/// The dumps for one database, oldest first; the newest version is among them.
fn dumps(kind: &str) -> Vec<(String, String)> {
    let suffix = format!(".{kind}.sql");
    let mut found: Vec<(String, String)> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| Some((name.strip_suffix(&suffix)?.to_owned(), name)))
        .map(|(version, name)| (version, fs::read_to_string(folder().join(name)).unwrap()))
        .collect();
    found.sort();
    let newest = newest();
    assert!(
        found.iter().any(|(version, _)| *version == newest),
        "no dump of {newest}; make it before others use these tables: \
         {REGENERATE}=1 cargo nextest run --release --workspace -E 'test(migrations)'"
    );
    found
}

/// Keeps the dump of the newest version, unless there is one: what a program wrote stays as it is.
fn keep(kind: &str, dump: impl FnOnce() -> String) {
    let path = folder().join(format!("{}.{kind}.sql", newest()));
    if std::env::var_os(REGENERATE).is_some() && !path.exists() {
        fs::create_dir_all(folder()).unwrap();
        fs::write(path, dump()).unwrap();
    }
}

async fn sqlite(folder: &std::path::Path) -> Database {
    let folder = folder.to_owned();
    let open = move || Database::open(&folder, &SCHEMAS);
    tokio::task::spawn_blocking(open).await.unwrap().unwrap()
}

async fn postgres(place: Postgres) -> Database {
    let open = move || Database::open_postgres(place, &SCHEMAS);
    tokio::task::spawn_blocking(open).await.unwrap().unwrap()
}

/// Something in every table.
async fn fill(db: &Database) {
    let store = SqlStore::new(db.clone());
    join(&store, "d1").await;
    join(&store, "d2").await;
    invite(&store, "i-open", at(1000)).await;
    let mut told = counted(3, "1.0.0", 40, 1, 50.0);
    told.generation = 2;
    let group = Some(Group { class: "small".parse().unwrap(), site: None });
    store.record_report(at(30), "d1".parse().unwrap(), group, Arc::new(told)).await.unwrap();
    store.revoke_device(by(), "d2".parse().unwrap()).await.unwrap();
    let away = OrdersChange::Exclude("it's away".to_owned());
    store.order_device(by(), "d1".parse().unwrap(), away).await.unwrap();
    store.put_class(by(), class("small")).await.unwrap();
    let channel = Channel {
        name: "beta".parse().unwrap(),
        after: None,
        policy: slmops_api::rollout::RolloutPolicy::default(),
    };
    store.put_channel(by(), channel).await.unwrap();
    let hook = webhook(&store, "w1", &["class.*"]).await;
    store.test_webhook(by(), hook.clone()).await.unwrap();
    store.lease_deliveries(hook, at(30), at(40), 1).await.unwrap();
    store.want_deltas(at(30), vec![wanted("old", 3)]).await.unwrap();
    let blueprint = StoredBlueprint {
        place: slmops_api::blueprint::Layer::Device("d1".parse().unwrap()),
        toml: "model = \"m\" # it's quoted: \\ \n".to_owned(),
    };
    store.put_blueprint(by(), blueprint).await.unwrap();
    for version in ["1.0.0", "1.1.0"] {
        store.add_release(by(), release(version, "")).await.unwrap();
    }
    let first = Transition {
        rollouts: vec![RolloutChange::whole(&rollout_record(
            "r1",
            "1.0.0",
            RolloutState::Completed,
        ))],
        assignments: vec![assignment("d1", 2)],
        quarantined: vec![(Digest::of(b"bad"), "small".parse().unwrap())],
        ..Transition::default()
    };
    transition(&store, first).await.unwrap();
    let second = Transition {
        rollouts: vec![RolloutChange::whole(&rollout_record("r2", "1.1.0", RolloutState::Running))],
        ..Transition::default()
    };
    transition(&store, second).await.unwrap();
    let token = Token {
        id: "t1".parse().unwrap(),
        name: "first".to_owned(),
        role: Role::Admin,
        created_at: at(0),
        expires_at: None,
    };
    store.add_token(by(), token, SecretHash::of("t1")).await.unwrap();
    let key = PublisherKey {
        id: "0123456789abcdef".parse().unwrap(),
        name: "ci".to_owned(),
        public_key: "pem".to_owned(),
        expires_at: None,
        endorsement: None,
    };
    store.add_key(by(), key).await.unwrap();
    let (weights, manifest) =
        (Digest::of(b"weights").to_string(), Digest::of(MANIFEST).to_string());
    let subject = Digest::of(b"subject").to_string();
    db.write(move |tx| {
        tx.execute("INSERT INTO registry_repositories (name) VALUES (?1)", params!["models/m"])?;
        tx.execute("INSERT INTO registry_blobs VALUES (1, ?1, 7)", params![weights])?;
        tx.execute(
            "INSERT INTO registry_manifests VALUES (1, ?1, 'a/b', 'c/d', ?2, '{}', ?3, 'now')",
            params![manifest, subject, MANIFEST.to_vec()],
        )?;
        tx.execute(
            "INSERT INTO registry_references VALUES (1, ?1, ?2)",
            params![manifest, weights],
        )?;
        tx.execute("INSERT INTO registry_tags VALUES (1, 'v1', ?1)", params![manifest])?;
        tx.execute("INSERT INTO registry_uploads VALUES ('up', 1, 1)", params![])
    })
    .await
    .unwrap();
}

/// A manifest with every kind of byte that a dump could spoil.
const MANIFEST: &[u8] = b"{ \"it's\": \"\\ \xff\x00\n\" }";

/// What [`fill`] put in is there, and can be worked with.
async fn check(version: &str, db: &Database) {
    let store = SqlStore::new(db.clone());
    let device = store.device("d1".to_owned()).await.unwrap();
    assert_eq!((device.desired.generation, device.revoked), (2, false), "{version}");
    assert_eq!(device.labels["room"], "kitchen", "{version}");
    assert_eq!(device.report.as_ref().unwrap().sequence, 3, "{version}");
    assert_eq!(device.desired.model.as_ref().unwrap().version.to_string(), "1.0.0");
    assert!(store.device("d2".to_owned()).await.unwrap().revoked, "{version}");
    if !version.starts_with("store-1_") {
        let exclusion = device.orders.as_ref().unwrap().exclusion.as_ref().unwrap();
        assert_eq!(exclusion.reason, "it's away", "{version}");
    }
    if !["store-1_", "store-2_"].iter().any(|old| version.starts_with(old)) {
        assert_eq!(store.channels().await.unwrap()[0].name.as_str(), "beta", "{version}");
        let hooks = store.webhooks().await.unwrap();
        assert_eq!(hooks[0].webhook.pending, 1, "{version}");
    }
    if !["store-1_", "store-2_", "store-4_", "store-5_"].iter().any(|it| version.starts_with(it)) {
        let series = store.telemetry(TelemetryQuery::default(), at(0)).await.unwrap();
        assert_eq!(series[0].points[0].answered, 40, "{version}");
    }
    if !(1..=8).any(|old| version.starts_with(&format!("store-{old}_"))) {
        let deltas = store.deltas("m".parse().unwrap()).await.unwrap();
        assert_eq!((deltas[0].from, deltas[0].devices), (wanted("old", 3).from, 3), "{version}");
    }
    let history = store.history(device.id.clone(), PageRequest::default()).await.unwrap().items;
    assert!(history.iter().any(|event| event.what.starts_with("told to be m 1.0.0")), "{version}");
    let invitations = store.invitations().await.unwrap();
    assert_eq!(invitations.len(), 3, "{version}");
    assert_eq!(invitations[0].used_by, None);
    assert_eq!(invitations[2].used_by, Some(device.id.clone()));
    assert_eq!(store.classes().await.unwrap(), [class("small")], "{version}");
    let blueprints = store.blueprints().await.unwrap();
    assert_eq!(blueprints[0].toml, "model = \"m\" # it's quoted: \\ \n", "{version}");
    for name in ["1.0.0", "1.1.0"] {
        let stored = store.release("m".parse().unwrap(), name.parse().unwrap()).await.unwrap();
        assert_eq!(stored.release, release(name, ""), "{version}");
    }
    let rollout = store.rollout("r2".parse().unwrap()).await.unwrap();
    assert_eq!(
        (rollout.state, rollout.asked.version.to_string()),
        (RolloutState::Running, "1.1.0".into())
    );
    assert!(!rollout.decisions.is_empty(), "{version}");
    let snapshot = store.frame(vec![]).await.unwrap();
    assert_eq!(snapshot.completed[0].id.as_str(), "r1", "{version}");
    assert_eq!(snapshot.rollouts.len(), 1, "{version}");
    assert!(snapshot.quarantine.contains(&(Digest::of(b"bad"), "small".parse().unwrap())));
    let token = store.token(SecretHash::of("t1")).await.unwrap().unwrap();
    assert_eq!(token.role, Role::Admin, "{version}");
    assert_eq!(store.keys().await.unwrap()[0].name, "ci", "{version}");
    let verdict = store.verify_audit(CheckFrom::Checkpoint).await.unwrap();
    assert_eq!(verdict.broken, None, "{version}");
    assert!(verdict.entries > 15, "{version}");

    let uploads = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(uploads.path()).unwrap();
    let registry =
        Registry::new(db.clone(), blobs, Auth::new(HubSecret::generate(), Arc::new(Nobody)));
    let name = "models/m".parse().unwrap();
    let tag = Reference::Tag("v1".parse().unwrap());
    let manifest = registry.manifest(&name, &tag).await.unwrap().unwrap();
    assert_eq!(manifest.content, MANIFEST, "{version}");
    assert_eq!(registry.blob_size(&name, &Digest::of(b"weights")).await.unwrap(), Some(7));
    let referrers = registry.referrers(&name, Digest::of(b"subject"), None).await.unwrap();
    assert_eq!(referrers[0].artifact_type.as_deref(), Some("c/d"), "{version}");

    // And it goes on from there.
    let news = report(4, slmops_api::device::Phase::Staged);
    let outcome =
        store.record_report(at(40), device.id.clone(), None, Arc::new(news)).await.unwrap();
    assert_eq!(outcome, ReportOutcome::News, "{version}");
    let next = |generation| Transition {
        rollouts: vec![RolloutChange::whole(&rollout_record(
            "r2",
            "1.1.0",
            RolloutState::Completed,
        ))],
        assignments: vec![assignment("d1", generation)],
        ..Transition::default()
    };
    assert!(transition(&store, next(2)).await.is_err(), "{version}: generations never fall");
    transition(&store, next(3)).await.unwrap();
    let completed = store.frame(vec![]).await.unwrap().completed;
    assert_eq!(completed[0].id.as_str(), "r2", "{version}: the newest is first");
    join(&store, "d3").await;
    store.add_release(by(), release("1.2.0", "")).await.unwrap();
    assert_eq!(store.verify_audit(CheckFrom::Checkpoint).await.unwrap().broken, None, "{version}");
}

struct Nobody;

impl Principals for Nobody {
    fn operator(
        &self,
        _: SecretHash,
    ) -> futures_util::future::BoxFuture<'_, Result<Option<Operator>, LookupError>> {
        Box::pin(async { Ok(None) })
    }

    fn device(&self, _: &DeviceId) -> Option<Arc<crate::events::Place>> {
        None
    }
}

/// A SQLite file as the statements that make it, as `sqlite3 FILE .dump` writes them.
fn dump_sqlite(path: &std::path::Path) -> String {
    let connection = rusqlite::Connection::open(path).unwrap();
    let texts = |sql: &str| -> Vec<String> {
        let mut statement = connection.prepare(sql).unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let mut text = "PRAGMA foreign_keys = OFF;\nBEGIN;\n".to_owned();
    let made =
        "FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid";
    for sql in texts(&format!("SELECT sql {made}")) {
        text += &format!("{sql};\n");
    }
    let mut tables = texts("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY rowid");
    tables.retain(|name| !name.starts_with("sqlite_") || name == "sqlite_sequence");
    for table in tables {
        let columns = texts(&format!("SELECT name FROM pragma_table_info('{table}') ORDER BY cid"));
        let quoted: Vec<String> = columns.iter().map(|name| format!("quote(\"{name}\")")).collect();
        for row in texts(&format!("SELECT {} FROM {table}", quoted.join(" || ',' || "))) {
            text += &format!("INSERT INTO {table} VALUES ({row});\n");
        }
    }
    text + "COMMIT;\n"
}

#[tokio::test]
async fn sqlite_comes_up_from_every_version() {
    let made = tempfile::tempdir().unwrap();
    let db = sqlite(made.path()).await;
    fill(&db).await;
    drop(db);
    let file = crate::db::DATABASE_FILE;
    keep("sqlite", || dump_sqlite(&made.path().join(file)));
    check("what this program writes", &sqlite(made.path()).await).await;

    for (version, dump) in dumps("sqlite") {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(file);
        rusqlite::Connection::open(&path).unwrap().execute_batch(&dump).unwrap();
        check(&version, &sqlite(folder.path()).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_comes_up_from_every_version() {
    let server = Server::start();
    let made = crate::db::tests::fresh(&server, "made");
    let db = postgres(made.clone()).await;
    fill(&db).await;
    drop(db);
    keep("postgres", || {
        let mut dump = server.client("pg_dump");
        dump.args(["--inserts", "--no-owner", "--no-privileges", "--no-comments", "made"]);
        run(&mut dump, "")
    });
    check("what this program writes", &postgres(made).await).await;

    for (number, (version, dump)) in dumps("postgres").into_iter().enumerate() {
        let name = format!("v{number}");
        let place = crate::db::tests::fresh(&server, &name);
        server.query(&name, &dump);
        check(&version, &postgres(place).await).await;
    }
}

#[tokio::test]
async fn tables_of_a_newer_program_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let db = sqlite(folder.path()).await;
    fill(&db).await;
    let newer = "UPDATE schema_version SET version = version + 1 WHERE component = 'registry'";
    db.write(|tx| tx.execute(newer, params![])).await.unwrap();
    drop(db);
    let path = folder.path().join(crate::db::DATABASE_FILE);
    let before = dump_sqlite(&path);
    let error = Database::open(folder.path(), &SCHEMAS).err().expect("refused");
    assert!(error.to_string().contains("a newer slm has used this database"), "{error}");
    assert_eq!(dump_sqlite(&path), before);
}
