//! Models that come as deltas: what is fetched, what comes of damage, and of kills in the middle.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use slmops_api::delta::{Delta, Fallback, Sources, Transfer};
use slmops_api::device::{DeviceReport, Phase};
use slmops_api::rules::DeviceRules;
use slmops_artifact::Digest;
use slmops_delta::Header;

use crate::Device;
use crate::fake_hub::{FakeHub, Release};
use crate::kills::{Running, join};
use crate::site::neighbour;

/// How often the agent is killed; `SLM_DELTA_KILLS=500` for a night.
const KILLS: u32 = 24;
const SEED: u64 = 2027;

fn transfer(report: &DeviceReport) -> Transfer {
    report.telemetry.transfer.clone().expect("a model was fetched")
}

/// Ships `to` to a device that runs `from`, with `delta` on offer; how the bytes came.
async fn update(hub: &FakeHub, to: &Release) -> Transfer {
    let generation = hub.ship(to);
    let report = hub.confirmed(generation).await;
    let running = report.running.as_ref().expect("it serves");
    assert_eq!(running.weights, Digest::of(&to.weights));
    let transfer = transfer(&report);
    assert_eq!(transfer.weights, running.weights);
    assert_eq!(transfer.size_bytes, to.weights.len() as u64);
    transfer
}

fn flip_on_disk(folder: &Path, digest: Digest, at: u64) {
    let path = folder.join("blobs").join(digest.hex());
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_fetches_what_has_changed() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let (first, second) = (Release::good("1.0.0"), Release::good("2.0.0"));
    let third = Release::drifted("3.0.0");
    let size = first.weights.len() as u64;
    let whole = update(&hub, &first).await;
    assert_eq!((whole.whole_bytes, whole.delta_bytes, whole.fallback), (size, 0, None));

    // It is told to wait for the delta first, and does.
    let small = hub.offer(&first, &second);
    hub.lock().sources.get_mut(&small.to).unwrap().wait_s = Some(1);
    let told = std::time::Instant::now();
    let by_delta = update(&hub, &second).await;
    assert!(told.elapsed() >= Duration::from_secs(1));
    assert_eq!((by_delta.whole_bytes, by_delta.fallback), (0, None));
    assert_eq!(by_delta.delta_bytes, small.bytes);
    assert!(small.bytes < size / 100, "{} of {size}", small.bytes);
    assert_eq!(hub.lock().blob_bytes.get(&small.to), None, "not a byte of the model itself");
    assert_eq!(hub.lock().blob_bytes[&small.blob], small.bytes);
    assert!(device.status().contains("of deltas for a model of"), "{}", device.status());

    // Over one that was never here: two deltas, one after the other; the one on the way goes again.
    let between = Release::good("2.5.0");
    let steps = [hub.offer(&second, &between), hub.offer(&between, &third)];
    let both = hub.lock().sources[&steps[0].to].deltas.clone();
    hub.lock().sources.get_mut(&steps[1].to).unwrap().deltas.extend(both);
    let chained = update(&hub, &third).await;
    assert_eq!((chained.whole_bytes, chained.fallback), (0, None));
    assert_eq!(chained.delta_bytes, steps[0].bytes + steps[1].bytes);
    crate::until("what was made on the way is gone", || async {
        !device.path().join("blobs").join(steps[0].to.hex()).exists()
    })
    .await;
    assert_eq!(device.ask().await, 200);
    device.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_serves_others_is_waited_for() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let release = Release::good("1.0.0");
    let (digest, size) = (Digest::of(&release.weights), release.weights.len() as u64);
    let gone = "http://127.0.0.1:9".to_owned();
    let peers = vec![neighbour([(digest, release.weights.clone())], 3).await, gone];
    hub.lock().sources.insert(digest, Sources { deltas: vec![], peers, wait_s: None });
    let told = std::time::Instant::now();
    let transfer = update(&hub, &release).await;
    assert_eq!((transfer.peer_bytes, transfer.whole_bytes), (size, 0));
    assert_eq!(hub.lock().blob_bytes.get(&digest), None, "not a byte over the site's line");
    // Three times it was told to come again a second later.
    assert!(told.elapsed() >= Duration::from_secs(3), "{:?}", told.elapsed());
    device.stop().await;
}

