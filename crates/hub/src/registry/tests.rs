use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use slmops_api::DeviceId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::manifest::INDEX_MEDIA_TYPE;
use super::*;
use crate::auth::{HubSecret, LookupError, Operator, Principals, SecretHash};
use crate::blobs::S3;
use crate::blobs::tests::S3Server;
use crate::db::{DbError, params};
use crate::events::Place;

mod kills;

const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const ADMIN: &str = "slmt_admin";
const OPERATOR: &str = "slmt_operator";
const VIEWER: &str = "slmt_viewer";

struct Known;

impl Principals for Known {
    fn operator(&self, hash: SecretHash) -> BoxFuture<'_, Result<Option<Operator>, LookupError>> {
        let all = [(ADMIN, Role::Admin), (OPERATOR, Role::Operator), (VIEWER, Role::Viewer)];
        let found = all.into_iter().find(|(token, _)| SecretHash::of(token) == hash);
        let found = found.map(|(token, role)| Operator { name: token[5..].to_owned(), role });
        Box::pin(async move { Ok(found) })
    }

    fn device(&self, _: &DeviceId) -> Option<Arc<Place>> {
        Some(Arc::new(Place::for_tests()))
    }
}

/// A registry served on a port of its own over a folder that may be kept.
struct Server {
    folder: PathBuf,
    address: SocketAddr,
    registry: Registry,
    client: reqwest::Client,
    token: &'static str,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Server {
    async fn start(folder: &std::path::Path) -> Self {
        Self::observed(folder, None).await
    }

    async fn observed(folder: &std::path::Path, on_change: Option<OnChange>) -> Self {
        // A server that was stopped just now may still close its connections.
        let db = wait_for(|| async { Database::open(folder, &[SCHEMA]).ok() }).await;
        Self::over(db, folder, on_change).await
    }

    async fn over(db: Database, folder: &std::path::Path, on_change: Option<OnChange>) -> Self {
        Self::with_blobs(db, Blobs::open(folder).unwrap(), folder, on_change).await
    }

    async fn with_blobs(
        db: Database,
        blobs: Blobs,
        folder: &std::path::Path,
        on_change: Option<OnChange>,
    ) -> Self {
        // The client wants a default provider even for plain HTTP; a second install is no harm.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let auth = Auth::new(HubSecret::generate(), Arc::new(Known));
        let registry = Registry::with_observer(db, blobs, auth, on_change);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = router(registry.clone()).into_make_service_with_connect_info::<SocketAddr>();
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let client = reqwest::Client::new();
        let folder = folder.to_owned();
        Self { folder, address, registry, client, token: ADMIN, serving }
    }

    /// Stops as a kill would, and starts again on the same folder.
    async fn restart(self) -> Self {
        let folder = self.folder.clone();
        drop(self);
        Self::start(&folder).await
    }

    fn request(&self, method: &str, path: &str) -> RequestBuilder {
        let url = format!("http://{}{path}", self.address);
        self.client.request(method.parse().unwrap(), url).bearer_auth(self.token)
    }

    async fn get(&self, path: &str) -> Response {
        self.request("GET", path).send().await.unwrap()
    }

    /// Starts an upload; its location.
    async fn begin(&self, name: &str) -> String {
        let response = self.request("POST", &format!("/v2/{name}/blobs/uploads/")).send().await;
        let response = expect(response.unwrap(), StatusCode::ACCEPTED).await;
        header_of(&response, "location")
    }

    async fn push_blob(&self, name: &str, bytes: &'static [u8]) -> Digest {
        let digest = Digest::of(bytes);
        let location = self.begin(name).await;
        let put = self.request("PUT", &format!("{location}?digest={digest}")).body(bytes);
        let response = expect(put.send().await.unwrap(), StatusCode::CREATED).await;
        assert_eq!(header_of(&response, "docker-content-digest"), digest.to_string());
        digest
    }

    async fn put_manifest(
        &self,
        name: &str,
        reference: &str,
        kind: &str,
        body: &Value,
    ) -> Response {
        let put = self.request("PUT", &format!("/v2/{name}/manifests/{reference}"));
        put.header("content-type", kind).body(body.to_string()).send().await.unwrap()
    }

    /// Pushes a small artifact under a tag; its digest.
    async fn push_artifact(&self, name: &str, tag: &str, weights: &'static [u8]) -> Digest {
        self.push_blob(name, b"{}").await;
        self.push_blob(name, weights).await;
        let body = artifact(weights);
        let response = self.put_manifest(name, tag, IMAGE, &body).await;
        expect(response, StatusCode::CREATED).await;
        Digest::of(body.to_string().as_bytes())
    }

    /// Sends bytes as they are, and reads the answer until the server closes.
    async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        tokio::time::timeout(Duration::from_secs(20), read).await.unwrap().unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }
}

async fn wait_for<T, F: Future<Output = Option<T>>>(mut check: impl FnMut() -> F) -> T {
    let wait = async {
        loop {
            if let Some(value) = check().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.expect("it happens in time")
}

fn header_of(response: &Response, name: &str) -> String {
    let value = response.headers().get(name).unwrap_or_else(|| panic!("header {name}"));
    value.to_str().unwrap().to_owned()
}

async fn expect(response: Response, status: StatusCode) -> Response {
    if response.status() == status {
        return response;
    }
    panic!("{} instead of {status}: {}", response.status(), response.text().await.unwrap());
}

/// The error code of an answer with this status.
async fn refusal(response: Response, status: StatusCode) -> String {
    let body: Value = expect(response, status).await.json().await.unwrap();
    assert!(body["errors"][0]["message"].as_str().is_some_and(|text| !text.is_empty()), "{body}");
    body["errors"][0]["code"].as_str().unwrap().to_owned()
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() })
}

