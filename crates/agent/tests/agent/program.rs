//! The program as people start it: verbs, messages, exit codes.

use std::io::Write as _;
use std::process::{Output, Stdio};

use crate::Device;
use crate::fake_hub::{FakeHub, Release};
use crate::kills::{agent, join};

fn text(output: &Output) -> (i32, String, String) {
    let read = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), read(&output.stdout), read(&output.stderr))
}

#[test]
fn every_verb_explains_itself_with_an_example() {
    for verb in [&[][..], &["join"], &["run"], &["status"], &["ledger"], &["outbox"], &["probe"]] {
        let help = std::process::Command::new(env!("CARGO_BIN_EXE_slm-agent"))
            .args(verb)
            .arg("--help")
            .output()
            .unwrap();
        let (code, stdout, _) = text(&help);
        assert_eq!(code, 0);
        assert!(stdout.contains("Example:") || stdout.contains("Example: "), "{verb:?}\n{stdout}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_get_a_hint() {
    let hub = FakeHub::start().await;
    let folder = tempfile::tempdir().unwrap();
    for verb in ["run", "status", "ledger", "outbox", "probe"] {
        let (code, _, stderr) = text(&agent(folder.path(), &[verb]).output().unwrap());
        assert_eq!(code, 1, "{stderr}");
        assert!(stderr.contains("holds no device yet\nhint: get an invitation"), "{stderr}");
    }
    let try_join = |invitation: &str, listen: &str| {
        let mut join = agent(folder.path(), &["join", "-", "--no-run", "--listen", listen])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        join.stdin.take().unwrap().write_all(invitation.as_bytes()).unwrap();
        text(&join.wait_with_output().unwrap())
    };
    let (code, _, stderr) = try_join("slmi1.nonsense", "127.0.0.1:0");
    assert_eq!(code, 1);
    assert!(stderr.contains("this is not an invitation") && stderr.contains("hint:"), "{stderr}");

    assert_eq!(try_join(&hub.invitation(), "127.0.0.1:0").0, 0);
    let (code, _, stderr) = try_join(&hub.invitation(), "127.0.0.1:0");
    assert_eq!(code, 1);
    assert!(stderr.contains("already holds device device-1"), "{stderr}");

    // Somebody else with the same invitation.
    let other = tempfile::tempdir().unwrap();
    let mut second = agent(other.path(), &["join", "-", "--no-run"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    second.stdin.take().unwrap().write_all(hub.invitation().as_bytes()).unwrap();
    let (code, _, stderr) = text(&second.wait_with_output().unwrap());
    assert_eq!(code, 1);
    assert!(stderr.contains("used already\nhint: ask for a new invitation"), "{stderr}");
    assert!(!stderr.contains("0123456789abcdef"), "{stderr}");

    // A port that is taken.
    let taken = hub.address.to_string();
    let run = agent(folder.path(), &["run", "--listen", &taken]).output().unwrap();
    let (code, _, stderr) = text(&run);
    assert_eq!(code, 1);
    assert!(stderr.contains(&taken) && stderr.contains("hint:"), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_on_the_same_folder_is_refused() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;
    let second = agent(device.path(), &["run"]).output().unwrap();
    let (code, _, stderr) = text(&second);
    assert_eq!(code, 1);
    assert!(stderr.contains("another agent is running") && stderr.contains("hint:"), "{stderr}");

    // While it runs and when it does not, its owner can look at it.
    let (code, stdout, _) = text(&agent(device.path(), &["status"]).output().unwrap());
    assert_eq!(code, 0);
    assert!(stdout.contains("glass 1.0.0 (f32) at http://127.0.0.1:"), "{stdout}");
    assert!(stdout.contains("confirmed glass 1.0.0 (f32)"), "{stdout}");
    let json = agent(device.path(), &["status", "--output", "json"]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["phase"]["phase"], "confirmed");
    let probe = agent(device.path(), &["probe"]).output().unwrap();
    let (code, stdout, stderr) = text(&probe);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("passed  golden-01"), "{stdout}");
    device.stop().await;
    let (_, stdout, _) = text(&agent(device.path(), &["status"]).output().unwrap());
    assert!(stdout.contains("not running") && stdout.contains("would serve"), "{stdout}");
    let (_, stdout, _) = text(&agent(device.path(), &["ledger"]).output().unwrap());
    assert!(stdout.contains("current    glass 1.0.0 (f32) sha256:"), "{stdout}");
    let (_, stdout, _) = text(&agent(device.path(), &["outbox"]).output().unwrap());
    assert!(stdout.contains("POST /v1/device/report"), "{stdout}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_it_in_good_order() {
    let hub = FakeHub::start().await;
    let folder = tempfile::tempdir().unwrap();
    join(&hub, folder.path());
    let mut running = agent(folder.path(), &["run"]).spawn().unwrap();
    let generation = hub.ship(&Release::good("1.0.0"));
    hub.confirmed(generation).await;
    let told = std::process::Command::new("kill").arg(running.id().to_string()).status().unwrap();
    assert!(told.success());
    let ended = tokio::task::spawn_blocking(move || running.wait().unwrap()).await.unwrap();
    assert_eq!(ended.code(), Some(0));
}
