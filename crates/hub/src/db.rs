//! The hub's database: opening, locking, migrating, and transactions off the async runtime. SQLite
//! and PostgreSQL are two drivers below one [`Tx`]; statements are written once, for both.
//! It never knows what the tables mean: each component brings its own [`Schema`].
//! Start reading at [`Database::open`], then [`Database::write`].

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::TransactionBehavior;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

mod feed;
mod postgres;
mod sqlite;
#[cfg(test)]
pub(crate) mod tests;
mod value;
mod writer;

pub use feed::{Feed, Heard, Note};
pub use postgres::Postgres;
pub use sqlite::FolderLock;
use value::RowOf;
pub(crate) use value::params;
pub use value::{Cell, Column, Row, ToValue, Value};
use writer::{Waiting, Writer};

/// The database's file in the hub's data folder.
pub const DATABASE_FILE: &str = "hub.db";
/// The file whose lock says that a hub uses the data folder.
pub const LOCK_FILE: &str = "hub.lock";
/// Rows of a whole table in memory at the same time.
const ROWS_AT_ONCE: u32 = 500;
/// Transactions that may read at the same time.
const READERS: usize = 4;
/// How long a statement waits for a lock that another process (a backup, `sqlite3`) holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// The tables of one component, as numbered migrations: the first is number 1. A migration that has
/// been released is never edited; a change is a new one at the end.
///
/// They are written in SQLite's words, of which PostgreSQL gets its own: `INTEGER` (`BIGINT`),
/// `BLOB` (`BYTEA`), `TEXT` (compared byte by byte), `INTEGER PRIMARY KEY` with or without
/// `AUTOINCREMENT` (an identity), `STRICT` and `WITHOUT ROWID` (nothing). Both engines read the
/// rest as it is; see the migration tests.
#[derive(Clone, Copy, Debug)]
pub struct Schema {
    /// Whose tables these are, such as `registry`; the key in `schema_version`.
    pub component: &'static str,
    /// SQL, each entry run once in a transaction of its own.
    pub migrations: &'static [&'static str],
    /// What SQL alone cannot do: code that is run right after the migration of that number, in its
    /// transaction.
    pub moves: &'static [(u32, Move)],
}

/// Moves data to new tables.
pub type Move = fn(&Tx<'_>) -> Result<(), DbError>;

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
        "database {database}: tables of `{component}` have version {found}, this program knows up to {known}\nhint: a newer slm has used this database; run that version or newer, or restore a backup from before the upgrade"
    )]
    NewerSchema {
        /// The database.
        database: String,
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
        "the hub's database is read-only\nhint: check the owner and mode of {DATABASE_FILE} and whether its file system is mounted read-only; with PostgreSQL, whether the server is a standby"
    )]
    ReadOnly,
    /// Another program kept the database locked. The transaction was rolled back.
    #[error(
        "the hub's database was locked by another program for {} s\nhint: is a backup or `sqlite3` open on {DATABASE_FILE}? Try again when it is closed",
        BUSY_TIMEOUT.as_secs()
    )]
    Busy,
    /// Any other failure of SQLite. The transaction was rolled back.
    #[error("database: {0}")]
    Sqlite(#[source] rusqlite::Error),
    /// Any other failure of PostgreSQL. The transaction was rolled back.
    #[error("database: {}", postgres::words(.0))]
    Postgres(#[source] tokio_postgres::Error),
    /// PostgreSQL cannot be reached, or went away. A transaction that was being committed may or may
    /// not have been; every other one was rolled back.
    #[error(
        "PostgreSQL cannot be reached: {}\nhint: is the server up? The hub goes on by itself when it is",
        postgres::words(.0)
    )]
    Unreachable(#[source] tokio_postgres::Error),
    /// PostgreSQL's certificate is not one to trust.
    #[error(
        "PostgreSQL's certificate is not trusted: {}\nhint: `sslrootcert` must name the certificate of the authority that signed it, and the URL its host as the certificate does",
        postgres::words(.0)
    )]
    Untrusted(#[source] tokio_postgres::Error),
    /// PostgreSQL does not let this user use this database.
    #[error(
        "PostgreSQL refuses: {}\nhint: check user and database in the URL, the password (PGPASSWORD or SLM_DATABASE_PASSWORD_FILE), and the server's pg_hba.conf",
        postgres::words(.0)
    )]
    Refused(#[source] tokio_postgres::Error),
    /// PostgreSQL does not answer.
    #[error(
        "PostgreSQL has not answered for {seconds} s\nhint: is the network to the server up? The hub goes on by itself when it is"
    )]
    Silent {
        /// How long it was waited for.
        seconds: u64,
        /// The cause.
        source: tokio::time::error::Elapsed,
    },
    /// The database's URL cannot be used.
    #[error(
        "the database's URL cannot be used: {reason}\nhint: write postgres://USER@HOST:PORT/DATABASE?sslrootcert=FILE, and give the password by PGPASSWORD or SLM_DATABASE_PASSWORD_FILE"
    )]
    Url {
        /// What is wrong with it.
        reason: String,
    },
    /// A column holds something else than this program wrote.
    #[error("database: column {index}: {source}")]
    Column {
        /// Its place in the row, from 0.
        index: usize,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Text with a zero byte, which PostgreSQL cannot keep.
    #[error("a text contains a zero byte\nhint: send plain text")]
    ZeroByte,
    /// The hub is going down.
    #[error("the hub is shutting down")]
    ShuttingDown,
    /// The transaction that a change shared with others failed; none of them was made.
    #[error(transparent)]
    Shared(Arc<DbError>),
    /// A transaction's own code panicked; it was rolled back.
    #[error("a database transaction panicked and was rolled back; this is a defect of the hub")]
    Panicked,
}

