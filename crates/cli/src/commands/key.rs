//! `slm key`.

use std::path::PathBuf;

use clap::Subcommand;
use jiff::Timestamp;
use reqwest::Method;
use serde::Serialize;
use slmops_api::device::PublisherKey;
use slmops_artifact::signing::PrivateKey;
use slmops_inference::server::{KeyLimits, Keys};

use super::Session;
use crate::client::Hub;
use crate::error::{Context, Failure, Result};
use crate::home::DEFAULT_KEY;
use crate::output::table;

/// Publisher keys, and keys of endpoints.
#[derive(Debug, Subcommand)]
pub enum Key {
    /// Make a publisher key here and register its public half with the hub
    #[command(
        long_about = "Make a P-256 key in SLM_HOME/keys and register its public half with the hub. \
                      The private half never leaves this machine. Devices that join afterwards \
                      accept releases signed with it; those that have joined already accept it \
                      on the word of a key they trust, which must be on this machine \
                      (`--endorsed-by`): the hub alone cannot give them one.",
        after_help = "Examples:\n  $ slm key create release-2027 --valid-days 400\n  \
                      $ slm ship model.gguf --key release-2027"
    )]
    Create {
        /// Its name
        #[arg(default_value = DEFAULT_KEY)]
        name: String,
        /// Days until devices and hub refuse what it signs; for ever if absent
        #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(i64).range(1..=36_500))]
        valid_days: Option<i64>,
        /// The key on this machine that vouches for it; `default`, if there is one
        #[arg(long, value_name = "NAME")]
        endorsed_by: Option<String>,
    },
    /// Make a key for an endpoint, `slm serve --keys` or a device's
    #[command(
        long_about = "Make a key with which an application may use an endpoint, and print it once: the \
                      file holds its digest alone. The endpoint reads the file again within a second. A \
                      key of the same name is replaced.",
        after_help = "Examples:\n  $ slm key endpoint till --file keys.toml --per-minute 60\n  \
                      $ slm serve model.gguf --keys keys.toml"
    )]
    Endpoint {
        /// Whose it is
        name: String,
        /// The file of keys; made if it does not exist
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// Requests at the same time; any number if absent
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
        concurrent: Option<u32>,
        /// Requests that may begin within a minute; any number if absent
        #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
        per_minute: Option<u32>,
    },
    /// List the keys that the hub hands to devices
    #[command(after_help = "Example:\n  $ slm key list")]
    List,
}

impl Key {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        match self {
            Self::Endpoint { name, file, concurrent, per_minute } => {
                let limits = KeyLimits { concurrent, per_minute };
                let key = Keys::create(&file, &name, limits)
                    .user(|| format!("make a key for `{name}`"))?;
                session.out.show(&NewEndpointKey { name: &name, key: &key }, || key.clone())?;
                let file = file.display();
                session.progress.say(format!(
                    "  Shown once; {file} holds its digest. Send it as `Authorization: Bearer KEY`."
                ));
                Ok(())
            }
            Self::Create { name, valid_days, endorsed_by } => {
                let hub = session.hub()?;
                let good = !name.is_empty()
                    && name.len() <= 64
                    && name
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
                if !good {
                    return Err(Failure::user(format!("`{name}` is no name of a key"))
                        .hint("use letters, digits, '-' and '_'"));
                }
                let voucher = match endorsed_by {
                    Some(voucher) => Some(session.home.key(&voucher)?),
                    None if name != DEFAULT_KEY && session.home.has_key(DEFAULT_KEY) => {
                        Some(session.home.key(DEFAULT_KEY)?)
                    }
                    None => None,
                };
                let expires_at = valid_days.map(|days| {
                    let second = Timestamp::now().as_second() + days * 24 * 3600;
                    Timestamp::from_second(second).expect("a hundred years are within bounds")
                });
                let key = session.home.create_key(&name)?;
                let mut public = record(&name, &key)?;
                public.expires_at = expires_at;
                if let Some(voucher) = &voucher {
                    public = public.endorsed(voucher);
                }
                let public = register(&hub, public).await?;
                let reach = if public.endorsement.is_some() {
                    "all devices accept it, those that have joined already within a day"
                } else {
                    "devices that join from now on accept it"
                };
                session
                    .out
                    .show(&public, || format!("key {name} ({}) is registered: {reach}", public.id))
            }
            Self::List => {
                let hub = session.hub()?;
                let keys: Vec<PublisherKey> = hub.list("/v1/keys", "list the keys").await?;
                session.out.show(&keys, || {
                    table(&["id", "name", "expires", "endorsed by"], keys.iter().map(row))
                })
            }
        }
    }
}

/// A key that is shown once.
#[derive(Serialize)]
struct NewEndpointKey<'a> {
    name: &'a str,
    key: &'a str,
}

fn row(key: &PublisherKey) -> Vec<String> {
    let expires = match key.expires_at {
        None => "never".to_owned(),
        Some(at) if key.is_expired(Timestamp::now()) => format!("expired {}", super::time(at)),
        Some(at) => super::time(at),
    };
    let by = key.endorsement.as_ref().map_or("", |endorsement| endorsement.by.as_str());
    vec![key.id.to_string(), key.name.clone(), expires, by.to_owned()]
}

/// What the hub is told of the key on this machine called `name`.
pub fn record(name: &str, key: &PrivateKey) -> Result<PublisherKey> {
    let public = key.public();
    let id = public.id().parse().internal(|| "name the key".to_owned())?;
    let public_key = public.to_pem().to_owned();
    Ok(PublisherKey { id, name: name.to_owned(), public_key, expires_at: None, endorsement: None })
}

/// Registers a key with the hub, unless the hub knows it; gives the hub's record.
///
/// # Errors
/// A key whose time is over, or what the hub says.
pub async fn register(hub: &Hub, key: PublisherKey) -> Result<PublisherKey> {
    let known: Vec<PublisherKey> = hub.list("/v1/keys", "list the keys").await?;
    if let Some(known) = known.into_iter().find(|known| known.id == key.id) {
        if let Some(at) = known.expires_at.filter(|_| known.is_expired(Timestamp::now())) {
            return Err(Failure::user(format!(
                "the publisher key `{}` expired {}",
                known.name,
                super::time(at)
            ))
            .hint("make its successor: slm key create NAME; then name it with --key NAME"));
        }
        return Ok(known);
    }
    let what = format!("register the key `{}`", key.name);
    hub.send(hub.request(Method::POST, "/v1/keys").json(&key), &what).await?;
    Ok(key)
}
