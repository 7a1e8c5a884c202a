//! `slm blueprint`.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use reqwest::Method;
use reqwest::header::CONTENT_TYPE;
use slmops_api::blueprint::{Explanation, Layer, StoredBlueprint};

use super::Session;
use crate::error::{Context, Failure, Result};
use crate::output::{fields, table};

/// The longest blueprint that is sent, in bytes.
const MAX_BLUEPRINT_BYTES: u64 = 64 * 1024;

/// Blueprints.
#[derive(Debug, Subcommand)]
pub enum Blueprint {
    /// List the layers that are set
    #[command(after_help = "Example:\n  $ slm blueprint list")]
    List,
    /// Set a layer from a TOML file (`-` reads stdin)
    #[command(
        long_about = "Set a layer from a TOML file. Layers are `fleet`, `class/NAME`, `site/NAME` \
                      and `device/NAME`; a later one in this order wins. Keys are listed in \
                      docs/configuration.md.",
        after_help = "Example:\n  $ slm blueprint set class/small small.toml\n  $ echo 'runtime.context_tokens = 1024' | slm blueprint set fleet -"
    )]
    Set {
        /// `fleet`, `class/NAME`, `site/NAME` or `device/NAME`
        layer: Place,
        /// The file
        file: PathBuf,
    },
    /// Show a layer as it was written
    #[command(after_help = "Example:\n  $ slm blueprint show class/small")]
    Show {
        /// `fleet`, `class/NAME`, `site/NAME` or `device/NAME`
        layer: Place,
    },
    /// Delete a layer
    #[command(after_help = "Example:\n  $ slm blueprint delete class/small")]
    Delete {
        /// `fleet`, `class/NAME`, `site/NAME` or `device/NAME`
        layer: Place,
    },
    /// Show every effective value of a device and the layer that set it
    #[command(after_help = "Example:\n  $ slm blueprint explain till-7")]
    Explain {
        /// The device's name or id
        device: String,
    },
}

/// A layer's place on the command line.
#[derive(Clone, Debug)]
pub struct Place {
    layer: &'static str,
    name: String,
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        if given == "fleet" {
            return Ok(Self { layer: "fleet", name: "-".to_owned() });
        }
        let wrong = || {
            format!("`{given}` is not a layer: write fleet, class/NAME, site/NAME or device/NAME")
        };
        let (layer, name) = given.split_once('/').ok_or_else(wrong)?;
        let layer = ["class", "site", "device"].into_iter().find(|known| *known == layer);
        name.parse::<slmops_api::ClassName>().map_err(|_| wrong())?;
        Ok(Self { layer: layer.ok_or_else(wrong)?, name: name.to_owned() })
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.layer {
            "fleet" => f.write_str("fleet"),
            layer => write!(f, "{layer}/{}", self.name),
        }
    }
}

impl Place {
    fn path(&self) -> String {
        format!("/v1/blueprints/{}/{}", self.layer, self.name)
    }

    fn is(&self, layer: &Layer) -> bool {
        match layer {
            Layer::Fleet => self.layer == "fleet",
            Layer::Class(name) => self.layer == "class" && self.name == name.as_str(),
            Layer::Site(name) => self.layer == "site" && self.name == name.as_str(),
            Layer::Device(name) => self.layer == "device" && self.name == name.as_str(),
        }
    }
}

fn place(layer: &Layer) -> String {
    match layer {
        Layer::Fleet => "fleet".to_owned(),
        Layer::Class(name) => format!("class/{name}"),
        Layer::Site(name) => format!("site/{name}"),
        Layer::Device(name) => format!("device/{name}"),
    }
}

impl Blueprint {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::List => {
                let all: Vec<StoredBlueprint> =
                    hub.list("/v1/blueprints", "list the blueprints").await?;
                session.out.show(&all, || {
                    let rows = all.iter().map(|one| {
                        let set: Vec<&str> = one
                            .toml
                            .lines()
                            .map(str::trim)
                            .filter(|line| line.contains('=') && !line.starts_with('#'))
                            .collect();
                        vec![place(&one.place), set.join(", ")]
                    });
                    table(&["layer", "sets"], rows)
                })
            }
            Self::Set { layer, file } => {
                let text = read(&file)?;
                let what = format!("set the blueprint {layer}");
                let request = hub
                    .request(Method::PUT, &layer.path())
                    .header(CONTENT_TYPE, "text/toml")
                    .body(text);
                hub.send(request, &what).await?;
                session.out.done(&format!("blueprint {layer} is set"))
            }
            Self::Show { layer } => {
                let all: Vec<StoredBlueprint> =
                    hub.list("/v1/blueprints", "list the blueprints").await?;
                let one = all.into_iter().find(|one| layer.is(&one.place)).ok_or_else(|| {
                    Failure::user(format!("the blueprint {layer} is not set"))
                        .hint("`slm blueprint list` shows those that are")
                })?;
                session.out.show(&one, || one.toml.trim_end().to_owned())
            }
            Self::Delete { layer } => {
                let what = format!("delete the blueprint {layer}");
                hub.act(Method::DELETE, &layer.path(), &what).await?;
                session.out.done(&format!("blueprint {layer} is deleted"))
            }
            Self::Explain { device } => explain(session, &device).await,
        }
    }
}

/// Shows every effective value of a device, and its fit.
pub async fn explain(session: &Session, device: &str) -> Result<()> {
    let hub = session.hub()?;
    let what = format!("explain the device `{device}`");
    let path = format!("/v1/devices/{}/explain", super::segment(device)?);
    let explanation: Explanation = hub.get(&path, &what).await?;
    session.out.show(&explanation, || {
        let rows = explanation.values.iter().map(|value| {
            vec![
                value.key.clone(),
                value.value.clone(),
                value.layer.clone(),
                value.overrides.join("; "),
            ]
        });
        let mut text = table(&["setting", "value", "set by", "overrides"], rows);
        for order in &explanation.orders {
            text.push_str(&format!("\n\nAn operator decided: {order}"));
        }
        let refused: Vec<(&str, String)> = explanation
            .values
            .iter()
            .flat_map(|value| value.refused.iter().map(|one| (value.key.as_str(), one.clone())))
            .collect();
        if !refused.is_empty() {
            text.push_str("\n\nNot overridable, so it counts for nothing:\n");
            text.push_str(&fields(&refused));
        }
        if !explanation.fit.is_empty() {
            let lines: Vec<(&str, String)> =
                explanation.fit.iter().map(|line| ("", line.clone())).collect();
            text.push_str("\n\nWhich variant fits:\n");
            text.push_str(&fields(&lines));
        }
        text
    })
}

fn read(file: &Path) -> Result<String> {
    let what = || format!("read the blueprint `{}`", file.display());
    let reader: Box<dyn Read> = if file == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(file).user(what)?)
    };
    let mut text = String::new();
    reader.take(MAX_BLUEPRINT_BYTES + 1).read_to_string(&mut text).user(what)?;
    if text.len() as u64 > MAX_BLUEPRINT_BYTES {
        return Err(Failure::user(format!("{}: longer than {MAX_BLUEPRINT_BYTES} bytes", what())));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_and_nonsense_is_refused() {
        for good in ["fleet", "class/small", "site/berlin-3", "device/till-7"] {
            assert_eq!(good.parse::<Place>().unwrap().to_string(), good);
        }
        for bad in ["", "class", "class/", "klass/small", "class/../tokens", "fleet/x"] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }
}
