//! The hub's SQLite database: opening, locking, migrating, and transactions off the async runtime.
//! It never knows what the tables mean: each component brings its own [`Schema`].
//! Start reading at [`Database::open`], then [`Database::write`].

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension as _, Transaction, TransactionBehavior};
use tokio::sync::Semaphore;

#[cfg(test)]
mod tests;

/// The database's file in the hub's data folder.
pub const DATABASE_FILE: &str = "hub.db";
/// The file whose lock says that a hub uses the data folder.
pub const LOCK_FILE: &str = "hub.lock";
/// Transactions that may read at the same time.
const READERS: usize = 4;
/// How long a statement waits for a lock that another process (a backup, `sqlite3`) holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Statements that each connection keeps prepared.
const STATEMENT_CACHE: usize = 256;
/// The longest process id read from a lock file, in bytes.
const MAX_LOCK_BYTES: u64 = 32;

/// The tables of one component, as numbered migrations: the first is number 1. A migration that has
/// been released is never edited; a change is a new one at the end.
#[derive(Clone, Copy, Debug)]
pub struct Schema {
    /// Whose tables these are, such as `registry`; the key in `schema_version`.
    pub component: &'static str,
    /// SQL, each entry run once in a transaction of its own.
    pub migrations: &'static [&'static str],
}

/// Why the database cannot be used, or a transaction failed.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The folder cannot be made or written.
    #[error(
        "open data folder {}: {source}\nhint: choose a folder that this user may write, with --data",
        path.display()
    )]
    Folder {
        /// The folder or the file in it.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Another hub runs on the folder.
    #[error(
        "data folder {} is in use by another hub{}\nhint: stop that hub, or give this one a folder of its own with --data",
        path.display(), holder.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    InUse {
        /// The folder.
        path: PathBuf,
        /// The process that holds it, where known.
        holder: Option<u32>,
    },
    /// The file is damaged.
    #[error(
        "database {} is damaged: {finding}\nhint: stop the hub, keep a copy of the folder, and restore {DATABASE_FILE} from a backup (or `sqlite3 {DATABASE_FILE} .recover`)",
        path.display()
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What the integrity check found first.
        finding: String,
    },
    /// A newer hub wrote the database.
    #[error(
        "database {}: tables of `{component}` have version {found}, this program knows up to {known}\nhint: a newer slm has used this folder; run that version or newer, or restore a backup from before the upgrade",
        path.display()
    )]
    NewerSchema {
        /// The database.
        path: PathBuf,
        /// Whose tables.
        component: String,
        /// The version in the database.
        found: u32,
        /// The newest version that this program has.
        known: u32,
    },
    /// A migration failed; the database is as it was before it.
    #[error("migrate tables of `{component}` to version {number}")]
    Migration {
        /// Whose tables.
        component: &'static str,
        /// The migration.
        number: u32,
        /// The cause.
        source: Box<DbError>,
    },
    /// The file system has no room left. The transaction was rolled back.
    #[error(
        "the disk that holds the hub's database is full\nhint: free some space; nothing was changed and the hub goes on by itself"
    )]
    DiskFull,
    /// The database cannot be written. The transaction was rolled back.
    #[error(
        "the hub's database is read-only\nhint: check the owner and mode of {DATABASE_FILE} and whether its file system is mounted read-only"
    )]
    ReadOnly,
    /// Another program kept the database locked. The transaction was rolled back.
    #[error(
        "the hub's database was locked by another program for {} s\nhint: is a backup or `sqlite3` open on {DATABASE_FILE}? Try again when it is closed",
        BUSY_TIMEOUT.as_secs()
    )]
    Busy,
    /// Any other failure of the engine. The transaction was rolled back.
    #[error("database: {0}")]
    Sqlite(#[source] rusqlite::Error),
    /// The hub is going down.
    #[error("the hub is shutting down")]
    ShuttingDown,
    /// A transaction's own code panicked; it was rolled back.
    #[error("a database transaction panicked and was rolled back; this is a defect of the hub")]
    Panicked,
}

