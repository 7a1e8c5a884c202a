//! `slm demo`: the whole product on one machine, in seven steps, with the same commands that a
//! person would type. Every claim that it prints is checked; one that does not hold ends it.

mod chat;
mod load;
pub mod process;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use semver::Version;
use serde::Deserialize;
use slmops_api::device::Device;
use slmops_api::rollout::{Outcome, Rollout, RolloutState};
use tokio::process::Command;

use crate::client::Hub;
use crate::commands::Session;
use crate::commands::demo::Demo as Arguments;
use crate::commands::rollout;
use crate::commands::serve::stopped;
use crate::error::{Context, Exit, Failure, Result};
use crate::home::Home;
use crate::units;
use load::Load;
use process::Process;

/// The devices: name, memory that models may use, and what such a thing might be.
const DEVICES: [(&str, &str, &str); 3] = [
    ("till", "245MB", "a cash desk"),
    ("kiosk", "270MB", "a ticket machine"),
    ("gateway", "600MB", "a shop's server"),
];
const MODEL: &str = "demo";
const GOOD: Version = Version::new(1, 0, 0);
const BAD: Version = Version::new(1, 1, 0);
const QUESTION: &str = "Give me three tips for a good night's sleep.";
const ANSWER_TOKENS: u32 = 96;
/// How far a worker's memory may be from the prediction.
const MEMORY_TOLERANCE: f64 = 0.1;
/// How long a process of the demo may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(200);

/// What `slm up --output json` prints when it is ready.
#[derive(Debug, Deserialize)]
struct Ready {
    dashboard: String,
}

struct Demo<'a> {
    session: &'a Session,
    arguments: &'a Arguments,
    folder: PathBuf,
    home: Home,
    slm: PathBuf,
    agent: PathBuf,
    processes: Vec<Process>,
    steps: Vec<(String, Duration)>,
    step_started: Instant,
    /// Questions answered during the bad rollout, by device.
    answered: Vec<(String, u64)>,
}

/// Runs the demo and cleans up, however it ends.
pub async fn run(arguments: Arguments, session: &Session) -> Result<()> {
    let mut demo = Demo::prepare(&arguments, session)?;
    let outcome = tokio::select! {
        outcome = demo.all() => outcome,
        () = stopped() => Err(Failure::user("stopped")),
    };
    let outcome = match outcome {
        Ok(()) if arguments.keep => {
            demo.stay().await;
            Ok(())
        }
        outcome => outcome,
    };
    demo.clean_up(outcome.as_ref().is_err_and(|failure| failure.exit == Exit::Internal)).await;
    outcome
}

impl<'a> Demo<'a> {
    fn prepare(arguments: &'a Arguments, session: &'a Session) -> Result<Self> {
        if !arguments.model.exists() {
            return Err(Failure::user(format!("there is no `{}`", arguments.model.display()))
                .hint("make demo fetches a model by itself; or name one with --model"));
        }
        let slm = std::env::current_exe().internal(|| "find this program".to_owned())?;
        let agent = match &arguments.agent {
            Some(agent) => agent.clone(),
            None => slm.with_file_name("slm-agent"),
        };
        if !agent.exists() {
            return Err(Failure::user(format!("there is no device program `{}`", agent.display()))
                .hint("make build makes both; or name it with --agent"));
        }
        let folder = std::path::absolute(&arguments.folder)
            .user(|| format!("find the folder `{}`", arguments.folder.display()))?;
        // Only a folder that a demo made is ever removed.
        let mark = folder.join("made-by-slm-demo");
        if folder.exists() && !mark.exists() {
            return Err(Failure::user(format!("`{}` holds something else", folder.display()))
                .hint("name another folder with --folder"));
        }
        if folder.exists() {
            std::fs::remove_dir_all(&folder)
                .user(|| format!("remove what an earlier demo left in `{}`", folder.display()))?;
        }
        let create = || format!("create `{}`", folder.display());
        std::fs::create_dir_all(folder.join("logs")).user(create)?;
        std::fs::write(&mark, "").user(create)?;
        let home = Home::new(Some(folder.join("home")))?;
        Ok(Self {
            session,
            arguments,
            folder,
            home,
            slm,
            agent,
            processes: Vec::new(),
            steps: Vec::new(),
            step_started: Instant::now(),
            answered: Vec::new(),
        })
    }

