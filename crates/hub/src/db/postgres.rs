//! The PostgreSQL driver: a few connections, opened again when the server comes back.
//!
//! A transaction that writes holds an advisory lock: those of all hubs over one database take turns,
//! as they do within one hub.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::runtime::Handle;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Config, NoTls, Statement};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::value::{Cell, Value};
use super::{BUSY_TIMEOUT, DbError};

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one statement may take.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// How soon the server notices that a hub has died in the middle of a statement (from version 14 on).
const NOTICE_DEATH: Duration = Duration::from_secs(1);
/// How long a transaction that writes may rest between two statements before the server ends it:
/// other hubs wait for it.
const WRITER_RESTS: Duration = Duration::from_secs(10);
/// The advisory lock of whoever writes: `slmops` in ASCII.
const HUB_LOCK: i64 = 0x736c_6d6f_7073;

/// Where a PostgreSQL database is, and as whom to use it. Never shows the password.
#[derive(Clone)]
pub struct Postgres {
    config: Config,
    tls: Option<MakeRustlsConnect>,
    /// Says which hub made a change.
    origin: String,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_string())
    }
}

impl fmt::Display for Postgres {
    /// Host and database, for logs and messages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            Some(Host::Unix(path)) => path.display().to_string(),
            None => String::new(),
        };
        write!(f, "{} on {host}", self.config.get_dbname().unwrap_or("postgres"))
    }
}

impl Postgres {
    /// Reads `postgres://USER@HOST:PORT/DATABASE`. A password in the URL is refused: command lines
    /// are for everyone to see. Hosts other than this machine are talked to by TLS, checked against
    /// the certificates in the PEM file that `sslrootcert` names; `sslmode=disable` switches it off.
    ///
    /// # Errors
    /// [`DbError::Url`].
    pub fn parse(url: &str, password: Option<&str>) -> Result<Self, DbError> {
        let refused = |reason: String| DbError::Url { reason };
        let (url, root_certificate) = take_parameter(url, "sslrootcert");
        if !(url.starts_with("postgres://") || url.starts_with("postgresql://")) {
            return Err(refused("it does not start with `postgres://`".to_owned()));
        }
        // The library's own words name what is wrong and never repeat the URL.
        let mut config: Config =
            url.parse().map_err(|error: tokio_postgres::Error| refused(words(&error)))?;
        if config.get_password().is_some() {
            return Err(refused(
                "it carries a password, which every user of this machine could read".to_owned(),
            ));
        }
        if let Some(password) = password {
            config.password(password);
        }
        if config.get_hosts().is_empty() {
            return Err(refused("it names no host".to_owned()));
        }
        config.application_name("slm hub").connect_timeout(CONNECT_TIMEOUT);
        let local = config.get_hosts().iter().all(is_local);
        let tls = match (config.get_ssl_mode(), root_certificate) {
            (SslMode::Disable, _) => None,
            (_, None) if local => {
                config.ssl_mode(SslMode::Disable);
                None
            }
            (_, None) => {
                return Err(refused(
                    "its server is another machine, and nothing says which certificate to trust"
                        .to_owned(),
                ));
            }
            (_, Some(path)) => {
                config.ssl_mode(SslMode::Require);
                Some(MakeRustlsConnect::new(client_config(Path::new(&path))?))
            }
        };
        let origin = hex::encode(rand::random::<[u8; 8]>());
        Ok(Self { config, tls, origin })
    }

    /// Who this hub is to others over the same database: another one at each start.
    pub(super) fn origin(&self) -> &str {
        &self.origin
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn tls(&self) -> Option<&MakeRustlsConnect> {
        self.tls.as_ref()
    }

    /// Opens a connection.
    pub(super) fn connect(&self, handle: &Handle) -> Result<Connection, DbError> {
        let client = handle.block_on(async {
            let connecting = async {
                match &self.tls {
                    None => {
                        let (client, connection) = self.config.connect(NoTls).await?;
                        tokio::spawn(connection);
                        Ok(client)
                    }
                    Some(tls) => {
                        let (client, connection) = self.config.connect(tls.clone()).await?;
                        tokio::spawn(connection);
                        Ok(client)
                    }
                }
            };
            bounded(CONNECT_TIMEOUT, connecting).await
        })?;
        let statements = RefCell::default();
        let connection = Connection { client, handle: handle.clone(), statements };
        connection.batch(&format!(
            "SET statement_timeout = {0}; SET idle_in_transaction_session_timeout = {0};
             SET lock_timeout = {1}; SET client_min_messages = warning;
             SELECT set_config(name, '{2}', false) FROM pg_settings
                 WHERE name = 'client_connection_check_interval';
             SELECT set_config('slm.origin', '{3}', false);",
            STATEMENT_TIMEOUT.as_millis(),
            BUSY_TIMEOUT.as_millis(),
            NOTICE_DEATH.as_millis(),
            self.origin,
        ))?;
        Ok(connection)
    }
}

fn is_local(host: &Host) -> bool {
    match host {
        Host::Unix(_) => true,
        Host::Tcp(name) => {
            name == "localhost"
                || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
        }
    }
}

/// Takes one parameter out of a URL's query.
fn take_parameter(url: &str, name: &str) -> (String, Option<String>) {
    let Some((base, query)) = url.split_once('?') else { return (url.to_owned(), None) };
    let (mut rest, mut value) = (Vec::new(), None);
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some((key, given)) if key == name => value = Some(given.to_owned()),
            _ => rest.push(pair),
        }
    }
    match rest.is_empty() {
        true => (base.to_owned(), value),
        false => (format!("{base}?{}", rest.join("&")), value),
    }
}

