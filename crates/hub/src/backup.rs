//! A hub as files: its tables as they were at one moment, its blobs and its secrets, whichever
//! databases and stores they come from and go to.
//! It never stops a hub that runs, and never writes over one that holds anything.
//! Start reading at [`back_up`], then [`restore`].
//!
//! ```text
//! DIR/backup.json           what is in it; written last, so without it a backup is not whole
//! DIR/tables/NAME.jsonl     one row on each line, as a JSON array
//! DIR/blobs/sha256/ab/ab…   blobs, hard-linked to those of the hub where that is possible
//! DIR/secrets/…             the hub's authority and secrets, mode 0600, not encrypted
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};
use slmops_artifact::Digest;
use slmops_artifact::digest::Hasher;

use crate::blobs::{BlobEntry, BlobError, Blobs, S3};
use crate::db::{
    Cell, DATABASE_FILE, Database, DbError, Postgres, Schema, ToValue as _, Tx, Value, params,
};
use crate::durable;
use crate::registry;
use crate::server::{SECRET_FILES, blob_owner, open_database};
use crate::store::{self, StoreError};

/// The version of the format.
const FORMAT: u32 = 1;
const CONTENTS_FILE: &str = "backup.json";
const TABLES_FOLDER: &str = "tables";
const SECRETS_FOLDER: &str = "secrets";
/// The longest secret or certificate, in bytes.
const MAX_SECRET_BYTES: u64 = 64 << 10;
/// The longest `backup.json`, in bytes.
const MAX_CONTENTS_BYTES: u64 = 1 << 20;
/// The table of the database itself; its content is `schemas` in the contents.
const VERSIONS_TABLE: &str = "schema_version";
/// Tables by which several hubs agree at the moment; their secrets are in files.
const PASSING_TABLES: [&str; 4] = ["changes", "planners", "replicas", "secrets"];
/// The tables' components, oldest version first.
const SCHEMAS: [Schema; 2] = [store::SCHEMA, registry::SCHEMA];

/// Where a hub keeps what it has.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its data folder.
    pub data_dir: PathBuf,
    /// Where the tables are, if not in a SQLite file there.
    pub database: Option<Postgres>,
    /// Where blobs are, if not in files there.
    pub blobs: Option<S3>,
}

/// What a backup holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The version of the format.
    pub format: u32,
    /// The moment that it shows.
    pub made_at: Timestamp,
    /// The program that made it.
    pub made_by: String,
    /// The version of each component's tables.
    pub schemas: BTreeMap<String, u32>,
    /// The tables.
    pub tables: Vec<TableFile>,
    /// The hub's secrets by name, with the digests of their files.
    pub secrets: BTreeMap<String, Digest>,
    /// Blobs that the tables name.
    pub blobs: u64,
    /// Their size together, in bytes.
    pub blob_bytes: u64,
    /// Whether they are in the backup, or only in the S3 store where they were.
    pub blobs_included: bool,
}

/// One table of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableFile {
    /// Its name.
    pub name: String,
    /// Its columns, in the order of each row.
    pub columns: Vec<String>,
    /// Its rows.
    pub rows: u64,
    /// The digest of its file.
    pub digest: Digest,
}

