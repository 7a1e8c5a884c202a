//! Starting and stopping the hub.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use std::{fs, io};

use axum::Router;
use axum_server::Handle;
use axum_server::accept::NoDelayAcceptor;
use axum_server::tls_rustls::RustlsConfig;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use slmops_api::DeviceId;
use slmops_api::audit::{Role, Token};
use slmops_api::model::DeviceClass;
use slmops_artifact::Digest;
use tokio::net::TcpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::auth::{
    Auth, AuthError, HubSecret, LookupError, Operator, Principals, SecretHash, new_operator_token,
};
use crate::blobs::{BlobError, Blobs, S3};
use crate::db::{Database, DbError, FolderLock, Postgres, Schema, Tx, params};
use crate::deltas::{Encode, Maker};
use crate::durable;
use crate::engine::Engine;
use crate::events::{Board, Events, Place};
use crate::neighbours::Neighbours;
use crate::registry::{self, Registry, RegistryError};
use crate::replicas::{self, Lead, Replica};
use crate::routes::{self, AppState, Metrics, Shared};
use crate::store::{By, SCHEMA, SqlStore, Store, StoreError, record_registry};
use crate::telemetry::{self, Keep};
use crate::tls::{CA_CERTIFICATE_FILE, Tls, TlsError};
use crate::webhooks::Dispatcher;

/// The file of the first administrator's token in the data folder (mode 0600).
pub const ADMIN_TOKEN_FILE: &str = "admin.token";
/// The file of the secret behind device tokens in the data folder (mode 0600).
const HUB_SECRET_FILE: &str = "hub.secret";
/// The folder of the hub's authority in the data folder.
const TLS_FOLDER: &str = "tls";
/// The folder of deltas that are being made.
const DELTA_FOLDER: &str = "deltas";
/// The files of the data folder that make a hub the same hub elsewhere; the first is always there.
pub(crate) const SECRET_FILES: [&str; 4] =
    [HUB_SECRET_FILE, "tls/ca.key", "tls/ca.pem", ADMIN_TOKEN_FILE];
/// The longest admin token file, in bytes.
const MAX_TOKEN_FILE_BYTES: u64 = 256;
/// How long open requests may take to end when the hub is stopped.
const GRACE: Duration = Duration::from_secs(3);
/// Connections that may wait to be accepted; the kernel's own bound (`somaxconn`) holds besides.
const MAX_PENDING_CONNECTIONS: u32 = 4096;
/// Classes of a fleet that has none: name, least memory budget, quantisation, description.
const DEFAULT_CLASSES: [(&str, u64, &str, &str); 3] = [
    ("large", 288 << 20, "Q8_0", "devices with room for the best variant"),
    ("medium", 240 << 20, "Q4_K_M", "devices with room for a good variant"),
    ("small", 0, "Q3_K_M", "devices that need the smallest variant"),
];

/// How the hub is started.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Where everything is kept; made if absent.
    pub data_dir: PathBuf,
    /// Where the tables are, if not in a SQLite file in `data_dir`.
    pub database: Option<Postgres>,
    /// Where blobs are, if not in files in `data_dir`.
    pub blobs: Option<S3>,
    /// Where HTTPS answers; none for plain HTTP alone.
    pub listen: Option<SocketAddr>,
    /// Where plain HTTP answers; loopback addresses only.
    pub http: Option<SocketAddr>,
    /// Host names and addresses for the certificate, besides those of `listen` and loopback.
    pub names: Vec<String>,
    /// The URL that invitations name; `https://` and the listening address if absent.
    pub public_url: Option<String>,
    /// How long telemetry is kept.
    pub keep: Keep,
    /// What makes deltas.
    pub encode: Encode,
}

