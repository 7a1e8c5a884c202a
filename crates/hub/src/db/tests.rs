use std::process::{Command, Stdio};

use super::*;

#[path = "../../tests/support/postgres.rs"]
pub(crate) mod server;
pub(crate) use server::{Server, certified};

/// How long what happens at once may take.
const SOON: Duration = Duration::from_secs(20);

/// As another hub would find it.
fn as_another_hub(server: &Server, name: &str) -> Postgres {
    Postgres::parse(&server.url(name), None).unwrap()
}

/// Where the database `name` is, which is made.
pub(crate) fn fresh(server: &Server, name: &str) -> Postgres {
    Postgres::parse(&server.database(name), None).unwrap()
}

async fn open_postgres(server: Postgres, schemas: &'static [Schema]) -> Result<Database, DbError> {
    tokio::task::spawn_blocking(move || Database::open_postgres(server, schemas)).await.unwrap()
}

const FIRST: &str = "CREATE TABLE thing (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT";
const SECOND: &str = "ALTER TABLE thing ADD COLUMN note TEXT";
const ONE: &[Schema] = &[Schema { component: "test", migrations: &[FIRST], moves: &[] }];
const TWO: &[Schema] = &[Schema { component: "test", migrations: &[FIRST, SECOND], moves: &[] }];

fn open(folder: &Path, schemas: &[Schema]) -> Database {
    Database::open(folder, schemas).expect("the database opens")
}

async fn insert(db: &Database, name: &'static str) -> Result<(), DbError> {
    db.write(move |tx| {
        tx.execute("INSERT INTO thing (name, n) VALUES (?1, 1)", params![name])?;
        Ok(())
    })
    .await
}

async fn count(db: &Database) -> i64 {
    number(db, "SELECT count(*) FROM thing").await
}

async fn number(db: &Database, sql: &'static str) -> i64 {
    let found = db.read(move |tx| tx.first(sql, params![], |row| row.get::<i64>(0)));
    found.await.expect("the number is read").expect("there is a row")
}

#[tokio::test]
async fn changes_survive_and_tables_move_up() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    insert(&db, "a").await.unwrap();
    drop(db);
    let db = open(folder.path(), TWO);
    assert_eq!(count(&db).await, 1);
    db.write(|tx| {
        tx.execute("UPDATE thing SET note = 'x'", params![])?;
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_newer_schema_is_refused_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path(), TWO));
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    assert!(matches!(&error, DbError::NewerSchema { found: 2, known: 1, .. }), "{error}");
    assert!(error.to_string().contains("hint:"), "{error}");
    let unknown = Database::open(folder.path(), &[]).err().expect("refused");
    assert!(matches!(&unknown, DbError::NewerSchema { known: 0, .. }), "{unknown}");
    drop(open(folder.path(), TWO));
}

#[tokio::test]
async fn a_failing_migration_leaves_the_version_before() {
    let folder = tempfile::tempdir().unwrap();
    let broken = [Schema {
        component: "test",
        migrations: &[FIRST, "INSERT INTO thing VALUES ('half', 1); CREATE TABLE thing (x)"],
        moves: &[],
    }];
    let error = Database::open(folder.path(), &broken).err().expect("refused");
    assert!(matches!(&error, DbError::Migration { number: 2, .. }), "{error}");
    assert_eq!(count(&open(folder.path(), ONE)).await, 0);
}

#[tokio::test]
async fn an_error_or_a_panic_rolls_back() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    let refused: Result<(), DbError> = db
        .write(|tx| {
            tx.execute("INSERT INTO thing VALUES ('a', 1)", params![])?;
            Err(DbError::Busy)
        })
        .await;
    assert!(matches!(refused, Err(DbError::Busy)));
    let panicked: Result<(), DbError> = db
        .write(|tx| {
            tx.execute("INSERT INTO thing VALUES ('b', 1)", params![])?;
            panic!("on purpose")
        })
        .await;
    assert!(matches!(panicked, Err(DbError::Panicked)));
    assert_eq!(count(&db).await, 0);
    insert(&db, "c").await.expect("the writer is usable after a panic");
    assert_eq!(count(&db).await, 1);
}

