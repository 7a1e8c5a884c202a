//! `slm class`.

use clap::Subcommand;
use reqwest::Method;
use slmops_api::ClassName;
use slmops_api::model::DeviceClass;

use super::Session;
use crate::error::Result;
use crate::output::table;
use crate::units;

/// Device classes.
#[derive(Debug, Subcommand)]
pub enum Class {
    /// List the classes
    #[command(after_help = "Example:\n  $ slm class list")]
    List,
    /// Create or change a class
    #[command(
        after_help = "Example:\n  $ slm class set tiny --min-memory 96MiB --quantisation Q2_K"
    )]
    Set {
        /// Its name
        name: ClassName,
        /// Devices that offer at least this much memory belong to it (the greatest bound wins)
        #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
        min_memory: u64,
        /// The GGUF file type that `slm ship` makes for it
        #[arg(long, visible_alias = "quantization", value_name = "TYPE")]
        quantisation: String,
        /// A note for people
        #[arg(long, default_value = "")]
        description: String,
    },
    /// Delete a class
    #[command(after_help = "Example:\n  $ slm class delete tiny")]
    Delete {
        /// Its name
        name: ClassName,
    },
}

impl Class {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::List => {
                let classes: Vec<DeviceClass> = hub.list("/v1/classes", "list the classes").await?;
                session.out.show(&classes, || {
                    let rows = classes.iter().map(|class| {
                        vec![
                            class.name.to_string(),
                            units::bytes(class.min_memory_bytes),
                            class.quantisation.clone(),
                            class.description.clone(),
                        ]
                    });
                    table(&["name", ">from memory", "quantisation", "description"], rows)
                })
            }
            Self::Set { name, min_memory, quantisation, description } => {
                let class = DeviceClass {
                    name,
                    description,
                    min_memory_bytes: min_memory,
                    quantisation: quantisation.to_uppercase(),
                };
                let path = format!("/v1/classes/{}", class.name);
                let what = format!("set the class `{}`", class.name);
                hub.send(hub.request(Method::PUT, &path).json(&class), &what).await?;
                session.out.show(&class, || format!("class {} is set", class.name))
            }
            Self::Delete { name } => {
                let what = format!("delete the class `{name}`");
                hub.act(Method::DELETE, &format!("/v1/classes/{name}"), &what).await?;
                session.out.done(&format!("class {name} is deleted"))
            }
        }
    }
}