impl From<rusqlite::Error> for DbError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::DiskFull,
            Some(ErrorCode::ReadOnly) => Self::ReadOnly,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy,
            _ => Self::Sqlite(error),
        }
    }
}

impl DbError {
    /// Whether a constraint of the tables (unique, foreign key, check) refused a change.
    pub fn is_constraint(&self) -> bool {
        matches!(self, Self::Sqlite(error)
            if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation))
    }
}

/// The open database. Clones share it; the folder's lock goes with the last one.
#[derive(Clone)]
pub struct Database {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    writer: Pool,
    readers: Pool,
    _lock: FolderLock,
}

/// Connections, and as many permits to use one.
struct Pool {
    permits: Arc<Semaphore>,
    connections: Mutex<Vec<Connection>>,
}

impl Database {
    /// Opens (or makes) the database in `folder`: takes the folder's lock, checks the file, and
    /// brings every component's tables up to date. Blocking: call it at start, or from a thread.
    ///
    /// # Errors
    /// A folder that cannot be written or is in use, a damaged file, tables of a newer program, or
    /// a migration that fails.
    pub fn open(folder: &Path, schemas: &[Schema]) -> Result<Self, DbError> {
        std::fs::create_dir_all(folder)
            .map_err(|source| DbError::Folder { path: folder.to_owned(), source })?;
        let lock = FolderLock::acquire(folder)?;
        let path = folder.join(DATABASE_FILE);
        let mut writer = connect(&path).map_err(|error| name_damage(&path, error))?;
        check_integrity(&path, &writer)?;
        migrate(&path, &mut writer, schemas)?;
        let mut readers = Vec::with_capacity(READERS);
        for _ in 0..READERS {
            let reader = connect(&path)?;
            reader.pragma_update(None, "query_only", true)?;
            readers.push(reader);
        }
        let inner = Inner {
            path,
            writer: Pool::new(vec![writer]),
            readers: Pool::new(readers),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where the database's file is.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Runs `change` in a transaction that excludes every other writer, on a thread for blocking
    /// work. When this returns `Ok`, the change is on the disk (`synchronous = FULL`); on `Err`
    /// nothing was changed.
    ///
    /// Not cancellation safe: once begun, a change is carried out even if the caller goes away.
    ///
    /// # Errors
    /// What `change` returns, or [`DbError`] from the transaction itself.
    pub async fn write<T, E>(
        &self,
        change: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        self.run(|inner| &inner.writer, TransactionBehavior::Immediate, change).await
    }

    /// Runs `query` over one consistent snapshot, on a thread for blocking work.
    ///
    /// # Errors
    /// What `query` returns, or [`DbError`] from the transaction itself.
    pub async fn read<T, E>(
        &self,
        query: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        self.run(|inner| &inner.readers, TransactionBehavior::Deferred, query).await
    }

    async fn run<T, E>(
        &self,
        pool: fn(&Inner) -> &Pool,
        behavior: TransactionBehavior,
        body: impl FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        let permits = Arc::clone(&pool(&self.inner).permits);
        let permit = permits.acquire_owned().await.map_err(|_| DbError::ShuttingDown)?;
        let inner = Arc::clone(&self.inner);
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let mut lent = pool(&inner).take();
            let connection = lent.connection.as_mut().expect("a permit stands for a connection");
            // Dropping an unfinished transaction (error or panic) rolls it back.
            let transaction =
                connection.transaction_with_behavior(behavior).map_err(DbError::from)?;
            let value = body(&transaction)?;
            transaction.commit().map_err(DbError::from)?;
            Ok(value)
        });
        match work.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => Err(DbError::Panicked.into()),
            Err(_) => Err(DbError::ShuttingDown.into()),
        }
    }
}

impl Pool {
    fn new(connections: Vec<Connection>) -> Self {
        let permits = Arc::new(Semaphore::new(connections.len()));
        Self { permits, connections: Mutex::new(connections) }
    }

    fn take(&self) -> Lent<'_> {
        let mut free = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        Lent { connection: free.pop(), pool: self }
    }
}

/// A connection in use; goes back to its pool even when the user panics.
struct Lent<'a> {
    connection: Option<Connection>,
    pool: &'a Pool,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut free = self.pool.connections.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.connection.take());
    }
}

