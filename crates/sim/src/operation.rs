//! One thing that goes wrong, or that an operator does, at one moment; as text and back.

use std::fmt;
use std::str::FromStr;

use slmops_fleet_core::rollout::Command;

use crate::time::Time;

/// An [`Action`] and when it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// When.
    pub at: Time,
    /// What.
    pub action: Action,
}

/// Before something takes place, or after, but before anybody hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Moment {
    Before,
    After,
}

/// An effect of the agent at whose boundary the power may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum EffectKind {
    Poll,
    FetchPackage,
    Download,
    Verify,
    Stage,
    Probe,
    Activate,
    SaveLedger,
    Report,
}

/// A transaction of the hub at whose boundary it may crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HubWork {
    /// What the planner decided is stored.
    Decision,
    /// A device's report is stored.
    Report,
}

/// What happens. Devices and groups are numbered from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    /// The power goes, and comes back after a while.
    Crash { device: u32 },
    /// It goes at the boundary of the next such effect.
    CrashAt { device: u32, moment: Moment, effect: EffectKind },
    /// The next request never reaches the hub.
    LoseRequest { device: u32 },
    /// The next request is carried out, and its reply is lost.
    LoseReply { device: u32 },
    /// No connection.
    Cut { device: u32, lasts: Time },
    /// No connection for a whole group.
    CutGroup { group: u32, lasts: Time },
    /// Every byte over a group's link costs.
    MeterGroup { group: u32, lasts: Time },
    /// The power goes while the next ledger is written.
    TearLedger { device: u32 },
    /// Nothing can be written.
    FillDisk { device: u32, lasts: Time },
    /// A bit of the file of the model that the ledger names flips.
    FlipBit { device: u32 },
    /// Every worker dies while it loads.
    BreakEngine { device: u32, lasts: Time },
    /// The system kills the worker that serves.
    KillWorker { device: u32 },
    /// The worker that serves dies by itself.
    CrashWorker { device: u32 },
    /// The device's clock jumps ahead.
    JumpClock { device: u32, by: Time },
    /// The device's clock runs fast (or slow) by so many millionths.
    DriftClock { device: u32, ppm: i32 },
    /// The hub goes down.
    CrashHub { lasts: Time },
    /// It goes down at the boundary of the next such transaction.
    CrashHubAt { moment: Moment, work: HubWork, lasts: Time },
    /// An operator's hand on the newest rollout.
    Operate(OperatorCommand),
}

/// What an operator does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum OperatorCommand {
    Pause,
    Resume,
    Abort,
    Rollback,
}

impl From<OperatorCommand> for Command {
    fn from(command: OperatorCommand) -> Self {
        match command {
            OperatorCommand::Pause => Self::Pause,
            OperatorCommand::Resume => Self::Resume,
            OperatorCommand::Abort => Self::Abort,
            OperatorCommand::Rollback => Self::Rollback,
        }
    }
}

/// Both ways between an enum and its words.
macro_rules! words {
    ($type:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word),+ })
            }
        }

        impl FromStr for $type {
            type Err = ParseOperationError;
            fn from_str(given: &str) -> Result<Self, Self::Err> {
                match given {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(ParseOperationError(given.to_owned())),
                }
            }
        }
    };
}

words!(Moment { Before = "before", After = "after" });
words!(HubWork { Decision = "decision", Report = "report" });
words!(OperatorCommand {
    Pause = "pause",
    Resume = "resume",
    Abort = "abort",
    Rollback = "rollback",
});
words!(EffectKind {
    Poll = "Poll",
    FetchPackage = "FetchPackage",
    Download = "Download",
    Verify = "Verify",
    Stage = "Stage",
    Probe = "Probe",
    Activate = "Activate",
    SaveLedger = "SaveLedger",
    Report = "Report",
});