fn artifact(weights: &[u8]) -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": IMAGE,
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": descriptor("application/vnd.cncf.model.config.v1+json", b"{}"),
        "layers": [descriptor("application/vnd.cncf.model.weight.v1.raw", weights)],
    })
}

macro_rules! server {
    ($server:ident) => {
        let folder = tempfile::tempdir().unwrap();
        #[allow(unused_mut)]
        let mut $server = Server::start(folder.path()).await;
    };
}

macro_rules! every_check {
    ($then:ident) => {
        $then! {
            callers_and_roles,
            blobs_in_one_piece_and_in_chunks,
            chunks_out_of_order_are_refused_and_change_nothing,
            a_wrong_digest_ends_the_upload,
            an_upload_can_be_cancelled,
            writers_of_one_upload_take_turns,
            parts_of_blobs,
            blobs_are_mounted_from_other_repositories,
            bad_manifests_are_refused,
            an_index_needs_its_manifests,
            tags_and_catalogue_come_in_pages,
            referrers_are_listed_by_type,
            deleting,
            hostile_paths_and_lengths,
            a_sweep_removes_what_kills_left_and_nothing_else,
            lost_bytes_are_not_here_until_they_are_pushed_again,
        }
    };
}

mod over_sqlite {
    use super::*;

    macro_rules! one_test_each {
        ($($check:ident),+ $(,)?) => {
            $(
                #[tokio::test]
                async fn $check() {
                    server!(server);
                    super::$check(server).await;
                }
            )+
        };
    }

    every_check!(one_test_each);
}

mod over_postgres {
    use super::*;

    macro_rules! in_turn {
        ($($check:ident),+ $(,)?) => {
            /// One server, a database for each check.
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn every_check() {
                let postgres = crate::db::tests::Server::start();
                $(
                    let folder = tempfile::tempdir().unwrap();
                    let place = crate::db::tests::fresh(&postgres, stringify!($check));
                    let open = move || Database::open_postgres(place, &[SCHEMA]);
                    let db = tokio::task::spawn_blocking(open).await.unwrap().unwrap();
                    super::$check(Server::over(db, folder.path(), None).await).await;
                )+
            }
        };
    }

    every_check!(in_turn);
}

async fn callers_and_roles(server: Server) {
    let url = |path: &str| format!("http://{}{path}", server.address);
    let bare = server.client.get(url("/v2/")).send().await.unwrap();
    assert_eq!(header_of(&bare, "www-authenticate"), "Basic realm=\"slmops\"");
    assert_eq!(header_of(&bare, "docker-distribution-api-version"), "registry/2.0");
    assert_eq!(refusal(bare, StatusCode::UNAUTHORIZED).await, "UNAUTHORIZED");
    for path in ["/v2", "/v2/"] {
        let basic = server.client.get(url(path)).basic_auth("anyone", Some(VIEWER));
        expect(basic.send().await.unwrap(), StatusCode::OK).await;
    }

    let digest = server.push_artifact("m", "1", b"weights").await;
    let device = server.registry.inner.auth.clone();
    let device = device.issue_for_tests(&"dev-1".parse().unwrap());
    // method, path, and the lowest role that may: viewer 0 (and devices), operator 1, admin 2.
    let blob = format!("/v2/m/blobs/{}", Digest::of(b"weights"));
    let calls = [
        ("GET", "/v2/m/manifests/1".to_owned(), 0),
        ("HEAD", blob.clone(), 0),
        ("POST", "/v2/m/blobs/uploads/".to_owned(), 1),
        ("PUT", "/v2/m/manifests/2".to_owned(), 1),
        ("DELETE", format!("/v2/m/manifests/{digest}"), 2),
        ("DELETE", blob, 2),
    ];
    for (method, path, lowest) in calls {
        for (token, rank) in [(device.as_str(), 0), (VIEWER, 0), (OPERATOR, 1), (ADMIN, 2)] {
            let request = server.client.request(method.parse().unwrap(), url(&path));
            let response = request.bearer_auth(token).send().await.unwrap();
            let refused = response.status() == StatusCode::FORBIDDEN;
            assert_eq!(refused, rank < lowest, "{token} {method} {path}: {}", response.status());
        }
    }
}

