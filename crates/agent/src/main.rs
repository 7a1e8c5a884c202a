//! The program `slm-agent`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    slmops_inference::child::run_if_child(&[]);
    slmops_agent::cli::main()
}
