//! `slm bench fleet`: how much a hub can take. A real hub in a process of its own, and simulated
//! devices that speak the real protocol to it over HTTPS from this process.
//! Start reading at [`run`].

pub mod delta;
mod devices;
mod hub;
pub mod measure;
mod seed;
pub mod serve;
mod wire;

use std::collections::BinaryHeap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::Rng as _;
use reqwest::Method;
use slmops_api::device::Phase;
use slmops_api::rollout::{NewRollout, Rollout, RolloutPolicy, RolloutState, WaveSize};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::devices::{Device, Polled};
use self::hub::{Server, Usage};
use self::measure::{
    FASTEST, Figures, Line, POLLS, Page, RECONNECTS, RolloutTimes, STORM_S, Tally,
};
use self::wire::{Answer, Target, Wire};
use crate::error::{Context as _, Failure, Result};
use crate::progress::Progress;

/// Connections over which all devices' polls go, since no process may have one for each.
const CONNECTIONS: usize = 256;
/// Connections that are busy at the same time when polls are asked for without a pause.
const BUSY: usize = 32;
/// Connections that reconnecting devices may have open at the same time.
const MAX_OPEN: usize = 8_000;
/// The longest that a rollout is followed.
const MAX_ROLLOUT: Duration = Duration::from_secs(1800);
/// Reads of each page.
const READS: usize = 10;
/// Milliseconds from being told until a device has downloaded, and until its probes have passed.
const STAGES_MS: [u64; 2] = [1_000, 3_000];

/// How a fleet is measured.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Devices.
    pub devices: u32,
    /// Seconds for which polls are measured.
    pub seconds: u64,
    /// Seconds between two polls of a device.
    pub interval_s: u64,
}

/// A device's connection and devices, which take turns on it.
struct Lane {
    wire: Wire,
    devices: Vec<Device>,
}

/// Measures one fleet in `folder`, which is empty.
pub async fn run(plan: Plan, folder: &Path, progress: &Progress) -> Result<Figures> {
    let stage = progress.stage(format!("{} devices join", plan.devices));
    std::fs::create_dir_all(folder.join("hub")).internal(|| "make a folder".to_owned())?;
    let devices = seed::seed(folder, plan.devices).await?;
    let mut server = Server::start(folder).await?;
    stage.done(format!("the hub was ready after {:.1} s", server.ready_after.as_secs_f64()));

    let mut calls = Vec::new();
    let mut lanes: Vec<Lane> = (0..CONNECTIONS.min(devices.len()))
        .map(|_| Lane { wire: Wire::new(&server.target), devices: Vec::new() })
        .collect();
    let count = lanes.len();
    for (number, device) in devices.into_iter().enumerate() {
        lanes[number % count].devices.push(device);
    }
    let lanes = lanes.into_iter().map(|lane| Arc::new(Mutex::new(lane))).collect::<Vec<_>>();

    let stage = progress.stage("every device signs in");
    calls.push(phase(&server, "sign in", &lanes[..BUSY.min(count)], sign_in_all).await?);
    // The others need a token too; that was measured.
    phase(&server, "sign in", &lanes[BUSY.min(count)..], sign_in_all).await?;
    calls.push(phase(&server, "first poll", &lanes, poll_all).await?);
    stage.done(said(&calls));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let hub_idle_bytes = server.usage()?.memory_bytes;

    let stage = progress.stage(format!("each polls every {} s", plan.interval_s));
    let until = Until::For(Duration::from_secs(plan.seconds));
    let (polls, _, took, usage) = drive(&server, plan, &lanes, until).await?;
    calls.push(Line::of(POLLS, &polls, took, usage));
    stage.done(said(&calls));

    let stage = progress.stage("polls without a pause");
    let busy = Duration::from_secs((plan.seconds / 3).max(1));
    let line = phase(&server, FASTEST, &lanes[..BUSY.min(count)], move |lane| poll_for(lane, busy));
    calls.push(line.await?);
    stage.done(said(&calls));

    let hub_polling_peak_bytes = server.usage()?.peak_bytes;

    let stage = progress.stage("a rollout to all of them");
    let (rollout, lines) = roll_out(&server, plan, &lanes).await?;
    calls.extend(lines);
    stage.done(format!(
        "created in {:.2} s, completed after {:.0} s",
        rollout.created_s, rollout.completed_s
    ));

    let stage = progress.stage("pages and lists");
    let pages = read_pages(&server).await?;
    stage.done(format!("{} read", pages.len()));
    let mut hub_peak_bytes = server.usage()?.peak_bytes;

    let stage = progress.stage("the hub is killed, and all of them reconnect");
    server.kill().await?;
    server = Server::start(folder).await?;
    let restart_s = server.ready_after.as_secs_f64();
    let devices: Vec<Device> = {
        let mut all = Vec::new();
        for lane in lanes {
            all.append(&mut lane.lock().await.devices);
        }
        all
    };
    let storm =
        Duration::from_secs(if plan.interval_s < STORM_S { plan.interval_s } else { STORM_S });
    let (tally, took, usage) = reconnect(&server, devices, storm).await?;
    calls.push(Line::of(RECONNECTS, &tally, took, usage));
    stage.done(said(&calls));
    hub_peak_bytes = hub_peak_bytes.max(server.usage()?.peak_bytes);
    server.stop().await?;
    Ok(Figures {
        devices: plan.devices,
        calls,
        rollout,
        restart_s,
        pages,
        hub_polling_peak_bytes,
        hub_peak_bytes,
        hub_idle_bytes,
        database_bytes: hub::database_bytes(folder),
    })
}