async fn blobs_in_one_piece_and_in_chunks(server: Server) {
    let all: &[u8] = b"0123456789abcdef";
    let digest = Digest::of(all);
    // In the first request.
    let post = server.request("POST", &format!("/v2/one/blobs/uploads/?digest={digest}"));
    let response = expect(post.body(all).send().await.unwrap(), StatusCode::CREATED).await;
    let blob = header_of(&response, "location");
    assert_eq!(blob, format!("/v2/one/blobs/{digest}"));
    assert_eq!(server.get(&blob).await.bytes().await.unwrap(), all);

    // In chunks, the last of them with the closing request, once with ranges and once without.
    for with_ranges in [true, false] {
        let location = server.begin("two/chunks").await;
        let chunk = |method: &str, path: &str, range: &str, bytes: &'static [u8]| {
            let request = server.request(method, path).body(bytes);
            match with_ranges {
                true => request.header("content-range", range),
                false => request,
            }
        };
        let response = chunk("PATCH", &location, "0-4", b"01234").send().await.unwrap();
        let response = expect(response, StatusCode::ACCEPTED).await;
        assert_eq!(header_of(&response, "range"), "0-4");
        let location = header_of(&response, "location");
        let response = server.get(&location).await;
        let response = expect(response, StatusCode::NO_CONTENT).await;
        assert_eq!(header_of(&response, "range"), "0-4");
        let response = chunk("PATCH", &location, "5-9", b"56789").send().await.unwrap();
        assert_eq!(header_of(&response, "range"), "0-9");
        let path = format!("{location}?digest={digest}");
        let response = chunk("PUT", &path, "10-15", b"abcdef").send().await.unwrap();
        expect(response, StatusCode::CREATED).await;
        let late = chunk("PATCH", &location, "16-16", b"x").send().await.unwrap();
        assert_eq!(refusal(late, StatusCode::NOT_FOUND).await, "BLOB_UPLOAD_UNKNOWN");
    }
    let head = server.request("HEAD", &format!("/v2/two/chunks/blobs/{digest}")).send().await;
    let head = expect(head.unwrap(), StatusCode::OK).await;
    assert_eq!(header_of(&head, "content-length"), "16");
    assert_eq!(header_of(&head, "docker-content-digest"), digest.to_string());
    // A blob of one repository is not one of another.
    let response = server.get(&format!("/v2/three/blobs/{digest}")).await;
    assert_eq!(refusal(response, StatusCode::NOT_FOUND).await, "BLOB_UNKNOWN");
}

async fn chunks_out_of_order_are_refused_and_change_nothing(server: Server) {
    let location = server.begin("m").await;
    let patch = |range: &'static str, bytes: &'static [u8]| {
        server.request("PATCH", &location).header("content-range", range).body(bytes).send()
    };
    expect(patch("0-2", b"abc").await.unwrap(), StatusCode::ACCEPTED).await;
    for (range, bytes) in [("4-5", b"xx".as_slice()), ("0-2", b"abc"), ("2-3", b"cd")] {
        let response = patch(range, bytes).await.unwrap();
        assert_eq!(header_of(&response, "range"), "0-2", "{range}");
        assert_eq!(header_of(&response, "location"), location);
        let code = refusal(response, StatusCode::RANGE_NOT_SATISFIABLE).await;
        assert_eq!(code, "BLOB_UPLOAD_INVALID");
    }
    // The range and the body disagree.
    for range in ["3-3", "3-9"] {
        let response = patch(range, b"def").await.unwrap();
        assert_eq!(refusal(response, StatusCode::BAD_REQUEST).await, "SIZE_INVALID");
    }
    let response = patch("five-six", b"def").await.unwrap();
    assert_eq!(refusal(response, StatusCode::BAD_REQUEST).await, "BLOB_UPLOAD_INVALID");
    let digest = Digest::of(b"abcdef");
    let put = server.request("PUT", &format!("{location}?digest={digest}")).body("def");
    expect(put.send().await.unwrap(), StatusCode::CREATED).await;
}

async fn a_wrong_digest_ends_the_upload(server: Server) {
    for digest in ["", "?digest=", "?digest=sha256:00", "?digest=md5:00"] {
        let location = server.begin("m").await;
        let put = server.request("PUT", &format!("{location}{digest}")).body("abc");
        let code = refusal(put.send().await.unwrap(), StatusCode::BAD_REQUEST).await;
        assert_eq!(code, "DIGEST_INVALID", "{digest}");
        expect(server.get(&location).await, StatusCode::NO_CONTENT).await;
    }
    let wrong = Digest::of(b"other");
    let location = server.begin("m").await;
    let put = server.request("PUT", &format!("{location}?digest={wrong}")).body("abc");
    assert_eq!(refusal(put.send().await.unwrap(), StatusCode::BAD_REQUEST).await, "DIGEST_INVALID");
    expect(server.get(&location).await, StatusCode::NOT_FOUND).await;
    let post = server.request("POST", &format!("/v2/m/blobs/uploads/?digest={wrong}")).body("abc");
    assert_eq!(
        refusal(post.send().await.unwrap(), StatusCode::BAD_REQUEST).await,
        "DIGEST_INVALID"
    );
    expect(server.get(&format!("/v2/m/blobs/{wrong}")).await, StatusCode::NOT_FOUND).await;
    assert_eq!(server.registry.inner.blobs.list().count().await, 0);
}

async fn an_upload_can_be_cancelled(server: Server) {
    let location = server.begin("m").await;
    server.request("PATCH", &location).body("abc").send().await.unwrap();
    let cancelled = server.request("DELETE", &location).send().await.unwrap();
    expect(cancelled, StatusCode::NO_CONTENT).await;
    for method in ["GET", "PATCH", "PUT", "DELETE"] {
        let response = server.request(method, &format!("{location}?digest={}", Digest::of(b"")));
        let code = refusal(response.send().await.unwrap(), StatusCode::NOT_FOUND).await;
        assert_eq!(code, "BLOB_UPLOAD_UNKNOWN", "{method}");
    }
    assert!(server.registry.inner.blobs.staged().await.unwrap().is_empty());
    // An upload belongs to its repository.
    let location = server.begin("m").await.replace("/v2/m/", "/v2/other/");
    expect(server.get(&location).await, StatusCode::NOT_FOUND).await;
}