    async fn all(&mut self) -> Result<()> {
        let hub = self.start_hub().await?;
        self.make_variants().await?;
        self.release().await?;
        self.start_devices(&hub).await?;
        self.roll_out(&hub).await?;
        self.catch_the_bad_one(&hub).await?;
        self.summary(&hub).await
    }

    fn say(&self, text: impl AsRef<str>) {
        self.session.progress.say(text);
    }

    fn step(&mut self, title: &str, why: &str) {
        if let Some((_, took)) = self.steps.last_mut() {
            *took = self.step_started.elapsed();
        }
        self.step_started = Instant::now();
        self.steps.push((title.to_owned(), Duration::ZERO));
        self.say(format!("\n━━ {}/7  {title}", self.steps.len()));
        for line in why.lines() {
            self.say(format!("   {}", line.trim()));
        }
    }

    // -- 1 ---------------------------------------------------------------------------------

    async fn start_hub(&mut self) -> Result<Hub> {
        self.step(
            "Start a hub",
            "The hub knows the fleet, keeps models and decides on rollouts.
             It is one process with an SQLite database and a folder: nothing to configure.",
        );
        let data = self.folder.join("hub");
        let arguments = ["up", "--data", &data.display().to_string(), "--listen", "127.0.0.1:0"]
            .map(str::to_owned);
        self.show_command(&["slm"], &arguments);
        let mut command = self.slm_command();
        command.args(&arguments).args(["--http", "127.0.0.1:0", "--output", "json"]);
        let log = self.folder.join("logs/hub.log");
        let mut process = Process::start("the hub", &mut command, &log, true)?;
        let mut lines =
            process.lines().ok_or_else(|| Failure::internal("read the hub's output"))?;
        let line = tokio::time::timeout(READY_TIMEOUT, lines.next_line()).await;
        let line = match line {
            Ok(Ok(Some(line))) => line,
            _ => {
                tokio::time::sleep(POLL).await;
                process.tend()?;
                return Err(Failure::internal(format!(
                    "the hub is not ready; see {}",
                    log.display()
                )));
            }
        };
        self.processes.push(process);
        let ready: Ready = serde_json::from_str(&line)
            .internal(|| format!("understand what the hub says: {line}"))?;
        self.say("   Its dashboard, which shows live all that follows (the link logs you in):");
        self.say(format!("   {}", ready.dashboard));
        Hub::connect(&self.home)
    }

    // -- 2 and 3 -----------------------------------------------------------------------------

    async fn make_variants(&mut self) -> Result<()> {
        self.step(
            "Make variants and measure them",
            "No single file fits every device. The model is brought back to 16 bits as reference;
             each device class gets a variant of its own, and every variant is measured against
             the reference: what was lost, how fast it is, how much memory it takes.",
        );
        let model = self.arguments.model.clone();
        self.ship(&model, &GOOD, &["--until", "gate"], &[Exit::User]).await.map(|_| ())
    }

    async fn release(&mut self) -> Result<()> {
        self.step(
            "Pack, sign and push",
            "Each variant becomes an OCI artifact (CNCF ModelPack) with its measurements, its
             lineage and the golden probes that a device must pass. It is signed with this
             publisher's key (OpenSSF Model Signing) and pushed to the hub's own registry.",
        );
        let model = self.arguments.model.clone();
        self.ship(&model, &GOOD, &["--until", "release"], &[]).await.map(|_| ())
    }

