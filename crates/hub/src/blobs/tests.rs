use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;

#[path = "../../tests/support/s3.rs"]
pub(crate) mod server;
pub(crate) use server::S3Server;

fn pieces(pieces: &[&'static [u8]]) -> impl Stream<Item = Result<Bytes, BlobError>> + Unpin {
    stream::iter(pieces.iter().map(|piece| Ok(Bytes::from_static(piece))).collect::<Vec<_>>())
}

async fn collect(reader: BlobReader) -> Vec<u8> {
    let pieces: Vec<Bytes> = reader.stream.try_collect().await.unwrap();
    pieces.concat()
}

/// The same behaviour of files and of any other store.
async fn check_store(blobs: &Blobs) {
    let expected = Digest::of(b"hello world");
    let put = blobs.put(pieces(&[b"hello ", b"", b"world"]), Some(expected)).await.unwrap();
    assert_eq!(put, BlobEntry { digest: expected, size_bytes: 11 });
    assert_eq!(blobs.size(&expected).await.unwrap(), Some(11));
    assert_eq!(collect(blobs.get(&expected, None).await.unwrap()).await, b"hello world");
    let part = blobs.get(&expected, Some(3..8)).await.unwrap();
    assert_eq!((part.size_bytes, part.range.clone()), (11, 3..8));
    assert_eq!(collect(part).await, b"lo wo");
    assert_eq!(&blobs.read(&expected, 11).await.unwrap()[..], b"hello world");
    let error = blobs.read(&expected, 10).await.unwrap_err();
    assert!(matches!(error, BlobError::TooLarge { limit_bytes: 10 }), "{error}");

    // Twice is once; empty is a blob like any other.
    blobs.put(pieces(&[b"hello world"]), None).await.unwrap();
    let empty = blobs.put(pieces(&[]), None).await.unwrap();
    assert_eq!(collect(blobs.get(&empty.digest, None).await.unwrap()).await, b"");
    let mut listed: Vec<BlobEntry> = blobs.list().try_collect().await.unwrap();
    listed.sort_by_key(|entry| entry.size_bytes);
    assert_eq!(listed.iter().map(|entry| entry.size_bytes).collect::<Vec<_>>(), [0, 11]);

    let error = blobs.put(pieces(&[b"other"]), Some(expected)).await.unwrap_err();
    assert!(matches!(error, BlobError::Mismatch { .. }), "{error}");
    let cut = stream::iter([
        Ok(Bytes::from_static(b"half")),
        Err(BlobError::Interrupted { reason: "gone".to_owned() }),
    ]);
    let error = blobs.put(cut, None).await.unwrap_err();
    assert!(matches!(error, BlobError::Interrupted { .. }), "{error}");
    assert_eq!(blobs.staged().await.unwrap(), Vec::<String>::new(), "nothing is left behind");

    blobs.delete(&expected).await.unwrap();
    blobs.delete(&expected).await.unwrap();
    assert_eq!(blobs.size(&expected).await.unwrap(), None);
    let error = blobs.get(&expected, None).await.err().unwrap();
    assert!(matches!(error, BlobError::NotFound(_)), "{error}");
}

#[tokio::test]
async fn files_keep_blobs() {
    let folder = tempfile::tempdir().unwrap();
    check_store(&Blobs::open(folder.path()).unwrap()).await;
}

#[tokio::test]
async fn staged_bytes_survive_a_restart_and_a_bound_holds() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(folder.path()).unwrap();
    let staged = Box::new(blobs.stage("up-1").await.unwrap());
    let (staged, added) = append(staged, pieces(&[b"abc", b"def"]), 6).await;
    assert_eq!(added.unwrap(), 6);
    drop(staged);

    let blobs = Blobs::open(folder.path()).unwrap();
    assert_eq!(blobs.staged_bytes("up-1").await.unwrap(), 6);
    let staged = Box::new(blobs.stage("up-1").await.unwrap());
    let (staged, added) = append(staged, pieces(&[b"gh", b"too much"]), 3).await;
    assert!(matches!(added, Err(BlobError::TooLarge { limit_bytes: 3 })));
    assert_eq!(staged.len_bytes(), 8, "what was within the bound is kept");
    let (staged, committed) = blobs.commit(staged, Some(Digest::of(b"abcdefgh"))).await;
    let committed = committed.unwrap();
    assert_eq!(committed.size_bytes, 8);
    let (_, late) = append(staged, pieces(&[b"late"]), 100).await;
    assert!(late.is_err(), "a blob is never written to");
    assert_eq!(&blobs.read(&committed.digest, 100).await.unwrap()[..], b"abcdefgh");
    assert_eq!(blobs.staged_bytes("up-1").await.unwrap(), 0);
}