/// Why a backup cannot be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file cannot be read or written.
    #[error("{operation} {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is no hub at the place.
    #[error(
        "there is no hub in {}\nhint: name its data folder with --data, and its database and blobs as for `slm up`",
        path.display()
    )]
    NoHub {
        /// The folder.
        path: PathBuf,
    },
    /// The folder holds something else than a backup.
    #[error(
        "{} holds something else than a backup\nhint: choose a folder that is empty or does not exist yet",
        path.display()
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// A blob was deleted while the backup was being made.
    #[error(
        "blob {digest} went away while the backup was being made\nhint: run it again; what is copied already stays"
    )]
    BlobGone {
        /// Which one.
        digest: Digest,
    },
    /// The folder holds no whole backup.
    #[error(
        "{} is no whole backup: {reason}\nhint: an interrupted backup is completed by running `slm backup` again with the same folder",
        path.display()
    )]
    NotWhole {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A file of the backup is not what was written.
    #[error("{} is damaged: {reason}\nhint: take another copy of the backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A newer program made the backup.
    #[error(
        "the backup was made by {made_by}, which this program is older than\nhint: restore it with that version or a newer one"
    )]
    Newer {
        /// That program.
        made_by: String,
    },
    /// Something is there already.
    #[error(
        "{place} is not empty: {found}\nhint: restore into a new folder and a new database; nothing was changed"
    )]
    NotEmpty {
        /// Where.
        place: String,
        /// What was found.
        found: String,
    },
    /// Blobs that are neither in the backup nor in the store that is restored to.
    #[error(
        "{missing} of {of} blobs are neither in the backup nor in the store, {first} among them\nhint: name the store they were in with --blobs, or restore from a backup made with --copy-blobs"
    )]
    BlobsMissing {
        /// How many.
        missing: u64,
        /// Of how many.
        of: u64,
        /// One of them.
        first: Digest,
    },
    /// The database failed.
    #[error(transparent)]
    Db(#[from] DbError),
    /// What is stored cannot be understood.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store of blobs failed.
    #[error(transparent)]
    Blobs(#[from] BlobError),
}

impl BackupError {
    fn file(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { operation, path: path.to_owned(), source }
    }
}

type Result<T, E = BackupError> = std::result::Result<T, E>;

/// Makes a backup of the hub at `place` in `folder`, whether or not the hub is running. Blobs in S3
/// stay there and are only checked for, unless `copy_blobs`. An interrupted backup is gone on with;
/// a whole one is brought up to date. When this returns `Ok`, it is on the disk.
///
/// # Errors
/// [`BackupError`]; the folder then holds no whole backup, unless it did before.
pub async fn back_up(place: &Place, folder: &Path, copy_blobs: bool) -> Result<Contents> {
    let data = &place.data_dir;
    if !data.join(SECRET_FILES[0]).exists() {
        return Err(BackupError::NoHub { path: data.clone() });
    }
    open_folder(folder)?;
    let secrets = save_secrets(data, &folder.join(SECRETS_FOLDER))?;
    let tables = folder.join(TABLES_FOLDER);
    let (database, data_dir) = (place.database.clone(), data.clone());
    let saved = blocking(move || {
        let save = |tx: &Tx<'_>| save_tables(tx, &tables);
        match database {
            None => Database::look(&data_dir, save),
            Some(server) => Database::look_at_postgres(&server, save),
        }
    })
    .await?;

    let blobs_included = place.blobs.is_none() || copy_blobs;
    let blobs = open_blobs(place, data).await?;
    let target = Blobs::open(folder)?;
    for entry in &saved.blobs {
        let gone = BackupError::BlobGone { digest: entry.digest };
        if !blobs_included {
            if blobs.size(&entry.digest).await? != Some(entry.size_bytes) {
                return Err(gone);
            }
        } else if target.size(&entry.digest).await? != Some(entry.size_bytes)
            && !target.link(&blobs, &entry.digest).await?
        {
            match blobs.get(&entry.digest, None).await {
                Ok(reader) => target.put(reader.stream, Some(entry.digest)).await?,
                Err(BlobError::NotFound(_)) => return Err(gone),
                Err(error) => return Err(error.into()),
            };
        }
    }
    if blobs_included {
        // What an earlier backup in the folder had and this one does not need.
        let mut listed = target.list();
        while let Some(entry) = listed.try_next().await? {
            if saved.blobs.binary_search_by_key(&entry.digest, |known| known.digest).is_err() {
                target.delete(&entry.digest).await?;
            }
        }
    }
    let contents = Contents {
        format: FORMAT,
        made_at: saved.at,
        made_by: concat!("slm ", env!("CARGO_PKG_VERSION")).to_owned(),
        schemas: saved.schemas,
        tables: saved.tables,
        secrets,
        blobs: saved.blobs.len() as u64,
        blob_bytes: saved.blobs.iter().map(|entry| entry.size_bytes).sum(),
        blobs_included,
    };
    let text = serde_json::to_vec_pretty(&contents).expect("the contents are plain data");
    let path = folder.join(CONTENTS_FILE);
    durable::write_secret(&path, &text).map_err(BackupError::file("write", &path))?;
    Ok(contents)
}

/// Makes a hub at `place` of the backup in `folder`: every digest is checked, and each device's
/// generation is raised to the current time in seconds since 1970, so that generations never fall
/// however much was told since the backup. May be run again if it was interrupted.
///
/// # Errors
/// [`BackupError`]; the place then holds no hub, though blobs may be there already.
pub async fn restore(folder: &Path, place: &Place) -> Result<Contents> {
    let contents = read_contents(folder)?;
    let data = place.data_dir.clone();
    durable::create_private_folder(&data).map_err(BackupError::file("make folder", &data))?;
    check_secrets(&contents, folder, &data)?;
    let schemas = schemas_of(&contents)?;
    let (tables, known) = (folder.join(TABLES_FOLDER), contents.clone());
    let (at, server) = (data.clone(), place.database.clone());
    // With it comes the right to the folder: no hub starts in the middle of this.
    let (database, lock) = blocking(move || {
        for table in &known.tables {
            check_table(&tables, table)?;
        }
        match &server {
            Some(server) => Database::look_at_postgres(server, |tx| check_empty(tx, server))?,
            None if at.join(DATABASE_FILE).exists() => {
                Database::look(&at, |tx| check_empty(tx, at.display()))?;
            }
            None => {}
        }
        Ok(open_database(&at, server, &schemas)?)
    })
    .await?;

    for name in contents.secrets.keys() {
        let path = folder.join(SECRETS_FOLDER).join(name);
        write_secret(&read_secret(&path)?, &data.join(name))?;
    }
    restore_blobs(&contents, folder, place).await?;

    let (tables, known) = (folder.join(TABLES_FOLDER), contents.clone());
    let now = Timestamp::now();
    database
        .write(move |tx| {
            tx.defer_foreign_keys()?;
            for table in &known.tables {
                load_table(tx, &tables, table)?;
            }
            tx.check_foreign_keys()?;
            store::record_restore(tx, now, known.made_at)?;
            Ok::<_, BackupError>(())
        })
        .await?;
    drop((database, lock));
    let server = place.database.clone();
    blocking(move || Ok(open_database(&data, server, &SCHEMAS).map(drop)?)).await?;
    Ok(contents)
}

/// Refuses a database in which any table has rows.
fn check_empty(tx: &Tx<'_>, place: impl std::fmt::Display) -> Result<()> {
    for (table, _) in tables_of(tx)? {
        if tx.exists(&format!("SELECT 1 FROM {table} LIMIT 1"), params![])? {
            let found = format!("its table `{table}` has rows");
            return Err(BackupError::NotEmpty { place: place.to_string(), found });
        }
    }
    Ok(())
}

async fn open_blobs(place: &Place, data: &Path) -> Result<Blobs> {
    Ok(match &place.blobs {
        None => Blobs::open(data)?,
        Some(s3) => {
            let path = data.join("tls/ca.pem");
            let ca = CertificateDer::from_pem_file(&path).map_err(|error| {
                BackupError::Damaged { path: path.clone(), reason: error.to_string() }
            })?;
            Blobs::open_s3(s3, &blob_owner(Digest::of(&ca)), data).await?
        }
    })
}

/// Makes the folder, or finds a backup in it.
fn open_folder(folder: &Path) -> Result<()> {
    durable::create_private_folder(folder).map_err(BackupError::file("make folder", folder))?;
    let entries = fs::read_dir(folder).map_err(BackupError::file("read", folder))?;
    let known = [CONTENTS_FILE, TABLES_FOLDER, SECRETS_FOLDER, "blobs", "uploads"];
    for entry in entries {
        let name = entry.map_err(BackupError::file("read", folder))?.file_name();
        if !known.iter().any(|known| name == **known) {
            return Err(BackupError::Occupied { path: folder.to_owned() });
        }
    }
    // Until it is written again the folder holds no whole backup.
    match fs::remove_file(folder.join(CONTENTS_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(BackupError::file("remove", &folder.join(CONTENTS_FILE))(error));
        }
        _ => {}
    }
    let tables = folder.join(TABLES_FOLDER);
    if tables.exists() {
        fs::remove_dir_all(&tables).map_err(BackupError::file("remove", &tables))?;
    }
    durable::create_private_folder(&tables).map_err(BackupError::file("make folder", &tables))
}

fn save_secrets(data: &Path, target: &Path) -> Result<BTreeMap<String, Digest>> {
    let mut saved = BTreeMap::new();
    // The first administrator's token may have been taken away.
    for name in SECRET_FILES.into_iter().filter(|name| data.join(name).exists()) {
        let bytes = read_secret(&data.join(name))?;
        write_secret(&bytes, &target.join(name))?;
        saved.insert(name.to_owned(), Digest::of(&bytes));
    }
    Ok(saved)
}

fn read_secret(path: &Path) -> Result<Vec<u8>> {
    durable::read_secret(path, MAX_SECRET_BYTES).map_err(BackupError::file("read", path))
}

fn write_secret(bytes: &[u8], to: &Path) -> Result<()> {
    let folder = to.parent().expect("a secret lies in a folder");
    durable::create_private_folder(folder).map_err(BackupError::file("make folder", folder))?;
    durable::write_secret(to, bytes).map_err(BackupError::file("write", to))
}

/// Checks the secrets of the backup, and that the place has none or the same.
fn check_secrets(contents: &Contents, folder: &Path, data: &Path) -> Result<()> {
    for (name, digest) in &contents.secrets {
        if !SECRET_FILES.contains(&name.as_str()) {
            let reason = format!("it names a secret `{name}`");
            return Err(BackupError::Damaged { path: folder.join(CONTENTS_FILE), reason });
        }
        let path = folder.join(SECRETS_FOLDER).join(name);
        let bytes = read_secret(&path)?;
        if Digest::of(&bytes) != *digest {
            return Err(BackupError::Damaged { path, reason: "its digest is another".to_owned() });
        }
        let there = data.join(name);
        if there.exists() && read_secret(&there)? != bytes {
            let (place, found) = (data.display().to_string(), format!("it has another `{name}`"));
            return Err(BackupError::NotEmpty { place, found });
        }
    }
    Ok(())
}

async fn restore_blobs(contents: &Contents, folder: &Path, place: &Place) -> Result<()> {
    let blobs = open_blobs(place, &place.data_dir).await?;
    let source = Blobs::open(folder)?;
    let (mut missing, mut first) = (0, None);
    for entry in needed_blobs(&folder.join(TABLES_FOLDER), contents)? {
        if blobs.size(&entry.digest).await? == Some(entry.size_bytes) {
            continue;
        }
        match source.get(&entry.digest, None).await {
            Ok(reader) => {
                blobs.put(reader.stream, Some(entry.digest)).await?;
            }
            Err(BlobError::NotFound(digest)) => {
                missing += 1;
                first.get_or_insert(digest);
            }
            Err(error) => return Err(error.into()),
        }
    }
    match first {
        None => Ok(()),
        Some(first) => Err(BackupError::BlobsMissing { missing, of: contents.blobs, first }),
    }
}

fn read_contents(folder: &Path) -> Result<Contents> {
    let path = folder.join(CONTENTS_FILE);
    let not_whole =
        |reason: &str| BackupError::NotWhole { path: folder.to_owned(), reason: reason.to_owned() };
    let bytes = match durable::read_secret(&path, MAX_CONTENTS_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(not_whole(&format!("{CONTENTS_FILE} is missing")));
        }
        Err(error) => return Err(BackupError::file("read", &path)(error)),
    };
    let damaged = |reason: String| BackupError::Damaged { path: path.clone(), reason };
    let json: Json = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    if json["format"].as_u64().is_some_and(|format| format > FORMAT.into()) {
        let made_by = json["made_by"].as_str().unwrap_or("a newer program").to_owned();
        return Err(BackupError::Newer { made_by });
    }
    let contents: Contents =
        serde_json::from_value(json).map_err(|error| damaged(error.to_string()))?;
    let plain = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    let names = contents.tables.iter().flat_map(|table| table.columns.iter().chain([&table.name]));
    let bad = names.into_iter().find(|name| name.is_empty() || !plain(name)).cloned();
    match bad {
        Some(name) => Err(damaged(format!("`{name}` is no name of a table or column"))),
        None => Ok(contents),
    }
}