#[tokio::test]
async fn an_upload_goes_on_after_a_restart_and_a_cut_connection() {
    server!(server);
    let location = server.begin("m").await;
    server.request("PATCH", &location).body("0123").send().await.unwrap();
    let server = server.restart().await;
    let response = expect(server.get(&location).await, StatusCode::NO_CONTENT).await;
    assert_eq!(header_of(&response, "range"), "0-3");

    // 6 of 12 announced bytes, then the connection is gone.
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!(
        "PATCH {location} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\nContent-Length: 12\r\n\r\n456789"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    wait_for(|| async {
        let response = server.get(&location).await;
        (header_of(&response, "range") == "0-9").then_some(())
    })
    .await;
    drop(stream);
    let patch = server.request("PATCH", &location).header("content-range", "10-15").body("abcdef");
    let response = expect(patch.send().await.unwrap(), StatusCode::ACCEPTED).await;
    assert_eq!(header_of(&response, "range"), "0-15");
    let server = server.restart().await;
    let digest = Digest::of(b"0123456789abcdef");
    let put = server.request("PUT", &format!("{location}?digest={digest}"));
    expect(put.send().await.unwrap(), StatusCode::CREATED).await;
}

async fn writers_of_one_upload_take_turns(server: Server) {
    let location = server.begin("m").await;
    let send = || server.request("PATCH", &location).body(vec![b'x'; 100_000]).send();
    let sent = futures_util::future::join_all((0..8).map(|_| send())).await;
    for response in sent {
        expect(response.unwrap(), StatusCode::ACCEPTED).await;
    }
    let digest = Digest::of(&vec![b'x'; 800_000]);
    let put = server.request("PUT", &format!("{location}?digest={digest}"));
    expect(put.send().await.unwrap(), StatusCode::CREATED).await;
}

async fn parts_of_blobs(server: Server) {
    let digest = server.push_blob("m", b"0123456789").await;
    let path = format!("/v2/m/blobs/{digest}");
    let ranged = |range: &'static str| server.request("GET", &path).header("range", range).send();
    let response = expect(ranged("bytes=3-5").await.unwrap(), StatusCode::PARTIAL_CONTENT).await;
    assert_eq!(header_of(&response, "content-range"), "bytes 3-5/10");
    assert_eq!(response.bytes().await.unwrap(), "345");
    let response = expect(ranged("bytes=7-").await.unwrap(), StatusCode::PARTIAL_CONTENT).await;
    assert_eq!(response.bytes().await.unwrap(), "789");
    let response =
        expect(ranged("bytes=10-").await.unwrap(), StatusCode::RANGE_NOT_SATISFIABLE).await;
    assert_eq!(header_of(&response, "content-range"), "bytes */10");
    let response = expect(ranged("bytes=0-1,3-4").await.unwrap(), StatusCode::OK).await;
    assert_eq!(header_of(&response, "accept-ranges"), "bytes");
    let empty = server.push_blob("m", b"").await;
    let response = expect(server.get(&format!("/v2/m/blobs/{empty}")).await, StatusCode::OK).await;
    assert_eq!(response.bytes().await.unwrap(), "");
}

async fn blobs_are_mounted_from_other_repositories(server: Server) {
    let digest = server.push_blob("from", b"shared").await;
    let post = async |query: String| {
        let post = server.request("POST", &format!("/v2/to/blobs/uploads/?{query}"));
        post.send().await.unwrap()
    };
    let response = post(format!("mount={digest}&from=from")).await;
    let response = expect(response, StatusCode::CREATED).await;
    expect(server.get(&header_of(&response, "location")).await, StatusCode::OK).await;
    expect(post(format!("mount={digest}")).await, StatusCode::CREATED).await;
    // What cannot be mounted becomes an upload.
    let other = Digest::of(b"not here");
    for query in [
        format!("mount={other}&from=from"),
        format!("mount={digest}&from=nobody"),
        format!("mount={other}"),
    ] {
        expect(post(query).await, StatusCode::ACCEPTED).await;
    }
    expect(post(format!("mount={digest}&from=../x")).await, StatusCode::BAD_REQUEST).await;
    expect(post("mount=x".to_owned()).await, StatusCode::BAD_REQUEST).await;
}

#[tokio::test]
async fn manifests_by_tag_and_digest() {
    server!(server);
    let digest = server.push_artifact("models/m", "1.0.0", b"weights").await;
    for reference in
        ["1.0.0".to_owned(), digest.to_string(), digest.to_string().replace(':', "%3A")]
    {
        let path = format!("/v2/models/m/manifests/{reference}");
        let response = expect(server.get(&path).await, StatusCode::OK).await;
        assert_eq!(header_of(&response, "content-type"), IMAGE);
        assert_eq!(header_of(&response, "docker-content-digest"), digest.to_string());
        assert_eq!(Digest::of(&response.bytes().await.unwrap()), digest);
        let head = server.request("HEAD", &path).send().await.unwrap();
        assert!(header_of(&head, "content-length").parse::<usize>().unwrap() > 100);
    }
    // A tag moves; the manifest it named stays.
    let second = server.push_artifact("models/m", "1.0.0", b"other weights").await;
    let moved = server.get("/v2/models/m/manifests/1.0.0").await;
    assert_eq!(header_of(&moved, "docker-content-digest"), second.to_string());
    expect(server.get(&format!("/v2/models/m/manifests/{digest}")).await, StatusCode::OK).await;
    let missing = server.get("/v2/models/m/manifests/2.0.0").await;
    assert_eq!(refusal(missing, StatusCode::NOT_FOUND).await, "MANIFEST_UNKNOWN");
    // By its digest, twice.
    let body = artifact(b"weights");
    for _ in 0..2 {
        let response = server.put_manifest("models/m", &digest.to_string(), IMAGE, &body).await;
        expect(response, StatusCode::CREATED).await;
    }
    // And after a restart.
    let server = server.restart().await;
    expect(server.get("/v2/models/m/manifests/1.0.0").await, StatusCode::OK).await;
}

async fn bad_manifests_are_refused(server: Server) {
    server.push_artifact("m", "good", b"weights").await;
    let good = artifact(b"weights");
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = good.clone();
        change(&mut body);
        body
    };
    let bad = [
        with(&|body| body["schemaVersion"] = json!(1)),
        with(&|body| body["mediaType"] = json!(INDEX_MEDIA_TYPE)),
        with(&|body| body["config"] = json!(null)),
        with(&|body| drop(body.as_object_mut().unwrap().remove("layers"))),
        with(&|body| body["layers"][0]["digest"] = json!("sha256:zz")),
        with(&|body| body["layers"][0]["size"] = json!(-1)),
        with(&|body| body["layers"][0]["size"] = json!(8)),
        with(&|body| body["layers"] = json!(vec![body["layers"][0].clone(); MAX_DESCRIPTORS + 1])),
        with(&|body| body["annotations"] = json!({"a": 1})),
        with(&|body| body["artifactType"] = json!("a".repeat(1000))),
        json!([]),
        json!("text"),
    ];
    for body in bad {
        let response = server.put_manifest("m", "bad", IMAGE, &body).await;
        let code = refusal(response, StatusCode::BAD_REQUEST).await;
        assert_eq!(code, "MANIFEST_INVALID", "{body}");
    }
    let missing = artifact(b"never pushed");
    let response = server.put_manifest("m", "bad", IMAGE, &missing).await;
    assert_eq!(refusal(response, StatusCode::NOT_FOUND).await, "MANIFEST_BLOB_UNKNOWN");
    let response = server.put_manifest("m", &Digest::of(b"x").to_string(), IMAGE, &good).await;
    assert_eq!(refusal(response, StatusCode::BAD_REQUEST).await, "DIGEST_INVALID");
    for kind in ["text/plain", INDEX_MEDIA_TYPE] {
        let response = server.put_manifest("m", "bad", kind, &good).await;
        assert_eq!(refusal(response, StatusCode::BAD_REQUEST).await, "MANIFEST_INVALID");
    }
    let put = |body: Vec<u8>| {
        let put = server.request("PUT", "/v2/m/manifests/bad").header("content-type", IMAGE);
        put.body(body).send()
    };
    let deep = put([vec![b'['; 100_000], vec![b']'; 100_000]].concat()).await.unwrap();
    assert_eq!(refusal(deep, StatusCode::BAD_REQUEST).await, "MANIFEST_INVALID");
    let large = put(vec![b' '; MAX_MANIFEST_BYTES + 1]).await.unwrap();
    assert_eq!(refusal(large, StatusCode::PAYLOAD_TOO_LARGE).await, "MANIFEST_INVALID");
    expect(server.get("/v2/m/manifests/bad").await, StatusCode::NOT_FOUND).await;
    // A refused manifest makes no repository, either.
    server.put_manifest("new", "bad", IMAGE, &missing).await;
    let tags = server.get("/v2/new/tags/list").await;
    assert_eq!(refusal(tags, StatusCode::NOT_FOUND).await, "NAME_UNKNOWN");
}