const SHARED: DeviceRules = DeviceRules {
    hold: false,
    activate_at: None,
    activate_in: Vec::new(),
    download_in: Vec::new(),
    metered: slmops_api::rules::Metered::Allow,
    max_rate_bytes_per_s: None,
    share_bytes_per_s: Some(100_000_000),
    replace: false,
};

/// Ships `to` to a device that shares with its site; how the bytes came.
async fn update_shared(hub: &FakeHub, to: &Release) -> (Transfer, DeviceReport) {
    let generation = hub.ship_under(to, SHARED);
    let report = hub.confirmed(generation).await;
    (transfer(&report), report)
}

#[tokio::test(flavor = "multi_thread")]
async fn deltas_come_from_the_site_and_stay_for_it() {
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let versions = ["1.0.0", "2.0.0", "3.0.0", "4.0.0", "5.0.0"];
    let [first, second, third, fourth, fifth] = versions.map(Release::drifted);
    let size = first.weights.len() as u64;
    update(&hub, &first).await;
    let kept = |delta: &Delta| device.path().join("blobs").join(delta.blob.hex());

    // The first one of a site gets a delta over its line, and keeps it for the others.
    let delta = hub.offer(&first, &second);
    let (came, report) = update_shared(&hub, &second).await;
    assert_eq!((came.delta_bytes, came.peer_bytes, came.whole_bytes), (delta.bytes, 0, 0));
    let address = report.facts.shares_at.clone();
    let address = address.expect("it shares");
    let given = reqwest::get(format!("{address}/blobs/{}", delta.blob)).await.unwrap();
    assert_eq!(Digest::of(&given.bytes().await.unwrap()), delta.blob);

    // The others get it there: nothing of it, nor of the model, comes over the line. One who has
    // neither does no harm, nor does one who is busy.
    let delta = hub.offer(&second, &third);
    let bytes = hub.lock().blob(delta.blob).to_vec();
    let peers = vec![neighbour([], 0).await, neighbour([(delta.blob, bytes)], 2).await];
    hub.lock().sources.get_mut(&delta.to).unwrap().peers = peers;
    let (came, _) = update_shared(&hub, &third).await;
    assert_eq!((came.delta_bytes, came.peer_bytes, came.whole_bytes), (0, delta.bytes, 0));
    assert_eq!(came.fallback, None);
    let over_the_line = |hub: &FakeHub, digest| hub.lock().blob_bytes.get(&digest).copied();
    assert_eq!([delta.blob, delta.to].map(|it| over_the_line(&hub, it)), [None, None]);
    crate::until("the delta before goes", || async {
        let deltas = std::fs::read_dir(device.path().join("blobs")).unwrap().flatten();
        kept(&delta).exists() && deltas.filter(|it| it.metadata().unwrap().is_file()).count() == 4
    })
    .await;

    // A neighbour that lies is found out; one that has the whole model comes before the line.
    let delta = hub.offer(&third, &fourth);
    let liar = neighbour([(delta.blob, vec![7; delta.bytes as usize])], 0).await;
    let whole = neighbour([(delta.to, fourth.weights.clone())], 0).await;
    hub.lock().sources.get_mut(&delta.to).unwrap().peers = vec![liar, whole];
    let (came, _) = update_shared(&hub, &fourth).await;
    assert_eq!((came.delta_bytes, came.whole_bytes), (0, 0));
    assert_eq!(came.peer_bytes, delta.bytes + size);
    assert_eq!(device.ask().await, 200);

    // Nobody near has it any more: it comes over the line. Once nothing is shared, it goes.
    let delta = hub.offer(&fourth, &fifth);
    hub.lock().sources.get_mut(&delta.to).unwrap().peers = vec!["http://127.0.0.1:9".to_owned()];
    let (came, _) = update_shared(&hub, &fifth).await;
    assert_eq!((came.delta_bytes, came.peer_bytes, came.whole_bytes), (delta.bytes, 0, 0));
    assert!(kept(&delta).exists());
    hub.rules(DeviceRules::default());
    crate::until("what was kept goes", || async { !kept(&delta).exists() }).await;
    assert_eq!(device.ask().await, 200);
    device.stop().await;
}

