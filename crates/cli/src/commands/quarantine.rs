//! `slm quarantine`.

use clap::Subcommand;
use reqwest::Method;
use slmops_api::ClassName;
use slmops_api::orders::{Lift, Quarantined};

use super::Session;
use crate::client::Hub;
use crate::error::{Failure, Result};
use crate::output::table;

/// The quarantine: packages that failed in a class and are not offered to it any more.
#[derive(Debug, Subcommand)]
pub enum Quarantine {
    /// List what is quarantined, for which class, and since which rollout
    #[command(after_help = "Example:\n  $ slm quarantine list")]
    List,
    /// Let a package be offered to a class again, by the next rollout of its release
    #[command(
        after_help = "Example:\n  $ slm quarantine lift 9f86d081884c --class small --reason 'the kernel was at fault'"
    )]
    Lift {
        /// The digest of its manifest, or how that begins
        #[arg(value_parser = parse_digest, value_name = "DIGEST")]
        digest: String,
        /// The class
        #[arg(long)]
        class: ClassName,
        /// Why; it is kept in the audit log
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
}

/// The hex digits of a digest, or the first of them.
fn parse_digest(given: &str) -> Result<String, String> {
    let digits = given.strip_prefix("sha256:").unwrap_or(given);
    let hex = digits.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if !hex || !(6..=64).contains(&digits.len()) {
        return Err(format!("`{given}` is no digest: write 6 to 64 of its hex digits"));
    }
    Ok(digits.to_owned())
}

impl Quarantine {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::List => {
                let all = list(&hub).await?;
                session.out.show(&all, || {
                    let rows = all.iter().map(|one| {
                        vec![
                            one.manifest.short(),
                            one.class.to_string(),
                            packages(one),
                            one.since.map_or_else(|| "unknown".to_owned(), super::time),
                            one.rollout
                                .as_ref()
                                .map_or_else(|| "-".to_owned(), |id| id.to_string()),
                            one.rejected_by.len().to_string(),
                        ]
                    });
                    let header = ["digest", "class", "package", "since", "rollout", ">devices"];
                    table(&header, rows)
                })
            }
            Self::Lift { digest, class, reason } => {
                let what = format!("lift the quarantine of {digest} for class {class}");
                let all = list(&hub).await?;
                let hex = |one: &&Quarantined| {
                    let full = one.manifest.to_string();
                    one.class == class && full.trim_start_matches("sha256:").starts_with(&digest)
                };
                let found: Vec<&Quarantined> = all.iter().filter(hex).collect();
                let [one] = found[..] else {
                    let how = if found.is_empty() { "nothing" } else { "more than one package" };
                    return Err(Failure::user(format!(
                        "{what}: {how} that begins with it is quarantined for the class"
                    ))
                    .hint("`slm quarantine list` shows what there is"));
                };
                let body = Lift { manifest: one.manifest, class, reason };
                let request = hub.request(Method::POST, "/v1/quarantine/lift").json(&body);
                hub.send(request, &what).await?;
                if !one.rejected_by.is_empty() {
                    session.progress.say(format!(
                        "It failed on {}: they refuse it for themselves all the same.",
                        one.rejected_by.join(", ")
                    ));
                }
                session.out.done(&format!(
                    "{} may be offered to class {} again, by the next rollout of it",
                    packages(one),
                    body.class
                ))
            }
        }
    }
}

async fn list(hub: &Hub) -> Result<Vec<Quarantined>> {
    hub.list("/v1/quarantine", "list the quarantine").await
}

fn packages(one: &Quarantined) -> String {
    let names = one.packages.iter().map(|it| format!("{} {} {}", it.model, it.version, it.variant));
    match names.collect::<Vec<_>>().join(", ") {
        none if none.is_empty() => one.manifest.short(),
        names => names,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_digest("sha256:9f86d0"), Ok("9f86d0".to_owned()));
        for bad in ["", "9f86d", "9F86D0", "sha256:", "notadigest", &"a".repeat(65)] {
            assert!(parse_digest(bad).is_err(), "{bad}");
        }
    }
}
