//! `slm model delta` and `slm model patch`: deltas between plain files.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use slmops_artifact::{Digest, files};
use slmops_delta::{DeltaError, Header, Method, Part};
use slmops_fleet_core::deltas::{MAX_HUNDREDTHS, saves_enough};

use super::Session;
use crate::error::{Context, Failure, Result};
use crate::output::{fields, table};
use crate::progress::Stage;
use crate::units;

/// How many tensors the text names one by one; JSON has all.
const NAMED_TENSORS: usize = 10;

/// `slm model delta`.
#[derive(Debug, clap::Args)]
pub struct Delta {
    /// The file that devices have
    old: PathBuf,
    /// The file that they shall have
    new: PathBuf,
    /// Where the delta goes
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Compute threads; 0 means one for each core
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    threads: usize,
}

/// `slm model patch`.
#[derive(Debug, clap::Args)]
pub struct Patch {
    /// The file that the delta was made from
    old: PathBuf,
    /// The delta
    delta: PathBuf,
    /// Where the new file goes
    #[arg(long, short, value_name = "FILE")]
    out: PathBuf,
    /// Frames decoded at the same time, up to 4; each takes about 3 MB of memory
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    threads: usize,
}

/// What `slm model delta` says.
#[derive(Serialize)]
struct Made {
    from: Whole,
    to: Whole,
    delta: Whole,
    /// Of the new file's length.
    share: f64,
    /// Whether that is little enough for a hub to keep it.
    is_worth_it: bool,
    took_ms: u64,
    parts: Vec<Row>,
}

/// A file.
#[derive(Serialize)]
struct Whole {
    file: PathBuf,
    digest: Digest,
    size_bytes: u64,
}

/// A part of the new file.
#[derive(Serialize)]
struct Row {
    /// The tensor, or none for what is none.
    tensor: Option<String>,
    #[serde(rename = "type")]
    kind: Option<&'static str>,
    method: &'static str,
    size_bytes: u64,
    delta_bytes: u64,
}

/// What `slm model patch` says.
#[derive(Serialize)]
struct Patched {
    file: PathBuf,
    digest: Digest,
    size_bytes: u64,
    from: Digest,
    delta_bytes: u64,
    took_ms: u64,
}

impl Delta {
    pub(super) async fn run(self, session: &Session) -> Result<()> {
        let stage = session.progress.stage(format!("compare with {}", self.old.display()));
        let work = tokio::task::spawn_blocking(move || -> Result<Made> {
            let made = self.make(&stage)?;
            stage.done(written(&made.delta.file, made.delta.size_bytes));
            Ok(made)
        });
        let made = work.await.internal(|| "make a delta".to_owned())??;
        session.out.show(&made, || text(&made))
    }

    fn make(&self, stage: &Stage) -> Result<Made> {
        refuse_existing(&self.out)?;
        let (old, new) = (open(&self.old)?, open(&self.new)?);
        let started = Instant::now();
        let total = new.len() as u64;
        let encoded = slmops_delta::encode(&old, &new, threads(self.threads), &|done| {
            stage.bytes(done, total)
        });
        let took_ms = started.elapsed().as_millis() as u64;
        write(&self.out, |file| (&*file).write_all(&encoded.bytes).user(|| writing(&self.out)))?;
        // The header was made of these very bytes.
        let header = Header::parse(&encoded.bytes).internal(|| "read the new delta".to_owned())?;
        let size_bytes = encoded.bytes.len() as u64;
        Ok(Made {
            from: Whole {
                file: self.old.clone(),
                digest: header.from,
                size_bytes: header.from_bytes,
            },
            to: Whole { file: self.new.clone(), digest: header.to, size_bytes: header.to_bytes },
            delta: Whole { file: self.out.clone(), digest: Digest::of(&encoded.bytes), size_bytes },
            share: size_bytes as f64 / header.to_bytes.max(1) as f64,
            is_worth_it: saves_enough(size_bytes, header.to_bytes),
            took_ms,
            parts: encoded.parts.into_iter().map(Row::from).collect(),
        })
    }
}

impl Patch {
    pub(super) async fn run(self, session: &Session) -> Result<()> {
        let stage = session.progress.stage(format!("apply {}", self.delta.display()));
        let work = tokio::task::spawn_blocking(move || -> Result<Patched> {
            let patched = self.apply(&stage)?;
            stage.done(written(&patched.file, patched.size_bytes));
            Ok(patched)
        });
        let patched = work.await.internal(|| "apply a delta".to_owned())??;
        session.out.show(&patched, || {
            fields(&[
                ("file", patched.file.display().to_string()),
                ("digest", patched.digest.to_string()),
                ("size", units::bytes(patched.size_bytes)),
                ("delta", units::bytes(patched.delta_bytes)),
            ])
        })
    }

    fn apply(&self, stage: &Stage) -> Result<Patched> {
        refuse_existing(&self.out)?;
        let what = || format!("apply the delta `{}`", self.delta.display());
        let (old, delta) = (open(&self.old)?, open(&self.delta)?);
        let header = Header::parse(&delta).user(what)?;
        let available = delta.len() as u64;
        if header.delta_bytes() > available {
            let needed = header.delta_bytes();
            return Err(DeltaError::Truncated { needed, available }).user(what);
        }
        check_space(&self.out, header.to_bytes)?;
        let started = Instant::now();
        let mut done = 0;
        write(&self.out, |file| {
            let emit = |piece: &[u8]| {
                done += piece.len() as u64;
                stage.bytes(done, header.to_bytes);
                (&*file).write_all(piece)
            };
            let applied = slmops_delta::apply(&old, &delta, threads(self.threads), emit);
            if let Err(DeltaError::Base { .. } | DeltaError::Frame { .. }) = &applied {
                // What comes out is checked, so that the old file is only looked at to tell why.
                let found = Digest::of(&old);
                if found != header.from {
                    return Err(self.wrong_base(found, header.from));
                }
            }
            applied.user(|| writing(&self.out))
        })?;
        Ok(Patched {
            file: self.out.clone(),
            digest: header.to,
            size_bytes: header.to_bytes,
            from: header.from,
            delta_bytes: header.delta_bytes(),
            took_ms: started.elapsed().as_millis() as u64,
        })
    }
}

