//! `slm model delta` and `slm model patch` on plain files: what comes out, what is refused, and
//! what a kill at any moment leaves behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// How often a patch is killed; `SLM_KILL_ROUNDS` (`make nightly`: 500) overrides it.
const KILLS: u32 = 20;

/// A folder with an old model, a new one and the delta between them.
struct Files {
    folder: tempfile::TempDir,
    new: Vec<u8>,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let glass =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/glasslm/glass-f32.gguf");
        let old = fs::read(glass).expect("the tiny model");
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut new = old.clone();
        // The lower halves of weights: it stays a model.
        for _ in 0..new.len() / 50 {
            let at = random.random_range(200_000..new.len()) & !3;
            new[at] ^= random.random::<u8>();
        }
        fs::write(folder.path().join("old.gguf"), &old).expect("a file");
        fs::write(folder.path().join("new.gguf"), &new).expect("a file");
        let files = Self { folder, new };
        let made = files.slm(&["delta", "old.gguf", "new.gguf", "--out", "it.delta"]);
        assert!(made.status.success(), "{}", said(&made));
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slm"));
        command.arg("model").args(arguments).current_dir(self.folder.path());
        command.env("SLM_HOME", self.path("home")).stdin(Stdio::null());
        command
    }

    fn slm(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("slm starts")
    }

    fn patch(&self, old: &str, delta: &str, out: &str) -> Output {
        self.slm(&["patch", old, delta, "--out", out])
    }

    /// A patch that must fail, say why, give a hint and leave nothing behind.
    fn refused(&self, old: &str, delta: &str, why: &str) {
        let before = fs::read_dir(self.folder.path()).expect("a folder").count();
        let output = self.patch(old, delta, "refused.gguf");
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(why) && said.contains("hint: "), "{said}");
        let after = fs::read_dir(self.folder.path()).expect("a folder").count();
        assert_eq!(before, after, "nothing is left behind: {said}");
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_delta_makes_the_new_file_and_says_what_it_consists_of() {
    let files = Files::new();
    let made =
        files.slm(&["--output", "json", "delta", "old.gguf", "new.gguf", "--out", "again.delta"]);
    let made: serde_json::Value = serde_json::from_slice(&made.stdout).expect("JSON");
    let parts = made["parts"].as_array().expect("parts");
    let sum: u64 = parts.iter().filter_map(|part| part["size_bytes"].as_u64()).sum();
    assert_eq!(sum, files.new.len() as u64);
    assert!(parts.iter().any(|part| part["method"] == "coded" && part["type"] == "F32"));
    let delta = fs::read(files.path("again.delta")).expect("the delta");
    assert!(delta == fs::read(files.path("it.delta")).expect("a delta"), "the same every time");
    assert_eq!(made["delta"]["size_bytes"], delta.len());

    let patched = files.patch("old.gguf", "it.delta", "patched.gguf");
    assert!(patched.status.success(), "{}", said(&patched));
    assert!(fs::read(files.path("patched.gguf")).expect("the new file") == files.new);
    let again = files.patch("old.gguf", "it.delta", "patched.gguf");
    assert!(said(&again).contains("`patched.gguf` exists"), "{}", said(&again));
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing() {
    let files = Files::new();
    let delta = fs::read(files.path("it.delta")).expect("the delta");
    files.refused("new.gguf", "it.delta", "and the delta changes sha256:");
    files.refused("missing.gguf", "it.delta", "read `missing.gguf`");
    files.refused("old.gguf", "old.gguf", "it does not begin with SLMDELTA");
    fs::write(files.path("bad.delta"), &delta[..delta.len() / 2]).expect("a file");
    files.refused("old.gguf", "bad.delta", "it ends after");
    let mut damaged = delta.clone();
    let at = delta.len() * 3 / 4;
    damaged[at] ^= 1;
    fs::write(files.path("bad.delta"), &damaged).expect("a file");
    files.refused("old.gguf", "bad.delta", "the result is wrong");
    let mut old = fs::read(files.path("old.gguf")).expect("the old file");
    let at = old.len() / 2;
    old[at] ^= 1;
    fs::write(files.path("flipped.gguf"), &old).expect("a file");
    files.refused("flipped.gguf", "it.delta", "and the delta changes sha256:");
}

/// The kernel refuses a write half-way, as it does on a full disk.
#[test]
fn a_disk_that_fills_up_leaves_nothing() {
    let files = Files::new();
    // The signal that goes with the limit is ignored, so that the write fails instead.
    let limited = "trap '' XFSZ; ulimit -f 2048; exec \"$0\" \"$@\"";
    let output = Command::new("sh")
        .args(["-c", limited, env!("CARGO_BIN_EXE_slm"), "model", "patch"])
        .args(["old.gguf", "it.delta", "--out", "refused.gguf"])
        .current_dir(files.folder.path())
        .output()
        .expect("a shell");
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("write `refused.gguf`") && said.contains("hint: "), "{said}");
    let left = fs::read_dir(files.folder.path()).expect("a folder").flatten();
    let names: Vec<_> = left.map(|entry| entry.file_name().into_string().expect("text")).collect();
    assert!(
        names.iter().all(|name| !name.contains("partial") && name != "refused.gguf"),
        "{names:?}"
    );
}

