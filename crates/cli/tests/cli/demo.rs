use std::process::Command;

/// What `make demo` shows first-time users, with the model that it shows them. Needs the file that
/// `SLMOPS_SMOLLM2` names (`make test` fetches it); says so where there is none.
#[test]
fn demo_runs_to_its_end() {
    let Some(model) = std::env::var_os("SLMOPS_SMOLLM2") else {
        eprintln!("skipped: SLMOPS_SMOLLM2 does not name the SmolLM2 GGUF file");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let demo = Command::new(env!("CARGO_BIN_EXE_slm"))
        .args(["demo", "--model"])
        .arg(model)
        .arg("--folder")
        .arg(folder.path().join("demo"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&demo.stderr);
    assert!(demo.status.success(), "{said}");
    let table = String::from_utf8_lossy(&demo.stdout);
    for device in ["till", "kiosk", "gateway"] {
        let row = table.lines().rfind(|line| line.starts_with(device)).unwrap_or_default();
        assert!(row.contains("1.0.0"), "{device} runs what it ran before: {table}\n{said}");
    }
}