async fn an_index_needs_its_manifests(server: Server) {
    let child = server.push_artifact("m", "1", b"weights").await;
    let size = artifact(b"weights").to_string().len();
    let index = |digest: Digest| {
        json!({
            "schemaVersion": 2,
            "mediaType": INDEX_MEDIA_TYPE,
            "manifests": [{ "mediaType": IMAGE, "digest": digest, "size": size }],
        })
    };
    let put = async |body: Value| server.put_manifest("m", "all", INDEX_MEDIA_TYPE, &body).await;
    expect(put(index(child)).await, StatusCode::CREATED).await;
    let missing = put(index(Digest::of(b"x"))).await;
    assert_eq!(refusal(missing, StatusCode::NOT_FOUND).await, "MANIFEST_BLOB_UNKNOWN");
    let path = format!("/v2/m/manifests/{child}");
    let kept = server.request("DELETE", &path).send().await.unwrap();
    assert_eq!(refusal(kept, StatusCode::CONFLICT).await, "DENIED");
}

async fn tags_and_catalogue_come_in_pages(server: Server) {
    for tag in ["b", "a", "C", "d"] {
        server.push_artifact("m/x", tag, b"weights").await;
    }
    server.push_artifact("a", "1", b"weights").await;
    let list = async |path: &str| {
        let response = expect(server.get(path).await, StatusCode::OK).await;
        let link = response.headers().get("link").map(|link| link.to_str().unwrap().to_owned());
        let body: Value = response.json().await.unwrap();
        (body, link)
    };
    let (body, link) = list("/v2/m/x/tags/list").await;
    assert_eq!(body, json!({ "name": "m/x", "tags": ["C", "a", "b", "d"] }));
    assert_eq!(link, None);
    let mut seen = Vec::new();
    let mut next = Some("/v2/m/x/tags/list?n=3".to_owned());
    while let Some(path) = next {
        let (body, link) = list(&path).await;
        seen.push(body["tags"].as_array().unwrap().len());
        next = link.map(|link| link[1..].split_once('>').unwrap().0.to_owned());
    }
    assert_eq!(seen, [3, 1]);
    assert_eq!(list("/v2/m/x/tags/list?n=0").await, (json!({ "name": "m/x", "tags": [] }), None));
    let (body, _) = list("/v2/m/x/tags/list?n=99999999999999999999&last=b").await;
    assert_eq!(body["tags"], json!(["d"]));
    let (body, link) = list("/v2/_catalog?n=1").await;
    assert_eq!(body, json!({ "repositories": ["a"] }));
    assert_eq!(link.unwrap(), "</v2/_catalog?n=1&last=a>; rel=\"next\"");
    expect(server.get("/v2/m/x/tags/list?n=-1").await, StatusCode::BAD_REQUEST).await;
}

