//! `SLM_HOME`: which hub this user talks to, publisher keys, and the cache.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use slmops_artifact::signing::PrivateKey;

use crate::error::{Context as _, Failure, Result};

/// The longest token or key file that is read, in bytes.
const MAX_SECRET_FILE_BYTES: u64 = 64 * 1024;
/// The name of the publisher key that is used unless another is named.
pub const DEFAULT_KEY: &str = "default";

/// The folder and what lies in it.
#[derive(Clone, Debug)]
pub struct Home {
    folder: PathBuf,
}

/// Which hub, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// The hub's URL.
    pub hub: String,
    /// The hub's CA certificate, PEM; not needed for plain HTTP on loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// The file that holds the operator token.
    pub token_file: PathBuf,
}

/// Everything a client needs, read and checked.
pub struct Access {
    /// The hub's URL without a final slash.
    pub hub: String,
    /// PEM of the CA that the hub's certificate must descend from.
    pub ca_pem: Option<Vec<u8>>,
    /// The operator token.
    pub token: String,
}

impl Home {
    /// The folder that was asked for, or `~/.slm`.
    pub fn new(asked: Option<PathBuf>) -> Result<Self> {
        let folder = match asked {
            Some(folder) => folder,
            None => std::env::home_dir()
                .ok_or_else(|| {
                    Failure::user("this user has no home folder")
                        .hint("set SLM_HOME to a folder of your own")
                })?
                .join(".slm"),
        };
        let folder = std::path::absolute(&folder)
            .user(|| format!("find the folder `{}`", folder.display()))?;
        Ok(Self { folder })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where `slm up` keeps the hub's data unless told otherwise.
    pub fn hub_data(&self) -> PathBuf {
        self.folder.join("hub")
    }

    /// A folder for what can be made again, created if it is not there.
    pub fn cache(&self, kind: &str) -> Result<PathBuf> {
        let folder = self.folder.join("cache").join(kind);
        fs::create_dir_all(&folder).user(|| format!("create `{}`", folder.display()))?;
        Ok(folder)
    }

    fn context_file(&self) -> PathBuf {
        self.folder.join("context.toml")
    }

    /// The context, if there is one.
    pub fn context(&self) -> Result<Option<Context>> {
        let file = self.context_file();
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Failure::user(format!("read `{}`", file.display())).source(error));
            }
        };
        toml::from_str(&text).map(Some).map_err(|error| {
            Failure::user(format!("read `{}`", file.display()))
                .source(error)
                .hint("mend it, or remove it and start `slm up` again, which writes it anew")
        })
    }

    /// Writes the context.
    pub fn set_context(&self, context: &Context) -> Result<()> {
        let text = toml::to_string(context).internal(|| "write the context".to_owned())?;
        write_private(&self.context_file(), text.as_bytes())
    }

    /// How to reach the hub of a context.
    pub fn access_of(&self, context: &Context) -> Result<Access> {
        let token = read_small(&context.token_file)?;
        Ok(Access {
            hub: context.hub.trim_end_matches('/').to_owned(),
            ca_pem: context.ca.as_deref().map(read_small).transpose()?,
            token: String::from_utf8_lossy(&token).trim().to_owned(),
        })
    }

    /// How to reach the hub: `SLM_HUB`, `SLM_TOKEN` and `SLM_CA` win over the context.
    pub fn access(&self) -> Result<Access> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let context = self.context()?;
        let no_hub = || {
            Failure::user(format!(
                "no hub is known: `{}` is missing",
                self.context_file().display()
            ))
            .hint("start one with `slm up`, or set SLM_HUB, SLM_TOKEN and SLM_CA to use another")
        };
        let other = variable("SLM_HUB");
        // Another hub's token or CA must never be sent to, or trusted for, the one in SLM_HUB.
        let context =
            context.filter(|context| other.as_ref().is_none_or(|hub| *hub == context.hub));
        let hub = other.or_else(|| context.as_ref().map(|context| context.hub.clone()));
        let hub = hub.ok_or_else(no_hub)?;
        let ca = variable("SLM_CA")
            .map(PathBuf::from)
            .or_else(|| context.as_ref().and_then(|context| context.ca.clone()));
        let ca_pem = ca.as_deref().map(read_small).transpose()?;
        let token = match (variable("SLM_TOKEN"), &context) {
            (Some(token), _) => token,
            (None, Some(context)) => {
                String::from_utf8_lossy(&read_small(&context.token_file)?).trim().to_owned()
            }
            (None, None) => {
                return Err(Failure::user(format!("there is no token for the hub {hub}"))
                    .hint("set SLM_TOKEN to one made with `slm token create` on that hub"));
            }
        };
        Ok(Access { hub: hub.trim_end_matches('/').to_owned(), ca_pem, token })
    }

    fn key_file(&self, name: &str) -> PathBuf {
        self.folder.join("keys").join(format!("{name}.pem"))
    }

    /// Makes a publisher key called `name`.
    pub fn create_key(&self, name: &str) -> Result<PrivateKey> {
        let file = self.key_file(name);
        if file.exists() {
            return Err(Failure::user(format!("there is a key called `{name}` already"))
                .hint(format!("choose another name, or use the one in `{}`", file.display())));
        }
        let key = PrivateKey::generate();
        write_private(&file, key.to_pem().as_bytes())?;
        Ok(key)
    }

    /// The publisher key called `name`.
    pub fn key(&self, name: &str) -> Result<PrivateKey> {
        let file = self.key_file(name);
        if !file.exists() {
            return Err(Failure::user(format!("there is no publisher key called `{name}`"))
                .hint(format!("slm key create {name}")));
        }
        let pem = String::from_utf8_lossy(&read_small(&file)?).into_owned();
        PrivateKey::from_pem(&pem).user(|| format!("read the private key `{}`", file.display()))
    }

    /// Whether there is a publisher key called `name`.
    pub fn has_key(&self, name: &str) -> bool {
        self.key_file(name).exists()
    }
}

fn read_small(file: &Path) -> Result<Vec<u8>> {
    let meta = fs::metadata(file).user(|| format!("read `{}`", file.display()))?;
    if meta.len() > MAX_SECRET_FILE_BYTES {
        return Err(Failure::user(format!(
            "`{}` is {} bytes long, which is no key, token or certificate",
            file.display(),
            meta.len()
        )));
    }
    fs::read(file).user(|| format!("read `{}`", file.display()))
}

/// Writes a file that only its owner may read, whole or not at all.
pub fn write_private(file: &Path, content: &[u8]) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    let write = || -> std::io::Result<()> {
        if !folder.exists() {
            fs::create_dir_all(folder)?;
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
        }
        let temporary = file.with_extension("part");
        let mut open = fs::OpenOptions::new();
        let mut handle =
            open.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        handle.write_all(content)?;
        handle.sync_all()?;
        fs::rename(&temporary, file)
    };
    write().user(|| format!("write `{}`", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_for_their_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().join("home"))).unwrap();
        home.create_key("a").unwrap();
        let key = home.folder().join("keys/a.pem");
        assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(home.create_key("a").is_err(), "a key is never overwritten");
    }

    #[test]
    fn a_home_without_a_hub_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().to_owned())).unwrap();
        if std::env::var_os("SLM_HUB").is_none() {
            let failure = home.access().err().expect("no hub").to_string();
            assert!(failure.contains("hint: start one with `slm up`"), "{failure}");
        }
    }
}
