//! A backup of a hub that is being written to, restored elsewhere: to the same kind of database and
//! to the other, with blobs and secrets, and devices that go on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use slmops_api::device::Phase;
use slmops_hub::backup::{BackupError, Contents, Place, back_up, restore};
use slmops_hub::db::Postgres;

use super::rig::{FakeDevice, Rig};

#[allow(dead_code, reason = "other tests use more of it")]
#[path = "../../support/postgres.rs"]
pub mod postgres;
#[allow(dead_code, reason = "other tests use more of it")]
#[path = "../../support/s3.rs"]
pub mod s3;

fn place(data: &Path, database: Option<&str>) -> Place {
    let database = database.map(|url| Postgres::parse(url, None).unwrap());
    Place { data_dir: data.to_owned(), database, blobs: None }
}

/// A fleet of two, one of them in the middle of a rollout.
async fn fleet(rig: &Rig) -> Vec<FakeDevice> {
    rig.add_publisher_key().await;
    let mut devices = vec![rig.join("one", 600).await, rig.join("two", 600).await];
    rig.release("1.0.0").await;
    rig.rollout("1.0.0", json!({ "waves": ["rest"] })).await;
    for device in &mut devices {
        device.wait_for_generation(2).await;
    }
    devices[0].report(Phase::Confirmed).await;
    devices
}

/// Changes classes until it is told to stop; the names that were acknowledged.
async fn write_on(rig: &Rig, stop: &AtomicBool) -> Vec<String> {
    let mut done = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let name = format!("c{}", done.len());
        let body = json!({ "name": name, "min_memory_bytes": 1, "quantisation": "Q8_0" });
        rig.send(Method::PUT, &format!("/v1/classes/{name}"), body, StatusCode::OK).await;
        done.push(name);
    }
    done
}

fn rows(contents: &Contents, table: &str) -> u64 {
    contents.tables.iter().find(|found| found.name == table).unwrap().rows
}