    /// Runs `slm ship` as a person would; its words go straight to the terminal.
    async fn ship(
        &mut self,
        model: &Path,
        version: &Version,
        more: &[&str],
        tolerated: &[Exit],
    ) -> Result<i32> {
        let mut arguments = vec![
            "ship".to_owned(),
            model.display().to_string(),
            "--name".to_owned(),
            MODEL.to_owned(),
            "--version".to_owned(),
            version.to_string(),
            "--to".to_owned(),
            "all".to_owned(),
        ];
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        self.show_command(&["slm"], &arguments);
        let mut command = self.slm_command();
        let mut child = command
            .args(&arguments)
            .arg("--yes")
            .env(process::DIE_WITH_PARENT, "1")
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .internal(|| "start `slm ship`".to_owned())?;
        let status = loop {
            match tokio::time::timeout(POLL, child.wait()).await {
                Ok(status) => break status.internal(|| "wait for `slm ship`".to_owned())?,
                Err(_) => self.tend()?,
            }
        };
        let code = status.code().unwrap_or(Exit::Internal as i32);
        if code == 0 || tolerated.iter().any(|exit| *exit as i32 == code) {
            return Ok(code);
        }
        Err(Failure::internal(format!("`slm ship` ended with {status}")))
    }

    /// Starts devices again that somebody killed.
    fn tend(&mut self) -> Result<()> {
        for process in &mut self.processes {
            if let Some(what) = process.tend()? {
                self.session.progress.say(format!("   ! {what}"));
            }
        }
        Ok(())
    }

    fn slm_command(&self) -> Command {
        let mut command = Command::new(&self.slm);
        command.env("SLM_HOME", self.home.folder());
        for variable in ["SLM_HUB", "SLM_TOKEN", "SLM_CA", "SLM_OUTPUT"] {
            command.env_remove(variable);
        }
        command
    }

    fn show_command(&self, program: &[&str], arguments: &[String]) {
        let here = std::env::current_dir().unwrap_or_default();
        let here = format!("{}/", here.display());
        let words =
            program.iter().map(|&word| word.to_owned()).chain(arguments.iter().map(|word| {
                let word = word.replace(&here, "");
                if word.contains(' ') { format!("'{word}'") } else { word }
            }));
        self.say(format!("   $ {}", words.collect::<Vec<_>>().join(" ")));
    }

    // -- 4 ---------------------------------------------------------------------------------

    async fn start_devices(&mut self, hub: &Hub) -> Result<()> {
        self.step(
            "Let three devices join",
            "Each is a real slm-agent process. It makes its own key, joins with a one-time
             invitation that pins the hub's certificate, and offers a memory budget of its own.",
        );
        for (name, memory, kind) in DEVICES {
            self.start_device(hub, name, memory, kind).await?;
        }
        self.wait_for("every device's first report", hub, |devices| {
            devices.len() == DEVICES.len() && devices.iter().all(|d| d.report.is_some())
        })
        .await?;
        for device in self.devices(hub).await? {
            self.say(format!(
                "   {} offers {}: class {}",
                device.name,
                units::bytes(device.facts.memory_budget_bytes),
                device.class
            ));
        }
        Ok(())
    }

    async fn start_device(
        &mut self,
        hub: &Hub,
        name: &str,
        memory: &str,
        kind: &str,
    ) -> Result<()> {
        let invitation: slmops_api::device::Invitation = hub
            .call(
                reqwest::Method::POST,
                "/v1/invitations",
                &slmops_api::device::NewInvitation::default(),
                "invite a device",
            )
            .await?;
        let folder = self.folder.join("devices").join(name);
        std::fs::create_dir_all(&folder).user(|| format!("create `{}`", folder.display()))?;
        let file = folder.join("invite.txt");
        crate::home::write_private(&file, invitation.text.as_bytes())?;
        let arguments = [
            "join",
            &file.display().to_string(),
            "--state",
            &folder.join("state").display().to_string(),
            "--name",
            name,
            "--memory-budget",
            memory,
            "--listen",
            "127.0.0.1:0",
        ]
        .map(str::to_owned);
        self.say(format!("   {name}, {kind}:"));
        self.show_command(&["slm-agent"], &arguments);
        let log = self.folder.join("logs").join(format!("{name}.log"));
        let mut command = Command::new(&self.agent);
        command.args(&arguments);
        let process = Process::start(&format!("the device {name}"), &mut command, &log, false)?;
        let (agent, state) = (self.agent.clone(), folder.join("state"));
        self.processes.push(process.restarting(move || {
            let mut command = Command::new(&agent);
            command.arg("run").arg("--state").arg(&state);
            command
        }));
        Ok(())
    }