/// Waits until somebody on this network says that it has a file.
async fn announced(file: Digest) {
    let daemon = mdns_sd::ServiceDaemon::new().unwrap();
    let events = daemon.browse("_slm-model._tcp.local.").unwrap();
    let name = Digest::of(format!("nearby {file}").as_bytes()).hex();
    let heard = async {
        loop {
            let mdns_sd::ServiceEvent::ServiceResolved(service) =
                events.recv_async().await.unwrap()
            else {
                continue;
            };
            let files = service.get_property_val_str("files").unwrap_or_default();
            if files.split(',').any(|it| it == &name[..16]) {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), heard).await.expect("somebody says so");
    let _ = daemon.shutdown();
}

/// Two devices that no hub tells of each other find each other by multicast.
#[tokio::test(flavor = "multi_thread")]
async fn devices_on_one_network_find_each_other() {
    let (first, second) = (Release::good("1.0.0"), Release::drifted("2.0.0"));
    let hubs = [FakeHub::start().await, FakeHub::start().await];
    let mut devices = [Device::join(&hubs[0]).await, Device::join(&hubs[1]).await];
    for hub in &hubs {
        update_shared(hub, &first).await;
    }
    let delta = hubs[0].offer(&first, &second);
    hubs[1].offer(&first, &second);
    let (came, _) = update_shared(&hubs[0], &second).await;
    assert_eq!((came.delta_bytes, came.peer_bytes, came.whole_bytes), (delta.bytes, 0, 0));
    announced(delta.blob).await;
    let (came, _) = update_shared(&hubs[1], &second).await;
    assert_eq!((came.delta_bytes, came.peer_bytes, came.whole_bytes), (0, delta.bytes, 0));
    let outbox = std::fs::read_to_string(devices[0].path().join("outbox.log")).unwrap();
    assert!(outbox.contains("mDNS _slm-model._tcp"), "the owner can see what was said: {outbox}");
    assert!(!outbox.contains(&delta.blob.hex()), "no digest is said aloud: {outbox}");
    for device in &mut devices {
        assert_eq!(device.ask().await, 200);
        device.stop().await;
    }
}

/// What is wrong with the delta, or with the file that it changes.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Gone,
    Header,
    OtherFiles,
    OtherLength,
    Payload,
    Base,
    RangesIgnored,
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_delta_does_not_give_is_got_whole() {
    use Damage::*;
    let cases = [
        (Gone, Fallback::Missing),
        (Header, Fallback::Unreadable),
        (OtherFiles, Fallback::Unreadable),
        (OtherLength, Fallback::Unreadable),
        (Payload, Fallback::DamagedDelta),
        (Base, Fallback::DamagedBase),
        (RangesIgnored, Fallback::Unreadable),
    ];
    let hub = FakeHub::start().await;
    let mut device = Device::join(&hub).await;
    let mut running = Release::good("1.0.0");
    update(&hub, &running).await;
    let versions = ["2.0.0", "3.0.0", "4.0.0", "5.0.0", "6.0.0", "7.0.0", "8.0.0"];
    for ((damage, expected), version) in cases.into_iter().zip(versions) {
        let next = Release::drifted(version);
        let size = next.weights.len() as u64;
        let delta = hub.offer(&running, &next);
        let change = |change: fn(&mut Delta)| {
            change(&mut hub.lock().sources.get_mut(&delta.to).unwrap().deltas[0]);
        };
        let middle = (delta.header_bytes + delta.bytes) / 2;
        match damage {
            Gone => drop(hub.lock().faults.missing.insert(delta.blob)),
            Header => hub.flip(delta.blob, delta.header_bytes / 2),
            OtherFiles => change(|delta| delta.to_bytes += 1),
            OtherLength => change(|delta| delta.header_bytes -= 1),
            Payload => hub.flip(delta.blob, middle),
            // Where the weights that nothing reads in these probes are.
            Base => flip_on_disk(device.path(), delta.from, size / 2),
            RangesIgnored => hub.lock().faults.ignore_ranges = true,
        }
        let came = update(&hub, &next).await;
        hub.lock().faults.ignore_ranges = false;
        if let OtherFiles = damage {
            // What cannot give the model's size is not even begun.
            assert_eq!((came.fallback, came.whole_bytes), (None, size), "{damage:?}");
        } else {
            assert_eq!(came.fallback, Some(expected), "{damage:?}");
        }
        match damage {
            // One frame of the file itself, and deltas for the rest.
            Payload | Base => {
                assert!(came.delta_bytes > 0, "{damage:?}: {came:?}");
                assert!((1..size / 2).contains(&came.whole_bytes), "{damage:?}: {came:?}");
            }
            _ => assert_eq!(came.whole_bytes, size, "{damage:?}"),
        }
        assert_eq!(device.ask().await, 200, "{damage:?}");
        running = next;
    }
    device.stop().await;
}

/// Bytes of the new file that are there.
fn made(delta: &Delta, folder: &Path) -> u64 {
    let partial = folder.join("blobs/partial").join(delta.to.hex());
    std::fs::metadata(partial).map_or(0, |file| file.len())
}

/// Where the payloads begin that are still needed, for what a kill left of the new file.
fn goes_on_at(hub: &FakeHub, delta: &Delta, folder: &Path) -> Option<u64> {
    let have = made(delta, folder);
    let header = Header::parse(&hub.lock().blob(delta.blob)).unwrap();
    let next = header.frames().iter().find(|frame| frame.output.end > have)?;
    Some(next.payload.start)
}

/// SIGKILL while frames are applied: every frame that was made stays.
#[tokio::test(flavor = "multi_thread")]
async fn no_kill_costs_more_than_a_frame() {
    let kills = std::env::var("SLM_DELTA_KILLS").ok().and_then(|kills| kills.parse().ok());
    let kills: u32 = kills.unwrap_or(KILLS);
    let hub = FakeHub::start().await;
    let folder = tempfile::tempdir().unwrap();
    join(&hub, folder.path());
    let mut random = ChaCha8Rng::seed_from_u64(SEED);
    let mut agent = Running::start(folder.path());
    // Three, since a device keeps two: what it keeps it does not fetch.
    let versions = ["2.0.0", "3.0.0", "4.0.0"];
    let mut from = Release::good("1.0.0");
    update(&hub, &from).await;
    let (mut killed, mut gone_on, mut round) = (0, 0, 0);
    while killed < kills {
        let to = Release::drifted(versions[round % versions.len()]);
        round += 1;
        hub.lock().sources.clear();
        let delta = hub.offer(&from, &to);
        hub.lock().starts.clear();
        hub.lock().faults.slow = Some(16 << 10);
        let generation = hub.ship(&to);
        let is_done = || {
            let last = hub.lock().reports.last().cloned();
            last.is_some_and(|last| last.generation == generation && last.phase == Phase::Confirmed)
        };
        let mut looked_at = 0;
        let mut expected = delta.header_bytes;
        loop {
            let started = || {
                let world = hub.lock();
                let payload = |(blob, start): &&(Digest, u64)| {
                    *blob == delta.blob && *start >= delta.header_bytes
                };
                world.starts[looked_at..].iter().find(payload).map(|(_, start)| *start)
            };
            crate::until("it goes on", || async { is_done() || started().is_some() }).await;
            let Some(start) = started() else { break };
            assert_eq!(start, expected, "kill {killed}");
            gone_on += u32::from(start > delta.header_bytes);
            if killed >= kills {
                break;
            }
            // At once, in the next frame, or in the one after it.
            let more = [0, 1, 1 + (1 << 20)][random.random_range(0..3)];
            let target = made(&delta, folder.path()) + more;
            crate::until("frames are made", || async {
                is_done() || made(&delta, folder.path()) >= target
            })
            .await;
            agent.kill();
            killed += 1;
            let next = goes_on_at(&hub, &delta, folder.path());
            looked_at = hub.lock().starts.len();
            agent = Running::start(folder.path());
            let Some(next) = next else { break };
            expected = next;
        }
        hub.lock().faults.slow = None;
        let report = hub.confirmed(generation).await;
        let came = transfer(&report);
        assert_eq!((came.fallback, came.whole_bytes), (None, 0), "round {round}");
        // One that was killed once it had confirmed loads it again, and answers 503 meanwhile.
        crate::until("it answers", || async { crate::ask(folder.path()).await == 200 }).await;
        from = to;
    }
    assert!(gone_on > kills / 8, "only {gone_on} of {kills} kills hit the middle");
    agent.kill();
}
