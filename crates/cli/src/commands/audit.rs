//! `slm audit`.

use clap::Subcommand;
use slmops_api::audit::{AuditEntry, AuditVerdict};

use super::Session;
use crate::client::Hub;
use crate::error::{Failure, Result};
use crate::output::table;

/// The audit log.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// List what was done, by whom, newest first
    #[command(after_help = "Example:\n  $ slm audit list --output json | jq '.[].action'")]
    List,
    /// Check that no entry was changed, removed or added afterwards, since it was last checked
    #[command(after_help = "Examples:\n  $ slm audit verify\n  $ slm audit verify --full")]
    Verify {
        /// Check all of it, from the first entry on
        #[arg(long)]
        full: bool,
    },
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
            Self::Verify { full } => {
                let verdict = verify(&hub, full).await?;
                session.out.show(&verdict, || match &verdict.broken {
                    None if verdict.from > 0 => format!(
                        "{} entries, unbroken; {} of them checked now; head {}",
                        verdict.entries,
                        verdict.entries - verdict.from,
                        verdict.head
                    ),
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

/// Checks the log to its end, or to where it is broken.
pub async fn verify(hub: &Hub, full: bool) -> Result<AuditVerdict> {
    let what = "verify the audit log";
    let mut path = format!("/v1/audit/verify?full={full}");
    let mut from = None;
    loop {
        let mut verdict: AuditVerdict = hub.get(&path, what).await?;
        verdict.from = *from.get_or_insert(verdict.from);
        match &verdict.cursor {
            // Without a cursor the hub goes on from what it has kept.
            Some(_) if !full => {}
            Some(cursor) => path = format!("/v1/audit/verify?cursor={cursor}"),
            None => return Ok(verdict),
        }
    }
}