/// Why the hub does not start.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Nothing to listen on.
    #[error("the hub has no address to listen on\nhint: give --listen, --http, or both")]
    NoAddress,
    /// Plain HTTP on an address that others can reach.
    #[error(
        "plain HTTP on {0} could be read by others on the network\nhint: plain HTTP is for loopback addresses such as 127.0.0.1; use HTTPS (--listen) for others"
    )]
    PlainHttp(SocketAddr),
    /// The address is in use or not this machine's.
    #[error(
        "listen on {address}: {source}\nhint: another program may use the port; choose another one, or port 0 for any free one"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// A file of the data folder cannot be read or written.
    #[error("{}: {source}\nhint: check the owner and mode of the data folder", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The database cannot be used.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store of blobs cannot be used.
    #[error(transparent)]
    Blobs(#[from] BlobError),
    /// The registry cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The certificate authority cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The secret behind device tokens cannot be used.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// Other hubs over the same database keep their blobs elsewhere.
    #[error(
        "another hub over this database keeps its blobs in {there}, this one in {here}\nhint: hubs over one database need one store of blobs: start each with the same --blobs s3://BUCKET/PREFIX"
    )]
    OtherBlobs {
        /// Where this hub does.
        here: String,
        /// Where the other one does.
        there: String,
    },
    /// The data folder belongs to a hub over another database.
    #[error(
        "{} is another one than that of the hubs over this database\nhint: give this hub a data folder of its own: it gets the secrets from the database", path.display()
    )]
    OtherSecrets {
        /// The file that differs.
        path: PathBuf,
    },
    /// A listener ended.
    #[error("serve {address}: {source}")]
    Serve {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
}

/// The hub.
pub struct Hub;

/// A started hub. It runs until [`RunningHub::stop`]; dropping it stops it without waiting.
pub struct RunningHub {
    /// Where HTTPS answers.
    pub https: Option<SocketAddr>,
    /// Where plain HTTP answers.
    pub http: Option<SocketAddr>,
    /// The URL that invitations name.
    pub url: String,
    /// The certificate of the hub's authority, for clients.
    pub ca_file: PathBuf,
    /// The digest of that certificate, which invitations pin.
    pub ca: Digest,
    /// The first administrator's token.
    pub admin_token_file: PathBuf,
    /// Whether this start made the data folder's content.
    pub first_start: bool,
    /// What this hub is called among several over one database.
    pub replica: Option<String>,
    handles: Vec<Handle<SocketAddr>>,
    listeners: Vec<JoinHandle<Result<(), HubError>>>,
    tasks: Vec<JoinHandle<()>>,
    stop: watch::Sender<bool>,
    /// The folder's, where the database is elsewhere and does not hold it.
    _lock: Option<FolderLock>,
}