#[tokio::test]
async fn changes_that_wait_together_share_a_transaction_and_fail_alone() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    // The writer is busy until all others wait: they are one batch.
    let (begun, begins) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let first = tokio::spawn({
        let db = db.clone();
        async move {
            db.write(move |tx| {
                begun.send(()).unwrap();
                released.recv().unwrap();
                tx.execute("INSERT INTO thing (name, n) VALUES ('first', 1)", params![])
            })
            .await
        }
    });
    tokio::task::spawn_blocking(move || begins.recv().unwrap()).await.unwrap();
    let mut others: Vec<_> = (0..20)
        .map(|number| {
            Box::pin(db.write(move |tx| {
                let name = format!("n{number}");
                tx.execute("INSERT INTO thing (name, n) VALUES (?1, 1)", params![name])?;
                // What the others of the batch have done is there, this very change included.
                let seen =
                    tx.first("SELECT count(*) FROM thing", params![], |row| row.get::<i64>(0))?;
                match number {
                    5 => Err(DbError::ReadOnly),
                    6 => panic!("on purpose"),
                    7 => tx.execute("INSERT INTO thing (name) VALUES ('n1')", params![]).map(|_| 0),
                    _ => Ok(seen.unwrap_or(0)),
                }
            }))
        })
        .collect();
    for other in &mut others {
        assert!(futures_util::FutureExt::now_or_never(other).is_none());
    }
    assert_eq!(count(&db).await, 0, "nothing is committed yet");
    release.send(()).unwrap();
    first.await.unwrap().unwrap();
    let outcomes = futures_util::future::join_all(others).await;
    for (number, outcome) in outcomes.iter().enumerate() {
        match (number, outcome) {
            (5, Err(DbError::ReadOnly)) | (6, Err(DbError::Panicked)) => {}
            (7, Err(error)) if error.is_constraint() => {}
            (0..5, Ok(seen)) => assert_eq!(*seen, number as i64 + 2),
            (8.., Ok(seen)) => assert_eq!(*seen, number as i64 - 1),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(count(&db).await, 18);
}

#[tokio::test]
async fn constraints_foreign_keys_and_read_only_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    insert(&db, "a").await.unwrap();
    assert!(insert(&db, "a").await.unwrap_err().is_constraint());
    let in_read: Result<(), DbError> = db
        .read(|tx| {
            tx.execute("DELETE FROM thing", params![])?;
            Ok(())
        })
        .await;
    assert!(matches!(in_read, Err(DbError::ReadOnly)), "{in_read:?}");
    let foreign: Result<(), DbError> = db
        .write(|tx| {
            tx.batch(
                "CREATE TABLE child (name TEXT REFERENCES thing(name));
                 INSERT INTO child VALUES ('nobody')",
            )?;
            Ok(())
        })
        .await;
    assert!(foreign.unwrap_err().is_constraint());
}

#[tokio::test]
async fn a_full_disk_is_named_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    let full: Result<(), DbError> = db
        .write(|tx| {
            tx.batch("PRAGMA max_page_count = 1")?;
            for n in 0..1000 {
                tx.execute("INSERT INTO thing VALUES (?1, 1)", params![format!("{n:0900}")])?;
            }
            Ok(())
        })
        .await;
    assert!(matches!(full, Err(DbError::DiskFull)), "{full:?}");
    assert_eq!(count(&db).await, 0);
}

#[test]
fn a_second_hub_on_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path(), ONE);
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    let pid = std::process::id();
    assert!(matches!(error, DbError::InUse { holder: Some(holder), .. } if holder == pid));
    drop(first);
    drop(open(folder.path(), ONE));
}