/// The components' tables as they were when the backup was made.
fn schemas_of(contents: &Contents) -> Result<Vec<Schema>> {
    let newer = || BackupError::Newer { made_by: contents.made_by.clone() };
    let mut schemas = Vec::new();
    for (component, version) in &contents.schemas {
        let known = SCHEMAS.iter().find(|schema| schema.component == component);
        let known = known.ok_or_else(newer)?;
        let migrations = known.migrations.get(..*version as usize).ok_or_else(newer)?;
        schemas.push(Schema { migrations, ..*known });
    }
    Ok(schemas)
}

/// What was read in one transaction.
struct Saved {
    at: Timestamp,
    schemas: BTreeMap<String, u32>,
    tables: Vec<TableFile>,
    /// In order of their digests.
    blobs: Vec<BlobEntry>,
}

fn save_tables(tx: &Tx<'_>, folder: &Path) -> Result<Saved> {
    let sql = format!("SELECT component, version FROM {VERSIONS_TABLE}");
    let schemas = tx.query(&sql, params![], |row| Ok::<_, DbError>((row.get(0)?, row.get(1)?)))?;
    let kept =
        |(component, _): &(String, u32)| SCHEMAS.iter().any(|schema| schema.component == component);
    let schemas = schemas.into_iter().filter(kept);
    let at = Timestamp::now();
    let tables = tables_of(tx)?;
    let tables = tables.into_iter().map(|(name, columns)| save_table(tx, folder, name, columns));
    let tables = tables.collect::<Result<Vec<_>>>()?;
    let sql = "SELECT DISTINCT digest, size_bytes FROM registry_blobs ORDER BY digest";
    let mut blobs = tx.query(sql, params![], |row| -> Result<_> {
        let digest: String = row.get(0)?;
        blob_of(&digest, row.get(1)?, folder)
    })?;
    blobs.dedup_by_key(|entry| entry.digest);
    blobs.sort_by_key(|entry| entry.digest);
    Ok(Saved { at, schemas: schemas.collect(), tables, blobs })
}

