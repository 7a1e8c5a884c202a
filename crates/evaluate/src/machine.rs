//! The facts of the machine on which something was measured.

use std::fs;

use slmops_api::report::{MachineFacts, MeasuredWhere};

/// Reads this machine's facts.
pub fn facts() -> MachineFacts {
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    MachineFacts {
        cpu: cpu_model(&read("/proc/cpuinfo")),
        arch: std::env::consts::ARCH.to_owned(),
        cores,
        memory_bytes: memory_bytes(&read("/proc/meminfo")),
        kernel,
        measured: if is_constrained() { MeasuredWhere::Constrained } else { MeasuredWhere::Real },
    }
}

fn cpu_model(cpuinfo: &str) -> String {
    let value = |key: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(key))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    // Arm kernels name no model, but where a board's firmware does.
    value("model name").or_else(|| value("Model")).or_else(|| value("Hardware")).unwrap_or_else(
        || value("CPU part").map_or_else(|| "unknown".into(), |part| format!("Arm part {part}")),
    )
}

fn memory_bytes(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Whether a control group limits this process's memory or processor time (cgroup v2).
fn is_constrained() -> bool {
    let Ok(own) = fs::read_to_string("/proc/self/cgroup") else { return false };
    let Some(path) = own.lines().find_map(|line| line.strip_prefix("0::")) else { return false };
    let mut folder = std::path::PathBuf::from("/sys/fs/cgroup");
    folder.push(path.trim().trim_start_matches('/'));
    // A limit on any ancestor binds as well.
    folder.ancestors().take_while(|folder| folder.starts_with("/sys/fs/cgroup")).any(|folder| {
        ["memory.max", "cpu.max"].iter().any(|file| {
            fs::read_to_string(folder.join(file)).is_ok_and(|limit| !limit.starts_with("max"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_read_from_the_kernels_files() {
        let x86 = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n";
        assert_eq!(cpu_model(x86), "Some CPU @ 2 GHz");
        let arm = "processor\t: 0\nCPU part\t: 0xd08\n";
        assert_eq!(cpu_model(arm), "Arm part 0xd08");
        assert_eq!(cpu_model(""), "unknown");
        assert_eq!(memory_bytes("MemTotal:       16 kB\nMemFree: 1 kB\n"), 16384);
        assert_eq!(memory_bytes("garbage"), 0);
        let here = facts();
        assert!(here.cores > 0 && !here.kernel.is_empty());
    }
}
