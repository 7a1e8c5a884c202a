use std::process::{Child, Command, Stdio};

use super::*;

/// How long a PostgreSQL server may take to start.
const SERVER_START: Duration = Duration::from_secs(60);

/// A PostgreSQL server in a private folder, reached by a socket in it; gone when dropped. The server
/// refuses to run as root, so root runs it as the user `postgres`.
pub(crate) struct Server {
    folder: tempfile::TempDir,
    programs: PathBuf,
    process: Option<Child>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        if rustix::process::getuid().is_root() {
            let found = Command::new("id").args(["-u", "postgres"]).output().unwrap();
            let user = String::from_utf8(found.stdout).unwrap().trim().parse().ok();
            let user: u32 = user.expect("the user `postgres`, which its package makes");
            std::os::unix::fs::chown(folder.path(), Some(user), None).unwrap();
        }
        let mut server = Self { folder, programs: programs(), process: None };
        let mut init = server.command("initdb");
        init.args(["--username=postgres", "--auth=trust", "--no-sync", "--locale=C.UTF-8"]);
        let made = init.arg("-D").arg(server.folder.path().join("data")).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        server.resume();
        server
    }

    fn command(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut command = Command::new(&program);
        if rustix::process::getuid().is_root() {
            command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
            // The server must not outlive a test that is killed.
            command.args(["--pdeathsig=QUIT", "--"]).arg(program);
        }
        command.current_dir(self.folder.path());
        command
    }

    /// Starts the server again on what it kept.
    pub(crate) fn resume(&mut self) {
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.folder.path().join("data")).arg("-k").arg(self.folder.path());
        command.args(["-c", "listen_addresses=", "-c", "max_connections=60"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let started = std::time::Instant::now();
        loop {
            // After a kill it refuses to start until the last of its processes has ended.
            if process.try_wait().unwrap().is_some() {
                process = command.spawn().unwrap();
            }
            let mut asked = self.command("pg_isready");
            let asked = asked.arg("-q").arg("-h").arg(self.folder.path()).status().unwrap();
            if asked.success() {
                self.process = Some(process);
                return;
            }
            assert!(started.elapsed() < SERVER_START, "the server does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it as a loss of power would.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().expect("the server runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Where the database `name` is, which is made.
    pub(crate) fn database(&self, name: &str) -> Postgres {
        let made = self
            .command("createdb")
            .arg("-h")
            .arg(self.folder.path())
            .args(["-U", "postgres", "--", name])
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Postgres::parse(&self.url(name), None).unwrap()
    }

    pub(crate) fn url(&self, name: &str) -> String {
        let folder = self.folder.path().to_str().unwrap().replace('/', "%2F");
        format!("postgres://postgres@{folder}/{name}")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // SIGQUIT: end at once, with every process of the server.
            let pid = rustix::process::Pid::from_child(&process);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
            let _ = process.wait();
        }
    }
}

/// The folder of the server's programs, which Debian keeps out of PATH.
fn programs() -> PathBuf {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = debian.map(|entry| entry.path().join("bin")).collect();
    found.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let found = found.into_iter().find(|folder| folder.join("initdb").exists());
    found.expect("PostgreSQL's server programs; `scripts/setup.sh test` installs them")
}

async fn open_postgres(server: Postgres, schemas: &'static [Schema]) -> Result<Database, DbError> {
    tokio::task::spawn_blocking(move || Database::open_postgres(server, schemas)).await.unwrap()
}

const FIRST: &str = "CREATE TABLE thing (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT";
const SECOND: &str = "ALTER TABLE thing ADD COLUMN note TEXT";
const ONE: &[Schema] = &[Schema { component: "test", migrations: &[FIRST] }];
const TWO: &[Schema] = &[Schema { component: "test", migrations: &[FIRST, SECOND] }];

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
    let place = server.database("moves");
    let db = open_postgres(place.clone(), ONE).await.unwrap();
    insert(&db, "a").await.unwrap();
    drop(db);
    let db = open_postgres(place.clone(), TWO).await.unwrap();
    assert_eq!(count(&db).await, 1);
    drop(db);
    let error = open_postgres(place.clone(), ONE).await.err().expect("refused");
    assert!(matches!(&error, DbError::NewerSchema { found: 2, known: 1, .. }), "{error}");
    let db = open_postgres(place.clone(), TWO).await.unwrap();

    // One hub at a time.
    let error = open_postgres(place, TWO).await.err().expect("refused");
    assert!(matches!(error, DbError::DatabaseInUse { .. }), "{error}");

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

    // Writers take turns.
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let db = db.clone();
        tasks.spawn(async move {
            db.write(|tx| {
                let n = tx.first("SELECT n FROM thing", params![], |row| row.get::<i64>(0))?;
                tx.execute("UPDATE thing SET n = ?1", params![n.unwrap() + 1])
            })
            .await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    assert_eq!(number(&db, "SELECT n FROM thing").await, 21);

    // The server dies: what was committed is there when it is back, and so is the hub.
    server.kill();
    let error = insert(&db, "b").await.unwrap_err();
    assert!(matches!(error, DbError::Unreachable(_)), "{error}");
    server.resume();
    insert(&db, "b").await.unwrap();
    assert_eq!(count(&db).await, 2);
}