    async fn devices(&self, hub: &Hub) -> Result<Vec<Device>> {
        let mut devices: Vec<Device> = hub.list("/v1/devices", "list the devices").await?;
        let place = |device: &Device| DEVICES.iter().position(|(name, ..)| *name == device.name);
        devices.sort_by_key(place);
        Ok(devices)
    }

    /// Waits for a condition on the devices, watching that no process ends meanwhile.
    async fn wait_for(
        &mut self,
        what: &str,
        hub: &Hub,
        holds: impl Fn(&[Device]) -> bool,
    ) -> Result<Vec<Device>> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let devices = self.devices(hub).await?;
            if holds(&devices) {
                return Ok(devices);
            }
            self.tend()?;
            if Instant::now() > deadline {
                return Err(Failure::internal(format!(
                    "waited {} for {what}",
                    units::duration(READY_TIMEOUT)
                ))
                .hint(format!("the logs are in {}", self.folder.join("logs").display())));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    // -- 5 ---------------------------------------------------------------------------------

    async fn roll_out(&mut self, hub: &Hub) -> Result<()> {
        self.step(
            "Roll 1.0.0 out",
            "First one device, the canary; the rest only after it has confirmed. To confirm, a
             device verifies the signature, loads the model beside what it serves, and must answer
             the package's golden probes as the reference did.",
        );
        let model = self.arguments.model.clone();
        self.ship(&model, &GOOD, &[], &[]).await?;
        let devices = self
            .wait_for("an endpoint on every device", hub, |devices| {
                devices.iter().all(|device| device.facts.endpoint.is_some())
            })
            .await?;
        self.say("   Which variant each device got, and why:");
        let rollout = rollout::find(hub, None).await?;
        for device in &rollout.devices {
            self.say(format!("   {}: {}", device.name, device.fit));
        }
        self.check_memory(&devices)?;
        let gateway = devices.last().ok_or_else(|| Failure::internal("there is no device"))?;
        let endpoint = endpoint(gateway)?;
        self.say(format!("   A question to {}'s own OpenAI-compatible endpoint:", gateway.name));
        self.say(format!(
            "   $ curl -N {endpoint}/v1/chat/completions -d '{{\"stream\":true, …}}'"
        ));
        self.say(format!("   {QUESTION}"));
        eprint!("     ");
        let answer = chat::ask(&endpoint, QUESTION, ANSWER_TOKENS).await?;
        let after_first = answer.total.saturating_sub(answer.first).as_secs_f64();
        let rate = f64::from(answer.pieces.saturating_sub(1)) / after_first.max(1e-3);
        self.say(format!(
            "   {} pieces, the first after {}, then {rate:.0} a second",
            answer.pieces,
            units::duration(answer.first)
        ));
        Ok(())
    }

    /// What each worker took is what the fit said, or near enough.
    fn check_memory(&self, devices: &[Device]) -> Result<()> {
        let mut lines = Vec::new();
        for device in devices {
            let predicted = device.desired.model.as_ref().map_or(0, |m| m.predicted_memory_bytes);
            let measured =
                device.report.as_ref().map_or(0, |report| report.telemetry.worker_memory_bytes);
            if measured == 0 {
                continue;
            }
            let off = measured.abs_diff(predicted) as f64 / measured as f64;
            if off > MEMORY_TOLERANCE {
                return Err(Failure::internal(format!(
                    "{} was predicted to take {}, and takes {}",
                    device.name,
                    units::bytes(predicted),
                    units::bytes(measured)
                )));
            }
            lines.push(format!("{} {}", device.name, units::bytes(measured)));
        }
        self.say(format!("   Measured on the devices: {}.", lines.join(", ")));
        Ok(())
    }

    // -- 6 ---------------------------------------------------------------------------------

    async fn catch_the_bad_one(&mut self, hub: &Hub) -> Result<()> {
        self.step(
            "Ship a damaged 1.1.0",
            "Some of its layers are scrambled: it still loads and it still talks, but nonsense.
             The gate compares it with 1.0.0 and refuses it.",
        );
        let before = self.devices(hub).await?;
        let damaged = self.folder.join("damaged.gguf");
        self.damage(&damaged).await?;
        let code = self.ship(&damaged, &BAD, &["--until", "gate"], &[Exit::Gate]).await?;
        if code != Exit::Gate as i32 {
            return Err(Failure::internal("the gate let the damaged model pass"));
        }
        self.say("   Refused (exit code 3): nothing was released, nothing was pushed.");
        self.say("   Now somebody in a hurry overrides the gate. Meanwhile customers keep asking all three devices.");
        let mut asked = Vec::new();
        for device in &before {
            asked.push((device.name.clone(), endpoint(device)?));
        }
        let load = Load::start(&asked);
        let shipped = self
            .ship(
                &damaged,
                &BAD,
                &["--override-gate", "we are in a hurry, it will be fine"],
                &[Exit::Gate],
            )
            .await;
        let counts = load.finish().await;
        shipped?;
        let rollout = rollout::find(hub, None).await?;
        self.check_halt(&rollout)?;
        let after = self
            .wait_for("every device to answer from 1.0.0", hub, |devices| {
                devices.iter().all(|device| {
                    let running = device.report.as_ref().and_then(|report| report.running.as_ref());
                    running.is_some_and(|running| running.version == GOOD)
                })
            })
            .await?;
        self.check_bytes(&rollout, &before, &after)?;
        let restarts: u32 = self.processes.iter().map(Process::restarts).sum();
        for (name, answered, failed, first) in &counts {
            if *failed > 0 && restarts > 0 {
                self.say(format!("   {name} failed {failed} questions while it was killed."));
            } else if *failed > 0 {
                return Err(Failure::internal(format!(
                    "{name} failed {failed} of {} questions during the rollout, the first with: {}",
                    answered + failed,
                    first.as_deref().unwrap_or("no reason")
                )));
            }
        }
        let failed: u64 = counts.iter().map(|(_, _, failed, _)| failed).sum();
        self.answered = counts.into_iter().map(|(name, answered, ..)| (name, answered)).collect();
        let total: u64 = self.answered.iter().map(|(_, answered)| answered).sum();
        self.say(format!(
            "   During all of it {} questions were asked; {total} were answered, {failed} failed.",
            total + failed
        ));
        self.say("   The evidence:");
        self.show_command(&["slm"], &["rollout".to_owned(), "why".to_owned()]);
        rollout::print_why(&rollout)
    }

    async fn damage(&self, target: &Path) -> Result<()> {
        let model = &self.arguments.model;
        let arguments = [
            "model",
            "damage",
            &model.display().to_string(),
            "--out",
            &target.display().to_string(),
        ]
        .map(str::to_owned);
        self.show_command(&["slm"], &arguments);
        let status = self
            .slm_command()
            .args(&arguments)
            .kill_on_drop(true)
            .status()
            .await
            .internal(|| "start `slm model damage`".to_owned())?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::internal(format!("`slm model damage` ended with {status}")))
    }

