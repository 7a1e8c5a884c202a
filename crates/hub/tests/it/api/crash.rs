//! SIGKILL of the hub at any moment: nothing acknowledged is lost, and the audit chain is whole.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use slmops_hub::{Hub, HubConfig};

/// Kills in one test run.
const KILLS: u64 = 12;
/// The data folder of the hub that a child process runs.
const DATA_VARIABLE: &str = "SLMOPS_TEST_HUB_DATA";

/// Not a test by itself: the process that [`acknowledged_changes_survive_kills`] kills.
#[tokio::test]
async fn hub_process() {
    let Some(data_dir) = std::env::var_os(DATA_VARIABLE) else { return };
    let config = HubConfig {
        database: None,
        blobs: None,
        data_dir: data_dir.into(),
        listen: None,
        http: Some("127.0.0.1:0".parse().unwrap()),
        names: vec![],
        public_url: None,
        keep: Default::default(),
        encode: slmops_hub::deltas::encode_on_thread,
    };
    let mut hub = Hub::start(config).await.unwrap();
    println!("\nlistening on {}", hub.http.unwrap());
    hub.wait().await.unwrap();
}

pub fn spawn(data: &Path) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "api::crash::hub_process", "--nocapture"])
        .env(DATA_VARIABLE, data)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for line in lines {
        if let Some(address) = line.unwrap().strip_prefix("listening on ") {
            return (child, format!("http://{address}"));
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("the hub did not start");
}

pub async fn get(client: &Client, url: &str, token: &str) -> Value {
    let response = client.get(url).bearer_auth(token).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK, "{url}");
    response.json().await.unwrap()
}

#[tokio::test]
async fn acknowledged_changes_survive_kills() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("hub");
    // Another test of this process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    let mut acknowledged: Vec<String> = Vec::new();
    let mut entries = 0;
    for round in 0..=KILLS {
        let (mut child, url) = spawn(&data);
        let token = std::fs::read_to_string(data.join("admin.token")).unwrap();
        let token = token.trim().to_owned();

        // What was acknowledged is there, and the chain is whole and no shorter.
        let classes = get(&client, &format!("{url}/v1/classes"), &token).await.to_string();
        for name in &acknowledged {
            assert!(classes.contains(&format!("\"{name}\"")), "{name} was lost in round {round}");
        }
        let verdict = get(&client, &format!("{url}/v1/audit/verify"), &token).await;
        assert!(verdict.get("broken").is_none(), "{verdict}");
        let found = verdict["entries"].as_u64().unwrap();
        assert!(found >= entries, "the audit log shrank from {entries}: {verdict}");
        assert!(found >= acknowledged.len() as u64, "{verdict}");
        entries = found;
        if round == KILLS {
            child.kill().unwrap();
            child.wait().unwrap();
            break;
        }

        // Changes from four clients at once, and a kill somewhere among them.
        let clients = (0..4).map(|number| {
            let (client, url, token) = (client.clone(), url.clone(), token.clone());
            tokio::spawn(async move {
                let mut done = Vec::new();
                for change in 0.. {
                    let name = format!("k{round}-{number}-{change}");
                    let body = json!({
                        "name": name, "min_memory_bytes": 1, "quantisation": "Q8_0",
                    });
                    let request = client.put(format!("{url}/v1/classes/{name}"));
                    match request.bearer_auth(&token).json(&body).send().await {
                        Ok(response) if response.status() == StatusCode::OK => done.push(name),
                        _ => break,
                    }
                }
                done
            })
        });
        let clients: Vec<_> = clients.collect();
        // A different moment in each round; what matters is that work is under way.
        tokio::time::sleep(Duration::from_millis(3 + round * 7 % 40)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        for client in clients {
            acknowledged.extend(client.await.unwrap());
        }
    }
    assert!(!acknowledged.is_empty(), "no change was ever acknowledged");
}
