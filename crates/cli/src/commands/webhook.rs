//! `slm webhook`.

use std::path::PathBuf;

use clap::Subcommand;
use reqwest::Method;
use slmops_api::WebhookId;
use slmops_api::webhook::{
    CreatedWebhook, Delivery, DeliveryState, NewWebhook, Redeliver, Redelivered, Rotate,
    Webhook as WebhookFacts, WebhookRetry,
};

use super::Session;
use crate::error::{Context as _, Result};
use crate::output::{fields, table};
use crate::units;

/// Webhooks: the audit log, event by event, to other programs.
#[derive(Debug, Subcommand)]
pub enum Webhook {
    /// Tell another program of events from now on; prints the secret of the signatures, once
    #[command(
        after_help = "Example:\n  $ slm webhook add https://ops.example.com/slm --events 'rollout.*,device.*'"
    )]
    Add {
        /// Where events are posted to, as signed CloudEvents in JSON
        url: String,
        /// Which events: actions of the audit log, whole kinds such as rollout.*, or *
        #[arg(long, value_delimiter = ',', required = true, value_name = "EVENTS")]
        events: Vec<String>,
        /// A PEM file with the CA of the receiver's certificate, instead of the system's CAs
        #[arg(long, value_name = "FILE")]
        ca: Option<PathBuf>,
        /// Attempts until an event is given up [default: 20, about 11 hours]
        #[arg(long, value_name = "COUNT")]
        attempts: Option<u32>,
        /// How long the receiver has to answer [default: 10s]
        #[arg(long, value_parser = units::parse_seconds, value_name = "TIME")]
        timeout: Option<u64>,
    },
    /// List the webhooks with how many events wait or were given up
    #[command(after_help = "Example:\n  $ slm webhook list")]
    List,
    /// Tell it no more
    #[command(after_help = "Example:\n  $ slm webhook remove w0123456789abcdef")]
    Remove {
        /// The webhook
        id: WebhookId,
    },
    /// Give it a new secret, which is printed once; for a while events are signed with both
    #[command(after_help = "Example:\n  $ slm webhook rotate w0123456789abcdef --overlap 2d")]
    Rotate {
        /// The webhook
        id: WebhookId,
        /// How long the secret of now signs as well
        #[arg(long, value_parser = units::parse_seconds, value_name = "TIME", default_value = "1d")]
        overlap: u64,
    },
    /// Send it a test event
    #[command(after_help = "Example:\n  $ slm webhook test w0123456789abcdef")]
    Test {
        /// The webhook
        id: WebhookId,
    },
    /// List what was delivered, what waits, and what was given up
    #[command(after_help = "Example:\n  $ slm webhook deliveries w0123456789abcdef --state dead")]
    Deliveries {
        /// The webhook
        id: WebhookId,
        /// Only those: pending, delivered or dead
        #[arg(long)]
        state: Option<DeliveryState>,
    },
    /// Try what was given up again
    #[command(after_help = "Example:\n  $ slm webhook redeliver w0123456789abcdef")]
    Redeliver {
        /// The webhook
        id: WebhookId,
        /// This event alone, by its number in the audit log; it may have been delivered
        #[arg(long, value_name = "NUMBER")]
        sequence: Option<u64>,
    },
}

impl Webhook {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::Add { url, events, ca, attempts, timeout } => {
                let read = |path: &PathBuf| {
                    std::fs::read_to_string(path)
                        .user(|| format!("read the CA file {}", path.display()))
                };
                let usual = WebhookRetry::default();
                let retry = WebhookRetry {
                    attempts: attempts.unwrap_or(usual.attempts),
                    timeout_ms: timeout.map_or(usual.timeout_ms, |s| s.saturating_mul(1000)),
                    ..usual
                };
                let ca_pem = ca.as_ref().map(read).transpose()?;
                let body = NewWebhook { url, events, ca_pem, retry };
                let created: CreatedWebhook =
                    hub.call(Method::POST, "/v1/webhooks", &body, "add the webhook").await?;
                session.progress.say("Give the secret to the receiver; it is not shown again.");
                session.out.show(&created, || secret(&created))
            }
            Self::Rotate { id, overlap } => {
                let what = format!("give the webhook {id} a new secret");
                let path = format!("/v1/webhooks/{id}/rotate");
                let body = Rotate { overlap_s: Some(overlap) };
                let rotated: CreatedWebhook = hub.call(Method::POST, &path, &body, &what).await?;
                if let Some(until) = rotated.webhook.previous_secret_until {
                    session.progress.say(format!(
                        "Give the secret to the receiver before {}; it is not shown again.",
                        super::time(until)
                    ));
                }
                session.out.show(&rotated, || secret(&rotated))
            }
            Self::List => {
                let webhooks: Vec<WebhookFacts> =
                    hub.list("/v1/webhooks", "list the webhooks").await?;
                session.out.show(&webhooks, || {
                    let rows = webhooks.iter().map(|webhook| {
                        vec![
                            webhook.id.to_string(),
                            webhook.asked.url.clone(),
                            webhook.asked.events.join(","),
                            webhook.pending.to_string(),
                            webhook.dead.to_string(),
                            super::time(webhook.created_at),
                        ]
                    });
                    table(&["id", "url", "events", ">waiting", ">given up", "created"], rows)
                })
            }
            Self::Remove { id } => {
                let what = format!("remove the webhook {id}");
                hub.act(Method::DELETE, &format!("/v1/webhooks/{id}"), &what).await?;
                session.out.done(&format!("webhook {id} is removed"))
            }
            Self::Test { id } => {
                let what = format!("test the webhook {id}");
                hub.act(Method::POST, &format!("/v1/webhooks/{id}/test"), &what).await?;
                let look = format!("`slm webhook deliveries {id}` shows what became of it");
                session.out.done(&format!("a test event is on its way: {look}"))
            }
            Self::Deliveries { id, state } => {
                let what = format!("list the deliveries of the webhook {id}");
                let query = state.map(|state| format!("?state={}", state.name()));
                let path = format!("/v1/webhooks/{id}/deliveries{}", query.unwrap_or_default());
                let deliveries: Vec<Delivery> = hub.list(&path, &what).await?;
                session.out.show(&deliveries, || {
                    let rows = deliveries.iter().map(|delivery| {
                        vec![
                            delivery.sequence.to_string(),
                            delivery.action.clone(),
                            delivery.state.name().to_owned(),
                            delivery.attempts.to_string(),
                            delivery.last.clone(),
                            delivery.next_at.map_or_else(|| "-".to_owned(), super::time),
                        ]
                    });
                    table(&[">event", "what", "state", ">attempts", "last", "next"], rows)
                })
            }
            Self::Redeliver { id, sequence } => {
                let what = format!("deliver again to the webhook {id}");
                let path = format!("/v1/webhooks/{id}/redeliver");
                let body = Redeliver { sequence };
                let again: Redelivered = hub.call(Method::POST, &path, &body, &what).await?;
                let events = again.deliveries;
                session.out.show(&again, || format!("{events} to be delivered again"))
            }
        }
    }
}

fn secret(created: &CreatedWebhook) -> String {
    fields(&[("webhook", created.webhook.id.to_string()), ("secret", created.secret.clone())])
}
