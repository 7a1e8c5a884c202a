use slmops_api::device::{DeviceFacts, InstalledModel, Phase};
use slmops_api::rollout::{Outcome, RolloutPolicy, WaveSize};

use super::*;
use crate::store::conformance::{self, report};
use crate::store::{By, PageRequest, SqlStore, Store};

/// A store, and a fleet over it that is kept up to date by what changes, never loaded again.
struct Rig {
    store: SqlStore,
    board: Board,
    fleet: Fleet,
    now: Timestamp,
    sequence: u64,
    _folder: tempfile::TempDir,
}

async fn loaded(store: &SqlStore, board: &Board) -> Fleet {
    let mut fleet = Fleet::new(
        store.frame(vec![]).await.unwrap(),
        Arc::new(Listening::begin(Timestamp::now(), Instant::now())),
    );
    fleet.refresh(store.devices_after(None, 1000).await.unwrap(), board);
    fleet
}

impl Rig {
    async fn new(devices: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = conformance::sqlite::fresh(folder.path()).await;
        for number in 0..devices {
            conformance::join(&store, &format!("d{number:03}")).await;
        }
        for version in ["1.0.0", "1.1.0"] {
            let release = conformance::release(version, "");
            store.add_release(conformance::by(), release).await.unwrap();
        }
        let board = Board::default();
        let fleet = loaded(&store, &board).await;
        let now = conformance::at(100);
        Self { store, board, fleet, now, sequence: 0, _folder: folder }
    }

    /// Persists a decision, and checks that the store says the same as memory.
    async fn persist(&mut self, decided: Decided) -> Transition {
        let transition = Arc::new(decided.transition);
        let by = By::hub(self.now);
        let persisted = self.store.transition(by, self.fleet.revision(), Arc::clone(&transition));
        self.fleet.persisted(persisted.await.unwrap());
        let loaded = loaded(&self.store, &Board::default()).await;
        assert_eq!(loaded.frame.rollouts, self.fleet.frame.rollouts);
        assert_eq!(loaded.frame.quarantine, self.fleet.frame.quarantine);
        let completed = |fleet: &Fleet| {
            fleet.frame.completed.iter().map(|known| known.id.clone()).collect::<Vec<_>>()
        };
        assert_eq!(completed(&loaded), completed(&self.fleet));
        for (stored, known) in loaded.devices.iter().zip(&self.fleet.devices) {
            assert_eq!((&stored.id, &stored.desired), (&known.id, &known.desired));
            assert_eq!((&stored.report, &stored.labels), (&known.report, &known.labels));
        }
        Arc::unwrap_or_clone(transition)
    }

    /// Decides until nothing changes; the numbers of rollout rows written each time.
    async fn settle(&mut self) -> Vec<usize> {
        let mut rows = Vec::new();
        loop {
            let decided = self.fleet.decide(self.now);
            if decided.transition.is_empty() {
                return rows;
            }
            let done = self.persist(decided).await;
            rows.push(done.rollouts.iter().map(|change| change.parts.len()).sum());
        }
    }

    /// A device reports that it runs what it was told.
    async fn confirm(&mut self, id: &str, facts: impl FnOnce(&mut DeviceFacts)) -> bool {
        let id: DeviceId = id.parse().unwrap();
        let desired = self.store.device(id.to_string()).await.unwrap().desired;
        self.sequence += 1;
        let mut report = report(self.sequence, Phase::Confirmed);
        facts(&mut report.facts);
        report.generation = desired.generation;
        report.running = desired.model.map(|model| InstalledModel {
            model: model.model,
            version: model.version,
            variant: model.variant,
            manifest: model.manifest,
            weights: model.weights,
        });
        let report = Arc::new(report);
        self.store.record_report(self.now, id.clone(), None, Arc::clone(&report)).await.unwrap();
        self.fleet.hear(&id, report)
    }

    async fn refresh(&mut self, ids: &[&str]) {
        let ids = ids.iter().map(|id| id.parse().unwrap()).collect();
        self.fleet.refresh(self.store.devices_of(ids).await.unwrap(), &self.board);
    }

    async fn roll_out(&mut self, id: &str, version: &str) {
        let policy = RolloutPolicy {
            waves: vec![WaveSize::Count(2), WaveSize::Rest],
            bake_s: 0,
            ..RolloutPolicy::default()
        };
        let (model, version) = ("m".parse().unwrap(), version.parse().unwrap());
        let asked = NewRollout { model, version, policy, promotion: None };
        let decided = self.fleet.create(self.now, id.parse().unwrap(), asked, "token test");
        let decided = decided.unwrap();
        self.persist(decided).await;
        self.settle().await;
    }
}

