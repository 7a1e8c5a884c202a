//! `slm channel`.

use clap::Subcommand;
use reqwest::Method;
use slmops_api::ChannelName;
use slmops_api::channel::{Channel as ChannelFacts, ChannelStatus};

use super::Session;
use super::rollout::PolicyArgs;
use crate::error::Result;
use crate::output::table;

/// Channels: the steps of a release on its way through the fleet.
#[derive(Debug, Subcommand)]
pub enum Channel {
    /// List the channels with their devices and what is on each
    #[command(after_help = "Example:\n  $ slm channel list")]
    List,
    /// Make or change a channel; devices follow it by their blueprint (channel = "beta")
    #[command(
        after_help = "Examples:\n  $ slm channel set edge --waves rest\n  $ slm channel set beta --after edge --waves 1,10%,rest --bake 1h"
    )]
    Set {
        /// Its name
        name: ChannelName,
        /// The channel on which a release must have been confirmed before
        #[arg(long, value_name = "CHANNEL")]
        after: Option<ChannelName>,
        /// How releases that are promoted to it are rolled out
        #[command(flatten)]
        policy: Box<PolicyArgs>,
    },
    /// Remove a channel that no device follows
    #[command(after_help = "Example:\n  $ slm channel remove edge")]
    Remove {
        /// Its name
        name: ChannelName,
    },
}

impl Channel {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::List => {
                let channels: Vec<ChannelStatus> =
                    hub.list("/v1/channels", "list the channels").await?;
                session.out.show(&channels, || {
                    let rows = channels.iter().map(|status| {
                        let waves: Vec<String> =
                            status.channel.policy.waves.iter().map(ToString::to_string).collect();
                        let releases = status.releases.iter().map(|one| {
                            let state = super::word(&one.state);
                            format!("{} {} ({state}, by {})", one.model, one.version, one.by)
                        });
                        let releases: Vec<String> = releases.collect();
                        let after = status.channel.after.as_ref();
                        vec![
                            status.channel.name.to_string(),
                            after.map_or_else(|| "-".to_owned(), ToString::to_string),
                            status.followers.to_string(),
                            waves.join(","),
                            match releases.is_empty() {
                                true => "nothing yet".to_owned(),
                                false => releases.join("; "),
                            },
                        ]
                    });
                    table(&["channel", "after", ">devices", "waves", "releases"], rows)
                })
            }
            Self::Set { name, after, policy } => {
                let channel = ChannelFacts { name, after, policy: policy.policy()? };
                let path = format!("/v1/channels/{}", channel.name);
                let what = format!("set the channel `{}`", channel.name);
                hub.send(hub.request(Method::PUT, &path).json(&channel), &what).await?;
                session.out.show(&channel, || format!("channel {} is set", channel.name))
            }
            Self::Remove { name } => {
                let what = format!("remove the channel `{name}`");
                hub.act(Method::DELETE, &format!("/v1/channels/{name}"), &what).await?;
                session.out.done(&format!("channel {name} is removed"))
            }
        }
    }
}