fn said(calls: &[Line]) -> String {
    let Some(line) = calls.last() else { return String::new() };
    format!(
        "{:.0}/s, p99 {:.1} ms, {:.0} µs of the hub's CPU each",
        line.rate_per_s, line.p99_ms, line.hub_cpu_us_per_answer
    )
}

/// Lets every lane do something, and measures it.
async fn phase<F>(
    server: &Server,
    name: &'static str,
    lanes: &[Arc<Mutex<Lane>>],
    act: impl Fn(Arc<Mutex<Lane>>) -> F,
) -> Result<Line>
where
    F: Future<Output = Result<Tally>> + Send + 'static,
{
    let (before, begun) = (server.usage()?, Instant::now());
    let mut tasks = JoinSet::new();
    for lane in lanes {
        tasks.spawn(act(Arc::clone(lane)));
    }
    let mut tally = Tally::default();
    while let Some(done) = tasks.join_next().await {
        tally.add(done.internal(|| "wait for the devices".to_owned())??);
    }
    Ok(Line::of(name, &tally, begun.elapsed(), (before, server.usage()?)))
}

fn refused(what: &str, answer: &Answer) -> Failure {
    let text = String::from_utf8_lossy(&answer.body);
    Failure::internal(format!("{what}: the hub answered {}: {text}", answer.status))
}

async fn sign_in_all(lane: Arc<Mutex<Lane>>) -> Result<Tally> {
    let mut tally = Tally::default();
    let Lane { wire, devices } = &mut *lane.lock().await;
    for device in devices {
        let begun = Instant::now();
        if let Some(answer) = device.sign_in(wire).await? {
            return Err(refused("sign in", &answer));
        }
        tally.answered(hyper::StatusCode::OK, begun.elapsed());
    }
    Ok(tally)
}

/// Polls once; the time counts from `due`, when the device meant to.
async fn poll(device: &mut Device, wire: &mut Wire, due: Instant, tally: &mut Tally) -> bool {
    match device.poll(wire).await {
        Ok(Polled::Unchanged) => {
            tally.answered(hyper::StatusCode::NOT_MODIFIED, due.elapsed());
            false
        }
        Ok(Polled::News) => {
            tally.answered(hyper::StatusCode::OK, due.elapsed());
            true
        }
        Ok(Polled::Refused(answer)) => {
            tally.answered(answer.status, due.elapsed());
            false
        }
        Err(_) => {
            tally.broke();
            false
        }
    }
}

async fn poll_all(lane: Arc<Mutex<Lane>>) -> Result<Tally> {
    let mut tally = Tally::default();
    let Lane { wire, devices } = &mut *lane.lock().await;
    for device in devices {
        poll(device, wire, Instant::now(), &mut tally).await;
    }
    Ok(tally)
}

async fn poll_for(lane: Arc<Mutex<Lane>>, time: Duration) -> Result<Tally> {
    let mut tally = Tally::default();
    let Lane { wire, devices } = &mut *lane.lock().await;
    let end = Instant::now() + time;
    for index in (0..devices.len()).cycle() {
        if Instant::now() >= end {
            break;
        }
        poll(&mut devices[index], wire, Instant::now(), &mut tally).await;
    }
    Ok(tally)
}

/// When devices stop.
enum Until {
    For(Duration),
    Told(Arc<AtomicBool>),
}

/// What a device does next, and when; the earliest first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Due(std::cmp::Reverse<Instant>, usize, Step);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    Poll,
    Downloaded,
    Confirmed,
}