impl DbError {
    /// The failure itself, whether or not others share it.
    pub fn cause(&self) -> &Self {
        match self {
            Self::Shared(error) => error.cause(),
            error => error,
        }
    }

    /// Whether a constraint of the tables (unique, foreign key, check) refused a change.
    pub fn is_constraint(&self) -> bool {
        match self {
            Self::Sqlite(error) => {
                error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation)
            }
            Self::Postgres(error) => postgres::is_constraint(error),
            Self::Shared(error) => error.is_constraint(),
            _ => false,
        }
    }
}

/// The open database. Clones share it; the folder's lock goes with the last one.
#[derive(Clone)]
pub struct Database {
    inner: Arc<Inner>,
}

struct Inner {
    source: Source,
    writer: Writer,
    readers: Pool,
}

/// Where connections come from.
enum Source {
    Sqlite { path: PathBuf, _lock: FolderLock },
    Postgres { server: Box<Postgres>, handle: Handle },
}

enum Connection {
    Sqlite(rusqlite::Connection),
    Postgres(postgres::Connection),
}

/// Places for connections, and as many permits to use one. A place is empty until it is needed, and
/// again when its connection is lost.
struct Pool {
    permits: Arc<Semaphore>,
    places: Mutex<Vec<Option<Connection>>>,
}

impl Database {
    /// Opens (or makes) the SQLite database in `folder`: takes the folder's lock, checks the file,
    /// and brings every component's tables up to date. Blocking: call it at start, or from a thread.
    ///
    /// # Errors
    /// A folder that cannot be written or is in use, a damaged file, tables of a newer program, or
    /// a migration that fails.
    pub fn open(folder: &Path, schemas: &[Schema]) -> Result<Self, DbError> {
        std::fs::create_dir_all(folder)
            .map_err(|source| DbError::Folder { path: folder.to_owned(), source })?;
        let lock = FolderLock::acquire(folder)?;
        let path = folder.join(DATABASE_FILE);
        let mut writer = Connection::Sqlite(sqlite::open(&path)?);
        migrate(&path.display().to_string(), &mut writer, schemas)?;
        Ok(Self::over(Source::Sqlite { path, _lock: lock }, writer))
    }

