use object_store::memory::InMemory;

use super::*;

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
async fn any_object_store_keeps_blobs() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(InMemory::new());
    check_store(&Blobs::with_store(store, folder.path()).unwrap()).await;
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