/// The right to use a data folder; released when dropped, and by the system when the process dies.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl FolderLock {
    /// Takes the lock of `folder`, which must exist.
    ///
    /// # Errors
    /// [`DbError::InUse`] if another process (or another part of this one) has it.
    pub fn acquire(folder: &Path) -> Result<Self, DbError> {
        let path = folder.join(LOCK_FILE);
        let failed = |source| DbError::Folder { path: path.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let holder = (&file).take(MAX_LOCK_BYTES).read_to_string(&mut text);
                let holder = holder.ok().and_then(|_| text.trim().parse().ok());
                return Err(DbError::InUse { path: folder.to_owned(), holder });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        // For the message of whoever comes second; the lock itself does not depend on it.
        let note = file.set_len(0).and_then(|()| file.rewind());
        let note = note.and_then(|()| writeln!(file, "{}", std::process::id()));
        note.map_err(failed)?;
        Ok(Self { _file: file })
    }
}

fn connect(path: &Path) -> Result<Connection, DbError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
    if mode != "wal" {
        let source = std::io::Error::other(format!(
            "SQLite cannot use write-ahead logging here (journal mode `{mode}`)"
        ));
        return Err(DbError::Folder { path: path.to_owned(), source });
    }
    connection.pragma_update(None, "synchronous", "full")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    Ok(connection)
}

fn check_integrity(path: &Path, connection: &Connection) -> Result<(), DbError> {
    let finding = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get::<_, String>(0))
        .map_err(|error| name_damage(path, error.into()))?;
    if finding == "ok" {
        return Ok(());
    }
    Err(DbError::Damaged { path: path.to_owned(), finding })
}

/// Turns the engine's "malformed" and "not a database" into the error that says what to do.
fn name_damage(path: &Path, error: DbError) -> DbError {
    match error {
        DbError::Sqlite(source)
            if matches!(
                source.sqlite_error_code(),
                Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
            ) =>
        {
            DbError::Damaged { path: path.to_owned(), finding: source.to_string() }
        }
        other => other,
    }
}

fn migrate(path: &Path, connection: &mut Connection, schemas: &[Schema]) -> Result<(), DbError> {
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS schema_version (
             component TEXT PRIMARY KEY,
             version INTEGER NOT NULL
         ) STRICT",
    )?;
    refuse_newer(path, connection, schemas)?;
    for schema in schemas {
        let found = version_of(connection, schema.component)?;
        for (number, sql) in (1_u32..).zip(schema.migrations).skip(found as usize) {
            let failed = |error: rusqlite::Error| DbError::Migration {
                component: schema.component,
                number,
                source: Box::new(error.into()),
            };
            let mut step = || -> rusqlite::Result<()> {
                let transaction =
                    connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
                transaction.execute_batch(sql)?;
                transaction.execute(
                    "INSERT INTO schema_version (component, version) VALUES (?1, ?2)
                     ON CONFLICT (component) DO UPDATE SET version = excluded.version",
                    (schema.component, number),
                )?;
                transaction.commit()
            };
            step().map_err(failed)?;
            tracing::info!(component = schema.component, number, "migrated tables");
        }
    }
    Ok(())
}

fn version_of(connection: &Connection, component: &str) -> rusqlite::Result<u32> {
    connection
        .query_row("SELECT version FROM schema_version WHERE component = ?1", [component], |row| {
            row.get(0)
        })
        .optional()
        .map(Option::unwrap_or_default)
}

/// Checks every component before the first migration runs, so that a refusal changes nothing.
fn refuse_newer(path: &Path, connection: &Connection, schemas: &[Schema]) -> Result<(), DbError> {
    let mut statement = connection.prepare("SELECT component, version FROM schema_version")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    for row in rows {
        let (component, found): (String, u32) = row?;
        let schema = schemas.iter().find(|schema| schema.component == component);
        let known = schema.map_or(0, |schema| schema.migrations.len() as u32);
        if found > known {
            return Err(DbError::NewerSchema { path: path.to_owned(), component, found, known });
        }
    }
    Ok(())
}