#[tokio::test]
async fn batches_larger_than_the_buffer_arrive_whole() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(folder.path()).unwrap();
    let piece = Bytes::from(vec![7_u8; 300_000]);
    let count = 3 * WRITE_BATCH_BYTES / piece.len() + 1;
    let all = vec![7_u8; count * piece.len()];
    let stream = stream::iter((0..count).map(|_| Ok(piece.clone())).collect::<Vec<_>>());
    let put = blobs.put(stream, Some(Digest::of(&all))).await.unwrap();
    assert!(collect(blobs.get(&put.digest, None).await.unwrap()).await == all);
}

#[tokio::test]
async fn a_full_disk_is_named_and_what_came_before_stays() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(folder.path()).unwrap();
    std::os::unix::fs::symlink("/dev/full", folder.path().join("uploads/full")).unwrap();
    let staged = Box::new(blobs.stage("full").await.unwrap());
    let (staged, added) = append(staged, pieces(&[b"abc"]), 100).await;
    assert!(matches!(added, Err(BlobError::DiskFull)), "{added:?}");
    assert_eq!(staged.len_bytes(), 0);
}

#[tokio::test]
async fn a_blob_cut_short_on_disk_ends_with_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(folder.path()).unwrap();
    let put = blobs.put(pieces(&[b"hello world"]), None).await.unwrap();
    let path = folder.path().join("blobs").join(location(&put.digest).as_ref());
    let reader = blobs.get(&put.digest, None).await.unwrap();
    std::fs::write(&path, b"hello").unwrap();
    assert!(reader.stream.try_collect::<Vec<Bytes>>().await.is_err());
    let error = blobs.read(&put.digest, 100).await.unwrap_err();
    assert!(matches!(error, BlobError::Mismatch { .. }), "{error}");
    // Pushing it again mends it.
    blobs.put(pieces(&[b"hello world"]), None).await.unwrap();
    assert_eq!(&blobs.read(&put.digest, 100).await.unwrap()[..], b"hello world");
}

const OWNER: &str = "CA sha256:1234";

fn place(url: &str, server: &S3Server) -> S3 {
    S3::parse(url, server.settings(), None).unwrap()
}

