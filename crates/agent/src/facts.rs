//! What this device is, read from the system.

use std::path::Path;

use slmops_api::device::DeviceFacts;
use slmops_api::model::ADAPTERS;
use slmops_api::rules::DeviceRules;

/// Instruction-set extensions that matter to inference, as `/proc/cpuinfo` names them.
const FEATURES: [&str; 20] = [
    "sse3",
    "ssse3",
    "sse4_2",
    "avx",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "fma",
    "f16c",
    "bmi2",
    "asimddp",
    "fphp",
    "i8mm",
    "bf16",
    "sve",
];
/// The longest text of one fact, in bytes.
const MAX_TEXT_BYTES: usize = 200;
/// The most bytes read of a file under `/proc` or `/sys`.
const MAX_FILE_BYTES: usize = 1 << 20;

/// The facts that do not change while the agent runs, and the free disk of now.
pub fn read(
    memory_budget_bytes: u64,
    disk_free_bytes: u64,
    engine: &str,
    endpoint: Option<String>,
) -> DeviceFacts {
    let system = rustix::system::uname();
    let text = |text: &std::ffi::CStr| bounded(&text.to_string_lossy());
    let cpuinfo = file("/proc/cpuinfo");
    DeviceFacts {
        hostname: text(system.nodename()),
        arch: std::env::consts::ARCH.to_owned(),
        kernel: bounded(&format!(
            "{} {}",
            system.sysname().to_string_lossy(),
            system.release().to_string_lossy()
        )),
        cpu: bounded(&cpu_model(&cpuinfo)),
        cpu_features: cpu_features(&cpuinfo),
        cores: std::thread::available_parallelism()
            .map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX)),
        memory_bytes: memory_bytes(),
        memory_budget_bytes,
        disk_free_bytes,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        engine: bounded(engine),
        endpoint,
        time_zone: time_zone(),
        metered: is_metered(),
        shares_at: None,
        obeys: DeviceRules::ALL.into_iter().chain([ADAPTERS]).map(str::to_owned).collect(),
    }
}

/// The name of this machine's time zone: that of `TZ` or of the system.
pub fn time_zone() -> Option<String> {
    jiff::tz::TimeZone::system().iana_name().map(bounded)
}

/// Whether the link of the default route is one on which every byte usually costs.
pub fn is_metered() -> bool {
    let interface = default_interface(&file("/proc/net/route"));
    interface.is_some_and(|name| {
        let folder = format!("/sys/class/net/{name}");
        is_metered_link(&file(&format!("{folder}/type")), &file(&format!("{folder}/uevent")))
    })
}

/// The interface of the default route with the smallest metric (`/proc/net/route`).
fn default_interface(routes: &str) -> Option<String> {
    let of_line = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let name = columns.first().filter(|name| !name.contains('/'))?;
        let default = columns.get(1) == Some(&"00000000") && columns.get(7) == Some(&"00000000");
        let metric: u32 = columns.get(6)?.parse().ok()?;
        default.then(|| (metric, (*name).to_owned()))
    };
    routes.lines().skip(1).filter_map(of_line).min().map(|(_, name)| name)
}

/// A line of a modem (ARPHRD_PPP of `linux/if_arp.h`), or a mobile network's.
fn is_metered_link(kind: &str, uevent: &str) -> bool {
    kind.trim() == "512" || uevent.lines().any(|line| line.trim() == "DEVTYPE=wwan")
}

/// Memory that this process may use: the machine's, or its control group's limit if lower.
pub fn memory_bytes() -> u64 {
    let total = total_memory(&file("/proc/meminfo"));
    let group = file("/proc/self/cgroup");
    let limit = group
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .and_then(|path| group_limit(Path::new("/sys/fs/cgroup"), path))
        .or_else(|| number(&file("/sys/fs/cgroup/memory/memory.limit_in_bytes")));
    match (total, limit) {
        (0, limit) => limit.unwrap_or(0),
        (total, Some(limit)) => total.min(limit),
        (total, None) => total,
    }
}