    /// The rollout halted at its canary, which failed its probes; nobody else was told.
    fn check_halt(&self, rollout: &Rollout) -> Result<()> {
        if rollout.state != RolloutState::Halted || rollout.asked.version != BAD {
            return Err(Failure::internal(format!(
                "the rollout of {} is {:?}, it should be halted",
                rollout.asked.version, rollout.state
            )));
        }
        let told = rollout.devices.iter().filter(|device| device.generation.is_some());
        let [canary] = told.collect::<Vec<_>>()[..] else {
            return Err(Failure::internal("more devices than the canary were told of 1.1.0"));
        };
        let Outcome::Failed { failure: slmops_api::device::Failure::Probes { results } } =
            &canary.outcome
        else {
            return Err(Failure::internal(format!("{} did not fail its probes", canary.name)));
        };
        let failed = results.iter().filter(|result| !result.passed).count();
        self.say(format!(
            "   {} failed {failed} of {} probes, went back to 1.0.0 by itself, and the rollout halted.",
            canary.name,
            results.len()
        ));
        Ok(())
    }

    /// No device but the canary downloaded anything.
    fn check_bytes(&self, rollout: &Rollout, before: &[Device], after: &[Device]) -> Result<()> {
        let downloaded = |device: &Device| {
            device.report.as_ref().map_or(0, |report| report.telemetry.downloaded_bytes)
        };
        for device in after {
            let earlier = before.iter().find(|one| one.id == device.id).map_or(0, downloaded);
            let bytes = downloaded(device).saturating_sub(earlier);
            let told = rollout
                .devices
                .iter()
                .any(|one| one.device == device.id && one.generation.is_some());
            if !told && bytes > 0 {
                return Err(Failure::internal(format!(
                    "{} downloaded {} of a release that it was never offered",
                    device.name,
                    units::bytes(bytes)
                )));
            }
            let role = if told { "the canary" } else { "never offered it" };
            self.say(format!(
                "   {} ({role}) downloaded {} of 1.1.0",
                device.name,
                units::bytes(bytes)
            ));
        }
        Ok(())
    }