    /// Opens a PostgreSQL database, which must exist and which other hubs may use as well, and brings
    /// every component's tables up to date. Blocking, and within a runtime: call it from a thread
    /// for blocking work.
    ///
    /// # Errors
    /// A server that cannot be reached or refuses, tables of a newer program, or a migration that
    /// fails.
    pub fn open_postgres(server: Postgres, schemas: &[Schema]) -> Result<Self, DbError> {
        let handle = Handle::current();
        let mut writer = Connection::Postgres(server.connect(&handle)?);
        migrate(&server.to_string(), &mut writer, &[schemas, &[feed::SCHEMA]].concat())?;
        Ok(Self::over(Source::Postgres { server: Box::new(server), handle }, writer))
    }

    /// Asks the SQLite database in `folder`, which a hub may be using, over one snapshot. Blocking.
    ///
    /// # Errors
    /// No such database, or what `query` says.
    pub fn look<T, E: From<DbError>>(
        folder: &Path,
        query: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let path = folder.join(DATABASE_FILE);
        // SQLite would make one.
        std::fs::metadata(&path)
            .map_err(|source| DbError::Folder { path: path.clone(), source })?;
        let mut connection = Connection::Sqlite(sqlite::open_reader(&path)?);
        transact(&mut connection, false, query)
    }

    /// Asks a PostgreSQL database, which a hub may be using, over one snapshot. Blocking, as
    /// [`Database::open_postgres`] is.
    ///
    /// # Errors
    /// A server that cannot be reached or refuses, or what `query` says.
    pub fn look_at_postgres<T, E: From<DbError>>(
        server: &Postgres,
        query: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = Connection::Postgres(server.connect(&Handle::current())?);
        transact(&mut connection, false, query)
    }

    fn over(source: Source, writer: Connection) -> Self {
        let (writer, readers) = (Writer::new(writer), Pool::new(READERS));
        Self { inner: Arc::new(Inner { source, writer, readers }) }
    }

    /// Runs `change` as if in a transaction of its own that excludes every other writer, on a thread
    /// for blocking work; changes that wait together are committed together. When this returns
    /// `Ok`, the change is on the disk; on `Err` nothing was changed, but for
    /// [`DbError::Unreachable`], which leaves open whether a commit arrived.
    ///
    /// Not cancellation safe: a change is carried out even if the caller goes away.
    ///
    /// # Errors
    /// What `change` returns, or [`DbError`] from the transaction itself.
    pub async fn write<T, E>(
        &self,
        change: impl FnOnce(&Tx<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        let (waiting, answered) = Waiting::of(change);
        if self.inner.writer.push(waiting) {
            let inner = Arc::clone(&self.inner);
            drop(tokio::task::spawn_blocking(move || writer::work(inner)));
        }
        answered.await.unwrap_or_else(|_| Err(DbError::ShuttingDown.into()))
    }

    /// Runs `query` over one consistent snapshot, on a thread for blocking work.
    ///
    /// # Errors
    /// What `query` returns, or [`DbError`] from the transaction itself.
    pub async fn read<T, E>(
        &self,
        query: impl FnOnce(&Tx<'_>) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        let permits = Arc::clone(&self.inner.readers.permits);
        let permit = permits.acquire_owned().await.map_err(|_| DbError::ShuttingDown)?;
        let inner = Arc::clone(&self.inner);
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let mut lent = inner.readers.take();
            let mut connection = inner.source.ready(lent.connection.take(), false)?;
            let result = transact(&mut connection, false, query);
            // What panicked or was lost is not put back; the next who needs one opens it again.
            let lost = matches!(&connection, Connection::Postgres(open) if open.is_closed());
            lent.connection = (!lost).then_some(connection);
            result
        });
        match work.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => Err(DbError::Panicked.into()),
            Err(_) => Err(DbError::ShuttingDown.into()),
        }
    }
}