#[test]
fn a_kill_at_any_moment_leaves_the_whole_file_or_none() {
    let rounds = std::env::var("SLM_KILL_ROUNDS").ok();
    let rounds = rounds.map_or(KILLS, |rounds| rounds.parse().expect("SLM_KILL_ROUNDS: a number"));
    let files = Files::new();
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let target = files.path("patched.gguf");
    let (mut killed, mut finished) = (0, 0);
    for round in 0..rounds {
        let mut child = files
            .command(&["--quiet", "patch", "old.gguf", "it.delta", "--out", "patched.gguf"])
            .stdout(Stdio::null())
            .spawn()
            .expect("slm starts");
        // Killed once so much is written; a quarter of them some time later, around the rename.
        let until = random.random_range(0..files.new.len() as u64);
        let later = if random.random_range(0..4) == 0 { random.random_range(0..4000) } else { 0 };
        while child.try_wait().expect("a child").is_none() && written(&files) < until {
            std::thread::yield_now();
        }
        for _ in 0..later {
            std::thread::yield_now();
        }
        child.kill().expect("a signal");
        let ended = child.wait().expect("a child");
        if ended.success() {
            finished += 1
        } else {
            killed += 1
        }
        match fs::read(&target) {
            Ok(bytes) => {
                assert!(bytes == files.new, "round {round}: half a file under the final name");
                fs::remove_file(&target).expect("remove");
            }
            Err(_) => assert!(!ended.success(), "round {round}: it said that it was done"),
        }
        // What a killed process leaves has another name.
        for left in partial(&files) {
            fs::remove_file(left).expect("remove");
        }
    }
    assert!(killed * 2 > rounds, "{killed} of {rounds} were killed, {finished} finished");
    let patched = files.patch("old.gguf", "it.delta", "patched.gguf");
    assert!(patched.status.success(), "{}", said(&patched));
    println!("{killed} of {rounds} were killed, {finished} finished before");
}

fn partial(files: &Files) -> Vec<PathBuf> {
    let entries = fs::read_dir(files.folder.path()).expect("a folder").flatten();
    let paths = entries.map(|entry| entry.path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "partial")).collect()
}

/// Bytes of the file in the making.
fn written(files: &Files) -> u64 {
    let sizes = partial(files).into_iter().filter_map(|path| path.metadata().ok());
    sizes.map(|metadata| metadata.len()).sum()
}

/// Inputs are mapped; everything else of a patch fits into 16 MiB, however large the model is.
#[test]
#[cfg(target_os = "linux")]
fn a_patch_takes_little_memory_of_its_own() {
    const WEIGHTS: usize = 16 << 20;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let header = format!(
        "{{\"t\":{{\"dtype\":\"F16\",\"shape\":[{WEIGHTS}],\"data_offsets\":[0,{}]}}}}",
        2 * WEIGHTS
    );
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    // Numbers around one half, of either sign.
    file.extend(
        (0..WEIGHTS).flat_map(|_| (random.random::<u16>() & 0x83ff | 0x3800).to_le_bytes()),
    );
    fs::write(folder.path().join("old"), &file).expect("a file");
    let start = file.len() - 2 * WEIGHTS;
    for number in file[start..].chunks_exact_mut(2) {
        if random.random_range(0..20) == 0 {
            number[0] ^= 1;
        }
    }
    fs::write(folder.path().join("new"), &file).expect("a file");
    let slm = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slm"));
        command.arg("model").current_dir(folder.path()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let made = slm().args(["delta", "old", "new", "--out", "delta"]).status().expect("slm starts");
    assert!(made.success());
    for threads in ["1", "4"] {
        let out = format!("out-{threads}");
        let mut child = slm()
            .args(["patch", "old", "delta", "--out", &out, "--threads", threads])
            .spawn()
            .expect("slm starts");
        let (mut most_kib, mut looks) = (0, 0);
        while child.try_wait().expect("a child").is_none() {
            let status = fs::read_to_string(format!("/proc/{}/status", child.id()));
            let status = status.unwrap_or_default();
            let own = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            let kib = own.and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok());
            most_kib = most_kib.max(kib.unwrap_or(0));
            looks += 1;
            std::thread::yield_now();
        }
        assert!(child.wait().expect("a child").success());
        assert!(fs::read(folder.path().join(&out)).expect("the new file") == file);
        assert!(looks > 20, "looked only {looks} times");
        assert!(most_kib < 16 << 10, "{most_kib} KiB with {threads} threads");
        println!("{threads} threads: {most_kib} KiB of its own at most, seen {looks} times");
    }
}
