//! The adapters of a running worker, as its owner knows them.

use std::path::PathBuf;

use super::protocol::{AdapterChoice, AdapterFile, AdapterUse, Command, Event, RequestError};
use super::{Worker, WorkerError, unexpected};

/// The most adapters of one model.
const MAX_ADAPTERS: usize = 64;
/// The largest factor of an adapter.
const MAX_SCALE: f32 = 100.0;
/// The longest name of an adapter.
const MAX_NAME_CHARS: usize = 100;

/// What is loaded.
pub(super) struct Adapters {
    loaded: Vec<AdapterFile>,
    next_id: u32,
}

impl Adapters {
    pub(super) fn new(loaded: Vec<AdapterFile>) -> Self {
        let next_id = loaded.iter().map(|adapter| adapter.id + 1).max().unwrap_or(0);
        Self { loaded, next_id }
    }

    fn applied(&self, choice: &AdapterChoice) -> Result<Vec<AdapterUse>, RequestError> {
        let uses = match choice {
            AdapterChoice::Common => {
                self.loaded.iter().map(|it| AdapterUse { id: it.id, scale: it.scale }).collect()
            }
            AdapterChoice::Named(name) => {
                let found = self.loaded.iter().find(|adapter| adapter.name == *name);
                let found = found.ok_or_else(|| unknown(&format!("`{name}`")))?;
                vec![AdapterUse { id: found.id, scale: 1.0 }]
            }
            AdapterChoice::These(uses) => {
                for (place, AdapterUse { id, scale }) in uses.iter().enumerate() {
                    check_scale(*scale)?;
                    if !self.loaded.iter().any(|adapter| adapter.id == *id) {
                        return Err(unknown(&format!("number {id}")));
                    }
                    if uses[..place].iter().any(|earlier| earlier.id == *id) {
                        return Err(wrong("lora", format!("adapter {id} is named twice")));
                    }
                }
                uses.clone()
            }
        };
        Ok(uses)
    }
}

fn wrong(parameter: &str, message: String) -> RequestError {
    RequestError::Invalid { parameter: parameter.to_owned(), message }
}

fn unknown(which: &str) -> RequestError {
    wrong("lora", format!("there is no adapter {which}\nhint: GET /lora-adapters lists them"))
}

fn check_scale(scale: f32) -> Result<(), RequestError> {
    match (-MAX_SCALE..=MAX_SCALE).contains(&scale) {
        true => Ok(()),
        false => Err(wrong("scale", format!("{scale} is not within -{MAX_SCALE} to {MAX_SCALE}"))),
    }
}

impl Worker {
    fn known(&self) -> std::sync::MutexGuard<'_, Adapters> {
        self.shared.adapters.lock().expect("no holder panics")
    }

    /// The adapters that are loaded.
    pub fn adapters(&self) -> Vec<AdapterFile> {
        self.known().loaded.clone()
    }

    /// What is applied for a choice; adapters without effect are left out.
    pub(super) fn applied(&self, choice: &AdapterChoice) -> Result<Vec<AdapterUse>, RequestError> {
        let mut uses = self.known().applied(choice)?;
        uses.retain(|used| used.scale != 0.0);
        Ok(uses)
    }

    /// Loads an adapter beside the model, while requests go on.
    ///
    /// # Errors
    /// The name is taken or cannot be one, the file is no adapter of this model, or the worker fails.
    pub async fn load_adapter(
        &self,
        name: String,
        path: PathBuf,
        scale: f32,
    ) -> Result<AdapterFile, WorkerError> {
        check_scale(scale)?;
        let fits = (1..=MAX_NAME_CHARS).contains(&name.chars().count());
        if !fits || name.chars().any(char::is_control) {
            let message = format!("expected 1 to {MAX_NAME_CHARS} characters");
            return Err(wrong("name", message).into());
        }
        let adapter = {
            let mut known = self.known();
            if known.loaded.iter().any(|adapter| adapter.name == name) {
                return Err(wrong("name", format!("there is an adapter `{name}` already")).into());
            }
            if known.loaded.len() >= MAX_ADAPTERS {
                return Err(wrong("path", format!("{MAX_ADAPTERS} adapters are loaded")).into());
            }
            known.next_id += 1;
            AdapterFile { id: known.next_id - 1, name, path, scale }
        };
        let path = adapter.path.clone();
        let load = self.submit(|id| Command::LoadAdapter { id, adapter: adapter.id, path })?;
        match load.result().await? {
            Event::Done { .. } => {}
            other => return Err(unexpected(&other)),
        }
        let mut known = self.known();
        if known.loaded.iter().any(|other| other.name == adapter.name) {
            let name = adapter.name;
            return Err(wrong("name", format!("there is an adapter `{name}` already")).into());
        }
        known.loaded.push(adapter.clone());
        Ok(adapter)
    }

    /// Unloads an adapter. Answers under way that use it are finished with it.
    ///
    /// # Errors
    /// There is none of this id, or the worker fails.
    pub async fn unload_adapter(&self, adapter: u32) -> Result<(), WorkerError> {
        {
            let mut known = self.known();
            let count = known.loaded.len();
            known.loaded.retain(|it| it.id != adapter);
            if known.loaded.len() == count {
                return Err(unknown(&format!("number {adapter}")).into());
            }
        }
        match self.submit(|id| Command::UnloadAdapter { id, adapter })?.result().await? {
            Event::Done { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Sets the scales of requests that choose no adapters; those that are not named get 0.
    ///
    /// # Errors
    /// There is no such adapter, or a scale is out of range.
    pub fn scale_adapters(&self, scales: &[AdapterUse]) -> Result<(), WorkerError> {
        let mut known = self.known();
        known.applied(&AdapterChoice::These(scales.to_vec()))?;
        for adapter in &mut known.loaded {
            let given = scales.iter().find(|given| given.id == adapter.id);
            adapter.scale = given.map_or(0.0, |given| given.scale);
        }
        Ok(())
    }
}
