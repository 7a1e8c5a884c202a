//! The pipeline of `slm ship`: import, variants, measurement, gate, pack, release, rollout.
//! Every stage is keyed by digests, so a repeated ship continues where the last one stopped.

pub mod engine;
mod pack;
pub mod report;
pub mod source;

use std::io::{BufRead, IsTerminal, Write};

use reqwest::Method;
use semver::Version;
use slmops_api::device::PublisherKey;
use slmops_api::model::{DeviceClass, GateOverride, NewRelease, Release, Requirements, Variant};
use slmops_api::probe::{PROBES_FILE, ProbeSet};
use slmops_api::report::{EvaluationReport, GateDecision, Verdict};
use slmops_api::{ClassName, ModelName, VariantName};
use slmops_artifact::lineage::Lineage;
use slmops_artifact::package::{ModelConfig, Package};
use slmops_artifact::signing::PrivateKey;

use crate::client::Hub;
use crate::commands::ship::{Ship, Until};
use crate::commands::{Session, key, rollout};
use crate::error::{Context, Exit, Failure, Result};
use crate::registry::Repository;
use crate::units;
use report::Row;
use source::{AdapterFile, File, Original};

/// A variant with all that is known of it.
struct Candidate {
    name: VariantName,
    quantisation: String,
    classes: Vec<ClassName>,
    file: File,
    lineage: Lineage,
    report: Option<EvaluationReport>,
    gate: Option<GateDecision>,
}

/// Ships a model.
pub async fn run(ship: &Ship, session: &Session) -> Result<()> {
    let hub = session.hub()?;
    let original = source::original(session, &ship.model).await?;
    let name = match &ship.name {
        Some(name) => name.clone(),
        None => original.model_name()?,
    };
    let mut releases: Vec<Release> = hub.list("/v1/releases", "list the releases").await?;
    releases.retain(|one| one.release.model == name);
    releases.sort_by(|a, b| a.release.version.cmp(&b.release.version));
    let adapter = ship.adapter.as_deref().map(source::adapter).transpose()?;
    let adapter = adapter.as_ref();
    let version = choose_version(ship.version.clone(), &releases, &original, adapter)?;

    let registered = releases.iter().find(|one| one.release.version == version);
    if let Some(release) = registered {
        session.progress.say(format!("  ✓ {name} {version} is released already"));
        if ship.until < Until::Rollout {
            return session.out.show(release, || report::variants_table(&release.release.variants));
        }
    } else {
        let previous = releases.iter().rfind(|one| one.release.version < version);
        let work =
            Work { ship, session, hub: &hub, name: &name, version: &version, adapter, previous };
        if !work.release(&original).await? {
            return Ok(());
        }
    }
    roll_out(ship, session, &hub, &name, &version).await
}

/// The version that is meant: the one that was asked for; else that of the newest release if it
/// was made from this very original and adapter; else the next minor one.
fn choose_version(
    asked: Option<Version>,
    releases: &[Release],
    original: &Original,
    adapter: Option<&AdapterFile>,
) -> Result<Version> {
    let adapter = adapter.map(|file| file.adapter);
    let same = |release: &Release| {
        let release = &release.release;
        release.original == original.file.digest
            && release.variants.first().and_then(|variant| variant.adapter) == adapter
    };
    let Some(asked) = asked else {
        return Ok(match releases.last() {
            None => Version::new(1, 0, 0),
            Some(newest) if same(newest) => newest.release.version.clone(),
            Some(newest) => {
                let newest = &newest.release.version;
                Version::new(newest.major, newest.minor + 1, 0)
            }
        });
    };
    match releases.iter().find(|release| release.release.version == asked) {
        Some(other) if !same(other) => {
            let next = Version::new(asked.major, asked.minor + 1, 0);
            let from = match other.release.original == original.file.digest {
                true => "with another adapter, or none".to_owned(),
                false => format!("from another file ({})", other.release.original.short()),
            };
            let model = &other.release.model;
            Err(Failure::user(format!("{model} {asked} was released already, {from}"))
                .hint(format!("a release never changes: choose another version, such as {next}")))
        }
        _ => Ok(asked),
    }
}