async fn referrers_are_listed_by_type(server: Server) {
    let subject = server.push_artifact("m", "1", b"weights").await;
    let path = format!("/v2/m/referrers/{subject}");
    let list = async |path: &str| {
        let response = expect(server.get(path).await, StatusCode::OK).await;
        assert_eq!(header_of(&response, "content-type"), INDEX_MEDIA_TYPE);
        let filtered = response.headers().contains_key("oci-filters-applied");
        let link = response.headers().get("link").map(|link| link.to_str().unwrap().to_owned());
        let body: Value = response.json().await.unwrap();
        (body["manifests"].as_array().unwrap().clone(), filtered, link)
    };
    assert_eq!(list(&path).await, (vec![], false, None));
    assert!(list(&format!("/v2/unknown/referrers/{subject}")).await.0.is_empty());

    let refer = async |kind: Option<&str>, note: &str| {
        let mut body = artifact(b"weights");
        body["subject"] = json!({ "mediaType": IMAGE, "digest": subject, "size": 1 });
        body["annotations"] = json!({ "note": note });
        match kind {
            Some(kind) => body["artifactType"] = json!(kind),
            None => drop(body.as_object_mut().unwrap().remove("artifactType")),
        }
        let digest = Digest::of(body.to_string().as_bytes());
        let response = server.put_manifest("m", &digest.to_string(), IMAGE, &body).await;
        let response = expect(response, StatusCode::CREATED).await;
        assert_eq!(header_of(&response, "oci-subject"), subject.to_string());
        digest
    };
    let signature = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let signed = refer(Some(signature), "one").await;
    refer(Some(signature), "two").await;
    refer(None, "three").await;
    let (all, filtered, _) = list(&path).await;
    assert_eq!((all.len(), filtered), (3, false));
    let one = all.iter().find(|found| found["digest"] == json!(signed)).unwrap();
    assert_eq!(
        (&one["artifactType"], &one["annotations"]["note"]),
        (&json!(signature), &json!("one"))
    );
    let config = "application/vnd.cncf.model.config.v1+json";
    assert!(all.iter().any(|found| found["artifactType"] == json!(config)), "the config stands in");

    let asked = signature.replace('+', "%2B");
    let (some, filtered, link) = list(&format!("{path}?artifactType={asked}&n=1")).await;
    assert_eq!((some.len(), filtered), (1, true));
    let link = link.unwrap();
    let next = link[1..].split_once('>').unwrap().0;
    let (rest, _, link) = list(next).await;
    assert_eq!((rest.len(), link), (1, None));
    assert_ne!(some, rest);
    let name = "m".parse().unwrap();
    let found = server.registry.referrers(&name, subject, Some(signature)).await.unwrap();
    assert_eq!(found.len(), 2);
}

async fn deleting(server: Server) {
    let first = server.push_artifact("a", "1", b"weights").await;
    let delete = async |path: String| server.request("DELETE", &path).send().await.unwrap();
    let weights = Digest::of(b"weights");
    let blob = |name: &str| format!("/v2/{name}/blobs/{weights}");
    let mount = server.request("POST", &format!("/v2/b/blobs/uploads/?mount={weights}&from=a"));
    expect(mount.send().await.unwrap(), StatusCode::CREATED).await;

    let kept = delete(blob("a")).await;
    assert_eq!(refusal(kept, StatusCode::CONFLICT).await, "DENIED");
    expect(delete("/v2/a/manifests/1".to_owned()).await, StatusCode::ACCEPTED).await;
    expect(delete("/v2/a/manifests/1".to_owned()).await, StatusCode::NOT_FOUND).await;
    expect(server.get(&format!("/v2/a/manifests/{first}")).await, StatusCode::OK).await;
    server.put_manifest("a", "again", IMAGE, &artifact(b"weights")).await;
    expect(delete(format!("/v2/a/manifests/{first}")).await, StatusCode::ACCEPTED).await;
    expect(server.get("/v2/a/manifests/again").await, StatusCode::NOT_FOUND).await;
    expect(delete(format!("/v2/a/manifests/{first}")).await, StatusCode::NOT_FOUND).await;
    expect(delete(blob("a")).await, StatusCode::ACCEPTED).await;
    expect(server.get(&blob("a")).await, StatusCode::NOT_FOUND).await;
    // The other repository still has it; the bytes go with the last one.
    expect(server.get(&blob("b")).await, StatusCode::OK).await;
    expect(delete(blob("b")).await, StatusCode::ACCEPTED).await;
    assert_eq!(server.registry.inner.blobs.size(&weights).await.unwrap(), None);
    expect(delete(blob("b")).await, StatusCode::NOT_FOUND).await;
    expect(delete("/v2/nobody/manifests/1".to_owned()).await, StatusCode::NOT_FOUND).await;
}

