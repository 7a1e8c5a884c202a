//! `slm audit`.

use clap::Subcommand;
use slmops_api::audit::{AuditEntry, AuditVerdict};

use super::Session;
use crate::error::{Failure, Result};
use crate::output::table;

/// The audit log.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// List what was done, by whom, newest first
    #[command(after_help = "Example:\n  $ slm audit list --output json | jq '.[].action'")]
    List,
    /// Check that no entry was changed, removed or added afterwards
    #[command(after_help = "Example:\n  $ slm audit verify")]
    Verify,
}

impl Audit {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::List => {
                let entries: Vec<AuditEntry> = hub.list("/v1/audit", "list the audit log").await?;
                session.out.show(&entries, || {
                    let rows = entries.iter().map(|entry| {
                        vec![
                            entry.sequence.to_string(),
                            super::time(entry.at),
                            entry.actor.clone(),
                            entry.action.clone(),
                            entry.object.clone(),
                        ]
                    });
                    table(&[">#", "when", "who", "what", "object"], rows)
                })
            }
            Self::Verify => {
                let verdict: AuditVerdict =
                    hub.get("/v1/audit/verify", "verify the audit log").await?;
                session.out.show(&verdict, || match &verdict.broken {
                    None => format!("{} entries, unbroken; head {}", verdict.entries, verdict.head),
                    Some(broken) => format!("BROKEN: {broken}"),
                })?;
                match verdict.broken {
                    None => Ok(()),
                    Some(broken) => Err(Failure::internal(format!("the audit log is broken: {broken}"))
                        .hint("somebody or something changed the hub's database: compare it with a backup")),
                }
            }
        }
    }
}