#[tokio::test]
async fn memory_and_store_say_the_same_all_the_way() {
    let mut rig = Rig::new(12).await;
    rig.settle().await;
    rig.roll_out("r1", "1.0.0").await;
    assert_eq!(rig.fleet.frame.rollouts[0].rollout.counts[0].updating, 2);
    let devices = rig.fleet.frame.rollouts[0].rollout.devices.clone();
    let order: Vec<&str> = devices.iter().map(|part| part.device.as_str()).collect();
    // One confirmation writes one row of the twelve.
    assert!(!rig.confirm(order[0], |_| {}).await);
    assert_eq!(rig.settle().await, [1]);
    rig.confirm(order[1], |_| {}).await;
    // The second canary opens the wave of all others.
    assert_eq!(rig.settle().await.iter().sum::<usize>(), 11);
    for id in &order[2..] {
        rig.confirm(id, |_| {}).await;
    }
    rig.settle().await;
    assert!(rig.fleet.frame.rollouts.is_empty(), "completed");
    assert_eq!(rig.fleet.frame.completed.len(), 1);

    // Who joins later gets the release from the completed rollout; so does whoever is told apart.
    conformance::join(&rig.store, "d012").await;
    rig.refresh(&["d012"]).await;
    rig.settle().await;
    let told = rig.store.device("d012".to_owned()).await.unwrap().desired;
    assert_eq!(told.model.unwrap().version.to_string(), "1.0.0");

    // And it can be taken back, though it is in memory no more.
    rig.roll_out("r2", "1.1.0").await;
    let r2: RolloutId = "r2".parse().unwrap();
    let frame = rig.store.frame(vec![r2.clone()]).await.unwrap();
    assert!(rig.fleet.reframe(frame));
    let decided = rig.fleet.command(rig.now, &r2, Command::Rollback, "token test").unwrap();
    assert_eq!(rig.persist(decided).await.assignments.len(), 2);
    rig.settle().await;
    assert!(!rig.fleet.has_rollout(&r2));
    let shown = rig.store.rollouts(PageRequest::default()).await.unwrap().items;
    assert_eq!(shown[0].state, RolloutState::RolledBack);
}

#[tokio::test]
async fn a_new_memory_budget_is_read_again() {
    let mut rig = Rig::new(3).await;
    rig.roll_out("r1", "1.0.0").await;
    for id in ["d000", "d001", "d002"] {
        if rig.confirm(id, |_| {}).await {
            rig.refresh(&[id]).await;
        }
        rig.settle().await;
    }
    let free_space = |facts: &mut DeviceFacts| facts.disk_free_bytes /= 2;
    assert!(!rig.confirm("d000", free_space).await, "free space changes with every report");
    assert!(rig.confirm("d000", |facts| facts.memory_budget_bytes += 1).await);
    rig.refresh(&["d000"]).await;
    let budget = rig.fleet.devices[0].budget_bytes;
    assert_eq!(budget, rig.fleet.devices[1].budget_bytes + 1);
    rig.settle().await;
}

#[tokio::test]
async fn many_newcomers_are_sorted_in() {
    let mut rig = Rig::new(1).await;
    let names: Vec<String> = (0..20).map(|number| format!("c{number:03}")).collect();
    for name in &names {
        conformance::join(&rig.store, name).await;
    }
    let ids: Vec<&str> = names.iter().map(String::as_str).collect();
    rig.refresh(&ids[..3]).await;
    rig.refresh(&ids[3..]).await;
    rig.refresh(&ids[5..7]).await;
    assert_eq!(rig.fleet.devices.len(), 21);
    assert!(rig.fleet.devices.is_sorted_by(|a, b| a.id < b.id));
    let late = conformance::at(5000);
    rig.board.place(&"c007".parse().unwrap()).unwrap().seen(late);
    let seen = rig.fleet.look(rig.now, |world, _| {
        world.devices.iter().filter(|device| device.last_seen == late).count()
    });
    assert_eq!(seen, 1);
}

#[test]
fn what_is_written_of_a_part_shows_in_its_fingerprint() {
    let part = conformance::part("d1", 0, Outcome::Pending);
    let mut others = vec![
        RolloutDevice { wave: 1, ..part.clone() },
        RolloutDevice { generation: Some(2), ..part.clone() },
        RolloutDevice { finished_at: Some(conformance::at(1)), ..part.clone() },
        RolloutDevice { fit: "other".to_owned(), ..part.clone() },
        RolloutDevice { unready: true, ..part.clone() },
    ];
    let failed = |failure| Outcome::Failed { failure };
    use slmops_api::device::Failure;
    for outcome in [Outcome::Away, failed(Failure::Load), failed(Failure::Crash)] {
        others.push(RolloutDevice { outcome, ..part.clone() });
    }
    let all: BTreeSet<u64> = others.iter().chain([&part]).map(fingerprint).collect();
    assert_eq!(all.len(), others.len() + 1);
    assert_eq!(fingerprint(&part), fingerprint(&part.clone()));
}
