//! An S3 server for tests: `moto` (Python), which checks signatures and keeps objects in memory.
//! `scripts/s3-server.sh` installs it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A server with a bucket `fleet` and one user who may use it; gone when dropped.
pub(crate) struct S3Server {
    process: Child,
    address: SocketAddr,
    access_key: String,
    pub(crate) secret: String,
}

impl S3Server {
    pub(crate) fn start() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap())
    }

    /// Starts an empty one where another one was.
    pub(crate) fn at(address: SocketAddr) -> Self {
        let folder = std::env::var_os("SLMOPS_S3_VENV").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/slmops/s3-server"),
            PathBuf::from,
        );
        let program = folder.join("bin/moto_server");
        assert!(program.exists(), "no S3 server; `scripts/s3-server.sh` installs it");
        let mut process = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &address.port().to_string()])
            // As many calls as are made below; later ones must be signed.
            .env("INITIAL_NO_AUTH_ACTION_COUNT", "4")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap());
        let mut text = String::new();
        let address = loop {
            text.clear();
            let read = lines.read_line(&mut text).unwrap();
            assert!(read > 0, "the S3 server ended");
            if let Some((_, address)) = text.trim().split_once("Running on http://") {
                break address.parse().unwrap();
            }
        };
        // What it logs is read, or it would wait for that.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        let mut server =
            Self { process, address, access_key: String::new(), secret: String::new() };
        server.iam("Action=CreateUser");
        let key = server.iam("Action=CreateAccessKey");
        let policy = "Action=PutUserPolicy&PolicyName=p&PolicyDocument=%7B%22Version%22%3A%222012-10-17\
                      %22%2C%22Statement%22%3A%5B%7B%22Effect%22%3A%22Allow%22%2C%22Action%22%3A%22s3\
                      %3A%2A%22%2C%22Resource%22%3A%22%2A%22%7D%5D%7D";
        server.iam(policy);
        server.call("PUT", "/fleet", "s3", "");
        server.access_key = between(&key, "<AccessKeyId>", "</AccessKeyId>");
        server.secret = between(&key, "<SecretAccessKey>", "</SecretAccessKey>");
        server
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Environment variables that lead to it.
    pub(crate) fn settings(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", self.access_key.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.secret.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    fn iam(&self, action: &str) -> String {
        self.call("POST", "/", "iam", &format!("{action}&UserName=hub&Version=2010-05-08"))
    }

    fn call(&self, method: &str, path: &str, service: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: {}\r\nContent-Length: {}\r\n\
             Content-Type: application/x-www-form-urlencoded\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/{service}/aws4_request, \
             SignedHeaders=host, Signature=0\r\n\r\n{body}",
            self.address,
            body.len(),
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.split_whitespace().nth(1) == Some("200"), "{answer}");
        answer
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn between(text: &str, start: &str, end: &str) -> String {
    let found = text.split_once(start).and_then(|(_, rest)| rest.split_once(end));
    found.expect("the answer names it").0.to_owned()
}