/// The classes that a selector is about: those it names, or all of them.
fn choose_classes(all: Vec<DeviceClass>, ship: &Ship) -> Result<Vec<DeviceClass>> {
    let policy = ship.policy.policy()?;
    let named = policy.selector.values_of("class");
    for wanted in &named {
        if !all.iter().any(|class| class.name.as_str() == *wanted) {
            let known = report::join(&all.iter().map(|class| &class.name).collect::<Vec<_>>());
            return Err(Failure::user(format!("there is no device class `{wanted}`"))
                .hint(format!("known are: {known}; `slm class set` makes another")));
        }
    }
    let mut chosen = all;
    chosen.retain(|class| named.is_empty() || named.contains(&class.name.as_str()));
    chosen.sort_by_key(|class| std::cmp::Reverse(class.min_memory_bytes));
    if chosen.is_empty() {
        return Err(Failure::user("the hub has no device classes")
            .hint("slm class set small --min-memory 0 --quantisation Q4_K_M"));
    }
    Ok(chosen)
}

struct Work<'a> {
    ship: &'a Ship,
    session: &'a Session,
    hub: &'a Hub,
    name: &'a ModelName,
    version: &'a Version,
    adapter: Option<&'a AdapterFile>,
    previous: Option<&'a Release>,
}

