//! The program that this crate's tests start as a child: it can do nothing but the jobs.

fn main() {
    slmops_inference::child::run_if_child(slmops_optimize::JOBS);
    eprintln!("this program is only started by tests");
    std::process::exit(1);
}