impl EffectKind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Poll,
        Self::FetchPackage,
        Self::Download,
        Self::Verify,
        Self::Stage,
        Self::Probe,
        Self::Activate,
        Self::SaveLedger,
        Self::Report,
    ];
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {} {}", self.at, self.action)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crash { device } => write!(f, "crash device {device}"),
            Self::CrashAt { device, moment, effect } => {
                write!(f, "crash device {device} {moment} effect {effect}")
            }
            Self::LoseRequest { device } => write!(f, "lose request of device {device}"),
            Self::LoseReply { device } => write!(f, "lose reply to device {device}"),
            Self::Cut { device, lasts } => write!(f, "cut link of device {device} for {lasts}"),
            Self::CutGroup { group, lasts } => write!(f, "cut link of group {group} for {lasts}"),
            Self::MeterGroup { group, lasts } => {
                write!(f, "meter link of group {group} for {lasts}")
            }
            Self::TearLedger { device } => write!(f, "tear ledger of device {device}"),
            Self::FillDisk { device, lasts } => {
                write!(f, "fill disk of device {device} for {lasts}")
            }
            Self::FlipBit { device } => write!(f, "flip bit on device {device}"),
            Self::BreakEngine { device, lasts } => {
                write!(f, "break engine of device {device} for {lasts}")
            }
            Self::KillWorker { device } => write!(f, "kill worker of device {device}"),
            Self::CrashWorker { device } => write!(f, "crash worker of device {device}"),
            Self::JumpClock { device, by } => write!(f, "jump clock of device {device} by {by}"),
            Self::DriftClock { device, ppm } => {
                write!(f, "drift clock of device {device} by {ppm} ppm")
            }
            Self::CrashHub { lasts } => write!(f, "crash hub for {lasts}"),
            Self::CrashHubAt { moment, work, lasts } => {
                write!(f, "crash hub {moment} {work} for {lasts}")
            }
            Self::Operate(command) => write!(f, "operator {command}"),
        }
    }
}

/// Why a line is not an [`Operation`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an operation: write such as `at 00:10:00 crash device 17`")]
pub struct ParseOperationError(String);

impl FromStr for Operation {
    type Err = ParseOperationError;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        parse(line).ok_or_else(|| ParseOperationError(line.chars().take(120).collect()))
    }
}

fn parse(line: &str) -> Option<Operation> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["at", at, words @ ..] = words.as_slice() else { return None };
    let number = |text: &str| text.parse::<u32>().ok();
    let time = |text: &str| text.parse::<Time>().ok();
    let action = match words {
        ["crash", "device", device] => Action::Crash { device: number(device)? },
        ["crash", "device", device, moment, "effect", effect] => Action::CrashAt {
            device: number(device)?,
            moment: moment.parse().ok()?,
            effect: effect.parse().ok()?,
        },
        ["lose", "request", "of", "device", device] => {
            Action::LoseRequest { device: number(device)? }
        }
        ["lose", "reply", "to", "device", device] => Action::LoseReply { device: number(device)? },
        ["cut", "link", "of", "device", device, "for", lasts] => {
            Action::Cut { device: number(device)?, lasts: time(lasts)? }
        }
        ["cut", "link", "of", "group", group, "for", lasts] => {
            Action::CutGroup { group: number(group)?, lasts: time(lasts)? }
        }
        ["meter", "link", "of", "group", group, "for", lasts] => {
            Action::MeterGroup { group: number(group)?, lasts: time(lasts)? }
        }
        ["tear", "ledger", "of", "device", device] => {
            Action::TearLedger { device: number(device)? }
        }
        ["fill", "disk", "of", "device", device, "for", lasts] => {
            Action::FillDisk { device: number(device)?, lasts: time(lasts)? }
        }
        ["flip", "bit", "on", "device", device] => Action::FlipBit { device: number(device)? },
        ["break", "engine", "of", "device", device, "for", lasts] => {
            Action::BreakEngine { device: number(device)?, lasts: time(lasts)? }
        }
        ["kill", "worker", "of", "device", device] => {
            Action::KillWorker { device: number(device)? }
        }
        ["crash", "worker", "of", "device", device] => {
            Action::CrashWorker { device: number(device)? }
        }
        ["jump", "clock", "of", "device", device, "by", by] => {
            Action::JumpClock { device: number(device)?, by: time(by)? }
        }
        ["drift", "clock", "of", "device", device, "by", ppm, "ppm"] => Action::DriftClock {
            device: number(device)?,
            ppm: ppm.parse().ok().filter(|ppm| (-500_000..=500_000).contains(ppm))?,
        },
        ["crash", "hub", "for", lasts] => Action::CrashHub { lasts: time(lasts)? },
        ["crash", "hub", moment, work, "for", lasts] => Action::CrashHubAt {
            moment: moment.parse().ok()?,
            work: work.parse().ok()?,
            lasts: time(lasts)?,
        },
        ["operator", command] => Action::Operate(command.parse().ok()?),
        _ => return None,
    };
    Some(Operation { at: time(at)?, action })
}