/// Lets every device poll at its interval, and do what it is told. Returns what polls and reports
/// took, counted from when each was due.
async fn drive(
    server: &Server,
    plan: Plan,
    lanes: &[Arc<Mutex<Lane>>],
    until: Until,
) -> Result<(Tally, Tally, Duration, (Usage, Usage))> {
    let (before, begun) = (server.usage()?, Instant::now());
    let stop = match &until {
        Until::For(_) => Arc::new(AtomicBool::new(false)),
        Until::Told(stop) => Arc::clone(stop),
    };
    let mut tasks = JoinSet::new();
    for lane in lanes {
        let (lane, stop) = (Arc::clone(lane), Arc::clone(&stop));
        tasks.spawn(async move { drive_lane(&mut *lane.lock().await, plan, &stop).await });
    }
    if let Until::For(time) = until {
        tokio::time::sleep(time).await;
        stop.store(true, Ordering::Relaxed);
    }
    let (mut polls, mut reports) = (Tally::default(), Tally::default());
    let mut took = begun.elapsed();
    while let Some(done) = tasks.join_next().await {
        let (polled, reported) = done.internal(|| "wait for the devices".to_owned())?;
        polls.add(polled);
        reports.add(reported);
        took = took.max(begun.elapsed());
    }
    Ok((polls, reports, took, (before, server.usage()?)))
}

async fn drive_lane(lane: &mut Lane, plan: Plan, stop: &AtomicBool) -> (Tally, Tally) {
    let (mut polls, mut reports) = (Tally::default(), Tally::default());
    let interval_ms = plan.interval_s * 1000;
    let now = Instant::now();
    let after = |now: Instant, ms: u64| std::cmp::Reverse(now + Duration::from_millis(ms));
    // Devices are anywhere in their intervals, and do not stay in step.
    let mut due: BinaryHeap<Due> = (0..lane.devices.len())
        .map(|index| Due(after(now, rand::rng().random_range(0..interval_ms)), index, Step::Poll))
        .collect();
    while let Some(Due(std::cmp::Reverse(at), index, step)) = due.pop() {
        // Looks up now and then, so that nobody waits for the last device's turn.
        while Instant::now() < at && !stop.load(Ordering::Relaxed) {
            tokio::time::sleep_until(at.min(Instant::now() + Duration::from_millis(200))).await;
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let Lane { wire, devices } = &mut *lane;
        let device = &mut devices[index];
        let phase = match step {
            Step::Poll => {
                if poll(device, wire, at, &mut polls).await {
                    let ms = STAGES_MS[0] + rand::rng().random_range(0..500);
                    due.push(Due(after(Instant::now(), ms), index, Step::Downloaded));
                }
                let ms = interval_ms * 9 / 10 + rand::rng().random_range(0..=interval_ms / 5);
                due.push(Due(after(at, ms), index, Step::Poll));
                continue;
            }
            Step::Downloaded => Phase::Staged,
            Step::Confirmed => Phase::Confirmed,
        };
        match device.report(wire, phase).await {
            Ok(answer) => {
                reports.answered(answer.status, at.elapsed());
                match answer.retry_after {
                    Some(wait) => {
                        due.push(Due(std::cmp::Reverse(Instant::now() + wait), index, step));
                    }
                    None if step == Step::Downloaded => {
                        let ms = STAGES_MS[1] - STAGES_MS[0];
                        due.push(Due(after(Instant::now(), ms), index, Step::Confirmed));
                    }
                    None => {}
                }
            }
            Err(_) => {
                reports.broke();
                due.push(Due(after(Instant::now(), 1000), index, step));
            }
        }
    }
    (polls, reports)
}

async fn roll_out(
    server: &Server,
    plan: Plan,
    lanes: &[Arc<Mutex<Lane>>],
) -> Result<(RolloutTimes, [Line; 2])> {
    let what = "start the rollout";
    let asked = NewRollout {
        promotion: None,
        model: seed::MODEL.parse().internal(|| what.to_owned())?,
        version: seed::VERSION.parse().internal(|| what.to_owned())?,
        policy: RolloutPolicy {
            waves: vec![WaveSize::Percent(1), WaveSize::Percent(10), WaveSize::Rest],
            bake_s: 0,
            confirm_timeout_s: 3600,
            ..RolloutPolicy::default()
        },
    };
    let begun = Instant::now();
    let rollout: Rollout = server.api.call(Method::POST, "/v1/rollouts", &asked, what).await?;
    let created_s = begun.elapsed().as_secs_f64();
    let done = Arc::new(AtomicBool::new(false));
    let follow = async {
        let begun = Instant::now();
        let path = format!("/v1/rollouts/{}", rollout.id);
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let seen = server.api.get::<Rollout>(&path, "follow the rollout").await;
            let over = match &seen {
                Ok(seen) => seen.state.is_final() || seen.state == RolloutState::Halted,
                Err(_) => true,
            };
            if over || begun.elapsed() > MAX_ROLLOUT {
                done.store(true, Ordering::Relaxed);
                return seen.map(|seen| (seen, begun.elapsed()));
            }
        }
    };
    let (driven, followed) =
        tokio::join!(drive(server, plan, lanes, Until::Told(Arc::clone(&done))), follow);
    let ((polls, reports, took, usage), (seen, lasted)) = (driven?, followed?);
    let times = RolloutTimes {
        created_s,
        completed_s: lasted.as_secs_f64(),
        confirmed: seen.total().confirmed,
    };
    let polls = Line::of("polls meanwhile", &polls, took, usage);
    Ok((times, [polls, Line::of("reports", &reports, took, usage)]))
}

