//! What the tests share.

use std::path::PathBuf;

use slmops_api::runtime::RuntimeConfig;

/// The prompt of the reference in `testdata/README.md`.
pub const PROMPT: &str = "Alice was beginning to";
/// Its tokens.
pub const PROMPT_TOKENS: [i32; 5] = [494, 160, 729, 633, 111];
/// The next greedy tokens.
pub const GREEDY: [i32; 20] =
    [97, 4, 373, 111, 97, 388, 11, 120, 168, 734, 133, 160, 379, 107, 111, 526, 11, 120, 4, 702];

/// Makes children of this process be the fixture program.
pub fn set_up() {
    // The HTTP client wants one, though no test speaks TLS.
    let _ = rustls::crypto::ring::default_provider().install_default();
    slmops_inference::child::set_program(env!("CARGO_BIN_EXE_slmops-worker-fixture"));
}

/// A file under `testdata/`.
pub fn testdata(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

/// The tiny model: vocabulary 1024, context 128, no chat template.
pub fn glass() -> PathBuf {
    testdata("glasslm/glass-f32.gguf")
}

/// A configuration that fits the tiny model.
pub fn runtime() -> RuntimeConfig {
    RuntimeConfig { context_tokens: 128, threads: 2, ..RuntimeConfig::default() }
}

/// The same for one thread: two wait for each other where others use the cores.
pub fn one_thread() -> RuntimeConfig {
    RuntimeConfig { threads: 1, ..runtime() }
}

/// SmolLM2-135M-Instruct, which `SLMOPS_SMOLLM2` names (`make test` fetches it); says so where there
/// is none.
pub fn smollm2() -> Option<PathBuf> {
    let model = std::env::var_os("SLMOPS_SMOLLM2").map(PathBuf::from);
    if model.is_none() {
        eprintln!("skipped: SLMOPS_SMOLLM2 does not name the SmolLM2 GGUF file");
    }
    model
}

/// Processor time of a process in user and kernel, in milliseconds (proc(5), `stat`, in steps of 10): what
/// others do on the machine does not count.
pub fn cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields = stat.rsplit_once(')').expect("a name").1.split_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().expect("a number") * 10).sum()
}
