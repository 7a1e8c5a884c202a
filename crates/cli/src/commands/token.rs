//! `slm token`.

use clap::Subcommand;
use reqwest::Method;
use slmops_api::TokenId;
use slmops_api::audit::{CreatedToken, NewToken, Role, Token as TokenFacts};

use super::Session;
use crate::error::Result;
use crate::output::table;
use crate::units;

/// Operator tokens.
#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token; its secret is shown this once
    #[command(
        after_help = "Example:\n  $ slm token create ci --role operator --valid 90d --output json | jq -r .secret"
    )]
    Create {
        /// A name for people
        name: String,
        /// What its holder may do
        #[arg(long, value_enum, default_value = "viewer")]
        role: RoleArg,
        /// How long it works; for ever if absent
        #[arg(long, value_parser = units::parse_seconds, value_name = "TIME")]
        valid: Option<u64>,
    },
    /// List the tokens, without their secrets
    #[command(after_help = "Example:\n  $ slm token list")]
    List,
    /// Make a token stop working at once
    #[command(after_help = "Example:\n  $ slm token revoke tok-3f2a")]
    Revoke {
        /// Its id
        id: TokenId,
    },
}

/// A role on the command line.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum RoleArg {
    /// Read everything but secrets
    Viewer,
    /// Publish, roll out, invite devices
    Operator,
    /// Manage tokens and keys too
    Admin,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Viewer => Self::Viewer,
            RoleArg::Operator => Self::Operator,
            RoleArg::Admin => Self::Admin,
        }
    }
}

impl Token {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::Create { name, role, valid } => {
                let body = NewToken { name, role: role.into(), valid_s: valid };
                let what = format!("create the token `{}`", body.name);
                let created: CreatedToken =
                    hub.call(Method::POST, "/v1/tokens", &body, &what).await?;
                if !session.out.is_json() {
                    session.progress.say("Keep it now: it is not shown again.");
                }
                session.out.show(&created, || created.secret.clone())
            }
            Self::List => {
                let tokens: Vec<TokenFacts> = hub.list("/v1/tokens", "list the tokens").await?;
                session.out.show(&tokens, || {
                    let rows = tokens.iter().map(|token| {
                        vec![
                            token.id.to_string(),
                            token.name.clone(),
                            super::word(&token.role),
                            super::time(token.created_at),
                            token.expires_at.map_or_else(|| "never".to_owned(), super::time),
                        ]
                    });
                    table(&["id", "name", "role", "created", "expires"], rows)
                })
            }
            Self::Revoke { id } => {
                let what = format!("revoke the token `{id}`");
                hub.act(Method::DELETE, &format!("/v1/tokens/{id}"), &what).await?;
                session.out.done(&format!("token {id} is revoked"))
            }
        }
    }
}