fn blob_of(digest: &str, size_bytes: i64, path: &Path) -> Result<BlobEntry> {
    let digest = digest.parse().map_err(|_| BackupError::Damaged {
        path: path.to_owned(),
        reason: format!("`{digest}` is no digest of a blob"),
    })?;
    Ok(BlobEntry { digest, size_bytes: size_bytes.cast_unsigned() })
}

/// The hub's tables and their columns.
fn tables_of(tx: &Tx<'_>) -> Result<Vec<(String, Vec<String>)>> {
    let mut tables: Vec<(String, Vec<String>)> = Vec::new();
    for (table, column) in tx.columns()? {
        match tables.last_mut() {
            _ if table == VERSIONS_TABLE || PASSING_TABLES.contains(&table.as_str()) => {}
            Some((last, columns)) if *last == table => columns.push(column),
            _ => tables.push((table, vec![column])),
        }
    }
    Ok(tables)
}

fn table_path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.jsonl"))
}

fn save_table(tx: &Tx<'_>, folder: &Path, name: String, columns: Vec<String>) -> Result<TableFile> {
    let path = table_path(folder, &name);
    let file = File::create(&path).map_err(BackupError::file("make", &path))?;
    let mut writer = BufWriter::new(file);
    let (mut hasher, mut rows) = (Hasher::default(), 0);
    tx.each_of_table(&name, &columns, |row| {
        let cells = (0..columns.len()).map(|index| Ok(json_of(row.get(index)?)));
        let cells = cells.collect::<Result<Vec<Json>, DbError>>()?;
        let mut line = Json::Array(cells).to_string().into_bytes();
        line.push(b'\n');
        hasher.update(&line);
        rows += 1;
        writer.write_all(&line).map_err(BackupError::file("write", &path))
    })?;
    let file = writer.into_inner().map_err(|error| error.into_error());
    file.and_then(|file| file.sync_all()).map_err(BackupError::file("write", &path))?;
    Ok(TableFile { name, columns, rows, digest: hasher.finish().0 })
}