/// The lowest limit of a control group and those around it.
fn group_limit(root: &Path, group: &str) -> Option<u64> {
    let path = root.join(group.trim_start_matches('/'));
    let around = path.ancestors().take_while(|folder| folder.starts_with(root)).take(32);
    around.filter_map(|folder| number(&file(&folder.join("memory.max").to_string_lossy()))).min()
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn total_memory(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|rest| number(rest.trim().trim_end_matches("kB")));
    kib.unwrap_or(0).saturating_mul(1024)
}

fn cpu_model(cpuinfo: &str) -> String {
    let value = |key: &str| {
        cpuinfo.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        })
    };
    let arm = || Some(format!("Arm part {} variant {}", value("CPU part")?, value("CPU variant")?));
    value("model name").or_else(|| value("Model")).or_else(arm).unwrap_or_else(|| "unknown".into())
}

fn cpu_features(cpuinfo: &str) -> Vec<String> {
    let flags = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        ["flags", "Features"].contains(&name.trim()).then_some(value)
    });
    let flags: Vec<&str> = flags.unwrap_or_default().split_whitespace().collect();
    let known = FEATURES.iter().filter(|feature| flags.contains(*feature));
    known.map(|feature| (*feature).to_owned()).collect()
}

fn file(path: &str) -> String {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES as u64).read_to_end(&mut bytes));
    if read.is_err() {
        return String::new();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn bounded(text: &str) -> String {
    let clean = text.chars().filter(|character| !character.is_control());
    let mut bytes = 0;
    clean
        .take_while(|character| {
            bytes += character.len_utf8();
            bytes <= MAX_TEXT_BYTES
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_both_kinds_of_cpuinfo() {
        let intel = "processor\t: 0\nmodel name\t: Some CPU @ 2GHz\nflags\t\t: fpu avx2 fma nx\n";
        assert_eq!(cpu_model(intel), "Some CPU @ 2GHz");
        assert_eq!(cpu_features(intel), ["avx2", "fma"]);
        let arm = "Features\t: fp asimddp fphp\nCPU variant\t: 0x3\nCPU part\t: 0xd08\n";
        assert_eq!(cpu_model(arm), "Arm part 0xd08 variant 0x3");
        assert_eq!(cpu_features(arm), ["asimddp", "fphp"]);
        assert_eq!(cpu_model(""), "unknown");
    }

    #[test]
    fn the_lowest_limit_around_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        assert_eq!(group_limit(root.path(), "/a/b"), None);
        std::fs::write(inner.join("memory.max"), "max\n").unwrap();
        std::fs::write(root.path().join("a/memory.max"), "4096\n").unwrap();
        assert_eq!(group_limit(root.path(), "/a/b"), Some(4096));
        assert_eq!(total_memory("MemFree: 1 kB\nMemTotal:     8 kB\n"), 8192);
    }

    #[test]
    fn the_link_of_the_default_route_says_whether_it_is_metered() {
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
            wwan0\t00000000\t0101A8C0\t0003\t0\t0\t700\t00000000\t0\t0\t0\n\
            eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
            eth1\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(default_interface(routes).as_deref(), Some("eth0"));
        let mobile: String = routes.lines().take(2).collect::<Vec<_>>().join("\n");
        assert_eq!(default_interface(&mobile).as_deref(), Some("wwan0"));
        for nothing in ["", "Iface\n", "Iface\n../../etc\t00000000\n", "Iface\n\0\n"] {
            assert_eq!(default_interface(nothing), None, "{nothing:?}");
        }
        assert!(is_metered_link("1\n", "DEVTYPE=wwan\nINTERFACE=wwan0\n"));
        assert!(is_metered_link("512\n", ""));
        assert!(!is_metered_link("1\n", "INTERFACE=eth0\n") && !is_metered_link("", ""));
    }

    #[test]
    fn this_machine_has_facts() {
        let facts = read(1, 2, "engine", None);
        assert!(facts.memory_bytes > 0 && facts.cores > 0);
        assert!(!facts.hostname.is_empty() && !facts.kernel.is_empty());
    }
}