impl Patch {
    fn wrong_base(&self, found: Digest, expected: Digest) -> Failure {
        let (old, found, expected) = (self.old.display(), found.short(), expected.short());
        Failure::user(format!("`{old}` is {found}, and the delta changes {expected}"))
            .hint("give it the file that the delta was made from, or make a delta from this one")
    }
}

impl From<Part> for Row {
    fn from(part: Part) -> Self {
        Self {
            tensor: part.name,
            kind: part.kind.map(slmops_artifact::gguf::TensorType::name),
            method: match part.method {
                Method::Copied => "copied",
                Method::Coded => "coded",
                Method::Compressed => "compressed",
                Method::Stored => "stored",
            },
            size_bytes: part.bytes,
            delta_bytes: part.delta_bytes,
        }
    }
}

fn threads(asked: usize) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        asked => asked,
    }
}

fn written(path: &Path, bytes: u64) -> String {
    format!("{} ({})", path.display(), units::bytes(bytes))
}

fn open(path: &Path) -> Result<impl std::ops::Deref<Target = [u8]> + use<>> {
    files::map(path).map_err(|source| {
        Failure::user(format!("read `{}`", path.display())).hint("check the path").source(source)
    })
}

fn writing(path: &Path) -> String {
    format!("write `{}`", path.display())
}

fn refuse_existing(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        return Err(Failure::user(format!("`{}` exists", path.display()))
            .hint("name another file, or remove this one"));
    }
    Ok(())
}

/// Better told before than after a minute of work.
fn check_space(path: &Path, needed_bytes: u64) -> Result<()> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let stat = rustix::fs::statvfs(folder).user(|| writing(path))?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free_bytes < needed_bytes {
        let (needed, free) = (units::bytes(needed_bytes), units::bytes(free_bytes));
        return Err(Failure::user(format!("{} needs {needed}, {free} are free", writing(path)))
            .hint("make room, or name a file on another disk"));
    }
    Ok(())
}

/// A file that is there whole or not at all.
fn write(path: &Path, fill: impl FnOnce(&std::fs::File) -> Result<()>) -> Result<()> {
    files::replace(path, fill, |operation, source| {
        Failure::user(format!("{operation} `{}`", path.display()))
            .hint("does its folder exist, and may you write there?")
            .source(source)
    })
}

fn text(made: &Made) -> String {
    let whole = |whole: &Whole| format!("{} ({})", whole.digest, units::bytes(whole.size_bytes));
    let mut text = fields(&[
        ("from", whole(&made.from)),
        ("to", whole(&made.to)),
        ("delta", format!("{}, {}", whole(&made.delta), percent(made.share))),
    ]);
    if !made.is_worth_it {
        text.push_str(&format!(
            "\n\nThat saves too little: a hub keeps deltas of less than {MAX_HUNDREDTHS} % of the file. Send the \
             whole file."
        ));
    }
    let mut groups: BTreeMap<(&str, &str), (usize, u64, u64)> = BTreeMap::new();
    for row in &made.parts {
        let kind = match (&row.tensor, row.kind) {
            (None, _) => "no tensor",
            (Some(_), None) => "unknown",
            (Some(_), Some(kind)) => kind,
        };
        let group = groups.entry((row.method, kind)).or_default();
        *group = (group.0 + 1, group.1 + row.size_bytes, group.2 + row.delta_bytes);
    }
    let cells = |size: u64, delta: u64| {
        let share = percent(delta as f64 / size.max(1) as f64);
        [units::bytes(size), units::bytes(delta), share]
    };
    let rows = groups.into_iter().map(|((method, kind), (count, size, delta))| {
        [vec![method.to_owned(), kind.to_owned(), count.to_string()], cells(size, delta).to_vec()]
            .concat()
    });
    text.push_str("\n\n");
    text.push_str(&table(&["method", "type", ">parts", ">size", ">delta", ">share"], rows));
    let mut largest: Vec<&Row> =
        made.parts.iter().filter(|row| row.tensor.is_some() && row.delta_bytes > 0).collect();
    largest.sort_by_key(|row| std::cmp::Reverse(row.delta_bytes));
    if !largest.is_empty() {
        let rows = largest.iter().take(NAMED_TENSORS).map(|row| {
            let name = row.tensor.clone().unwrap_or_default();
            let kind = row.kind.unwrap_or("unknown").to_owned();
            [
                vec![name, kind, row.method.to_owned()],
                cells(row.size_bytes, row.delta_bytes).to_vec(),
            ]
            .concat()
        });
        text.push_str("\n\n");
        text.push_str(&table(&["tensor", "type", "method", ">size", ">delta", ">share"], rows));
        if largest.len() > NAMED_TENSORS {
            let others = largest.len() - NAMED_TENSORS;
            text.push_str(&format!("\nand {others} more: --output json has all"));
        }
    }
    text
}

fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent >= 10.0 { format!("{percent:.1} %") } else { format!("{percent:.3} %") }
}