/// Bytes have no JSON of their own.
fn json_of(cell: Cell) -> Json {
    match cell {
        Cell::Null => Json::Null,
        Cell::Integer(number) => number.into(),
        Cell::Text(text) => text.into(),
        Cell::Bytes(bytes) => json!({ "base64": STANDARD.encode(bytes) }),
    }
}

fn value_of(json: &Json) -> Option<Value<'_>> {
    Some(match json {
        Json::Null => Value::Null,
        Json::Number(number) => number.as_i64().map(Value::Integer)?,
        Json::String(text) => text.to_value(),
        Json::Object(object) => {
            let bytes = STANDARD.decode(object.get("base64")?.as_str()?).ok()?;
            Value::Bytes(bytes.into())
        }
        _ => return None,
    })
}

fn check_table(folder: &Path, table: &TableFile) -> Result<()> {
    let path = table_path(folder, &table.name);
    let mut file = File::open(&path).map_err(BackupError::file("open", &path))?;
    let mut hasher = Hasher::default();
    io::copy(&mut file, &mut Hashing(&mut hasher)).map_err(BackupError::file("read", &path))?;
    match hasher.finish().0 == table.digest {
        true => Ok(()),
        false => Err(BackupError::Damaged { path, reason: "its digest is another".to_owned() }),
    }
}

