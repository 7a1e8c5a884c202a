use slmops_api::RolloutId;
use slmops_api::rollout::RolloutState;

use super::*;
use crate::db::Postgres;
use crate::db::tests::Server;
use crate::store::conformance::{by, join, release, rollout_record, transition};
use crate::store::{CheckFrom, RolloutChange, SqlStore, Transition};

/// A hub over the database, as far as these tests need one.
async fn hub(server: &Server) -> (Database, Replica) {
    let place = Postgres::parse(&server.url("fleet"), None).unwrap();
    let schemas = &[crate::store::SCHEMA, crate::registry::SCHEMA, SCHEMA];
    let open = move || Database::open_postgres(place, schemas);
    let db = tokio::task::spawn_blocking(open).await.unwrap().unwrap();
    let feed = db.feed().await.unwrap().unwrap();
    let (lead, _) = watch::channel(Lead::Elsewhere);
    let id = feed.origin().to_owned();
    let replica = Replica { db: db.clone(), id, blobs: "s3://fleet".to_owned(), lead };
    (db, replica)
}

fn fence(lead: Lead) -> Fence {
    match lead {
        Lead::Here(fence) => fence,
        other => panic!("it does not decide: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_newest_planner_persists_anything() {
    let server = Server::start();
    server.database("fleet");
    let (db, first) = hub(&server).await;
    let (_, second) = hub(&server).await;
    let old = fence(first.renew().await.unwrap());
    assert_eq!(second.renew().await.unwrap(), Lead::Elsewhere);
    assert_eq!(fence(first.renew().await.unwrap()), old, "the lease is renewed, not given anew");
    // The first one's time is over, and it does not know that yet.
    server.query("fleet", "UPDATE planners SET until_ms = 0");
    let new = fence(second.renew().await.unwrap());

    let store = SqlStore::new(db);
    join(&store, "d1").await;
    store.add_release(by(), release("1.0.0", "")).await.unwrap();
    let audited = store.verify_audit(CheckFrom::start()).await.unwrap().entries;
    let running = rollout_record("r1", "1.0.0", RolloutState::Running);
    let decided = |fence: &Fence| Transition {
        rollouts: vec![RolloutChange::whole(&running)],
        fence: Some(fence.clone()),
        ..Transition::default()
    };
    let id: RolloutId = "r1".parse().unwrap();
    // One who never was the planner may not either, whatever number it names.
    let forged = Fence { holder: first.id.clone(), ..new.clone() };
    let later = Fence { token: new.token + 1, ..new.clone() };
    for fence in [&old, &forged, &later] {
        let refused = transition(&store, decided(fence)).await;
        assert!(matches!(refused, Err(StoreError::Superseded)), "{fence:?}: {refused:?}");
        assert!(store.rollout(id.clone()).await.is_err());
    }
    assert_eq!(store.verify_audit(CheckFrom::start()).await.unwrap().entries, audited);
    transition(&store, decided(&new)).await.unwrap();
    assert!(store.rollout(id).await.is_ok());
    let decisions = server.query("fleet", "SELECT token, decisions FROM planners ORDER BY 1");
    assert_eq!(decisions.trim(), "1|0\n2|1");
    assert_eq!(first.renew().await.unwrap(), Lead::Elsewhere);
}
