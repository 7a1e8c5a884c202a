//! `slm up`.

use std::net::SocketAddr;
use std::path::PathBuf;

use futures_util::future::BoxFuture;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;
use serde_json::Value;
use slmops_hub::backup::Place;
use slmops_hub::blobs::S3;
use slmops_hub::db::Postgres;
use slmops_hub::deltas::DeltaFiles;
use slmops_hub::telemetry::Keep;
use slmops_hub::{Hub as HubServer, HubConfig, RunningHub};
use slmops_inference::child::{self, Job};
use tokio::signal::unix::{SignalKind, signal};

use super::{Session, key};
use crate::client::Hub;
use crate::error::{Context as _, Failure, Result};
use crate::home::{Context, DEFAULT_KEY};
use crate::units;

/// Run the hub.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Run the hub in the foreground until Ctrl-C: control plane, model registry and \
                  dashboard. On the first start it makes its own certificate authority, an admin \
                  token and a publisher key, and notes in SLM_HOME how to reach it, so that the \
                  other commands of this user find it.",
    after_help = "Examples:\n  $ slm up\n  $ slm up --data /var/lib/slm --listen 0.0.0.0:8443 --public-url https://hub.example:8443"
)]
pub struct Up {
    #[command(flatten)]
    pub storage: Storage,
    /// Where HTTPS answers, for devices and operators; port 0 takes a free one
    #[arg(
        long,
        default_value = "127.0.0.1:8443",
        value_name = "ADDRESS",
        env = "SLM_LISTEN",
        hide_env_values = true
    )]
    pub listen: SocketAddr,
    /// Where plain HTTP answers, for a browser on this machine; loopback addresses only
    #[arg(
        long,
        default_value = "127.0.0.1:8442",
        value_name = "ADDRESS",
        env = "SLM_HTTP",
        hide_env_values = true
    )]
    pub http: SocketAddr,
    /// The URL under which devices reach the hub [default: https:// and the listening address]
    #[arg(long, value_name = "URL", env = "SLM_PUBLIC_URL", hide_env_values = true)]
    pub public_url: Option<String>,
    /// How long what devices count is kept by hour; then it is added up by day
    #[arg(
        long,
        value_name = "TIME",
        value_parser = units::parse_seconds,
        default_value = "14d",
        env = "SLM_TELEMETRY_HOURS",
        hide_env_values = true
    )]
    pub telemetry_hours: u64,
    /// How long it is kept by day
    #[arg(
        long,
        value_name = "TIME",
        value_parser = units::parse_seconds,
        default_value = "400d",
        env = "SLM_TELEMETRY_DAYS",
        hide_env_values = true
    )]
    pub telemetry_days: u64,
}

/// Where a hub keeps what it has.
#[derive(Debug, clap::Args)]
pub struct Storage {
    /// Where the hub keeps everything [default: SLM_HOME/hub]
    #[arg(long, value_name = "DIR", env = "SLM_DATA", hide_env_values = true)]
    data: Option<PathBuf>,
    /// Keep the tables in PostgreSQL: postgres://USER@HOST/DATABASE; see docs/configuration.md
    #[arg(long, value_name = "URL", env = "SLM_DATABASE", hide_env_values = true)]
    database: Option<String>,
    /// Keep blobs in an S3-compatible store: s3://BUCKET/PREFIX; see docs/configuration.md
    #[arg(long, value_name = "URL", env = "SLM_BLOBS", hide_env_values = true)]
    blobs: Option<String>,
}

impl Storage {
    /// What the options and the environment say.
    pub(super) fn place(&self, session: &Session) -> Result<Place> {
        let data = self.data.clone().unwrap_or_else(|| session.home.hub_data());
        let data_dir =
            std::path::absolute(&data).user(|| format!("find the folder `{}`", data.display()))?;
        Ok(Place {
            data_dir,
            database: self.database.as_deref().map(database).transpose()?,
            blobs: self.blobs.as_deref().map(blobs).transpose()?,
        })
    }
}

/// Where the tables are, with a password that no other user of this machine can read.
fn database(url: &str) -> Result<Postgres> {
    let password = match std::env::var("PGPASSWORD") {
        Ok(password) => Some(password),
        Err(_) => read_named("SLM_DATABASE_PASSWORD_FILE")?,
    };
    Postgres::parse(url, password.as_deref()).user(|| "use --database".to_owned())
}

/// Where blobs are, with a secret that no other user of this machine can read.
fn blobs(url: &str) -> Result<S3> {
    let mut settings: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    if let Some(secret) = read_named("SLM_BLOBS_SECRET_FILE")? {
        settings.push(("AWS_SECRET_ACCESS_KEY".to_owned(), secret));
    }
    let ca = read_named("SLM_BLOBS_CA")?;
    S3::parse(url, settings, ca.as_deref().map(str::as_bytes)).user(|| "use --blobs".to_owned())
}

/// The text of the file that an environment variable names, without its last line's end.
fn read_named(variable: &str) -> Result<Option<String>> {
    let Some(path) = std::env::var_os(variable) else { return Ok(None) };
    let text = std::fs::read_to_string(&path)
        .user(|| format!("read `{}`, which {variable} names", PathBuf::from(&path).display()))?;
    Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
}

/// What is said when the hub is ready.
#[derive(Serialize)]
struct Ready {
    /// For a browser on this machine; the part after `#` logs it in and is never sent.
    dashboard: String,
    /// For devices and operators.
    url: String,
    /// The certificate of the hub's authority.
    ca: PathBuf,
    /// Where everything is kept.
    data: PathBuf,
    first_start: bool,
}