impl Hub {
    /// Starts a hub on `config.data_dir`: opens (or makes) the database, the certificate authority
    /// and the administrator's token, then listens. When this returns, requests are answered.
    ///
    /// # Errors
    /// [`HubError`]; nothing listens then.
    pub async fn start(config: HubConfig) -> Result<RunningHub, HubError> {
        if let Some(address) = config.http
            && !address.ip().to_canonical().is_loopback()
        {
            return Err(HubError::PlainHttp(address));
        }
        if config.listen.is_none() && config.http.is_none() {
            return Err(HubError::NoAddress);
        }
        let folder = config.data_dir.clone();
        durable::create_private_folder(&folder)
            .map_err(|source| HubError::File { path: folder.clone(), source })?;
        let (opened, server) = (folder.clone(), config.database.clone());
        let open = move || match server {
            None => open_database(&opened, None, &[SCHEMA, registry::SCHEMA]),
            server => {
                let schemas = [SCHEMA, registry::SCHEMA, replicas::SCHEMA];
                open_database(&opened, server, &schemas)
            }
        };
        let (db, lock) =
            tokio::task::spawn_blocking(open).await.map_err(|_| DbError::Panicked)??;
        let store: Arc<dyn Store> = Arc::new(SqlStore::new(db.clone()));
        let mut names = config.names.clone();
        let listens = config.listen.map(|address| address.ip());
        names.extend(listens.filter(|ip| !ip.is_unspecified()).map(|ip| ip.to_string()));
        let replica = match db.feed().await? {
            None => None,
            Some(feed) => {
                let blobs = match &config.blobs {
                    Some(place) => place.to_string(),
                    None => Blobs::open(&folder)?.identity()?,
                };
                let (at, names) = (folder.clone(), names.clone());
                let make = move |tx: &Tx<'_>| make_secrets(tx, &at, &names);
                let joined = Replica::join(&db, &feed, blobs, &folder, make).await?;
                Some((joined, feed))
            }
        };
        let first_start = first_start(&store, &folder).await?;
        let tls = Tls::open(&folder.join(TLS_FOLDER), &names)?;
        let secret = HubSecret::load_or_create(&folder.join(HUB_SECRET_FILE))?;
        let board = Board::default();
        let events = Events::default();
        let lead = match &replica {
            None => watch::channel(Lead::Alone).1,
            Some((replica, _)) => replica.lead(),
        };
        let heard = replica.as_ref().map(|(_, feed)| feed.heard());
        let (engine, planner) =
            Engine::new(Arc::clone(&store), board.clone(), events.clone(), lead, heard);
        let planner = planner.load().await?;
        let principals = Known { store: Arc::clone(&store), board: board.clone() };
        let auth = Auth::new(secret, Arc::new(principals));
        let blobs = match &config.blobs {
            None => Blobs::open(&folder)?,
            Some(place) => Blobs::open_s3(place, &blob_owner(tls.ca_digest()), &folder).await?,
        };
        let audit: registry::OnChange = Arc::new(|tx, change| Ok(record_registry(tx, change)?));
        let registry = Registry::with_observer(db, blobs, auth.clone(), Some(audit));
        registry.sweep().await?;
        let state = AppState::new(Shared {
            store: Arc::clone(&store),
            auth,
            board: board.clone(),
            events: events.clone(),
            engine: engine.clone(),
            packages: Arc::new(registry.clone()),
            metrics: Metrics::default(),
            ca: tls.ca_digest(),
            url: OnceLock::new(),
            neighbours: Neighbours::default(),
            delta_wanted: Arc::default(),
        });
        let delta_folder = folder.join(DELTA_FOLDER);
        // What a kill left behind there is of no use.
        let file = |source| HubError::File { path: delta_folder.clone(), source };
        match fs::remove_dir_all(&delta_folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file(error)),
            _ => fs::create_dir(&delta_folder).map_err(file)?,
        }
        let maker = Maker {
            store: Arc::clone(&store),
            engine: engine.clone(),
            registry: registry.clone(),
            events: events.clone(),
            wake: Arc::clone(&state.delta_wanted),
            encode: config.encode,
            folder: delta_folder,
        };
        let app = app(&state, registry);

        let bind = |address: SocketAddr| {
            bind(address).map_err(|source| HubError::Listen { address, source })
        };
        let secure = config.listen.map(bind).transpose()?;
        let plain = config.http.map(bind).transpose()?;
        let local = |listener: &Option<TcpListener>| {
            listener.as_ref().and_then(|listener| listener.local_addr().ok())
        };
        let (https, http) = (local(&secure), local(&plain));
        let url = config.public_url.clone().unwrap_or_else(|| own_url(https, http, &tls));
        // Set once, here, before anyone can ask.
        let _ = state.url.set(url.clone());

