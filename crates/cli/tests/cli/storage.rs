//! A hub whose tables are in PostgreSQL (by TLS) and whose packages are in S3: a release goes out to
//! a device, both are killed, and a backup makes a hub of files of it, to which the device goes over.

use std::time::Instant;

use serde_json::Value;

use crate::fleet::{Fleet, TIMEOUT, model};
use crate::{postgres, s3};

fn confirmed(devices: &[Value], above: u64) -> bool {
    devices.iter().all(|device| {
        device["report"]["generation"].as_u64().is_some_and(|generation| generation > above)
            && device["report"]["phase"] == "confirmed"
    })
}

#[test]
fn postgres_and_s3_from_start_to_restore() {
    let mut server = postgres::Server::start();
    server.database("fleet");
    let (authority, certificate, key) = postgres::certified("127.0.0.1");
    let port = server.listen_by_tls(&certificate, &key, "open sesame");
    let bucket = s3::S3Server::start();
    let secrets = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = secrets.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ca = file("ca.pem", &authority);
    let mut settings = bucket.settings();
    settings.retain(|(name, _)| name != "AWS_SECRET_ACCESS_KEY");
    for (name, value) in [
        ("SLM_DATABASE", format!("postgres://postgres@127.0.0.1:{port}/fleet?sslrootcert={ca}")),
        ("SLM_DATABASE_PASSWORD_FILE", file("password", "open sesame\n")),
        ("SLM_BLOBS", "s3://fleet/models".to_owned()),
        ("SLM_BLOBS_SECRET_FILE", file("s3", &format!("{}\n", bucket.secret))),
    ] {
        settings.push((name.to_owned(), value));
    }

    let mut fleet = Fleet::with(settings);
    fleet.suit_the_tiny_model();
    fleet.join("till", "150MB");
    fleet.wait_for("the device", |devices| devices.len() == 1 && !devices[0]["report"].is_null());
    let rollout = fleet.json(&["ship", model(), "--name", "glass", "--yes", "--version", "1.0.0"]);
    assert_eq!(rollout["state"], "completed", "{rollout}");
    assert!(!fleet.data.join("hub.db").exists() && !fleet.data.join("blobs").exists());

    // The database dies; then the hub.
    server.kill();
    assert!(!fleet.run(&["class", "list"]).status.success());
    server.resume();
    let deadline = Instant::now() + TIMEOUT;
    while !fleet.run(&["class", "list"]).status.success() {
        assert!(Instant::now() < deadline, "the hub does not come back to its database");
    }
    fleet.kill_hub();
    assert_eq!(fleet.json(&["release", "list"]).as_array().unwrap().len(), 1);

    // A password or a secret that is wrong is said with what to do, and not shown.
    let wrong = file("wrong", "close sesame");
    let data = fleet.path("wrong").display().to_string();
    let up = ["up", "--data", &data, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    for (variable, unset) in
        [("SLM_DATABASE_PASSWORD_FILE", "SLM_BLOBS"), ("SLM_BLOBS_SECRET_FILE", "SLM_DATABASE")]
    {
        let refused = fleet.slm(&up).env(variable, &wrong).env_remove(unset).output().unwrap();
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{errors}");
        assert!(errors.contains("refuses") && errors.contains("hint: "), "{errors}");
        assert!(!errors.contains("sesame"), "{errors}");
    }

    // From PostgreSQL to a file, under the same address; the device notices nothing but news.
    let told = fleet.json(&["device", "list"])[0]["desired"]["generation"].as_u64().unwrap();
    let (saved, moved) = (fleet.path("saved"), fleet.path("moved"));
    let (saved, moved_to) = (saved.display().to_string(), moved.display().to_string());
    let data = fleet.data.display().to_string();
    let backup = fleet.json(&["backup", &saved, "--data", &data]);
    assert_eq!(backup["blobs_included"], false, "{backup}");
    fleet.refused(1, &["restore", &saved, "--data", &data]);
    fleet.settings.retain(|(name, _)| !name.starts_with("SLM_DATABASE"));
    fleet.json(&["restore", &saved, "--data", &moved_to]);
    fleet.data = moved;
    fleet.kill_hub();
    fleet.wait_for("the device's confirmation", |devices| confirmed(devices, told));
    let verdict = fleet.json(&["audit", "verify"]);
    assert!(verdict.get("broken").is_none(), "{verdict}");
    assert!(fleet.data.join("hub.db").exists());
}
