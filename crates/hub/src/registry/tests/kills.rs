//! The registry in a process of its own, killed at any moment: what was answered stays, what was
//! not can be done again, and nothing is ever half.

use std::process::Stdio;
use std::time::Duration;

use rand::{Rng as _, RngCore as _, SeedableRng as _};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use super::*;

/// How often the server is killed.
const KILLS: u32 = 25;
/// The longest life of a server, in microseconds.
const LIFE_US: u64 = 60_000;
/// Names the folder to the test that is really the server.
const FOLDER_VARIABLE: &str = "SLMOPS_TEST_REGISTRY_FOLDER";

/// Not a test but the process that is killed: does nothing unless it is told a folder.
#[tokio::test]
async fn the_process_that_is_killed() {
    let Some(folder) = std::env::var_os(FOLDER_VARIABLE) else { return };
    let server = Server::start(folder.as_ref()).await;
    server.registry.sweep().await.unwrap();
    println!("\nlistening {}", server.address);
    // Ends with its parent, whatever happens to that.
    let end = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    let _ = tokio::task::spawn_blocking(end).await;
}

struct Process {
    child: Child,
    address: String,
}

async fn spawn(folder: &std::path::Path) -> Process {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["registry::tests::kills::the_process_that_is_killed", "--exact", "--nocapture"])
        .env(FOLDER_VARIABLE, folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    loop {
        let line = lines.next_line().await.unwrap().expect("the server says where it listens");
        if let Some(address) = line.strip_prefix("listening ") {
            return Process { child, address: address.to_owned() };
        }
    }
}

/// One artifact on its way in, as a client that was interrupted goes on with it.
struct Push {
    tag: String,
    bytes: Vec<u8>,
    location: Option<String>,
    resumed: u32,
}

impl Push {
    fn new(number: usize, random: &mut rand::rngs::StdRng) -> Self {
        let mut bytes = vec![0; random.random_range(1..2_000_000)];
        random.fill_bytes(&mut bytes);
        Self { tag: format!("v{number}"), bytes, location: None, resumed: 0 }
    }

    /// Goes on until the server dies (`Err`) or the artifact is there.
    async fn go_on(&mut self, address: &str) -> reqwest::Result<()> {
        let client = reqwest::Client::new();
        let request = |method: &str, path: &str| {
            let url = format!("http://{address}{path}");
            client.request(method.parse().unwrap(), url).bearer_auth(ADMIN)
        };
        let digest = Digest::of(&self.bytes);
        while request("HEAD", &format!("/v2/k/blobs/{digest}")).send().await?.status() != 200 {
            let mut offset = 0;
            if let Some(location) = &self.location {
                let response = request("GET", location).send().await?;
                match response.status() {
                    StatusCode::NO_CONTENT => {
                        let range = header_of(&response, "range");
                        let last: usize = range.strip_prefix("0-").unwrap().parse().unwrap();
                        offset = if last == 0 { 0 } else { last + 1 };
                        self.resumed += u32::from(offset > 0);
                    }
                    _ => self.location = None,
                }
            }
            if self.location.is_none() {
                let response = request("POST", "/v2/k/blobs/uploads/").send().await?;
                assert_eq!(response.status(), StatusCode::ACCEPTED);
                self.location = Some(header_of(&response, "location"));
            }
            let location = self.location.clone().unwrap();
            for chunk in self.bytes[offset..].chunks(300_000) {
                let range = format!("{offset}-{}", offset + chunk.len() - 1);
                let patch = request("PATCH", &location).header("content-range", range);
                let response = patch.body(chunk.to_vec()).send().await?;
                assert_eq!(response.status(), StatusCode::ACCEPTED);
                offset += chunk.len();
            }
            let put = request("PUT", &format!("{location}?digest={digest}")).send().await?;
            // Killed after the bytes were in place and before their row: to be sent again.
            if put.status() != StatusCode::CREATED {
                self.location = None;
            }
        }
        let mut body = artifact(&self.bytes);
        body["config"] = body["layers"][0].clone();
        let put = request("PUT", &format!("/v2/k/manifests/{}", self.tag));
        let response = put.header("content-type", IMAGE).body(body.to_string()).send().await?;
        assert_eq!(response.status(), StatusCode::CREATED);
        Ok(())
    }
}

#[tokio::test]
async fn killed_at_any_moment_it_keeps_what_it_answered() {
    let folder = tempfile::tempdir().unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut random = rand::rngs::StdRng::seed_from_u64(1);
    let mut pushed = Vec::new();
    let mut push = Push::new(0, &mut random);
    for _ in 0..KILLS {
        let mut process = spawn(folder.path()).await;
        let life = Duration::from_micros(random.random_range(0..LIFE_US));
        let work = async {
            while push.go_on(&process.address).await.is_ok() {
                let next = Push::new(pushed.len() + 1, &mut random);
                pushed.push(std::mem::replace(&mut push, next));
            }
        };
        // SIGKILL at a moment that the work does not choose.
        let _ = tokio::time::timeout(life, work).await;
        process.child.kill().await.unwrap();
    }
    let server = Server::start(folder.path()).await;
    server.registry.sweep().await.unwrap();
    push.go_on(&server.address.to_string()).await.expect("the last push is finished");
    pushed.push(push);

    let name = "k".parse().unwrap();
    for push in &pushed {
        let tag = Reference::Tag(push.tag.clone());
        let manifest = server.registry.manifest(&name, &tag).await.unwrap();
        let manifest = manifest.unwrap_or_else(|| panic!("{} was answered and is lost", push.tag));
        assert_eq!(Digest::of(&manifest.content), manifest.digest);
        let digest = Digest::of(&push.bytes);
        let bytes = server.registry.blob(&name, &digest, push.bytes.len()).await.unwrap();
        assert!(bytes == push.bytes, "{} is whole", push.tag);
    }
    assert_eq!(server.registry.inner.blobs.list().count().await, pushed.len());
    assert!(server.registry.inner.blobs.staged().await.unwrap().is_empty());
}