    // -- 7 ---------------------------------------------------------------------------------

    async fn summary(&mut self, hub: &Hub) -> Result<()> {
        self.step("What happened", "");
        let mut rows = Vec::new();
        for (title, took) in self.steps.iter().take(self.steps.len() - 1) {
            rows.push(vec![title.clone(), units::duration(*took)]);
        }
        let total: Duration = self.steps.iter().map(|(_, took)| *took).sum();
        rows.push(vec!["all".to_owned(), units::duration(total)]);
        let table = crate::output::table(&["step", ">took"], rows);
        crate::output::print(&table)?;
        let answered = |name: &str| {
            self.answered.iter().find(|(device, _)| device == name).map_or(0, |(_, count)| *count)
        };
        let rows = self.devices(hub).await?.into_iter().map(|device| {
            let report = device.report.as_ref();
            let running = report.and_then(|report| report.running.as_ref());
            vec![
                device.name.clone(),
                running.map_or_else(
                    || "nothing".to_owned(),
                    |m| format!("{} {}", m.version, m.variant),
                ),
                units::bytes(report.map_or(0, |report| report.telemetry.downloaded_bytes)),
                answered(&device.name).to_string(),
            ]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        let columns = ["device", "runs", ">downloaded", ">answered during 1.1.0"];
        let table = crate::output::table(&columns, rows);
        crate::output::print(&format!("\n{table}"))?;
        self.say("\n   What to try next:");
        self.say("     make demo KEEP=1                              look around while it runs");
        self.say("     slm serve MODEL.gguf                          one model on this machine, no fleet");
        self.say("     slm up                                        a hub of your own");
        self.say("     slm ship MODEL.gguf --to 'class=small|large'  your model onto your devices");
        Ok(())
    }

    async fn stay(&mut self) {
        self.say("\n   Everything is still running. In another terminal:");
        self.say(format!("     export SLM_HOME={}", self.home.folder().display()));
        self.say("     slm device list; slm rollout why; slm audit verify");
        for process in &self.processes {
            self.say(format!("     {} is process {}", process.name, process.id()));
        }
        self.say("   Ctrl-C ends all of it and removes the folder.");
        stopped().await;
    }

    /// Ends every process and removes the folder; keeps the logs of what broke.
    async fn clean_up(&mut self, keep_logs: bool) {
        // Devices first, so that they do not complain about a hub that is gone.
        while let Some(process) = self.processes.pop() {
            process.stop().await;
        }
        if keep_logs {
            self.say(format!("The logs are kept in {}", self.folder.join("logs").display()));
            for part in ["hub", "devices", "home", "damaged.gguf"] {
                let path = self.folder.join(part);
                // What cannot be removed now is removed by the next demo.
                let _ = if path.is_dir() {
                    std::fs::remove_dir_all(&path)
                } else {
                    std::fs::remove_file(&path)
                };
            }
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            self.say(format!("could not remove {}: {error}", self.folder.display()));
        }
    }
}

fn endpoint(device: &Device) -> Result<String> {
    let endpoint = device.facts.endpoint.clone();
    endpoint.ok_or_else(|| Failure::internal(format!("{} has no endpoint", device.name)))
}
