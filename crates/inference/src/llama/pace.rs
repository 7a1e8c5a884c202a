//! How many threads compute when their number is left to the engine.
//!
//! The engine's threads wait for each other many times per token, spinning. Where another program
//! holds one of the cores, all of them wait for the one that is not running: two threads on a busy
//! two-core machine were measured at 1 token/s, one thread at 30. So a context watches how long
//! its own thread was ready but not running (`/proc/thread-self/schedstat`, see "Documentation/
//! scheduler/sched-stats" of Linux) and gives up as many threads as others need.

use std::time::Duration;

/// Computing time after which a judgement is made.
const WINDOW: Duration = Duration::from_millis(100);
/// Share of the computing time spent waiting for a core from which threads are given up.
const TOO_LONG: f64 = 0.08;
/// Computing time without much waiting until one more thread is tried.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same after many failed tries.
const PATIENCE_MAX: Duration = Duration::from_secs(64);

/// Decides on the number of threads from how long they had to wait for a core.
#[derive(Debug)]
pub(super) struct Pace {
    most: u32,
    threads: u32,
    /// Of the window under way.
    computed: Duration,
    delayed: Duration,
    /// Computing time since the number was changed.
    since_change: Duration,
    patience: Duration,
    /// Whether the latest change was one thread more.
    trying: bool,
}

impl Pace {
    /// Starts with `most` threads.
    pub(super) fn new(most: u32) -> Self {
        Self {
            most,
            threads: most,
            computed: Duration::ZERO,
            delayed: Duration::ZERO,
            since_change: Duration::ZERO,
            patience: PATIENCE,
            trying: false,
        }
    }

    /// Takes one computation: how long it took, and for how much of it this thread waited for a
    /// core. Returns the number of threads to go on with where it changes.
    pub(super) fn observe(&mut self, computed: Duration, delayed: Duration) -> Option<u32> {
        self.computed += computed;
        self.delayed += delayed.min(computed);
        if self.computed < WINDOW {
            return None;
        }
        let share = self.delayed.as_secs_f64() / self.computed.as_secs_f64();
        self.since_change += self.computed;
        (self.computed, self.delayed) = (Duration::ZERO, Duration::ZERO);
        if share > TOO_LONG && self.threads > 1 {
            // With n threads and k others on n cores, each waits for k / (n + k) of the time.
            let others = f64::from(self.threads) * share / (1.0 - share).max(0.01);
            let fewer = self.threads.saturating_sub(others.round().max(1.0) as u32).max(1);
            self.patience = match self.trying {
                true => (self.patience * 2).min(PATIENCE_MAX),
                false => PATIENCE,
            };
            return self.change(fewer, false);
        }
        if self.since_change >= self.patience {
            if self.trying {
                self.patience = PATIENCE;
            }
            if self.threads < self.most {
                return self.change(self.threads + 1, true);
            }
            self.trying = false;
        }
        None
    }

    /// Whether others use the cores, or nothing is known about them yet.
    pub(super) fn is_crowded(&self) -> bool {
        self.threads < self.most || self.since_change.is_zero()
    }

    fn change(&mut self, threads: u32, trying: bool) -> Option<u32> {
        self.threads = threads;
        self.trying = trying;
        self.since_change = Duration::ZERO;
        Some(threads)
    }
}

/// How long this thread was ready to run but did not, since it began; absent where the system does
/// not say.
pub(super) fn waited_for_a_core() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `pace` compute for `seconds` beside `others` busy threads on `cores` cores; returns
    /// for how much of the time how many threads ran.
    fn run(pace: &mut Pace, cores: u32, others: u32, seconds: u32) -> Vec<u32> {
        let mut seen = Vec::new();
        for _ in 0..seconds * 100 {
            let ready = f64::from(pace.threads + others);
            let share = (1.0 - f64::from(cores) / ready).max(0.0);
            let step = Duration::from_millis(10);
            pace.observe(step, step.mul_f64(share));
            seen.push(pace.threads);
        }
        seen
    }

    #[test]
    fn gives_up_what_others_need_and_takes_it_back() {
        for (cores, others, expected) in [(2, 1, 1), (2, 4, 1), (8, 3, 5), (4, 0, 4), (1, 3, 1)] {
            let mut pace = Pace::new(cores);
            let seen = run(&mut pace, cores, others, 120);
            let right = seen.iter().filter(|&&threads| threads == expected).count();
            assert!(right * 100 > seen.len() * 95, "{cores} cores, {others} others: {right}");
            run(&mut pace, cores, 0, 120);
            assert_eq!(pace.threads, cores);
        }
    }

    #[test]
    fn a_short_disturbance_costs_a_second() {
        let mut pace = Pace::new(2);
        run(&mut pace, 2, 1, 1);
        assert_eq!(pace.threads, 1);
        let seen = run(&mut pace, 2, 0, 2);
        assert_eq!((seen[0], seen[199]), (1, 2));
    }

    #[test]
    fn the_system_says_how_long_a_thread_waited() {
        let before = waited_for_a_core().expect("this is Linux");
        assert!(waited_for_a_core().unwrap() >= before);
    }
}
