//! Where llama.cpp's log goes: to `tracing`, in a child also to stderr; never to stdout. What it
//! says while an operation runs is kept, since its functions return no cause of their own.

use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use llama_cpp_sys_2 as sys;

/// Environment variable that sends the engine's whole log to the child's stderr.
const VERBOSE_VARIABLE: &str = "SLMOPS_ENGINE_LOG";
/// The lines kept of one operation.
const MAX_CAPTURED_LINES: usize = 4096;

static TO_STDERR: AtomicBool = AtomicBool::new(false);
static VERBOSE: AtomicBool = AtomicBool::new(false);
static STATE: Mutex<State> =
    Mutex::new(State { partial: String::new(), level: 0, captured: None, listener: None });
/// Held while an operation's log is captured: one at a time.
static CAPTURE: Mutex<()> = Mutex::new(());

struct State {
    /// A line that has not ended yet, and its level.
    partial: String,
    level: sys::ggml_log_level,
    captured: Option<Vec<Line>>,
    listener: Option<Sender<String>>,
}

/// One line of the engine's log.
pub(super) struct Line {
    error: bool,
    pub(super) text: String,
}

/// Sends warnings and errors of the engine to stderr, as children do: their parent reads it.
pub fn log_to_stderr() {
    TO_STDERR.store(true, Ordering::Relaxed);
    VERBOSE.store(std::env::var_os(VERBOSE_VARIABLE).is_some(), Ordering::Relaxed);
}

/// Routes the library's log and its last words to this module.
pub(super) fn install() {
    // SAFETY: both callbacks are plain functions without state of their own, valid for ever.
    unsafe {
        sys::llama_log_set(Some(on_log), std::ptr::null_mut());
        sys::ggml_set_abort_callback(Some(on_abort));
    }
}

/// Runs `operation` and returns what the engine logged meanwhile (of all threads).
pub(super) fn capture<T>(
    listener: Option<Sender<String>>,
    operation: impl FnOnce() -> T,
) -> (T, Vec<Line>) {
    let _one = CAPTURE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    with_state(|state| {
        state.captured = Some(Vec::new());
        state.listener = listener;
    });
    let outcome = operation();
    let lines = with_state(|state| {
        state.listener = None;
        state.captured.take().unwrap_or_default()
    });
    (outcome, lines)
}

/// The errors among `lines`, in one line; `otherwise` where there are none.
pub(super) fn errors(lines: &[Line], otherwise: &str) -> String {
    let mut errors: Vec<&str> = Vec::new();
    for line in lines.iter().filter(|line| line.error) {
        // The library repeats the cause as it unwinds: `llama_model_load: error loading model: X`.
        let text = line.text.split_once(": ").map_or(line.text.as_str(), |(function, rest)| {
            if function.contains(' ') { line.text.as_str() } else { rest }
        });
        let text = text.trim();
        if !text.is_empty() && !text.starts_with("failed to load model") && !errors.contains(&text)
        {
            errors.push(text);
        }
    }
    if errors.is_empty() { otherwise.to_owned() } else { errors.join("; ") }
}

fn with_state<T>(act: impl FnOnce(&mut State) -> T) -> T {
    act(&mut STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: the library passes a NUL-terminated string that lives for this call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    with_state(|state| {
        if level != sys::GGML_LOG_LEVEL_CONT {
            state.level = level;
        }
        state.partial.push_str(&text);
        while let Some(end) = state.partial.find('\n') {
            let line: String = state.partial.drain(..=end).collect();
            emit(state, line.trim_end());
        }
        // Dots of progress never end their line; do not gather them for ever.
        if state.partial.len() > 4096 {
            let line = std::mem::take(&mut state.partial);
            emit(state, &line);
        }
    });
}

fn emit(state: &mut State, line: &str) {
    if line.is_empty() {
        return;
    }
    let error = state.level == sys::GGML_LOG_LEVEL_ERROR;
    let warning = state.level == sys::GGML_LOG_LEVEL_WARN;
    if error {
        tracing::warn!(target: "llama.cpp", "{line}");
    } else {
        tracing::debug!(target: "llama.cpp", "{line}");
    }
    let wanted = error || warning || VERBOSE.load(Ordering::Relaxed);
    if wanted && TO_STDERR.load(Ordering::Relaxed) {
        eprintln!("{line}");
    }
    if let Some(captured) = &mut state.captured
        && captured.len() < MAX_CAPTURED_LINES
    {
        captured.push(Line { error, text: line.to_owned() });
    }
    if let Some(listener) = &state.listener {
        let _ = listener.send(line.to_owned());
    }
}

/// Prints the failed assertion before the abort; without this the library would start a debugger.
unsafe extern "C" fn on_abort(message: *const c_char) {
    if !message.is_null() {
        // SAFETY: the library passes a NUL-terminated string that lives for this call.
        let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
        eprintln!("llama.cpp: {message}");
    }
}