async fn hostile_paths_and_lengths(server: Server) {
    let digest = Digest::of(b"x");
    let auth = format!("Host: x\r\nConnection: close\r\nAuthorization: Bearer {ADMIN}\r\n");
    for path in [
        "/v2/../../etc/passwd/manifests/x",
        "/v2/a/../b/tags/list",
        "/v2/%2e%2e/%2e%2e/tags/list",
        "/v2/a%2f..%2fb/tags/list",
        "/v2/a%00b/tags/list",
        "/v2/%ff/tags/list",
        "/v2/A/tags/list",
        "/v2//tags/list",
        "/v2/a/blobs/sha256:..",
        "/v2/a/blobs/../../hub.db",
        "/v2/a/blobs/uploads/..%2f..%2fhub.db",
        "/v2/a/blobs/uploads/x",
        "/v2/a/manifests/-x",
        "/v2/a",
        &format!("/v2/{}/tags/list", "a/".repeat(400)),
    ] {
        for method in ["GET", "DELETE", "PUT"] {
            let answer = server
                .raw(&format!("{method} {path} HTTP/1.1\r\n{auth}Content-Length: 0\r\n\r\n"))
                .await;
            let status: u16 = answer[9..12].parse().unwrap();
            assert!(matches!(status, 400 | 404), "{method} {path}: {answer}");
            assert!(answer.contains("\"errors\""), "{answer}");
        }
    }
    let location = server.begin("m").await;
    for length in
        ["18446744073709551615", "9223372036854775807", &(blobs::MAX_BLOB_BYTES + 1).to_string()]
    {
        let answer = server
            .raw(&format!("PATCH {location} HTTP/1.1\r\n{auth}Content-Length: {length}\r\n\r\nabc"))
            .await;
        // The HTTP layer itself refuses the first of them with a status of its own.
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    let answer = server
        .raw(&format!(
            "PATCH {location} HTTP/1.1\r\n{auth}Content-Range: 0-18446744073709551614\r\nContent-Length: 3\r\n\r\nabc"
        ))
        .await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let response = server.get(&location).await;
    assert_eq!(header_of(&response, "range"), "0-0", "nothing was taken");
    for method in ["PATCH", "OPTIONS", "TRACE"] {
        let response =
            server.request(method, &format!("/v2/m/blobs/{digest}")).send().await.unwrap();
        expect(response, StatusCode::METHOD_NOT_ALLOWED).await;
    }
    // None of it left a trace in the data folder.
    let mut files: Vec<_> = std::fs::read_dir(&server.folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.starts_with("hub."))
        .collect();
    files.sort();
    assert_eq!(files, ["blobs", "uploads"]);
}

#[tokio::test]
async fn changes_are_told_in_their_transaction() {
    let folder = tempfile::tempdir().unwrap();
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = Arc::clone(&told);
    let observer: OnChange = Arc::new(move |_tx, change| {
        if change.object.ends_with(":forbidden") {
            return Err(DbError::Busy.into());
        }
        log.lock().unwrap().push((change.actor.clone(), change.action, change.object.clone()));
        Ok(())
    });
    let server = Server::observed(folder.path(), Some(observer)).await;
    server.push_artifact("m", "1", b"weights").await;
    server.request("DELETE", "/v2/m/manifests/1").send().await.unwrap();
    let refused = server.put_manifest("m", "forbidden", IMAGE, &artifact(b"weights")).await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    expect(server.get("/v2/m/manifests/forbidden").await, StatusCode::NOT_FOUND).await;
    let entry = |action, object: &str| ("token admin".to_owned(), action, object.to_owned());
    let expected = [entry("registry.push", "m:1"), entry("registry.delete", "m:1")];
    assert_eq!(*told.lock().unwrap(), expected);
}

async fn a_sweep_removes_what_kills_left_and_nothing_else(server: Server) {
    let kept = server.push_artifact("m", "1", b"weights").await;
    let location = server.begin("m").await;
    server.request("PATCH", &location).body("half").send().await.unwrap();
    let Inner { blobs, db, .. } = &*server.registry.inner;
    // Killed between the bytes and their row, in the middle of a put, and after an upload's row went.
    let orphan = futures_util::stream::iter([Ok(Bytes::from_static(b"orphan"))]);
    let orphan = blobs.put(orphan, None).await.unwrap().digest;
    drop(blobs.stage("put-1").await.unwrap());
    drop(blobs.stage("0123456789abcdef0123456789abcdef").await.unwrap());
    server.registry.sweep().await.unwrap();
    assert_eq!(blobs.size(&orphan).await.unwrap(), None);
    let id = location.rsplit_once('/').unwrap().1;
    assert_eq!(blobs.staged().await.unwrap(), [id]);
    expect(server.get(&format!("/v2/m/manifests/{kept}")).await, StatusCode::OK).await;
    expect(server.get(&format!("/v2/m/blobs/{}", Digest::of(b"weights"))).await, StatusCode::OK)
        .await;
    // An old upload is forgotten.
    db.write(|tx| tx.execute("UPDATE registry_uploads SET started_at_s = 0", params![]))
        .await
        .unwrap();
    server.registry.sweep().await.unwrap();
    assert!(blobs.staged().await.unwrap().is_empty());
    expect(server.get(&location).await, StatusCode::NOT_FOUND).await;
}

/// Pushes bytes until they are taken: what was removed as unused in between is pushed again, as
/// clients do.
async fn push_anyway(server: &Server, bytes: &Bytes) -> u32 {
    let digest = Digest::of(bytes);
    for again in 0..100 {
        let location = server.begin("m").await;
        let put = server.request("PUT", &format!("{location}?digest={digest}"));
        let response = put.body(bytes.clone()).send().await.unwrap();
        match response.status() {
            StatusCode::CREATED => return again,
            status => {
                assert_eq!(status, StatusCode::NOT_FOUND, "{}", response.text().await.unwrap())
            }
        }
    }
    panic!("the bytes are never taken");
}

/// One hub removes bytes that no repository has, over and over, while another one publishes a
/// package of them: nothing that a package names is ever lost.
async fn removing_and_publishing_race(pusher: &Server, remover: &Server) {
    const PACKAGES: u32 = 40;
    let mut pushed_again = 0;
    for number in 0..PACKAGES {
        let weights = Bytes::from(format!("weights {number}"));
        let digests = [Digest::of(&weights), Digest::of(b"{}")];
        let stop = std::sync::atomic::AtomicBool::new(false);
        let body = artifact(&weights);
        let publish = async {
            pushed_again += push_anyway(pusher, &Bytes::from_static(b"{}")).await;
            pushed_again += push_anyway(pusher, &weights).await;
            let response = pusher.put_manifest("m", "latest", IMAGE, &body).await;
            expect(response, StatusCode::CREATED).await;
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        };
        let remove = async {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                for digest in digests {
                    remover.registry.remove_if_unused(digest).await.unwrap();
                }
            }
        };
        tokio::join!(publish, remove);
        let manifest = Digest::of(body.to_string().as_bytes());
        for server in [pusher, remover] {
            let path = format!("/v2/m/manifests/{manifest}");
            expect(server.get(&path).await, StatusCode::OK).await;
            let found = server.get(&format!("/v2/m/blobs/{}", digests[0])).await;
            assert_eq!(found.bytes().await.unwrap(), weights, "package {number}");
        }
    }
    // And what nothing names any more is removed.
    let orphan = Bytes::from_static(b"weights 7");
    let digest = Digest::of(&orphan);
    let path = format!("/v2/m/manifests/{}", Digest::of(artifact(&orphan).to_string().as_bytes()));
    expect(pusher.request("DELETE", &path).send().await.unwrap(), StatusCode::ACCEPTED).await;
    let path = format!("/v2/m/blobs/{digest}");
    expect(pusher.request("DELETE", &path).send().await.unwrap(), StatusCode::ACCEPTED).await;
    remover.registry.remove_if_unused(digest).await.unwrap();
    assert_eq!(remover.registry.inner.blobs.size(&digest).await.unwrap(), None);
    println!("{pushed_again} of {} pushes were made twice", 2 * PACKAGES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hub_that_removes_takes_nothing_from_one_that_publishes() {
    let postgres = crate::db::tests::Server::start();
    let bucket = S3Server::start();
    let at = S3::parse("s3://fleet/blobs", bucket.settings(), None).unwrap();
    for in_s3 in [false, true] {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let name = if in_s3 { "over_s3" } else { "over_a_folder" };
        crate::db::tests::fresh(&postgres, name);
        let hub = async |folder: &std::path::Path| {
            let place = crate::db::Postgres::parse(&postgres.url(name), None).unwrap();
            let open = move || Database::open_postgres(place, &[SCHEMA]);
            let db = tokio::task::spawn_blocking(open).await.unwrap().unwrap();
            let blobs = match in_s3 {
                true => Blobs::open_s3(&at, "CA sha256:1234", folder).await.unwrap(),
                // A folder that both have, as over a network file system.
                false => Blobs::open(one.path()).unwrap(),
            };
            Server::with_blobs(db, blobs, folder, None).await
        };
        let (pusher, remover) = (hub(one.path()).await, hub(two.path()).await);
        removing_and_publishing_race(&pusher, &remover).await;
    }
}

async fn lost_bytes_are_not_here_until_they_are_pushed_again(server: Server) {
    let digest = server.push_blob("m", b"weights").await;
    server.registry.inner.blobs.delete(&digest).await.unwrap();
    let path = format!("/v2/m/blobs/{digest}");
    let head = server.request("HEAD", &path).send().await.unwrap();
    expect(head, StatusCode::NOT_FOUND).await;
    server.push_blob("m", b"weights").await;
    assert_eq!(server.get(&path).await.bytes().await.unwrap(), "weights");
}