struct Hashing<'h>(&'h mut Hasher);

impl io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives each row of a table's file to `read`.
fn each_row(
    folder: &Path,
    table: &TableFile,
    mut read: impl FnMut(&[Json]) -> Result<()>,
) -> Result<()> {
    let path = table_path(folder, &table.name);
    let file = File::open(&path).map_err(BackupError::file("open", &path))?;
    for line in BufReader::new(file).lines() {
        let line = line.map_err(BackupError::file("read", &path))?;
        let row: Vec<Json> = serde_json::from_str(&line).map_err(|error| BackupError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        read(&row)?;
    }
    Ok(())
}

/// The blobs that a backup's tables name.
fn needed_blobs(folder: &Path, contents: &Contents) -> Result<Vec<BlobEntry>> {
    let mut needed = Vec::new();
    let Some(table) = contents.tables.iter().find(|table| table.name == "registry_blobs") else {
        return Ok(needed);
    };
    let place = |name| table.columns.iter().position(|column| column == name);
    let (Some(digest), Some(size)) = (place("digest"), place("size_bytes")) else {
        return Ok(needed);
    };
    each_row(folder, table, |row| {
        let digest = row.get(digest).and_then(Json::as_str).unwrap_or_default();
        let size = row.get(size).and_then(Json::as_i64).unwrap_or_default();
        needed.push(blob_of(digest, size, &table_path(folder, &table.name))?);
        Ok(())
    })?;
    needed.sort_by_key(|entry| entry.digest);
    needed.dedup_by_key(|entry| entry.digest);
    Ok(needed)
}

fn load_table(tx: &Tx<'_>, folder: &Path, table: &TableFile) -> Result<()> {
    let places: Vec<String> = (1..=table.columns.len()).map(|place| format!("?{place}")).collect();
    let (columns, places) = (table.columns.join(", "), places.join(", "));
    let sql = format!("INSERT INTO {} ({columns}) VALUES ({places})", table.name);
    each_row(folder, table, |row| {
        let values: Option<Vec<Value<'_>>> = row.iter().map(value_of).collect();
        let values = values.filter(|values| values.len() == table.columns.len());
        let values = values.ok_or_else(|| BackupError::Damaged {
            path: table_path(folder, &table.name),
            reason: "a row is not what this program wrote".to_owned(),
        })?;
        tx.execute(&sql, &values)?;
        Ok(())
    })?;
    Ok(tx.count_on(&table.name)?)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work);
    done.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
