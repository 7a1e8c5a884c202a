//! The SQLite driver: one file in the hub's data folder, which one process may use at a time.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, ErrorCode, ToSql};

use super::value::{Cell, Value};
use super::{BUSY_TIMEOUT, DbError, LOCK_FILE};

/// Statements that each connection keeps prepared.
const STATEMENT_CACHE: usize = 256;
/// The longest process id read from a lock file, in bytes.
const MAX_LOCK_BYTES: u64 = 32;

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

impl ToSql for Value<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match self {
            Self::Null => ValueRef::Null,
            Self::Integer(number) => ValueRef::Integer(*number),
            Self::Text(text) => ValueRef::Text(text.as_bytes()),
            Self::Bytes(bytes) => ValueRef::Blob(bytes),
        }))
    }
}

/// One column of a row.
pub(super) fn cell(row: &rusqlite::Row<'_>, index: usize) -> Result<Cell, DbError> {
    Ok(match row.get_ref(index)? {
        ValueRef::Null => Cell::Null,
        ValueRef::Integer(number) => Cell::Integer(number),
        ValueRef::Text(text) => match String::from_utf8(text.to_vec()) {
            Ok(text) => Cell::Text(text),
            Err(error) => return Err(DbError::Column { index, source: error.into() }),
        },
        ValueRef::Blob(bytes) => Cell::Bytes(bytes.to_vec()),
        ValueRef::Real(_) => return Err(DbError::Column { index, source: "no such type".into() }),
    })
}

/// Opens the database's file and checks it.
pub(super) fn open(path: &Path) -> Result<Connection, DbError> {
    let connection = connect(path).map_err(|error| name_damage(path, error))?;
    check_integrity(path, &connection)?;
    Ok(connection)
}

/// A connection that cannot change anything.
pub(super) fn open_reader(path: &Path) -> Result<Connection, DbError> {
    let reader = connect(path)?;
    reader.pragma_update(None, "query_only", true)?;
    Ok(reader)
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