/// The audit chain is whole and says so, and devices are told by generations above all they had.
async fn check_restored(rig: &Rig, devices: &mut [FakeDevice], contents: &Contents) {
    let verdict = rig.get("/v1/audit/verify").await;
    assert!(verdict.get("broken").is_none(), "{verdict}");
    let entries = rig.get("/v1/audit?limit=500").await;
    let actions: Vec<&str> = entries["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["action"].as_str().unwrap())
        .collect();
    assert!(actions.contains(&"hub.restore"), "{actions:?}");
    assert!(verdict["entries"].as_u64().unwrap() > rows(contents, "audit"));
    for device in devices {
        // Its token is still good, and what it is told is newer than anything it was told.
        let before = device.generation();
        device.move_to(rig);
        let desired = device.desired().await;
        assert!(desired.generation > before, "{} after {before}", desired.generation);
        assert!(desired.generation < u64::from(u32::MAX), "{}", desired.generation);
        assert_eq!(desired.model.as_ref().unwrap().version.to_string(), "1.0.0");
        assert_eq!(device.pull(&desired.model.unwrap().weights).await, StatusCode::OK);
        device.report(Phase::Confirmed).await;
    }
    // The rollout that was under way at the backup ends.
    let rollouts = rig.get("/v1/rollouts").await;
    let id = rollouts["items"][0]["id"].as_str().unwrap().to_owned();
    rig.wait_for_state(&id, "completed").await;
    // Numbers that tables give by themselves go on, too.
    rig.add_publisher_key().await;
    rig.release("1.1.0").await;
    rig.join("three", 600).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_is_written_to_is_restored_elsewhere() {
    let server = postgres::Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (data, saved) = (folder.path().join("hub"), folder.path().join("saved"));
    let rig = Arc::new(Rig::at(&data, None).await);
    let mut devices = fleet(&rig).await;

    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (rig, stop) = (Arc::clone(&rig), Arc::clone(&stop));
        async move { write_on(&rig, &stop).await }
    });
    let here = place(&data, None);
    let first = back_up(&here, &saved, false).await.unwrap();
    let before = rig.get("/v1/classes").await["items"].as_array().unwrap().len() as u64;
    let second = back_up(&here, &saved, false).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let written = writer.await.unwrap().len() as u64;
    assert!(first.blobs > 3 && first.blob_bytes > 0 && first.blobs_included, "{first:?}");
    assert!(rows(&second, "classes") >= before, "what was acknowledged before is in it");
    assert!(rows(&second, "classes") <= written + 3);
    assert_ne!(first.tables, second.tables, "the hub was written to meanwhile");

    // Told after the backup, and lost: generations must be above that all the same.
    let layer = "[runtime]\ncontext_tokens = 512\n";
    let (status, answer) = rig.put_text("/v1/blueprints/fleet/-", layer).await;
    assert!(status.is_success(), "{answer}");
    for device in &mut devices {
        device.wait_for_generation(3).await;
        device.learn().await;
    }
    drop(rig);

    // To SQLite, and to PostgreSQL; from there back to SQLite.
    let sqlite = folder.path().join("sqlite");
    restore(&saved, &place(&sqlite, None)).await.unwrap();
    check_restored(&Rig::at(&sqlite, None).await, &mut devices, &second).await;
    let url = server.database("fleet");
    let over_postgres = place(&folder.path().join("postgres"), Some(&url));
    // The clock counts seconds; so do generations after a restore.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    restore(&saved, &over_postgres).await.unwrap();
    let rig = Rig::at(&over_postgres.data_dir, Some(&url)).await;
    check_restored(&rig, &mut devices, &second).await;
    let again = folder.path().join("again");
    let third = back_up(&over_postgres, &again, false).await.unwrap();
    assert!(rows(&third, "audit") > rows(&second, "audit"));
    drop(rig);
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    let back = folder.path().join("back");
    restore(&again, &place(&back, None)).await.unwrap();
    let rig = Rig::at(&back, None).await;
    assert_eq!(rig.get("/v1/releases").await["items"].as_array().unwrap().len(), 2);
    assert!(rig.get("/v1/audit/verify").await.get("broken").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_not_whole_or_a_place_that_is_not_empty_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (data, saved) = (folder.path().join("hub"), folder.path().join("saved"));
    let nothing = place(&folder.path().join("nothing"), None);
    let error = back_up(&nothing, &saved, false).await.unwrap_err();
    assert!(matches!(error, BackupError::NoHub { .. }), "{error}");

    let rig = Rig::at(&data, None).await;
    fleet(&rig).await;
    let here = place(&data, None);
    std::fs::create_dir_all(folder.path().join("other/thing")).unwrap();
    let error = back_up(&here, &folder.path().join("other"), false).await.unwrap_err();
    assert!(matches!(error, BackupError::Occupied { .. }), "{error}");
    let contents = back_up(&here, &saved, false).await.unwrap();
    for secret in contents.secrets.keys() {
        let mode = std::fs::metadata(saved.join("secrets").join(secret)).unwrap().permissions();
        let mode = std::os::unix::fs::PermissionsExt::mode(&mode);
        assert_eq!(mode & 0o077, 0, "{secret} is for its owner alone");
    }
    assert_eq!(contents.secrets.len(), 4);

    // Over the hub itself, running or not; nothing of it is changed.
    let error = restore(&saved, &here).await.unwrap_err();
    assert!(matches!(error, BackupError::NotEmpty { .. }), "{error}");
    assert!(error.to_string().contains("hint: "), "{error}");
    drop(rig);
    let error = restore(&saved, &here).await.unwrap_err();
    assert!(matches!(error, BackupError::NotEmpty { .. }), "{error}");
    let other = Rig::at(&folder.path().join("another-hub"), None).await;
    drop(other);
    let error = restore(&saved, &place(&folder.path().join("another-hub"), None)).await;
    assert!(matches!(error, Err(BackupError::NotEmpty { .. })));

    // Damage of every part, found before anything is made.
    let new = |name: &str| place(&folder.path().join(name), None);
    let path = saved.join("tables/devices.jsonl");
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, b"[]\n").unwrap();
    let error = restore(&saved, &new("a")).await.unwrap_err();
    assert!(matches!(&error, BackupError::Damaged { .. }), "{error}");
    std::fs::write(&path, good).unwrap();
    let secret = saved.join("secrets/hub.secret");
    let good = std::fs::read(&secret).unwrap();
    std::fs::write(&secret, b"x").unwrap();
    let error = restore(&saved, &new("b")).await.unwrap_err();
    assert!(matches!(&error, BackupError::Damaged { .. }), "{error}");
    std::fs::write(&secret, good).unwrap();

    // A damaged blob is found too; with the blob mended, the same restore is gone on with.
    let blob = find_blob(&saved.join("blobs"), b"weights of m 1.0.0 q8_0");
    let good = std::fs::read(&blob).unwrap();
    // Not in place: the hub has the same file.
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, b"Weights of m 1.0.0 q8_0").unwrap();
    let error = restore(&saved, &new("c")).await.unwrap_err();
    assert!(error.to_string().contains("digest"), "{error}");
    std::fs::remove_file(&blob).unwrap();
    let error = restore(&saved, &new("c")).await.unwrap_err();
    assert!(matches!(&error, BackupError::BlobsMissing { missing: 1, .. }), "{error}");
    std::fs::write(&blob, good).unwrap();
    restore(&saved, &new("c")).await.unwrap();
    let error = restore(&saved, &new("c")).await.unwrap_err();
    assert!(matches!(error, BackupError::NotEmpty { .. }), "{error}");

    // A newer format; an interrupted backup.
    let path = saved.join("backup.json");
    let mut contents: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    contents["format"] = 2.into();
    std::fs::write(&path, contents.to_string()).unwrap();
    let error = restore(&saved, &new("d")).await.unwrap_err();
    assert!(matches!(error, BackupError::Newer { .. }), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = restore(&saved, &new("d")).await.unwrap_err();
    assert!(matches!(error, BackupError::NotWhole { .. }), "{error}");
    back_up(&here, &saved, false).await.unwrap();
    restore(&saved, &new("d")).await.unwrap();
}

