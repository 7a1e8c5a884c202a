//! `slm backup` and `slm restore`.

use std::path::PathBuf;

use slmops_hub::backup;

use super::Session;
use super::up::Storage;
use crate::error::{Context as _, Result};
use crate::units;

/// Make a backup of the hub, while it runs.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Make a backup of the hub: its tables as they are at one moment, its model packages \
                  and its secrets. The hub may be running. Run it on a machine that reaches the \
                  hub's data folder, with the same --data, --database and --blobs as `slm up`. \
                  Interrupted, it is completed by running it again; a whole backup is brought up to \
                  date. The secrets are in it unencrypted, for their owner alone to read.",
    after_help = "Examples:\n  $ slm backup /mnt/backup/monday\n  $ slm backup ./monday --data /var/lib/slm --database postgres://slm@db/fleet"
)]
pub struct Backup {
    /// Where the backup goes; a new folder, or one with an earlier backup
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    storage: Storage,
    /// Copy model packages out of S3 as well, instead of only naming them
    #[arg(long)]
    copy_blobs: bool,
}

impl Backup {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let place = self.storage.place(session)?;
        let contents = backup::back_up(&place, &self.folder, self.copy_blobs)
            .await
            .user(|| "make a backup".to_owned())?;
        session.out.show(&contents, || {
            let rows: u64 = contents.tables.iter().map(|table| table.rows).sum();
            let left = match contents.blobs_included {
                true => "",
                false => ", which stay in S3",
            };
            format!(
                "Backup of {}: {rows} rows, {} blobs ({}{left}), {} secrets, in {}\n\
                 Whoever reads the secrets can speak for the hub: keep the folder as safe as the hub itself.",
                super::time(contents.made_at),
                contents.blobs,
                units::bytes(contents.blob_bytes),
                contents.secrets.len(),
                self.folder.display(),
            )
        })
    }
}

/// Make a hub of a backup.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Make a hub of a backup, in a new data folder (and, with --database, an empty \
                  PostgreSQL database: a backup of one kind of database can be restored to the \
                  other). Every digest is checked. A place that holds anything is refused. \
                  Interrupted, it is completed by running it again. Then start the hub with `slm up` \
                  and the same options.",
    after_help = "Examples:\n  $ slm restore /mnt/backup/monday --data /var/lib/slm\n  $ slm restore ./monday --data /var/lib/slm --database postgres://slm@db/fleet"
)]
pub struct Restore {
    /// The backup
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    #[command(flatten)]
    storage: Storage,
}

impl Restore {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let place = self.storage.place(session)?;
        let contents =
            backup::restore(&self.folder, &place).await.user(|| "restore the backup".to_owned())?;
        session.out.show(&contents, || {
            format!(
                "Restored the hub of {} to {}; start it with `slm up` and the same options.\n\
                 What was done since then is not in it:\n  \
                 - devices that joined since then are unknown and need a new invitation\n  \
                 - releases and rollouts since then are gone: devices go back to what was wanted at \
                 that time; ship the releases again\n  \
                 - devices that were shut out and tokens that were deleted since then count again: \
                 see `slm device list` and `slm token list`",
                super::time(contents.made_at),
                place.data_dir.display(),
            )
        })
    }
}
