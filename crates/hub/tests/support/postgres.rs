//! A PostgreSQL server for tests, in a private folder; gone when dropped. The server refuses to run
//! as root, so root runs it as the user `postgres`.

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to start.
const SERVER_START: Duration = Duration::from_secs(120);

pub(crate) struct Server {
    folder: tempfile::TempDir,
    programs: PathBuf,
    process: Option<Child>,
    /// The port on loopback, if it speaks TLS there.
    port: Option<u16>,
}

impl Server {
    /// A server that is reached by a socket in its folder.
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        give_away(folder.path());
        let mut server = Self { folder, programs: programs(), process: None, port: None };
        let mut init = server.command("initdb");
        init.args(["--username=postgres", "--auth=trust", "--no-sync", "--locale=C.UTF-8"]);
        let made = init.arg("-D").arg(server.folder.path().join("data")).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        server.resume();
        server
    }

    /// Speaks TLS too from now on, on a port of 127.0.0.1; only the owner of a password gets in there.
    pub(crate) fn listen_by_tls(&mut self, certificate: &str, key: &str, password: &str) -> u16 {
        self.query("postgres", &format!("ALTER USER postgres PASSWORD '{password}'"));
        self.kill();
        let data = self.folder.path().join("data");
        for (name, text) in [
            ("server.crt", certificate),
            ("server.key", key),
            ("pg_hba.conf", "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"),
        ] {
            let path = data.join(name);
            let _ = std::fs::remove_file(&path);
            std::fs::write(&path, text).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            std::fs::set_permissions(&path, mode).unwrap();
            give_away(&path);
        }
        // Free now; the server takes no port 0.
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        self.port = Some(free);
        self.resume();
        free
    }

    fn command(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut command = Command::new(&program);
        if rustix::process::getuid().is_root() {
            command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
            // The server must not outlive a test that is killed.
            command.args(["--pdeathsig=QUIT", "--"]).arg(program);
        }
        command.current_dir(self.folder.path());
        command
    }

    /// Starts the server again on what it kept.
    pub(crate) fn resume(&mut self) {
        let mut command = self.command("postgres");
        command.arg("-D").arg(self.folder.path().join("data")).arg("-k").arg(self.folder.path());
        command.args(["-c", "max_connections=60"]);
        match self.port {
            None => command.args(["-c", "listen_addresses="]),
            Some(port) => command
                .args(["-c", "listen_addresses=127.0.0.1", "-c", "ssl=on", "-p"])
                .arg(port.to_string()),
        };
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let started = Instant::now();
        loop {
            // After a kill it refuses to start until the last of its processes has ended.
            if process.try_wait().unwrap().is_some() {
                process = command.spawn().unwrap();
            }
            if self.client("pg_isready").arg("-q").status().unwrap().success() {
                self.process = Some(process);
                return;
            }
            assert!(started.elapsed() < SERVER_START, "the server does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it as a loss of power would.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().expect("the server runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// One of PostgreSQL's own programs, told where the server is.
    pub(crate) fn client(&self, program: &str) -> Command {
        let mut command = self.command(program);
        command.arg("-h").arg(self.folder.path());
        command.args(["-p", &self.port.unwrap_or(5432).to_string()]);
        if program != "pg_isready" {
            command.args(["-U", "postgres"]);
        }
        command
    }

    /// Makes the database `name`; its URL.
    pub(crate) fn database(&self, name: &str) -> String {
        run(self.client("createdb").args(["--", name]), "");
        self.url(name)
    }

    pub(crate) fn url(&self, name: &str) -> String {
        let folder = self.folder.path().to_str().unwrap().replace('/', "%2F");
        format!("postgres://postgres@{folder}/{name}")
    }

    /// Runs SQL; the rows, columns separated by `|`.
    pub(crate) fn query(&self, database: &str, sql: &str) -> String {
        let mut psql = self.client("psql");
        run(psql.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", database]), sql)
    }
}

/// Runs a program with `input`; what it says.
pub(crate) fn run(command: &mut Command, input: &str) -> String {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let text = input.to_owned();
    let writer = std::thread::spawn(move || stdin.write_all(text.as_bytes()));
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    writer.join().unwrap().unwrap();
    String::from_utf8(done.stdout).unwrap()
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // SIGQUIT: end at once, with every process of the server.
            let pid = rustix::process::Pid::from_child(&process);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
            let _ = process.wait();
        }
    }
}

/// Root gives what it made to the user who runs the server.
fn give_away(path: &Path) {
    if rustix::process::getuid().is_root() {
        let found = Command::new("id").args(["-u", "postgres"]).output().unwrap();
        let user = String::from_utf8(found.stdout).unwrap().trim().parse().ok();
        let user: u32 = user.expect("the user `postgres`, which its package makes");
        std::os::unix::fs::chown(path, Some(user), None).unwrap();
    }
}

/// The folder of the server's programs, which Debian keeps out of PATH.
fn programs() -> PathBuf {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = debian.map(|entry| entry.path().join("bin")).collect();
    found.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let found = found.into_iter().find(|folder| folder.join("initdb").exists());
    found.expect("PostgreSQL's server programs; `scripts/setup.sh test` installs them")
}

/// An authority and a certificate that it signed for `name`: the authority's certificate, that
/// certificate, and its key, all PEM.
pub(crate) fn certified(name: &str) -> (String, String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::default();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = authority.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(authority, key);
    let key = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
    let server = server.signed_by(&key, &issuer).unwrap();
    (certificate.pem(), server.pem(), key.serialize_pem())
}
