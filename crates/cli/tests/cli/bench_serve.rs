//! The measurement of the endpoint, on a model that is small enough for a test, beside a peer.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn glass() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/glasslm/glass-f32.gguf")
}

fn bench(peers: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_slm"))
        .args(["bench", "serve", "--rounds", "1", "--threads", "1", "--requests", "300"])
        .args(["--quiet", "--peers"])
        .arg(peers)
        .args(more)
        .arg(glass())
        .output()
        .expect("slm runs")
}

/// A peer is any program that takes the options of `slm serve` and says its URL: such as `slm serve`.
#[test]
fn the_endpoint_is_measured_beside_the_loop_and_a_peer() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join("twin");
    let twin = format!(
        "#!/bin/sh\nexec {} serve --quiet --listen 127.0.0.1:0 \"$@\"\n",
        env!("CARGO_BIN_EXE_slm")
    );
    std::fs::write(&program, twin).expect("a script");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("it may run");
    let done = bench(folder.path(), &["--output", "json"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let measured: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    let peer = &measured["peers"][0];
    assert_eq!(peer["name"], "twin");
    for figures in [&measured["raw"], &measured["served"], peer] {
        for rate in ["prompt_per_s", "decode_per_s", "streams_per_s"] {
            assert!(figures[rate][0].as_f64().is_some_and(|rate| rate > 1.0), "{rate}: {figures}");
        }
        for times in ["first_token_ms", "cached_first_token_ms"] {
            let times = figures[times].as_array().expect("times");
            assert!(times.len() == 40 && times[0].as_f64() > Some(0.0), "{figures}");
        }
        assert!(figures["resident_bytes"].as_u64() > Some(1_000_000), "{figures}");
    }
    let crowd = &measured["crowd"];
    let count = |what: &str| crowd[what].as_u64().expect("a count");
    assert_eq!((count("failed"), count("answered") + count("turned_away")), (0, 300), "{crowd}");
}

#[test]
fn without_a_peer_it_says_so_and_a_peer_that_does_not_start_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let done = bench(&folder.path().join("absent"), &[]);
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(said.contains("No peer was measured: scripts/bench-peers.sh"), "{said}");
    for line in ["decode, one stream", "first token p99", "prompt cached, p50", "resident memory"] {
        assert!(said.contains(line), "{said}");
    }

    let program = folder.path().join("broken");
    std::fs::write(&program, "#!/bin/sh\necho no such model >&2\nexit 3\n").expect("a script");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("it may run");
    let done = bench(folder.path(), &[]);
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("`broken` did not start: no such model"), "{said}");
}