impl Source {
    /// A connection that answers: the one at hand, or a new one.
    fn ready(&self, at_hand: Option<Connection>, writes: bool) -> Result<Connection, DbError> {
        match (self, at_hand) {
            (Self::Sqlite { .. }, Some(connection)) => Ok(connection),
            (Self::Sqlite { path, .. }, None) if writes => {
                Ok(Connection::Sqlite(sqlite::open(path)?))
            }
            (Self::Sqlite { path, .. }, None) => Ok(Connection::Sqlite(sqlite::open_reader(path)?)),
            (Self::Postgres { .. }, Some(Connection::Postgres(open))) if !open.is_closed() => {
                Ok(Connection::Postgres(open))
            }
            (Self::Postgres { server, handle }, _) => {
                Ok(Connection::Postgres(server.connect(handle)?))
            }
        }
    }
}

/// One transaction: committed if `body` returns `Ok`, rolled back otherwise.
fn transact<T, E: From<DbError>>(
    connection: &mut Connection,
    writes: bool,
    body: impl FnOnce(&Tx<'_>) -> Result<T, E>,
) -> Result<T, E> {
    match connection {
        Connection::Sqlite(connection) => {
            let behavior = match writes {
                true => TransactionBehavior::Immediate,
                false => TransactionBehavior::Deferred,
            };
            // Dropping an unfinished transaction (error or panic) rolls it back.
            let transaction =
                connection.transaction_with_behavior(behavior).map_err(DbError::from)?;
            let tx = Tx(TxOf::Sqlite(transaction));
            let value = body(&tx)?;
            let TxOf::Sqlite(transaction) = tx.0 else { unreachable!("it was just made") };
            transaction.commit().map_err(DbError::from)?;
            Ok(value)
        }
        Connection::Postgres(connection) => {
            connection.begin(writes)?;
            // A panic drops the connection, and the server rolls back.
            let result = body(&Tx(TxOf::Postgres(connection)));
            match &result {
                Ok(_) => connection.end(true)?,
                Err(_) if connection.is_closed() => {}
                Err(_) => connection.end(false)?,
            }
            result
        }
    }
}

/// A transaction under way. Statements number their parameters `?1`, `?2`, …; see
/// `params!`.
pub struct Tx<'c>(TxOf<'c>);