/// Bytes of which no part looks like another.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    rand::RngCore::fill_bytes(&mut rand::rng(), &mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_keeps_blobs() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = S3Server::start();
    let folder = tempfile::tempdir().unwrap();
    let here = place("s3://fleet/blobs/of/one", &server);
    check_store(&Blobs::open_s3(&here, OWNER, folder.path()).await.unwrap()).await;

    // What is larger than a part is sent in several, and read from anywhere in it.
    let blobs = Blobs::open_s3(&here, OWNER, folder.path()).await.unwrap();
    let bytes = noise(2 * PART_BYTES as usize + 12_345);
    let put = blobs.put(whole(&bytes), Some(Digest::of(&bytes))).await.unwrap();
    assert_eq!(blobs.size(&put.digest).await.unwrap(), Some(bytes.len() as u64));
    assert!(collect(blobs.get(&put.digest, None).await.unwrap()).await == bytes);
    let around = PART_BYTES - 10..PART_BYTES + 10;
    let read = collect(blobs.get(&put.digest, Some(around.clone())).await.unwrap()).await;
    assert_eq!(read, bytes[around.start as usize..around.end as usize]);

    // Others keep out, as long as they name another place.
    let error = Blobs::open_s3(&here, "CA sha256:5678", folder.path()).await.err().unwrap();
    assert!(matches!(&error, BlobError::Owned { owner, .. } if owner == OWNER), "{error}");
    let other = place("s3://fleet", &server);
    let other = Blobs::open_s3(&other, "CA sha256:5678", folder.path()).await.unwrap();
    assert_eq!(other.size(&put.digest).await.unwrap(), None);

    // What is wrong is said at once, with what to do, and never with the secret.
    let error = Blobs::open_s3(&place("s3://nowhere/x", &server), OWNER, folder.path()).await;
    let error = error.err().unwrap();
    assert!(matches!(&error, BlobError::NoBucket { bucket, .. } if bucket == "nowhere"), "{error}");
    for (setting, value, reason) in [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN", "InvalidAccessKeyId"),
    ] {
        let mut settings = server.settings();
        settings.push((setting.to_owned(), value.to_owned()));
        let wrong = S3::parse("s3://fleet/blobs/of/one", settings, None).unwrap();
        let error = Blobs::open_s3(&wrong, OWNER, folder.path()).await.err().unwrap();
        assert!(matches!(error, BlobError::Denied { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(reason) && text.contains("hint: check the access key"), "{text}");
        assert!(!format!("{text}{wrong:?}").contains(&server.secret), "{text}");
    }
}

fn whole(bytes: &[u8]) -> impl Stream<Item = Result<Bytes, BlobError>> + Unpin {
    stream::iter([Ok(Bytes::copy_from_slice(bytes))])
}

/// Passes connections on until `allowed` bytes went to the server, and then cuts them all.
async fn cutting_proxy(server: SocketAddr, allowed: Arc<AtomicU64>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let allowed = Arc::clone(&allowed);
            tokio::spawn(async move {
                let server = TcpStream::connect(server).await?;
                let ((mut from, mut back), (mut answers, mut to)) =
                    (client.into_split(), server.into_split());
                let answers =
                    tokio::spawn(async move { tokio::io::copy(&mut answers, &mut back).await });
                let mut buffer = vec![0; 64 << 10];
                loop {
                    let read = from.read(&mut buffer).await?;
                    let left = allowed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                        left.checked_sub(read as u64)
                    });
                    if read == 0 || left.is_err() {
                        answers.abort();
                        return Ok::<_, io::Error>(());
                    }
                    to.write_all(&buffer[..read]).await?;
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_lost_in_the_middle_of_a_blob_loses_nothing() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = S3Server::start();
    let allowed = Arc::new(AtomicU64::new(u64::MAX));
    let proxy = cutting_proxy(server.address(), Arc::clone(&allowed)).await;
    let mut settings = server.settings();
    settings.push(("AWS_ENDPOINT_URL".to_owned(), format!("http://{proxy}")));
    let here = S3::parse("s3://fleet/blobs", settings, None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::open_s3(&here, OWNER, folder.path()).await.unwrap();

    let bytes = noise(3 * PART_BYTES as usize);
    let digest = Digest::of(&bytes);
    let staged = Box::new(blobs.stage("up").await.unwrap());
    let (staged, added) = append(staged, whole(&bytes), MAX_BLOB_BYTES).await;
    added.unwrap();
    // One part gets there, and a half.
    allowed.store(PART_BYTES + PART_BYTES / 2, Ordering::Relaxed);
    let (staged, committed) = blobs.commit(staged, Some(digest)).await;
    let error = committed.unwrap_err();
    assert!(matches!(error, BlobError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("hint: "), "{error}");
    assert_eq!(blobs.staged_bytes("up").await.unwrap(), bytes.len() as u64, "it is kept here");

    allowed.store(u64::MAX, Ordering::Relaxed);
    assert_eq!(blobs.size(&digest).await.unwrap(), None, "half a blob is none");
    blobs.commit(staged, Some(digest)).await.1.unwrap();
    assert!(collect(blobs.get(&digest, None).await.unwrap()).await == bytes);
    assert_eq!(blobs.staged().await.unwrap(), Vec::<String>::new());

    // A server that is gone, and one that comes back empty: said, and not taken for an empty fleet.
    let address = server.address();
    drop(server);
    let error = blobs.size(&digest).await.unwrap_err();
    assert!(matches!(error, BlobError::Unreachable { .. }), "{error:?}");
    let server = S3Server::at(address);
    let here = place("s3://fleet/blobs", &server);
    let blobs = Blobs::open_s3(&here, OWNER, folder.path()).await.unwrap();
    let error = blobs.get(&digest, None).await.err().unwrap();
    assert!(matches!(error, BlobError::NotFound(_)), "{error:?}");
}

#[test]
fn places_say_what_is_wrong_and_never_the_secret() {
    let key = |name: &str| (name.to_owned(), "hunter2".to_owned());
    let endpoint = |url: &str| ("AWS_ENDPOINT_URL".to_owned(), url.to_owned());
    let both = || vec![key("AWS_ACCESS_KEY_ID"), key("AWS_SECRET_ACCESS_KEY")];
    let with = |url: &str| [both(), vec![endpoint(url)]].concat();
    for (url, settings, expected) in [
        ("https://fleet/x", both(), "does not start with `s3://`"),
        ("s3://", both(), "no name of a bucket"),
        ("s3://a?b/x", both(), "no name of a bucket"),
        ("s3://fleet/a//b", both(), "cannot start the names"),
        ("s3://fleet", vec![key("AWS_ACCESS_KEY_ID")], "AWS_SECRET_ACCESS_KEY is not set"),
        ("s3://fleet", vec![endpoint("https://s3.example.com")], "neither AWS_ACCESS_KEY_ID"),
        ("s3://fleet", with("http://s3.example.com"), "could be read"),
        ("s3://fleet", with("http://localhost.example.com"), "could be read"),
        ("s3://fleet", with("s3.example.com"), "is no URL"),
    ] {
        let error = S3::parse(url, settings, None).expect_err(url).to_string();
        assert!(error.contains(expected) && error.contains("hint:"), "{url}: {error}");
        assert!(!error.contains("hunter"), "{error}");
    }
    for url in ["http://localhost:9000", "http://127.0.0.1:9000/", "https://s3.example.com"] {
        let place = S3::parse("s3://fleet/a/b/", with(url), None).unwrap();
        assert_eq!(format!("{place:?}"), "s3://fleet/a/b");
    }
    let protected = [with("http://s3.example.com"), vec![("AWS_ALLOW_HTTP".into(), "true".into())]];
    S3::parse("s3://fleet", protected.concat(), None).unwrap();
    let error = S3::parse("s3://fleet", both(), Some(b"no certificate")).expect_err("no PEM");
    assert!(error.to_string().contains("certificates to trust"), "{error}");
}