        let mut handles = Vec::new();
        let mut listeners = Vec::new();
        if let (Some(listener), Some(address)) = (secure, https) {
            let handle = Handle::new();
            let rustls = RustlsConfig::from_config(tls.server_config()?);
            let server = axum_server::from_tcp_rustls(listener, rustls)
                .map_err(|source| HubError::Listen { address, source })?
                .map(|acceptor| acceptor.acceptor(NoDelayAcceptor::new()))
                .handle(handle.clone());
            let service = app.clone().into_make_service_with_connect_info::<SocketAddr>();
            listeners.push(tokio::spawn(async move {
                server.serve(service).await.map_err(|source| HubError::Serve { address, source })
            }));
            handles.push(handle);
        }
        if let (Some(listener), Some(address)) = (plain, http) {
            let handle = Handle::new();
            let server = axum_server::from_tcp(listener)
                .map_err(|source| HubError::Listen { address, source })?
                .acceptor(NoDelayAcceptor::new())
                .handle(handle.clone());
            let service = app.into_make_service_with_connect_info::<SocketAddr>();
            listeners.push(tokio::spawn(async move {
                server.serve(service).await.map_err(|source| HubError::Serve { address, source })
            }));
            handles.push(handle);
        }
        let (stop, stopped) = watch::channel(false);
        let webhooks = Dispatcher {
            store: Arc::clone(&state.store),
            events: state.events.clone(),
            source: url.clone(),
        };
        let mut tasks = vec![
            tokio::spawn(planner.run(stopped.clone())),
            tokio::spawn(webhooks.run(stopped.clone())),
            tokio::spawn(telemetry::tidy(Arc::clone(&store), config.keep, stopped.clone())),
            tokio::spawn(maker.run(stopped.clone())),
        ];
        let mut id = None;
        if let Some((replica, feed)) = replica {
            id = Some(replica.id().to_owned());
            tasks.push(tokio::spawn(replica.keep(stopped.clone())));
            let follow = replicas::follow(feed, store, engine, board, events, stopped);
            tasks.push(tokio::spawn(follow));
        }
        tracing::info!(?https, ?http, data = %folder.display(), "hub started");
        Ok(RunningHub {
            https,
            http,
            url,
            ca_file: folder.join(TLS_FOLDER).join(CA_CERTIFICATE_FILE),
            ca: tls.ca_digest(),
            admin_token_file: folder.join(ADMIN_TOKEN_FILE),
            first_start,
            replica: id,
            handles,
            listeners,
            tasks,
            stop,
            _lock: lock,
        })
    }
}

/// Opens the database, and takes the lock of the data folder, in which there are secrets at least.
pub(crate) fn open_database(
    folder: &Path,
    server: Option<Postgres>,
    schemas: &[Schema],
) -> Result<(Database, Option<FolderLock>), DbError> {
    match server {
        None => Ok((Database::open(folder, schemas)?, None)),
        Some(server) => {
            let lock = FolderLock::acquire(folder)?;
            Ok((Database::open_postgres(server, schemas)?, Some(lock)))
        }
    }
}

/// The mark on a store of blobs that others could use as well.
pub(crate) fn blob_owner(ca: Digest) -> String {
    format!("CA {ca}")
}

/// Listens, with room for the connections of a fleet that reconnects at once.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(MAX_PENDING_CONNECTIONS)?.into_std()
}

fn app(state: &AppState, registry: Registry) -> Router {
    routes::router(state.clone())
        .merge(crate::dashboard::router())
        .merge(registry::router(registry))
}

impl RunningHub {
    /// The administrator's token.
    ///
    /// # Errors
    /// [`HubError::File`] if its file was taken away.
    pub fn admin_token(&self) -> Result<String, HubError> {
        read_token(&self.admin_token_file)
            .map_err(|source| HubError::File { path: self.admin_token_file.clone(), source })
    }

    /// Runs until a listener fails. Cancellation safe.
    ///
    /// # Errors
    /// What the listener says.
    pub async fn wait(&mut self) -> Result<(), HubError> {
        let (result, index, _) = futures_util::future::select_all(&mut self.listeners).await;
        drop(self.listeners.remove(index));
        result.unwrap_or(Ok(()))
    }

    /// Stops listening, lets open requests end (a few seconds at most), and lets go of the folder.
    pub async fn stop(mut self) {
        for handle in &self.handles {
            handle.graceful_shutdown(Some(GRACE));
        }
        for listener in self.listeners.drain(..) {
            // It ends because it was told to; there is nobody left to tell an error.
            let _ = listener.await;
        }
        let _ = self.stop.send(true);
        for task in self.tasks.drain(..) {
            let _ = task.await;
        }
    }
}

impl Drop for RunningHub {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        for handle in &self.handles {
            handle.shutdown();
        }
    }
}