/// Every device connects anew within `storm`, with no token: TLS, challenge, token, poll. Who is
/// turned away comes back when it was told to.
async fn reconnect(
    server: &Server,
    devices: Vec<Device>,
    storm: Duration,
) -> Result<(Tally, Duration, (Usage, Usage))> {
    let (before, begun) = (server.usage()?, Instant::now());
    let open = Arc::new(Semaphore::new(MAX_OPEN));
    let mut tasks = JoinSet::new();
    for mut device in devices {
        device.forget_token();
        let (open, target) = (Arc::clone(&open), server.target.clone());
        let at = begun + storm.mul_f64(rand::rng().random_range(0.0..1.0));
        tasks.spawn(async move {
            tokio::time::sleep_until(at).await;
            let Ok(_open) = open.acquire().await else { return Tally::default() };
            come_back(&mut device, &target, at).await
        });
    }
    let mut tally = Tally::default();
    while let Some(done) = tasks.join_next().await {
        tally.add(done.internal(|| "wait for the devices".to_owned())?);
    }
    Ok((tally, begun.elapsed(), (before, server.usage()?)))
}

/// Tries until it is in. Tries that were turned away or failed are counted as well as the last one.
async fn come_back(device: &mut Device, target: &Target, at: Instant) -> Tally {
    let mut tally = Tally::default();
    let mut due = at;
    for _ in 0..20 {
        let mut wire = Wire::new(target);
        let wait = match device.sign_in(&mut wire).await {
            Ok(None) => {
                poll(device, &mut wire, due, &mut tally).await;
                return tally;
            }
            Ok(Some(answer)) => {
                tally.answered(answer.status, due.elapsed());
                answer.retry_after.unwrap_or(Duration::from_secs(1))
            }
            Err(_) => {
                tally.broke();
                Duration::from_millis(rand::rng().random_range(1000..5000))
            }
        };
        drop(wire);
        tokio::time::sleep(wait).await;
        due = Instant::now();
    }
    tally
}

/// What dashboards and lists ask for.
async fn read_pages(server: &Server) -> Result<Vec<Page>> {
    let what = "look for what there is";
    let rollouts: slmops_api::Page<Rollout> = server.api.get("/v1/rollouts", what).await?;
    let devices: slmops_api::Page<slmops_api::device::Device> =
        server.api.get("/v1/devices?limit=200", what).await?;
    let rollout = rollouts.items.first().map_or("none", |rollout| rollout.id.as_str());
    let device = devices.items.last().map_or("none", |device| device.name.as_str());
    let paths = [
        "/".to_owned(),
        "/v1/devices?limit=200".to_owned(),
        format!("/v1/devices?limit=200&cursor={device}"),
        "/v1/fleet/summary".to_owned(),
        "/v1/devices?limit=100&search=site&state=confirmed".to_owned(),
        "/v1/devices?limit=100&selector=fact.cores>=1".to_owned(),
        format!("/v1/devices?limit=100&search={device}"),
        format!("/v1/devices/{device}"),
        format!("/v1/devices/{device}/explain"),
        format!("/v1/devices/{device}/history"),
        "/v1/rollouts?limit=100".to_owned(),
        format!("/v1/rollouts/{rollout}"),
        format!("/v1/rollouts/{rollout}/why"),
        format!("/v1/rollouts/{rollout}/devices?limit=500"),
        "/v1/releases".to_owned(),
        "/v1/invitations".to_owned(),
        "/v1/audit?limit=100".to_owned(),
        "/v1/audit/verify".to_owned(),
        "/v1/telemetry".to_owned(),
        "/metrics".to_owned(),
    ];
    let mut pages = Vec::new();
    for path in paths {
        let (mut times, mut bytes) = (Vec::new(), 0);
        for _ in 0..READS {
            let begun = Instant::now();
            let request = server.api.request(Method::GET, &path);
            let answer = server.api.send(request, what).await?;
            bytes = crate::client::bounded(answer, what).await?.len() as u64;
            times.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        // Its id is random: the page is the same.
        let path = path.replace(rollout, "ID").replace(device, "NAME");
        let (p50_ms, max_ms) = (times[times.len() / 2], times[times.len() - 1]);
        pages.push(Page { path, p50_ms, max_ms, bytes });
    }
    Ok(pages)
}
