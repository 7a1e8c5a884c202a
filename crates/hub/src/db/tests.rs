use super::*;

const FIRST: &str = "CREATE TABLE thing (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT";
const SECOND: &str = "ALTER TABLE thing ADD COLUMN note TEXT";
const ONE: &[Schema] = &[Schema { component: "test", migrations: &[FIRST] }];
const TWO: &[Schema] = &[Schema { component: "test", migrations: &[FIRST, SECOND] }];

fn open(folder: &Path, schemas: &[Schema]) -> Database {
    Database::open(folder, schemas).expect("the database opens")
}

async fn insert(db: &Database, name: &'static str) -> Result<(), DbError> {
    db.write(move |tx| {
        tx.execute("INSERT INTO thing (name, n) VALUES (?1, 1)", [name])?;
        Ok(())
    })
    .await
}

async fn count(db: &Database) -> i64 {
    db.read(|tx| {
        Ok::<_, DbError>(tx.query_row("SELECT count(*) FROM thing", [], |row| row.get(0))?)
    })
    .await
    .expect("the count is read")
}

#[tokio::test]
async fn changes_survive_and_tables_move_up() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    insert(&db, "a").await.unwrap();
    drop(db);
    let db = open(folder.path(), TWO);
    assert_eq!(count(&db).await, 1);
    db.write(|tx| {
        tx.execute("UPDATE thing SET note = 'x'", [])?;
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_newer_schema_is_refused_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path(), TWO));
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    assert!(matches!(&error, DbError::NewerSchema { found: 2, known: 1, .. }), "{error}");
    assert!(error.to_string().contains("hint:"), "{error}");
    let unknown = Database::open(folder.path(), &[]).err().expect("refused");
    assert!(matches!(&unknown, DbError::NewerSchema { known: 0, .. }), "{unknown}");
    drop(open(folder.path(), TWO));
}

#[tokio::test]
async fn a_failing_migration_leaves_the_version_before() {
    let folder = tempfile::tempdir().unwrap();
    let broken = [Schema {
        component: "test",
        migrations: &[FIRST, "INSERT INTO thing VALUES ('half', 1); CREATE TABLE thing (x)"],
    }];
    let error = Database::open(folder.path(), &broken).err().expect("refused");
    assert!(matches!(&error, DbError::Migration { number: 2, .. }), "{error}");
    assert_eq!(count(&open(folder.path(), ONE)).await, 0);
}

#[tokio::test]
async fn an_error_or_a_panic_rolls_back() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    let refused: Result<(), DbError> = db
        .write(|tx| {
            tx.execute("INSERT INTO thing VALUES ('a', 1)", [])?;
            Err(DbError::Busy)
        })
        .await;
    assert!(matches!(refused, Err(DbError::Busy)));
    let panicked: Result<(), DbError> = db
        .write(|tx| {
            tx.execute("INSERT INTO thing VALUES ('b', 1)", [])?;
            panic!("on purpose")
        })
        .await;
    assert!(matches!(panicked, Err(DbError::Panicked)));
    assert_eq!(count(&db).await, 0);
    insert(&db, "c").await.expect("the writer is usable after a panic");
    assert_eq!(count(&db).await, 1);
}

#[tokio::test]
async fn constraints_foreign_keys_and_read_only_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    insert(&db, "a").await.unwrap();
    assert!(insert(&db, "a").await.unwrap_err().is_constraint());
    let in_read: Result<(), DbError> = db
        .read(|tx| {
            tx.execute("DELETE FROM thing", [])?;
            Ok(())
        })
        .await;
    assert!(matches!(in_read, Err(DbError::ReadOnly)), "{in_read:?}");
    let foreign: Result<(), DbError> = db
        .write(|tx| {
            tx.execute_batch(
                "CREATE TABLE child (name TEXT REFERENCES thing(name));
                 INSERT INTO child VALUES ('nobody')",
            )?;
            Ok(())
        })
        .await;
    assert!(foreign.unwrap_err().is_constraint());
}

#[tokio::test]
async fn a_full_disk_is_named_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    let full: Result<(), DbError> = db
        .write(|tx| {
            tx.pragma_update(None, "max_page_count", 1)?;
            for n in 0..1000 {
                tx.execute("INSERT INTO thing VALUES (?1, 1)", [format!("{n:0900}")])?;
            }
            Ok(())
        })
        .await;
    assert!(matches!(full, Err(DbError::DiskFull)), "{full:?}");
    assert_eq!(count(&db).await, 0);
}

#[test]
fn a_second_hub_on_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path(), ONE);
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    let pid = std::process::id();
    assert!(matches!(error, DbError::InUse { holder: Some(holder), .. } if holder == pid));
    drop(first);
    drop(open(folder.path(), ONE));
}

#[test]
fn damage_is_found_at_open() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path(), ONE));
    let path = folder.path().join(DATABASE_FILE);
    let good = std::fs::read(&path).unwrap();

    std::fs::write(&path, b"this was never a database, by a long way").unwrap();
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    assert!(matches!(error, DbError::Damaged { .. }), "{error}");

    let mut bad = good;
    bad[4096..4200].fill(0xff);
    std::fs::write(&path, bad).unwrap();
    let error = Database::open(folder.path(), ONE).err().expect("refused");
    assert!(matches!(error, DbError::Damaged { .. }), "{error}");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, b"").unwrap();
    let error = Database::open(&file.join("data"), ONE).err().expect("refused");
    assert!(matches!(error, DbError::Folder { .. }), "{error}");
    assert!(error.to_string().contains("hint:"), "{error}");
}

#[tokio::test]
async fn many_writers_and_readers_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let db = open(folder.path(), ONE);
    insert(&db, "a").await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let db = db.clone();
        tasks.spawn(async move {
            db.write(|tx| {
                let n: i64 = tx.query_row("SELECT n FROM thing", [], |row| row.get(0))?;
                tx.execute("UPDATE thing SET n = ?1", [n + 1])?;
                Ok::<_, DbError>(())
            })
            .await
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    let n: i64 = db
        .read(|tx| Ok::<_, DbError>(tx.query_row("SELECT n FROM thing", [], |row| row.get(0))?))
        .await
        .unwrap();
    assert_eq!(n, 51);
}