/// The URL by which devices reach this hub, as far as it knows itself.
fn own_url(https: Option<SocketAddr>, http: Option<SocketAddr>, tls: &Tls) -> String {
    let (scheme, address) = match (https, http) {
        (Some(address), _) => ("https", address),
        (None, Some(address)) => ("http", address),
        (None, None) => return String::new(),
    };
    let host = match address.ip() {
        ip if !ip.is_unspecified() => match ip {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        },
        // Every interface: the main address is in the certificate.
        _ => {
            let names = tls.names().iter().filter_map(|name| name.parse::<IpAddr>().ok());
            let main = names.filter(|ip| !ip.is_loopback()).find(IpAddr::is_ipv4);
            main.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)).to_string()
        }
    };
    format!("{scheme}://{host}:{}", address.port())
}

fn read_token(path: &Path) -> io::Result<String> {
    let bytes = durable::read_secret(path, MAX_TOKEN_FILE_BYTES)?;
    let text = String::from_utf8(bytes).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(text.trim().to_owned())
}

/// The administrator's token in the data folder; made if there is none.
fn open_token(folder: &Path) -> Result<String, HubError> {
    let path = folder.join(ADMIN_TOKEN_FILE);
    let failed = |source| HubError::File { path: path.clone(), source };
    match read_token(&path) {
        Ok(secret) if !secret.is_empty() => Ok(secret),
        Ok(_) => Err(failed(io::ErrorKind::InvalidData.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = new_operator_token();
            let line = format!("{}\n", secret.expose());
            durable::write_secret(&path, line.as_bytes()).map_err(failed)?;
            Ok(secret.expose().to_owned())
        }
        Err(error) => Err(failed(error)),
    }
}

/// Makes what is missing of the secrets that hubs over one database share.
fn make_secrets(tx: &Tx<'_>, folder: &Path, names: &[String]) -> Result<(), HubError> {
    Tls::open(&folder.join(TLS_FOLDER), names)?;
    HubSecret::load_or_create(&folder.join(HUB_SECRET_FILE))?;
    // Where there are tokens already, an administrator may have taken the first one away.
    if !tx.exists("SELECT 1 FROM tokens", params![])? {
        open_token(folder)?;
    }
    Ok(())
}

/// Makes the administrator's token and the default classes where there is no token yet. The file is
/// written first: a crash in between leaves a token that is taken up the next time.
async fn first_start(store: &Arc<dyn Store>, folder: &Path) -> Result<bool, HubError> {
    if !store.tokens().await?.is_empty() {
        return Ok(false);
    }
    let secret = open_token(folder)?;
    let now = Timestamp::now();
    if store.classes().await?.is_empty() {
        for (name, min_memory_bytes, quantisation, description) in DEFAULT_CLASSES {
            let class = DeviceClass {
                name: name.parse().expect("a constant name is a name"),
                description: description.to_owned(),
                min_memory_bytes,
                quantisation: quantisation.to_owned(),
            };
            store.put_class(By::hub(now), class).await?;
        }
    }
    let token = Token {
        id: "t-first".parse().expect("a constant id is an id"),
        name: "first administrator".to_owned(),
        role: Role::Admin,
        created_at: now,
        expires_at: None,
    };
    match store.add_token(By::hub(now), token, SecretHash::of(&secret)).await {
        Ok(()) => Ok(true),
        // Another hub that starts at the same time was faster.
        Err(StoreError::Db(error)) if error.is_constraint() => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Who may call, from the store and the board.
struct Known {
    store: Arc<dyn Store>,
    board: Board,
}

impl Principals for Known {
    fn operator(&self, hash: SecretHash) -> BoxFuture<'_, Result<Option<Operator>, LookupError>> {
        Box::pin(async move {
            let found = self.store.token(hash).await?;
            let now = Timestamp::now();
            let valid = found.filter(|token| token.expires_at.is_none_or(|at| at > now));
            Ok(valid.map(|token| Operator { name: token.name, role: token.role }))
        })
    }

    fn device(&self, device: &DeviceId) -> Option<Arc<Place>> {
        self.board.place(device)
    }

    fn find_device(
        &self,
        device: DeviceId,
    ) -> BoxFuture<'_, Result<Option<Arc<Place>>, LookupError>> {
        Box::pin(async move {
            // It may have joined by another hub a moment ago.
            match self.store.device(device.to_string()).await {
                Ok(found) => Ok(Some(self.board.put(&found))),
                Err(StoreError::NotFound { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }
}