fn client_config(path: &Path) -> Result<ClientConfig, DbError> {
    let refused = |reason: String| DbError::Url {
        reason: format!("sslrootcert {}: {reason}", path.display()),
    };
    let mut roots = RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(path).map_err(|error| refused(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| refused(error.to_string()))?;
        roots.add(certificate).map_err(|error| refused(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(refused("there is no certificate in it".to_owned()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| refused(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// A connection, used from threads for blocking work only.
pub(super) struct Connection {
    client: Client,
    handle: Handle,
    statements: RefCell<HashMap<String, Statement>>,
}

impl Connection {
    /// Whether nothing can be asked of it any more.
    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Begins a transaction: one that may write, when it is its turn, or one snapshot to read.
    pub(super) fn begin(&self, writes: bool) -> Result<(), DbError> {
        if !writes {
            return self.batch("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
        }
        let begun = self.batch(&format!(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
             SET LOCAL idle_in_transaction_session_timeout = {};
             SELECT pg_advisory_xact_lock({HUB_LOCK})",
            WRITER_RESTS.as_millis(),
        ));
        if begun.is_err() && !self.is_closed() {
            // It waited for too long; what was begun must end.
            self.end(false)?;
        }
        begun
    }

    /// Ends the transaction.
    pub(super) fn end(&self, commit: bool) -> Result<(), DbError> {
        self.batch(if commit { "COMMIT" } else { "ROLLBACK" })
    }

    /// Runs several statements without parameters.
    pub(super) fn batch(&self, sql: &str) -> Result<(), DbError> {
        self.wait(self.client.batch_execute(sql))
    }

    pub(super) fn execute(&self, sql: &str, params: &[Value<'_>]) -> Result<usize, DbError> {
        let statement = self.prepare(sql)?;
        let params = borrowed(params)?;
        let changed = self.wait(self.client.execute(&statement, &params))?;
        Ok(usize::try_from(changed).unwrap_or(usize::MAX))
    }

    pub(super) fn query(
        &self,
        sql: &str,
        params: &[Value<'_>],
    ) -> Result<Vec<tokio_postgres::Row>, DbError> {
        let statement = self.prepare(sql)?;
        let params = borrowed(params)?;
        self.wait(self.client.query(&statement, &params))
    }

    fn prepare(&self, sql: &str) -> Result<Statement, DbError> {
        if let Some(known) = self.statements.borrow().get(sql) {
            return Ok(known.clone());
        }
        let statement = self.wait(self.client.prepare(&numbered(sql)))?;
        self.statements.borrow_mut().insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    fn wait<T>(
        &self,
        asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, DbError> {
        // Longer than the server's own limit, for a server that does not answer at all.
        self.handle.block_on(bounded(STATEMENT_TIMEOUT + CONNECT_TIMEOUT, asked))
    }
}

async fn bounded<T>(
    limit: Duration,
    asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, DbError> {
    match tokio::time::timeout(limit, asked).await {
        Ok(result) => Ok(result?),
        Err(source) => Err(DbError::Silent { seconds: limit.as_secs(), source }),
    }
}

/// `?1` as PostgreSQL writes it: `$1`.
fn numbered(sql: &str) -> String {
    let mut text = String::with_capacity(sql.len());
    let mut rest = sql.chars().peekable();
    while let Some(letter) = rest.next() {
        let parameter = letter == '?' && rest.peek().is_some_and(char::is_ascii_digit);
        text.push(if parameter { '$' } else { letter });
    }
    text
}

/// Definitions of tables as PostgreSQL writes them. Text is compared byte by byte, as in SQLite, so
/// that pages come in the same order everywhere.
pub(super) fn definitions(sql: &str) -> String {
    const WORDS: [(&str, &str); 7] = [
        (" STRICT, WITHOUT ROWID", ""),
        (" STRICT", ""),
        ("INTEGER PRIMARY KEY AUTOINCREMENT", "IDENTITY"),
        ("INTEGER PRIMARY KEY", "IDENTITY"),
        ("IDENTITY", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"),
        (" INTEGER", " BIGINT"),
        (" BLOB", " BYTEA"),
    ];
    let mut text = sql.replace(" TEXT", " TEXT COLLATE \"C\"");
    for (ours, theirs) in WORDS {
        text = text.replace(ours, theirs);
    }
    text
}

/// Gives every foreign key another moment to be checked.
pub(super) fn foreign_keys(moment: &str) -> String {
    format!(
        "DO $$ DECLARE key record; BEGIN
             FOR key IN SELECT conrelid::regclass AS owner, conname FROM pg_constraint
                 WHERE contype = 'f' AND connamespace = current_schema()::regnamespace
             LOOP
                 EXECUTE format('ALTER TABLE %s ALTER CONSTRAINT %I {moment}', key.owner, key.conname);
             END LOOP;
         END $$"
    )
}

fn borrowed<'v>(params: &'v [Value<'v>]) -> Result<Vec<&'v (dyn ToSql + Sync)>, DbError> {
    let mut found: Vec<&(dyn ToSql + Sync)> = Vec::with_capacity(params.len());
    for value in params {
        if matches!(value, Value::Text(text) if text.contains('\0')) {
            return Err(DbError::ZeroByte);
        }
        found.push(value);
    }
    Ok(found)
}

impl ToSql for Value<'_> {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self {
            Self::Null => Ok(IsNull::Yes),
            Self::Integer(number) if *ty == Type::BOOL => (*number != 0).to_sql(ty, out),
            Self::Integer(number) if *ty == Type::INT4 => i32::try_from(*number)?.to_sql(ty, out),
            Self::Integer(number) if *ty == Type::INT8 => number.to_sql(ty, out),
            Self::Text(text) if <&str as ToSql>::accepts(ty) => text.as_ref().to_sql(ty, out),
            Self::Bytes(bytes) if *ty == Type::BYTEA => bytes.as_ref().to_sql(ty, out),
            other => Err(format!("{other:?} where {ty} is wanted").into()),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    to_sql_checked!();
}

/// One column of a row.
pub(super) fn cell(row: &tokio_postgres::Row, index: usize) -> Result<Cell, DbError> {
    let column = row.columns().get(index);
    let column = column.ok_or_else(|| DbError::Column { index, source: "is missing".into() })?;
    let ty = column.type_();
    let cell = if *ty == Type::INT8 {
        row.try_get::<_, Option<i64>>(index)?.map(Cell::Integer)
    } else if *ty == Type::INT4 {
        row.try_get::<_, Option<i32>>(index)?.map(|number| Cell::Integer(number.into()))
    } else if *ty == Type::BOOL {
        row.try_get::<_, Option<bool>>(index)?.map(|truth| Cell::Integer(truth.into()))
    } else if *ty == Type::BYTEA {
        row.try_get::<_, Option<Vec<u8>>>(index)?.map(Cell::Bytes)
    } else {
        row.try_get::<_, Option<String>>(index)?.map(Cell::Text)
    };
    Ok(cell.unwrap_or(Cell::Null))
}

/// What an error says, with the server's own words where it has some.
pub(super) fn words(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(told), _) => format!("{} ({})", told.message(), told.code().code()),
        (None, Some(source)) => source.to_string(),
        (None, None) => error.to_string(),
    }
}

impl From<tokio_postgres::Error> for DbError {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(code) = error.code() else {
            if is_untrusted(&error) {
                return Self::Untrusted(error);
            }
            return match error.is_closed() || reaches_no_server(&error) {
                true => Self::Unreachable(error),
                false => Self::Postgres(error),
            };
        };
        match code.code() {
            "53100" => Self::DiskFull,
            "25006" => Self::ReadOnly,
            "55P03" | "57014" | "40001" | "40P01" => Self::Busy,
            // Shutting down, crashed, or not yet up; connections cut or used up.
            "57P01" | "57P02" | "57P03" | "53300" | "25P03" => Self::Unreachable(error),
            code if code.starts_with("08") => Self::Unreachable(error),
            // Wrong user, password or database, or no right to use it from here.
            "28000" | "28P01" | "3D000" | "42501" => Self::Refused(error),
            _ => Self::Postgres(error),
        }
    }
}

/// Whether the server is there, but cannot show that it is the one that was meant.
fn is_untrusted(error: &tokio_postgres::Error) -> bool {
    let source = std::error::Error::source(error);
    let io = source.and_then(|source| source.downcast_ref::<std::io::Error>());
    let tls = io.and_then(|io| io.get_ref()?.downcast_ref::<rustls::Error>());
    matches!(tls, Some(rustls::Error::InvalidCertificate(_)))
}

fn reaches_no_server(error: &tokio_postgres::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<std::io::Error>())
}

/// Whether a constraint of the tables refused a change: SQLSTATE class 23.
pub(super) fn is_constraint(error: &tokio_postgres::Error) -> bool {
    error.code().map(SqlState::code).is_some_and(|code| code.starts_with("23"))
}
