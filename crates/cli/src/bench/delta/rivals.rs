//! Tools that turn two files into a delta, each run as a process of its own and measured.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde::Serialize;
use slmops_artifact::Digest;

use crate::error::{Context, Failure, Result};

/// How often a process is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// Clock ticks per second in /proc: the kernel's USER_HZ.
const TICKS_PER_S: f64 = 100.0;
/// The average chunk of content-defined chunking, as xet and casync have it.
const CHUNK_BYTES: u32 = 64 << 10;

/// A tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tool {
    /// This program
    Slm,
    /// bsdiff 4
    Bsdiff,
    /// zstd -19 --long=31 --patch-from
    Zstd,
    /// xdelta3 -9 with the whole file as its window
    Xdelta3,
    /// FastCDC with chunks of 64 KiB, each new chunk sent whole
    Fastcdc,
}

/// What a tool made of two files.
#[derive(Debug, Serialize)]
pub struct Measured {
    pub tool: Tool,
    pub delta_bytes: u64,
    /// Making the delta and applying it; nothing for what only counts bytes.
    pub encode: Option<Cost>,
    pub apply: Option<Cost>,
}

/// What a process took.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cost {
    pub cpu_s: f64,
    /// The most memory that was resident, mapped files among it.
    pub peak_bytes: u64,
    /// The most memory that was its own, seen every two milliseconds.
    pub own_peak_bytes: u64,
}

impl Tool {
    /// Makes the delta in `folder`, applies it and compares; none where the tool is not there.
    pub fn measure(self, old: &Path, new: &Path, folder: &Path) -> Result<Option<Measured>> {
        let (delta, out) = (folder.join("delta"), folder.join("out"));
        let program = match self {
            Self::Slm => std::env::current_exe().internal(|| "find this program".to_owned())?,
            Self::Bsdiff => "bsdiff".into(),
            Self::Zstd => "zstd".into(),
            Self::Xdelta3 => "xdelta3".into(),
            Self::Fastcdc => {
                let delta_bytes = new_chunks(old, new)?;
                return Ok(Some(Measured { tool: self, delta_bytes, encode: None, apply: None }));
            }
        };
        let (mut encode, mut apply) = (Command::new(&program), Command::new(&program));
        match self {
            Self::Slm => {
                encode.args(["--quiet", "--output", "json", "model", "delta"]).args([old, new]);
                encode.arg("--out").arg(&delta).args(["--threads", "1"]);
                apply.args(["--quiet", "--output", "json", "model", "patch"]).args([old, &delta]);
                apply.arg("--out").arg(&out).args(["--threads", "1"]);
            }
            Self::Bsdiff => {
                encode.args([old, new, &delta]);
                apply = Command::new("bspatch");
                apply.args([old, &out, &delta]);
            }
            Self::Zstd => {
                let from = |flag: &str| {
                    let mut text = std::ffi::OsString::from(flag);
                    text.push(old);
                    text
                };
                encode.args(["-q", "-f", "-T1", "-19", "--long=31"]).arg(from("--patch-from="));
                encode.arg(new).arg("-o").arg(&delta);
                apply.args(["-q", "-f", "-d", "--long=31"]).arg(from("--patch-from="));
                apply.arg(&delta).arg("-o").arg(&out);
            }
            Self::Xdelta3 => {
                let window = old.metadata().map_or(0, |data| data.len()).next_power_of_two();
                let window = window.clamp(1 << 24, 1 << 31).to_string();
                encode.args(["-e", "-9", "-f", "-B", &window, "-s"]).args([old, new, &delta]);
                apply.args(["-d", "-f", "-B", &window, "-s"]).args([old, &delta, &out]);
            }
            Self::Fastcdc => unreachable!("it has no program"),
        }
        let Some(encode) = run(encode)? else { return Ok(None) };
        let Some(apply) = run(apply)? else { return Ok(None) };
        let what = || format!("compare what {} made", program.display());
        let same = Digest::of_reader(fs::File::open(&out).internal(what)?).internal(what)?
            == Digest::of_reader(fs::File::open(new).internal(what)?).internal(what)?;
        let delta_bytes = delta.metadata().internal(what)?.len();
        for file in [delta, out] {
            fs::remove_file(file).internal(what)?;
        }
        if !same {
            return Err(Failure::internal(format!("{} made another file", program.display())));
        }
        Ok(Some(Measured { tool: self, delta_bytes, encode: Some(encode), apply: Some(apply) }))
    }
}

/// Runs a process to its end; none where there is no such program.
fn run(mut command: Command) -> Result<Option<Cost>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let what = || format!("run {program}");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).internal(what),
    };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Failure::internal(format!("{program} has no process id")))?;
    let proc = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", child.id()));
    let mut cost = Cost { cpu_s: 0.0, peak_bytes: 0, own_peak_bytes: 0 };
    // Seen, not waited for: its times can still be read when it has ended.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    while waitid(WaitId::Pid(pid), options).internal(what)?.is_none() {
        let status = proc("status").unwrap_or_default();
        let kib = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        cost.peak_bytes = cost.peak_bytes.max(kib("VmHWM:").unwrap_or(0) << 10);
        cost.own_peak_bytes = cost.own_peak_bytes.max(kib("RssAnon:").unwrap_or(0) << 10);
        std::thread::sleep(LOOK);
    }
    let stat = proc("stat").internal(what)?;
    // Fields 14 and 15 (proc_pid_stat(5)); the second is the name in parentheses.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().skip(11).take(2);
    cost.cpu_s = ticks.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / TICKS_PER_S;
    let ended = child.wait().internal(what)?;
    if !ended.success() {
        return Err(Failure::internal(format!("{program} failed ({ended})")));
    }
    Ok(Some(cost))
}

/// Bytes of the chunks of `new` that `old` lacks.
fn new_chunks(old: &Path, new: &Path) -> Result<u64> {
    let what = || "cut the files into chunks".to_owned();
    let (old, new) = (fs::read(old).internal(what)?, fs::read(new).internal(what)?);
    let chunks = |bytes: &[u8]| -> Vec<(Digest, u64)> {
        let cuts =
            fastcdc::v2020::FastCDC::new(bytes, CHUNK_BYTES / 4, CHUNK_BYTES, CHUNK_BYTES * 4);
        cuts.map(|cut| {
            let chunk = &bytes[cut.offset..cut.offset + cut.length];
            (Digest::of(chunk), chunk.len() as u64)
        })
        .collect()
    };
    let mut known: HashSet<Digest> = chunks(&old).into_iter().map(|(digest, _)| digest).collect();
    let lacking = chunks(&new).into_iter().filter(|(digest, _)| known.insert(*digest));
    Ok(lacking.map(|(_, len)| len).sum())
}