#[test]
fn damage_is_found_at_open() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path(), ONE));
    let path = folder.path().join(DATABASE_FILE);
    let good = std::fs::read(&path).unwrap();

    std::fs::write(&path, b"this was never a database, by a long way").unwrap();
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    assert!(matches!(error, DbError::Damaged { .. }), "{error}");

    let mut bad = good;
    bad[4096..4200].fill(0xff);
    std::fs::write(&path, bad).unwrap();
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    assert!(matches!(error, DbError::Damaged { .. }), "{error}");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let error = Database::open(&file.join("data"), ONE).err().expect("refused");
    assert!(matches!(error, DbError::Folder { .. }), "{error}");
    assert!(error.to_string().contains("hint:"), "{error}");
}

#[tokio::test]
async fn many_writers_and_readers_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    insert(&db, "a").await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let db = db.clone();
        tasks.spawn(async move {
            db.write(|tx| {
                let n = tx.first("SELECT n FROM thing", params![], |row| row.get::<i64>(0))?;
                tx.execute("UPDATE thing SET n = ?1", params![n.unwrap() + 1])?;
                Ok::<_, DbError>(())
            })
            .await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(number(&db, "SELECT n FROM thing").await, 51);
}

#[test]
fn urls_say_what_is_wrong_and_never_the_password() {
    let parse = |url: &str| Postgres::parse(url, Some("hunter2"));
    let shown = format!("{:?}", parse("postgres://slm@localhost/fleet").unwrap());
    assert_eq!(shown, "fleet on localhost");
    for (url, expected) in [
        ("mysql://localhost/x", "does not start with"),
        ("postgres://slm:hunter3@localhost/fleet", "carries a password"),
        ("postgres:///fleet", "names no host"),
        ("postgres://slm@db.example.com/fleet", "which certificate to trust"),
        ("postgres://slm@db.example.com/fleet?sslrootcert=/nowhere.pem", "/nowhere.pem"),
        ("postgres://slm@localhost/fleet?nonsense=1", "nonsense"),
    ] {
        let error = parse(url).expect_err(url).to_string();
        assert!(error.contains(expected) && error.contains("hint:"), "{error}");
        assert!(!error.contains("hunter"), "{error}");
    }
    parse("postgres://slm@db.example.com/fleet?sslmode=disable").unwrap();
}

/// One server for all of these: starting one takes longer than they do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_keeps_the_same_promises() {
    let mut server = Server::start();

    // Tables move up, and are refused when they are newer.
    let place = fresh(&server, "moves");
    let db = open_postgres(place.clone(), ONE).await.unwrap();
    insert(&db, "a").await.unwrap();
    drop(db);
    let db = open_postgres(place.clone(), TWO).await.unwrap();
    assert_eq!(count(&db).await, 1);
    drop(db);
    let error = open_postgres(place.clone(), ONE).await.err().expect("refused");
    assert!(matches!(&error, DbError::NewerSchema { found: 2, known: 1, .. }), "{error}");
    let db = open_postgres(place.clone(), TWO).await.unwrap();

    // Two hubs take turns, and hear of each other's changes; each not of its own.
    let other = open_postgres(as_another_hub(&server, "moves"), TWO).await.unwrap();
    let mut feed = db.feed().await.unwrap().unwrap();
    let mut feed_there = other.feed().await.unwrap().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for db in [&db, &other].into_iter().cycle().take(20) {
        let db = db.clone();
        tasks.spawn(async move {
            db.write(|tx| {
                let n = tx.first("SELECT n FROM thing", params![], |row| row.get::<i64>(0))?;
                tx.announce("thing", &n.unwrap().to_string())?;
                tx.execute("UPDATE thing SET n = ?1", params![n.unwrap() + 1])
            })
            .await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(number(&db, "SELECT n FROM thing").await, 21);
    let (mut heard, mut heard_there) = (Vec::new(), Vec::new());
    while heard.len() < 10 || heard_there.len() < 10 {
        heard.extend(feed.read().await.unwrap().unwrap());
        heard_there.extend(feed_there.read().await.unwrap().unwrap());
    }
    let told = |note: &Note| note.object.parse::<i64>().unwrap();
    let mut all: Vec<i64> = heard.iter().chain(&heard_there).map(told).collect();
    assert!(heard.iter().map(told).is_sorted(), "in the order of commits: {heard:?}");
    all.sort_unstable();
    assert_eq!(all, (1..=20).collect::<Vec<_>>());
    // What is rolled back is not announced; and whoever waits is woken by the server.
    while tokio::time::timeout(Duration::from_millis(200), feed.told()).await.is_ok() {}
    let refused: Result<(), DbError> = other
        .write(|tx| {
            tx.announce("thing", "never")?;
            Err(DbError::ShuttingDown)
        })
        .await;
    assert!(refused.is_err());
    let wakes = tokio::spawn({
        let other = other.clone();
        async move { other.write(|tx| tx.announce("thing", "now")).await }
    });
    tokio::time::timeout(SOON, feed.told()).await.expect("the server tells");
    wakes.await.unwrap().unwrap();
    let heard = feed.read().await.unwrap().unwrap();
    assert_eq!(heard, [Note { kind: "thing".into(), object: "now".into() }]);
    // A change of another hub counts here once this hub has acted on it, and not before.
    let known = feed.heard();
    let waits = tokio::spawn(async move { known.up_to_date().await });
    tokio::time::timeout(SOON, feed.told()).await.expect("whoever waits wakes who reads");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waits.is_finished(), "it was read, and nothing was done about it");
    feed.acted_on();
    tokio::time::timeout(SOON, waits).await.expect("it was acted on").unwrap().unwrap();
    // Notes that were forgotten before they were read are not passed over in silence.
    other.write(|tx| tx.announce("thing", "a")).await.unwrap();
    other.write(|tx| tx.announce("thing", "b")).await.unwrap();
    let long_ago = "UPDATE changes SET at_ms = 0";
    db.write(|tx| tx.execute(long_ago, params![])).await.unwrap();
    Feed::forget(&db).await.unwrap();
    assert_eq!(feed.read().await.unwrap(), None);
    assert_eq!(feed.read().await.unwrap(), Some(vec![]));
    drop((other, feed_there));

    // Errors and panics roll back, and the connection goes on.
    let refused: Result<(), DbError> = db
        .write(|tx| {
            tx.execute("DELETE FROM thing", params![])?;
            Err(DbError::ShuttingDown)
        })
        .await;
    assert!(matches!(refused, Err(DbError::ShuttingDown)));
    let panicked: Result<(), DbError> = db
        .write(|tx| {
            tx.execute("DELETE FROM thing", params![])?;
            panic!("on purpose")
        })
        .await;
    assert!(matches!(panicked, Err(DbError::Panicked)));
    assert_eq!(count(&db).await, 1);
    assert!(insert(&db, "a").await.unwrap_err().is_constraint());
    let in_read: Result<usize, DbError> =
        db.read(|tx| tx.execute("DELETE FROM thing", params![])).await;
    assert!(matches!(in_read, Err(DbError::ReadOnly)), "{in_read:?}");
    let zero: Result<usize, DbError> =
        db.write(|tx| tx.execute("UPDATE thing SET note = ?1", params!["a\0b"])).await;
    assert!(matches!(zero, Err(DbError::ZeroByte)), "{zero:?}");

    // The server dies: what was committed is there when it is back, and so is the hub.
    server.kill();
    let error = insert(&db, "b").await.unwrap_err();
    assert!(matches!(error, DbError::Unreachable(_)), "{error}");
    server.resume();
    insert(&db, "b").await.unwrap();
    assert_eq!(count(&db).await, 2);
}

/// A migration that takes long enough to be killed in.
const SLOW: &str = "INSERT INTO thing (name, n) WITH RECURSIVE filler(i) AS
     (SELECT 1 UNION ALL SELECT i + 1 FROM filler WHERE i < 100000000)
     SELECT 'filler ' || i, i FROM filler";
const ENDLESS: &[Schema] = &[Schema { component: "test", migrations: &[FIRST, SLOW], moves: &[] }];
/// Names the database to the test that is really the process that is killed.
const KILLED_VARIABLE: &str = "SLMOPS_TEST_MIGRATE";

/// Not a test but the process that is killed: does nothing unless it is told a database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_process_that_migrates() {
    let Some(place) = std::env::var_os(KILLED_VARIABLE) else { return };
    let place = place.into_string().unwrap();
    if place.starts_with("postgres:") {
        let _ = open_postgres(Postgres::parse(&place, None).unwrap(), ENDLESS).await;
    } else {
        let _ = Database::open(Path::new(&place), ENDLESS);
    }
}

/// Starts a migration in a process of its own, and kills that when `under_way` says so.
fn kill_while_migrating(place: &str, under_way: impl Fn() -> bool) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["db::tests::the_process_that_migrates", "--exact", "--nocapture"])
        .env(KILLED_VARIABLE, place)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let started = std::time::Instant::now();
    while !under_way() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(started.elapsed() < Duration::from_secs(60), "it never began");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_is_killed_leaves_the_version_before() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    insert(&db, "a").await.unwrap();
    drop(db);
    // More than fits into SQLite's memory: parts of the change are on the disk.
    let log = folder.path().join(format!("{DATABASE_FILE}-wal"));
    let spilled = || std::fs::metadata(&log).is_ok_and(|log| log.len() > 4 << 20);
    kill_while_migrating(folder.path().to_str().unwrap(), spilled);
    let db = open(folder.path(), TWO);
    assert_eq!(count(&db).await, 1);

    let server = Server::start();
    let url = server.database("killed");
    let place = Postgres::parse(&url, None).unwrap();
    let db = open_postgres(place.clone(), ONE).await.unwrap();
    insert(&db, "a").await.unwrap();
    drop(db);
    let grown = || server.query("killed", "SELECT pg_relation_size('thing') > 1000000") == "t\n";
    kill_while_migrating(&url, grown);
    let db = open_postgres(place, TWO).await.unwrap();
    assert_eq!(count(&db).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_is_talked_to_by_tls_that_is_checked() {
    let mut server = Server::start();
    server.database("fleet");
    let folder = tempfile::tempdir().unwrap();
    let (authority, certificate, key) = certified("127.0.0.1");
    let port = server.listen_by_tls(&certificate, &key, "open sesame");
    let place = |authority: &str, user: &str, password: &str, more: &str| {
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, authority).unwrap();
        let file = file.display();
        let url = format!("postgres://{user}@127.0.0.1:{port}/fleet?sslrootcert={file}{more}");
        Postgres::parse(&url, Some(password)).unwrap()
    };
    let refused = async |place: Postgres, expected: &str| {
        let error = open_postgres(place, ONE).await.err().expect("refused").to_string();
        assert!(error.contains(expected) && error.contains("hint: "), "{error}");
        assert!(!error.contains("sesame"), "{error}");
    };

    let db = open_postgres(place(&authority, "postgres", "open sesame", ""), ONE).await.unwrap();
    insert(&db, "a").await.unwrap();
    let secure = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    assert_eq!(number(&db, secure).await, 1);
    drop(db);

    let (other, ..) = certified("127.0.0.1");
    refused(place(&other, "postgres", "open sesame", ""), "certificate is not trusted").await;
    refused(place(&authority, "postgres", "close sesame", ""), "password authentication").await;
    refused(place(&authority, "nobody", "open sesame", ""), "PostgreSQL refuses").await;
    // The server takes nothing in the clear.
    let plain = place(&authority, "postgres", "open sesame", "&sslmode=disable");
    refused(plain, "no pg_hba.conf entry").await;

    // A certificate of the right authority for another host.
    let (authority, certificate, key) = certified("db.example.com");
    let port = server.listen_by_tls(&certificate, &key, "open sesame");
    let file = folder.path().join("ca.pem");
    std::fs::write(&file, authority).unwrap();
    let url = format!("postgres://postgres@127.0.0.1:{port}/fleet?sslrootcert={}", file.display());
    refused(Postgres::parse(&url, Some("open sesame")).unwrap(), "certificate is not trusted")
        .await;
}
