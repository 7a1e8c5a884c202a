//! What the registry remembers, in SQL: repositories, which blobs they have, manifests, tags,
//! referrers and unfinished uploads. Each function runs inside the caller's transaction.

use slmops_api::delta::DELTA_MEDIA_TYPE;
use slmops_artifact::Digest;

use super::error::RegistryError;
use super::manifest::{Descriptor, Parsed};
use super::name::{Reference, RepositoryName};
use crate::db::{DbError, Row, Schema, Tx, params};

/// The registry's tables.
pub const SCHEMA: Schema = Schema {
    component: "registry",
    migrations: &["
    CREATE TABLE registry_repositories (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE
    ) STRICT;

    -- A repository has a blob when it is listed here; the bytes are kept once for all of them.
    CREATE TABLE registry_blobs (
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        digest TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        PRIMARY KEY (repository, digest)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX registry_blobs_by_digest ON registry_blobs (digest);

    CREATE TABLE registry_manifests (
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        digest TEXT NOT NULL,
        media_type TEXT NOT NULL,
        artifact_type TEXT,
        subject TEXT,
        annotations TEXT,
        content BLOB NOT NULL,
        pushed_at TEXT NOT NULL,
        PRIMARY KEY (repository, digest)
    ) STRICT;
    CREATE INDEX registry_manifests_by_subject
        ON registry_manifests (repository, subject, digest) WHERE subject IS NOT NULL;

    -- Blobs and manifests that a manifest needs.
    CREATE TABLE registry_references (
        repository INTEGER NOT NULL,
        manifest TEXT NOT NULL,
        target TEXT NOT NULL,
        PRIMARY KEY (repository, manifest, target),
        FOREIGN KEY (repository, manifest)
            REFERENCES registry_manifests (repository, digest) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX registry_references_by_target ON registry_references (repository, target);

    CREATE TABLE registry_tags (
        repository INTEGER NOT NULL,
        name TEXT NOT NULL,
        manifest TEXT NOT NULL,
        PRIMARY KEY (repository, name),
        FOREIGN KEY (repository, manifest)
            REFERENCES registry_manifests (repository, digest) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX registry_tags_by_manifest ON registry_tags (repository, manifest);

    CREATE TABLE registry_uploads (
        id TEXT PRIMARY KEY,
        repository INTEGER NOT NULL REFERENCES registry_repositories (id),
        started_at_s INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    "],
    moves: &[],
};

type Result<T, E = RegistryError> = std::result::Result<T, E>;

/// A repository's row.
#[derive(Clone, Copy)]
pub(super) struct Repository(i64);

/// A manifest as it was pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredManifest {
    /// Its digest.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// Its bytes.
    pub content: Vec<u8>,
}

pub(super) fn find(tx: &Tx<'_>, name: &RepositoryName) -> Result<Option<Repository>> {
    let sql = "SELECT id FROM registry_repositories WHERE name = ?1";
    tx.first(sql, params![name.as_str()], |row| Ok(Repository(row.get(0)?)))
}

pub(super) fn find_or_make(tx: &Tx<'_>, name: &RepositoryName) -> Result<Repository> {
    if let Some(found) = find(tx, name)? {
        return Ok(found);
    }
    let sql = "INSERT INTO registry_repositories (name) VALUES (?1) RETURNING id";
    let made = tx.first(sql, params![name.as_str()], |row| row.get(0))?;
    Ok(Repository(made.expect("an insert returns its row")))
}

pub(super) fn catalogue(tx: &Tx<'_>, after: &str, limit: u32) -> Result<Vec<String>> {
    tx.query(
        "SELECT name FROM registry_repositories AS r WHERE name > ?1
         AND EXISTS (SELECT 1 FROM registry_manifests AS m WHERE m.repository = r.id)
         ORDER BY name LIMIT ?2",
        params![after, limit],
        |row| Ok(row.get(0)?),
    )
}

pub(super) fn tags(
    tx: &Tx<'_>,
    repository: Repository,
    after: &str,
    limit: u32,
) -> Result<Vec<String>> {
    tx.query(
        "SELECT name FROM registry_tags WHERE repository = ?1 AND name > ?2 ORDER BY name LIMIT ?3",
        params![repository.0, after, limit],
        |row| Ok(row.get(0)?),
    )
}

/// Says that a repository has a blob, whose bytes must be on the disk already.
pub(super) fn add_blob(
    tx: &Tx<'_>,
    repository: Repository,
    digest: &Digest,
    size_bytes: u64,
) -> Result<()> {
    tx.execute(
        "INSERT INTO registry_blobs (repository, digest, size_bytes) VALUES (?1, ?2, ?3)
         ON CONFLICT DO NOTHING",
        params![repository.0, digest.to_string(), size_bytes.cast_signed()],
    )?;
    Ok(())
}

/// The size of a blob that a repository has, in bytes.
pub(super) fn blob_size(
    tx: &Tx<'_>,
    repository: Repository,
    digest: &Digest,
) -> Result<Option<u64>> {
    let sql = "SELECT size_bytes FROM registry_blobs WHERE repository = ?1 AND digest = ?2";
    tx.first(sql, params![repository.0, digest.to_string()], size_of)
}

/// The size of a blob that any repository has, in bytes.
pub(super) fn blob_size_anywhere(tx: &Tx<'_>, digest: &Digest) -> Result<Option<u64>> {
    let sql = "SELECT size_bytes FROM registry_blobs WHERE digest = ?1 LIMIT 1";
    tx.first(sql, params![digest.to_string()], size_of)
}

/// Takes a blob from a repository; whether no repository has it now.
pub(super) fn remove_blob(tx: &Tx<'_>, repository: Repository, digest: &Digest) -> Result<bool> {
    if let Some(manifest) = needed_by(tx, repository, digest)? {
        return Err(RegistryError::in_use(&format!(
            "blob {digest} is part of manifest {manifest}"
        )));
    }
    let removed = tx.execute(
        "DELETE FROM registry_blobs WHERE repository = ?1 AND digest = ?2",
        params![repository.0, digest.to_string()],
    )?;
    if removed == 0 {
        return Err(RegistryError::blob_unknown(digest));
    }
    Ok(blob_size_anywhere(tx, digest)?.is_none())
}

fn needed_by(tx: &Tx<'_>, repository: Repository, target: &Digest) -> Result<Option<String>> {
    let sql =
        "SELECT manifest FROM registry_references WHERE repository = ?1 AND target = ?2 LIMIT 1";
    tx.first(sql, params![repository.0, target.to_string()], |row| Ok(row.get(0)?))
}

/// Stores a manifest after checking that everything it needs is here.
pub(super) fn put_manifest(
    tx: &Tx<'_>,
    repository: Repository,
    manifest: &StoredManifest,
    parsed: &Parsed,
) -> Result<()> {
    for blob in &parsed.blobs {
        match blob_size(tx, repository, &blob.digest)? {
            None => return Err(RegistryError::reference_unknown("blob", &blob.digest)),
            Some(size) => blob.check_size(size)?,
        }
    }
    for child in &parsed.manifests {
        match manifest_size(tx, repository, &child.digest)? {
            None => return Err(RegistryError::reference_unknown("manifest", &child.digest)),
            Some(size) => child.check_size(size)?,
        }
    }
    let digest = manifest.digest.to_string();
    tx.execute(
        "INSERT INTO registry_manifests
             (repository, digest, media_type, artifact_type, subject, annotations, content, pushed_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
         ON CONFLICT (repository, digest) DO UPDATE SET media_type = excluded.media_type",
        params![
            repository.0,
            digest,
            manifest.media_type,
            parsed.artifact_type,
            parsed.subject.map(|subject| subject.to_string()),
            parsed.annotations.as_ref().map(serde_json::Value::to_string),
            manifest.content,
            jiff::Timestamp::now().to_string(),
        ],
    )?;
    for needed in parsed.blobs.iter().chain(&parsed.manifests) {
        tx.execute(
            "INSERT INTO registry_references (repository, manifest, target) VALUES (?1, ?2, ?3)
             ON CONFLICT DO NOTHING",
            params![repository.0, digest, needed.digest.to_string()],
        )?;
    }
    Ok(())
}

pub(super) fn put_tag(
    tx: &Tx<'_>,
    repository: Repository,
    tag: &str,
    manifest: &Digest,
) -> Result<()> {
    tx.execute(
        "INSERT INTO registry_tags (repository, name, manifest) VALUES (?1, ?2, ?3)
         ON CONFLICT (repository, name) DO UPDATE SET manifest = excluded.manifest",
        params![repository.0, tag, manifest.to_string()],
    )?;
    Ok(())
}

fn manifest_size(tx: &Tx<'_>, repository: Repository, digest: &Digest) -> Result<Option<u64>> {
    let sql =
        "SELECT length(content) FROM registry_manifests WHERE repository = ?1 AND digest = ?2";
    tx.first(sql, params![repository.0, digest.to_string()], size_of)
}

fn size_of(row: &Row<'_>) -> Result<u64> {
    Ok(row.get::<i64>(0)?.cast_unsigned())
}

pub(super) fn manifest(
    tx: &Tx<'_>,
    repository: Repository,
    reference: &Reference,
) -> Result<Option<StoredManifest>> {
    let sql = match reference {
        Reference::Digest(_) => {
            "SELECT digest, media_type, content FROM registry_manifests
             WHERE repository = ?1 AND digest = ?2"
        }
        Reference::Tag(_) => {
            "SELECT m.digest, m.media_type, m.content FROM registry_tags AS t
             JOIN registry_manifests AS m ON m.repository = t.repository AND m.digest = t.manifest
             WHERE t.repository = ?1 AND t.name = ?2"
        }
    };
    tx.first(sql, params![repository.0, reference.to_string()], |row| {
        Ok(StoredManifest {
            digest: digest_at(row, 0)?,
            media_type: row.get(1)?,
            content: row.get(2)?,
        })
    })
}

/// Removes a tag, or a manifest with all of its tags; what was removed.
pub(super) fn remove_manifest(
    tx: &Tx<'_>,
    repository: Repository,
    reference: &Reference,
) -> Result<()> {
    let removed = match reference {
        Reference::Tag(tag) => tx.execute(
            "DELETE FROM registry_tags WHERE repository = ?1 AND name = ?2",
            params![repository.0, tag],
        )?,
        Reference::Digest(digest) => {
            if let Some(index) = needed_by(tx, repository, digest)? {
                let what = format!("manifest {digest} is part of index {index}");
                return Err(RegistryError::in_use(&what));
            }
            remove_made_for(tx, repository, digest)?;
            tx.execute(
                "DELETE FROM registry_manifests WHERE repository = ?1 AND digest = ?2",
                params![repository.0, digest.to_string()],
            )?
        }
    };
    match removed {
        0 => Err(RegistryError::manifest_unknown(reference)),
        _ => Ok(()),
    }
}

/// Removes the deltas that the hub made for a manifest: they are good for nothing without it. Their
/// bytes are left to [`super::Registry::sweep`].
fn remove_made_for(tx: &Tx<'_>, repository: Repository, subject: &Digest) -> Result<()> {
    let made = "SELECT digest FROM registry_manifests
                WHERE repository = ?1 AND subject = ?2 AND artifact_type = ?3";
    let subject = subject.to_string();
    let asked = params![repository.0, subject, DELTA_MEDIA_TYPE];
    tx.execute(
        &format!(
            "DELETE FROM registry_blobs WHERE repository = ?1 AND digest IN (
                 SELECT target FROM registry_references AS r WHERE repository = ?1
                 AND manifest IN ({made})
                 AND NOT EXISTS (SELECT 1 FROM registry_references AS other
                     WHERE other.repository = ?1 AND other.target = r.target
                     AND other.manifest NOT IN ({made})))"
        ),
        asked,
    )?;
    tx.execute(
        "DELETE FROM registry_manifests
         WHERE repository = ?1 AND subject = ?2 AND artifact_type = ?3",
        asked,
    )?;
    Ok(())
}

/// Manifests whose subject is `subject`, in order of their digests.
pub(super) fn referrers(
    tx: &Tx<'_>,
    repository: Repository,
    subject: &Digest,
    artifact_type: Option<&str>,
    after: &str,
    limit: u32,
) -> Result<Vec<Descriptor>> {
    let sql = "SELECT digest, media_type, length(content), artifact_type, annotations
         FROM registry_manifests
         WHERE repository = ?1 AND subject = ?2 AND digest > ?3
         AND (CAST(?4 AS TEXT) IS NULL OR artifact_type = ?4)
         ORDER BY digest LIMIT ?5";
    let subject = subject.to_string();
    let asked = params![repository.0, subject, after, artifact_type, limit];
    tx.query(sql, asked, |row| {
        let annotations: Option<String> = row.get(4)?;
        Ok(Descriptor {
            digest: digest_at(row, 0)?,
            media_type: row.get(1)?,
            size: row.get::<i64>(2)?.cast_unsigned(),
            artifact_type: row.get(3)?,
            annotations: annotations.and_then(|json| serde_json::from_str(&json).ok()),
        })
    })
}

fn digest_at(row: &Row<'_>, index: usize) -> Result<Digest, DbError> {
    let text: String = row.get(index)?;
    text.parse().map_err(|error: slmops_artifact::digest::ParseDigestError| DbError::Column {
        index,
        source: error.into(),
    })
}

pub(super) fn add_upload(tx: &Tx<'_>, repository: Repository, id: &str, now_s: i64) -> Result<()> {
    tx.execute(
        "INSERT INTO registry_uploads (id, repository, started_at_s) VALUES (?1, ?2, ?3)",
        params![id, repository.0, now_s],
    )?;
    Ok(())
}

pub(super) fn count_uploads(tx: &Tx<'_>) -> Result<u32> {
    let count = tx.first("SELECT count(*) FROM registry_uploads", params![], |row| row.get(0))?;
    Ok(count.unwrap_or_default())
}

pub(super) fn has_upload(tx: &Tx<'_>, repository: Repository, id: &str) -> Result<bool> {
    let sql = "SELECT 1 FROM registry_uploads WHERE id = ?1 AND repository = ?2";
    Ok(tx.exists(sql, params![id, repository.0])?)
}

pub(super) fn remove_upload(tx: &Tx<'_>, id: &str) -> Result<()> {
    tx.execute("DELETE FROM registry_uploads WHERE id = ?1", params![id])?;
    Ok(())
}

/// Forgets uploads begun before `before_s`.
pub(super) fn expire_uploads(tx: &Tx<'_>, before_s: i64) -> Result<()> {
    tx.execute("DELETE FROM registry_uploads WHERE started_at_s < ?1", params![before_s])?;
    Ok(())
}

/// The ids of all uploads.
pub(super) fn uploads(tx: &Tx<'_>) -> Result<Vec<String>> {
    tx.query("SELECT id FROM registry_uploads", params![], |row| Ok(row.get(0)?))
}