enum TxOf<'c> {
    Sqlite(rusqlite::Transaction<'c>),
    Postgres(&'c postgres::Connection),
}

impl Tx<'_> {
    /// Runs one statement; the number of rows that it changed.
    ///
    /// # Errors
    /// What the database says. The transaction must then end.
    pub fn execute(&self, sql: &str, params: &[Value<'_>]) -> Result<usize, DbError> {
        match &self.0 {
            TxOf::Sqlite(tx) => {
                Ok(tx.prepare_cached(sql)?.execute(rusqlite::params_from_iter(params))?)
            }
            TxOf::Postgres(connection) => connection.execute(sql, params),
        }
    }

    /// Gives every row of a query to `read`, until there is no more or it returns `false`. Rows of
    /// SQLite are read one by one.
    ///
    /// # Errors
    /// What the database or `read` says.
    pub fn each<E: From<DbError>>(
        &self,
        sql: &str,
        params: &[Value<'_>],
        mut read: impl FnMut(&Row<'_>) -> Result<bool, E>,
    ) -> Result<(), E> {
        match &self.0 {
            TxOf::Sqlite(tx) => {
                let mut statement = tx.prepare_cached(sql).map_err(DbError::from)?;
                let params = rusqlite::params_from_iter(params);
                let mut rows = statement.query(params).map_err(DbError::from)?;
                while let Some(row) = rows.next().map_err(DbError::from)? {
                    if !read(&Row(RowOf::Sqlite(row)))? {
                        break;
                    }
                }
            }
            TxOf::Postgres(connection) => {
                for row in &connection.query(sql, params)? {
                    if !read(&Row(RowOf::Postgres(row)))? {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Every row of a query, each read by `read`.
    ///
    /// # Errors
    /// What the database or `read` says.
    pub fn query<T, E: From<DbError>>(
        &self,
        sql: &str,
        params: &[Value<'_>],
        mut read: impl FnMut(&Row<'_>) -> Result<T, E>,
    ) -> Result<Vec<T>, E> {
        let mut found = Vec::new();
        self.each(sql, params, |row| {
            found.push(read(row)?);
            Ok::<_, E>(true)
        })?;
        Ok(found)
    }

    /// The first row of a query, if it has any.
    ///
    /// # Errors
    /// What the database or `read` says.
    pub fn first<T, E: From<DbError>>(
        &self,
        sql: &str,
        params: &[Value<'_>],
        mut read: impl FnMut(&Row<'_>) -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        let mut found = None;
        self.each(sql, params, |row| {
            found = Some(read(row)?);
            Ok::<_, E>(false)
        })?;
        Ok(found)
    }

    /// Whether a query has any row.
    ///
    /// # Errors
    /// What the database says.
    pub fn exists(&self, sql: &str, params: &[Value<'_>]) -> Result<bool, DbError> {
        Ok(self.first(sql, params, |_| Ok::<_, DbError>(()))?.is_some())
    }

    /// Runs definitions of tables, as a [`Schema`] writes them, and other statements without
    /// parameters.
    ///
    /// # Errors
    /// What the database says.
    pub fn batch(&self, sql: &str) -> Result<(), DbError> {
        match &self.0 {
            TxOf::Sqlite(tx) => Ok(tx.execute_batch(sql)?),
            TxOf::Postgres(connection) => connection.batch(&postgres::definitions(sql)),
        }
    }

    /// Every table and column of this database, table by table, in order.
    ///
    /// # Errors
    /// What the database says.
    pub fn columns(&self) -> Result<Vec<(String, String)>, DbError> {
        let sql = match &self.0 {
            TxOf::Sqlite(_) => {
                "SELECT t.name, c.name FROM sqlite_schema AS t, pragma_table_info(t.name) AS c
                 WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%' ORDER BY t.name, c.cid"
            }
            TxOf::Postgres(_) => {
                "SELECT CAST(table_name AS text), CAST(column_name AS text)
                 FROM information_schema.columns NATURAL JOIN information_schema.tables
                 WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'
                 ORDER BY table_name, ordinal_position"
            }
        };
        self.query(sql, params![], |row| Ok((row.get(0)?, row.get(1)?)))
    }

    /// Gives every row of a table to `read`, a bounded number of them in memory.
    ///
    /// # Errors
    /// What the database or `read` says.
    pub fn each_of_table<E: From<DbError>>(
        &self,
        table: &str,
        columns: &[String],
        mut read: impl FnMut(&Row<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let all = format!("SELECT {} FROM {table}", columns.join(", "));
        match &self.0 {
            TxOf::Sqlite(_) => self.each(&all, params![], |row| read(row).map(|()| true)),
            TxOf::Postgres(connection) => {
                connection.batch(&format!("DECLARE each_{table} NO SCROLL CURSOR FOR {all}"))?;
                let next = format!("FETCH {ROWS_AT_ONCE} FROM each_{table}");
                loop {
                    let rows = connection.query(&next, params![])?;
                    if rows.is_empty() {
                        return Ok(());
                    }
                    for row in &rows {
                        read(&Row(RowOf::Postgres(row)))?;
                    }
                }
            }
        }
    }

    /// From here to the end of the transaction, rows may name others that come later.
    ///
    /// # Errors
    /// What the database says.
    pub fn defer_foreign_keys(&self) -> Result<(), DbError> {
        match &self.0 {
            TxOf::Sqlite(tx) => Ok(tx.execute_batch("PRAGMA defer_foreign_keys = ON")?),
            TxOf::Postgres(connection) => {
                connection.batch(&postgres::foreign_keys("DEFERRABLE INITIALLY DEFERRED"))
            }
        }
    }

    /// Ends what [`Tx::defer_foreign_keys`] began: every row must now find what it names. (SQLite
    /// looks when the transaction commits.)
    ///
    /// # Errors
    /// A row that does not, or what the database says.
    pub fn check_foreign_keys(&self) -> Result<(), DbError> {
        match &self.0 {
            TxOf::Sqlite(_) => Ok(()),
            TxOf::Postgres(connection) => {
                connection.batch("SET CONSTRAINTS ALL IMMEDIATE")?;
                connection.batch(&postgres::foreign_keys("NOT DEFERRABLE"))
            }
        }
    }

    /// Makes numbers that a table gives by itself go on after those that it has. (SQLite does so
    /// without being told.)
    ///
    /// # Errors
    /// What the database says.
    pub fn count_on(&self, table: &str) -> Result<(), DbError> {
        let TxOf::Postgres(connection) = &self.0 else { return Ok(()) };
        let sql = "SELECT CAST(column_name AS text) FROM information_schema.columns
                   WHERE table_schema = current_schema() AND table_name = ?1
                   AND is_identity = 'YES'";
        for column in self.query(sql, params![table], |row| row.get::<String>(0))? {
            connection.batch(&format!(
                "SELECT setval(pg_get_serial_sequence('{table}', '{column}'),
                     COALESCE(max({column}), 1), max({column}) IS NOT NULL) FROM {table}"
            ))?;
        }
        Ok(())
    }

    /// The number under `key` of a JSON object in the text `column`, as SQL.
    pub fn json_integer(&self, column: &str, key: &str) -> String {
        match &self.0 {
            TxOf::Sqlite(_) => format!("json_extract({column}, '$.{key}')"),
            TxOf::Postgres(_) => format!("CAST(CAST({column} AS json) ->> '{key}' AS BIGINT)"),
        }
    }
}

impl Pool {
    fn new(places: usize) -> Self {
        let permits = Arc::new(Semaphore::new(places));
        Self { permits, places: Mutex::new((0..places).map(|_| None).collect()) }
    }

    fn take(&self) -> Lent<'_> {
        let mut free = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        Lent { connection: free.pop().expect("a permit stands for a place"), pool: self }
    }
}

/// A place in use; goes back to its pool even when the user panics.
struct Lent<'a> {
    connection: Option<Connection>,
    pool: &'a Pool,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut free = self.pool.places.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(self.connection.take());
    }
}

fn migrate(database: &str, connection: &mut Connection, schemas: &[Schema]) -> Result<(), DbError> {
    // Every component is checked before the first migration runs: a refusal changes nothing.
    let versions = transact(connection, true, |tx| {
        tx.batch(
            "CREATE TABLE IF NOT EXISTS schema_version (
                 component TEXT PRIMARY KEY,
                 version INTEGER NOT NULL
             ) STRICT",
        )?;
        tx.query("SELECT component, version FROM schema_version", params![], |row| {
            Ok::<(String, u32), DbError>((row.get(0)?, row.get(1)?))
        })
    })?;
    for (component, found) in &versions {
        let schema = schemas.iter().find(|schema| schema.component == component);
        let known = schema.map_or(0, |schema| schema.migrations.len() as u32);
        if *found > known {
            let (database, component) = (database.to_owned(), component.clone());
            return Err(DbError::NewerSchema { database, component, found: *found, known });
        }
    }
    for schema in schemas {
        let found = versions.iter().find(|(component, _)| component == schema.component);
        let found = found.map_or(0, |(_, version)| *version as usize);
        for (number, sql) in (1_u32..).zip(schema.migrations).skip(found) {
            let step = transact(connection, true, |tx| {
                // Another hub that starts at the same time may have been faster.
                let done = "SELECT 1 FROM schema_version WHERE component = ?1 AND version >= ?2";
                if tx.exists(done, params![schema.component, number])? {
                    return Ok(0);
                }
                tx.batch(sql)?;
                for (_, r#move) in schema.moves.iter().filter(|(after, _)| *after == number) {
                    r#move(tx)?;
                }
                tx.execute(
                    "INSERT INTO schema_version (component, version) VALUES (?1, ?2)
                     ON CONFLICT (component) DO UPDATE SET version = excluded.version",
                    params![schema.component, number],
                )
            });
            step.map_err(|error: DbError| DbError::Migration {
                component: schema.component,
                number,
                source: Box::new(error),
            })?;
            tracing::info!(component = schema.component, number, "migrated tables");
        }
    }
    Ok(())
}