fn find_blob(folder: &Path, content: &[u8]) -> std::path::PathBuf {
    let hex = slmops_artifact::Digest::of(content).hex();
    folder.join("sha256").join(&hex[..2]).join(&hex)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blobs_in_s3_stay_there_unless_they_are_copied() {
    let server = s3::S3Server::start();
    let bucket = |prefix: &str| {
        let url = format!("s3://fleet/{prefix}");
        slmops_hub::blobs::S3::parse(&url, server.settings(), None).unwrap()
    };
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("hub");
    let there =
        |name: &str, blobs| Place { data_dir: folder.path().join(name), database: None, blobs };
    let here = there("hub", Some(bucket("one")));
    let rig = Rig::of(&here).await;
    let mut devices = fleet(&rig).await;
    let desired = devices[0].desired().await;
    assert!(!data.join("blobs").exists(), "nothing of them is here");

    let named = folder.path().join("named");
    let contents = back_up(&here, &named, false).await.unwrap();
    assert!(!contents.blobs_included && contents.blobs > 3);
    let copied = folder.path().join("copied");
    assert!(back_up(&here, &copied, true).await.unwrap().blobs_included);
    drop(rig);

    // Named ones are there for a hub that uses the same store, and for no other.
    let error = restore(&named, &there("a", None)).await.unwrap_err();
    assert!(matches!(error, BackupError::BlobsMissing { .. }), "{error}");
    for (name, from, blobs) in [
        ("b", &named, Some(bucket("one"))),
        ("c", &copied, None),
        ("d", &copied, Some(bucket("two"))),
    ] {
        let place = there(name, blobs);
        restore(from, &place).await.unwrap();
        let rig = Rig::of(&place).await;
        devices[0].move_to(&rig);
        let weights = desired.model.as_ref().unwrap().weights;
        assert_eq!(devices[0].pull(&weights).await, StatusCode::OK, "{name}");
    }
}
