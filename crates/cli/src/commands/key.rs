//! `slm key`.

use clap::Subcommand;
use reqwest::Method;
use slmops_api::device::PublisherKey;
use slmops_artifact::signing::PrivateKey;

use super::Session;
use crate::client::Hub;
use crate::error::{Context, Failure, Result};
use crate::home::DEFAULT_KEY;
use crate::output::table;

/// Publisher keys.
#[derive(Debug, Subcommand)]
pub enum Key {
    /// Make a publisher key here and register its public half with the hub
    #[command(
        long_about = "Make a P-256 key in SLM_HOME/keys and register its public half with the hub. \
                      The private half never leaves this machine; devices that join afterwards \
                      accept releases signed with it.",
        after_help = "Example:\n  $ slm key create release-2025"
    )]
    Create {
        /// Its name
        #[arg(default_value = DEFAULT_KEY)]
        name: String,
    },
    /// List the keys that the hub hands to devices
    #[command(after_help = "Example:\n  $ slm key list")]
    List,
}

impl Key {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::Create { name } => {
                let good = !name.is_empty()
                    && name.len() <= 64
                    && name
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
                if !good {
                    return Err(Failure::user(format!("`{name}` is no name of a key"))
                        .hint("use letters, digits, '-' and '_'"));
                }
                let key = session.home.create_key(&name)?;
                let public = register(&hub, &name, &key).await?;
                session.out.show(&public, || format!("key {name} ({}) is registered", public.id))
            }
            Self::List => {
                let keys: Vec<PublisherKey> = hub.list("/v1/keys", "list the keys").await?;
                session.out.show(&keys, || {
                    let rows = keys.iter().map(|key| vec![key.id.to_string(), key.name.clone()]);
                    table(&["id", "name"], rows)
                })
            }
        }
    }
}

/// Registers the public half of `key` with the hub; again is no error.
pub async fn register(hub: &Hub, name: &str, key: &PrivateKey) -> Result<PublisherKey> {
    let public = key.public();
    let id = public.id().parse().internal(|| "name the key".to_owned())?;
    let body = PublisherKey { id, name: name.to_owned(), public_key: public.to_pem().to_owned() };
    let known: Vec<PublisherKey> = hub.list("/v1/keys", "list the keys").await?;
    if known.iter().any(|known| known.id == body.id) {
        return Ok(body);
    }
    let what = format!("register the key `{name}`");
    hub.send(hub.request(Method::POST, "/v1/keys").json(&body), &what).await?;
    Ok(body)
}