impl Up {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        raise_open_files();
        let place = self.storage.place(session)?;
        let data = place.data_dir.clone();
        let config = HubConfig {
            data_dir: place.data_dir,
            database: place.database,
            blobs: place.blobs,
            listen: Some(self.listen),
            http: Some(self.http),
            names: self.names()?,
            public_url: self.public_url.as_ref().map(|url| url.trim_end_matches('/').to_owned()),
            keep: Keep { hours_s: self.telemetry_hours, days_s: self.telemetry_days },
            encode: encode_in_child,
        };
        let mut hub = HubServer::start(config).await.user(|| "start the hub".to_owned())?;
        let outcome = self.serve(session, &mut hub, data).await;
        hub.stop().await;
        outcome
    }

    async fn serve(&self, session: &Session, hub: &mut RunningHub, data: PathBuf) -> Result<()> {
        let token = hub.admin_token().internal(|| "read the admin token".to_owned())?;
        self.introduce(session, hub).await?;
        let http = hub.http.unwrap_or(self.http);
        let ready = Ready {
            dashboard: format!("http://{http}/#token={token}"),
            url: hub.url.clone(),
            ca: hub.ca_file.clone(),
            data,
            first_start: hub.first_start,
        };
        if session.out.is_json() {
            // One line, so that whoever started this program can read it as it comes.
            let line = serde_json::to_string(&ready).internal(|| "print the address".to_owned())?;
            crate::output::print(&line)?;
        } else {
            crate::output::print(&text(&ready, hub))?;
        }
        let mut terminate =
            signal(SignalKind::terminate()).internal(|| "wait for signals".to_owned())?;
        tokio::select! {
            ended = hub.wait() => ended.internal(|| "run the hub".to_owned()),
            _ = tokio::signal::ctrl_c() => {
                session.progress.say("stopping; devices go on serving what they have");
                Ok(())
            }
            _ = terminate.recv() => Ok(()),
        }
    }

    /// Host names for the certificate: that of the public URL.
    fn names(&self) -> Result<Vec<String>> {
        let Some(url) = &self.public_url else { return Ok(Vec::new()) };
        let parsed = reqwest::Url::parse(url).ok().filter(|url| url.scheme() == "https");
        let host = parsed.as_ref().and_then(|url| url.host_str());
        let host = host.ok_or_else(|| {
            Failure::user(format!("`{url}` is not a URL for devices"))
                .hint("write it as https://host:port")
        })?;
        Ok(vec![host.trim_matches(['[', ']']).to_owned()])
    }

    /// Makes this user's other commands find the hub, and gives it a publisher key.
    async fn introduce(&self, session: &Session, hub: &RunningHub) -> Result<()> {
        let home = &session.home;
        let Some(https) = hub.https else { return Ok(()) };
        let here = if https.ip().is_unspecified() {
            SocketAddr::new(std::net::Ipv4Addr::LOCALHOST.into(), https.port())
        } else {
            https
        };
        let context = Context {
            hub: format!("https://{here}"),
            ca: Some(hub.ca_file.clone()),
            token_file: hub.admin_token_file.clone(),
        };
        match home.context()? {
            Some(other) if other.token_file != context.token_file => {
                tracing::warn!(
                    "{} points to another hub ({}) and is left as it is; to talk to this one, \
                     start it with a SLM_HOME of its own",
                    home.folder().display(),
                    other.hub
                );
                return Ok(());
            }
            Some(same) if same == context => {}
            _ => home.set_context(&context)?,
        }
        let client = Hub::new(home.access_of(&context)?)?;
        let signer = if home.has_key(DEFAULT_KEY) {
            home.key(DEFAULT_KEY)?
        } else {
            home.create_key(DEFAULT_KEY)?
        };
        key::register(&client, key::record(DEFAULT_KEY, &signer)?).await.map(|_| ())
    }
}

/// Each waiting device is an open file: lets this process have as many as the system allows.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

fn text(ready: &Ready, hub: &RunningHub) -> String {
    let mut lines = vec![
        format!("The hub is up. It keeps everything in {}", ready.data.display()),
        String::new(),
        format!("  Dashboard (this link logs you in)  {}", ready.dashboard),
        format!("  For devices and operators          {}", ready.url),
    ];
    if hub.https.is_some_and(|address| address.ip().is_loopback()) {
        lines.push(
            "  Only this machine reaches it; for others: slm up --listen 0.0.0.0:8443".to_owned(),
        );
    }
    lines.extend(
        [
            "",
            "Next, in another terminal:",
            "  slm device invite > invite.txt                      a one-time invitation",
            "  slm-agent join invite.txt --state ./device-1        on the device: join and serve",
            "  slm ship model.gguf --to all                        a model onto every device",
            "",
            "Ctrl-C stops the hub; devices go on serving what they have.",
        ]
        .map(str::to_owned),
    );
    lines.join("\n")
}

/// The job of making a delta: in a process of its own, its memory and crashes are not the hub's.
pub const DELTA_JOB: Job = Job { name: "hub-delta", run: encode };

fn encode(input: Value, _on_progress: &mut dyn FnMut(Value)) -> anyhow::Result<Value> {
    let files: DeltaFiles = serde_json::from_value(input)?;
    files.encode()?;
    Ok(Value::Null)
}

fn encode_in_child(files: DeltaFiles) -> BoxFuture<'static, Result<(), String>> {
    Box::pin(async move {
        let input = serde_json::to_value(&files).map_err(|error| error.to_string())?;
        let made = child::call(DELTA_JOB.name, input, |_| ()).await;
        made.map(|_| ()).map_err(|error| error.to_string())
    })
}