impl Work<'_> {
    /// Everything up to the registered release; `false` if it was told to stop before.
    async fn release(&self, original: &Original) -> Result<bool> {
        if self.ship.until >= Until::Release {
            // A key that cannot sign is better known before the work than after it.
            self.publisher(&self.session.home.key(&self.ship.key)?).await?;
        }
        let classes: Vec<DeviceClass> = self.hub.list("/v1/classes", "list the classes").await?;
        let classes = choose_classes(classes, self.ship)?;
        let reference = source::reference(self.session, original).await?;
        let mut candidates = Vec::new();
        for class in classes {
            let quantisation = class.quantisation.clone();
            let known = candidates
                .iter_mut()
                .find(|known: &&mut Candidate| known.quantisation == quantisation);
            match known {
                Some(known) => known.classes.push(class.name),
                None => {
                    let candidate = self.candidate(original, &reference, class).await?;
                    candidates.push(candidate);
                }
            }
        }
        if self.ship.until == Until::Variants {
            let files: Vec<&File> = candidates.iter().map(|candidate| &candidate.file).collect();
            self.session.out.show(&files, || {
                let rows = candidates.iter().map(|candidate| {
                    let file = &candidate.file;
                    vec![
                        candidate.name.to_string(),
                        units::bytes(file.size_bytes),
                        file.path.display().to_string(),
                    ]
                });
                crate::output::table(&["variant", ">size", "file"], rows)
            })?;
            return Ok(false);
        }

        let measuring = self.ship.measuring.load()?;
        let original_report =
            self.measure("the reference", &reference, &reference, &measuring).await?;
        for candidate in &mut candidates {
            let label = candidate.quantisation.clone();
            let measured = self.measure(&label, &candidate.file, &reference, &measuring).await?;
            let earlier = self.earlier(candidate);
            let gate = engine::gate(&measured, &original_report, &label, earlier)?;
            candidate.report = Some(measured);
            candidate.gate = Some(gate);
        }
        self.show(&original_report, &candidates)?;
        self.judge(&candidates)?;
        if self.ship.until == Until::Gate {
            return Ok(false);
        }
        self.publish(original, &reference, candidates).await?;
        Ok(true)
    }

    async fn measure(
        &self,
        label: &str,
        file: &File,
        reference: &File,
        measuring: &engine::Measuring,
    ) -> Result<EvaluationReport> {
        engine::evaluate(self.session, label, file, reference, self.adapter, measuring).await
    }

    async fn candidate(
        &self,
        original: &Original,
        reference: &File,
        class: DeviceClass,
    ) -> Result<Candidate> {
        let quantisation = class.quantisation;
        let file = source::variant(self.session, reference, &quantisation).await?;
        let name: VariantName = quantisation
            .to_lowercase()
            .parse()
            .user(|| format!("name a variant after `{quantisation}`"))?;
        let lineage = source::lineage(
            self.name,
            self.version,
            &name,
            original,
            reference,
            &file,
            self.adapter,
        );
        Ok(Candidate {
            name,
            quantisation,
            classes: vec![class.name],
            file,
            lineage,
            report: None,
            gate: None,
        })
    }

    /// The previous release's variant that a candidate replaces: the same kind.
    fn earlier(&self, candidate: &Candidate) -> Option<(&Version, &EvaluationReport)> {
        let previous = &self.previous?.release;
        let same = previous.variants.iter().find(|v| v.quantisation == candidate.quantisation)?;
        Some((&previous.version, &same.report))
    }

    fn show(&self, original: &EvaluationReport, candidates: &[Candidate]) -> Result<()> {
        let mut rows = vec![Row {
            name: "reference".to_owned(),
            classes: "(16 bits)".to_owned(),
            report: original,
            gate: None,
        }];
        for candidate in candidates {
            if let Some(report) = &candidate.report {
                rows.push(Row {
                    name: candidate.name.to_string(),
                    classes: report::join(&candidate.classes),
                    report,
                    gate: candidate.gate.as_ref(),
                });
            }
        }
        let table = report::measurements(&rows);
        if self.session.out.is_json() {
            let reports: Vec<&EvaluationReport> = rows.iter().map(|row| row.report).collect();
            // The last stage's result is the document on stdout; this one is only for `--until gate`.
            return match self.ship.until {
                Until::Gate => self.session.out.show(&reports, String::new),
                _ => Ok(()),
            };
        }
        crate::output::print(&format!("\n{table}\n"))
    }

    /// Fails with exit code 3 if the gate says worse and nobody overrides it.
    fn judge(&self, candidates: &[Candidate]) -> Result<()> {
        let blocked = |gate: &GateDecision| {
            gate.verdict == Verdict::Worse
                || (self.ship.strict && gate.verdict == Verdict::TooFewSamples)
        };
        let mut evidence = Vec::new();
        let mut refused = Vec::new();
        for candidate in candidates {
            if let Some(gate) = candidate.gate.as_ref().filter(|gate| blocked(gate)) {
                refused.push(candidate.name.to_string());
                evidence.extend(report::worse_rows(candidate.name.as_str(), gate));
            }
        }
        if refused.is_empty() {
            self.session.progress.say("  ✓ gate: no variant is worse");
            return Ok(());
        }
        for line in evidence {
            self.session.progress.say(format!("  ✗ {line}"));
        }
        if let Some(reason) = &self.ship.override_gate {
            self.session.progress.say(format!("  ! the gate is overridden: {reason}"));
            return Ok(());
        }
        let verdict = if self.ship.strict { "cannot pass" } else { "is worse" };
        let failure = Failure::user(format!(
            "the gate says that {} {} {verdict} ({})",
            self.name,
            self.version,
            refused.join(", ")
        ));
        Err(failure
            .exit(Exit::Gate)
            .hint("mend the model; or ship it all the same with --override-gate REASON"))
    }

    /// The key that signs, as the hub knows it.
    async fn publisher(&self, signer: &PrivateKey) -> Result<PublisherKey> {
        key::register(self.hub, key::record(&self.ship.key, signer)?).await
    }

    async fn publish(
        &self,
        original: &Original,
        reference: &File,
        candidates: Vec<Candidate>,
    ) -> Result<()> {
        let (session, hub) = (self.session, self.hub);
        let signer = session.home.key(&self.ship.key)?;
        let publisher = self.publisher(&signer).await?;
        let repository = Repository::new(hub, self.name);
        let earlier = self.earlier_probes(&repository).await?;
        let mut golden = engine::Probes::new(session, reference, self.adapter);
        let mut variants = Vec::new();
        let mut sent_bytes = 0;
        for candidate in candidates {
            let (Some(measured), gate) = (candidate.report, candidate.gate) else { continue };
            let carried = slmops_evaluate::probes::carry_over(&earlier, &candidate.quantisation);
            let probes = match carried {
                Some(probes) => probes,
                None => golden.of(&candidate.file, &candidate.quantisation).await?,
            };
            let tag = format!("{}-{}", self.version, candidate.name);
            let stage = session.progress.stage(format!("push {tag}"));
            let config = ModelConfig {
                name: self.name.to_string(),
                version: Some(self.version.clone()),
                family: Some(candidate.file.shape.architecture.clone()),
                title: original.title.clone(),
                licenses: original.license.clone().into_iter().collect(),
                parameters: Some(candidate.file.shape.parameters),
                quantisation: Some(candidate.quantisation.clone()),
                // Not the wall clock: the same variant packed again is the same package.
                created_at: Some(measured.finished_at),
            };
            let contents = pack::Contents {
                model: &candidate.file.path,
                weights: candidate.file.digest,
                size_bytes: candidate.file.size_bytes,
                adapter: self.adapter,
                probes: &probes,
                lineage: &candidate.lineage,
                report: &measured,
                config: &config,
            };
            let pushed =
                pack::push(&repository, self.name, &tag, &signer, &contents, |done, all| {
                    stage.bytes(done, all);
                })
                .await?;
            sent_bytes += pushed.sent_bytes;
            stage.done(format!(
                "{}, {} travelled",
                pushed.manifest.short(),
                units::bytes(pushed.sent_bytes)
            ));
            variants.push(Variant {
                name: candidate.name,
                classes: candidate.classes,
                quantisation: candidate.quantisation,
                manifest: pushed.manifest,
                weights: candidate.file.digest,
                size_bytes: candidate.file.size_bytes,
                adapter: self.adapter.map(|file| file.adapter),
                repacked_bytes: candidate.file.repacked_bytes,
                shape: candidate.file.shape,
                report: measured,
                gate,
            });
        }
        let worse = variants
            .iter()
            .any(|v| v.gate.as_ref().is_some_and(|gate| gate.verdict != Verdict::NoWorse));
        let reason = self.ship.override_gate.clone().filter(|_| worse);
        let release = NewRelease {
            model: self.name.clone(),
            version: self.version.clone(),
            original: original.file.digest,
            key: publisher.id,
            variants,
            gate_override: reason.map(|reason| GateOverride { reason }),
            requires: Requirements {
                engine: self.ship.min_engine.clone(),
                agent: self.ship.min_agent.clone(),
            },
        };
        let what = format!("release {} {}", self.name, self.version);
        let created: Release = hub.call(Method::POST, "/v1/releases", &release, &what).await?;
        session.progress.say(format!(
            "  ✓ {} {} is released, signed by {} ({} travelled)",
            self.name,
            self.version,
            release.key,
            units::bytes(sent_bytes)
        ));
        if self.ship.until == Until::Release && session.out.is_json() {
            session.out.show(&created, String::new)?;
        }
        Ok(())
    }

    /// The golden probes belong to the model line: they are made at its first release and carried
    /// over, so that a later version which is worse fails what earlier ones passed.
    async fn earlier_probes(&self, repository: &Repository<'_>) -> Result<Vec<(String, ProbeSet)>> {
        let mut earlier = Vec::new();
        let Some(previous) = self.previous else { return Ok(earlier) };
        let what = || format!("read the probes of {} {}", self.name, previous.release.version);
        for variant in &previous.release.variants {
            let manifest = repository.manifest(variant.manifest).await?;
            let package = Package::parse(&manifest).internal(what)?;
            let file = package.file(PROBES_FILE).ok_or_else(|| {
                Failure::internal(format!("{}: the package of {} has none", what(), variant.name))
            })?;
            let probes = repository.blob(file.digest).await?;
            let probes = serde_json::from_slice(&probes).internal(what)?;
            earlier.push((variant.quantisation.clone(), probes));
        }
        Ok(earlier)
    }
}

async fn roll_out(
    ship: &Ship,
    session: &Session,
    hub: &Hub,
    name: &ModelName,
    version: &Version,
) -> Result<()> {
    if ship.until < Until::Rollout {
        return Ok(());
    }
    let policy = ship.policy.policy()?;
    if !ship.yes && !confirmed(&format!("Roll {name} {version} out to {}?", policy.selector))? {
        return Err(Failure::user("nothing was rolled out; the release stays")
            .hint(format!("slm rollout start {name} {version} --to '{}'", policy.selector)));
    }
    let rollout = rollout::start(hub, name.clone(), version.clone(), policy).await?;
    if ship.detach {
        return session.out.show(&rollout, || rollout::status(&rollout));
    }
    let ended = rollout::follow(session, hub, &rollout.id).await?;
    rollout::finish(session, &ended)
}

/// Asks on the terminal; without one the answer is yes.
fn confirmed(question: &str) -> Result<bool> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(true);
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush().internal(|| "ask on the terminal".to_owned())?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).internal(|| "read the answer".to_owned())?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
}

#[cfg(test)]
mod tests;
