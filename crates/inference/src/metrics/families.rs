//! What is told of the counters: which metrics there are, and their points.

use std::time::SystemTime;

use super::family::{Attributes, Family, Histogram, Kind, Point, Reading};
use super::{Counters, Series};
use crate::host::{HostState, HostStatus};

impl Counters {
    pub(super) fn families(&self) -> Vec<Family> {
        let since = self.since;
        let counted = |attributes: Attributes, count: u64| Point {
            attributes,
            since,
            value: Reading::Number(count as f64),
        };
        let http = self.http.iter().map(|((endpoint, status), count)| {
            let attributes = vec![("endpoint", endpoint.clone()), ("status", status.to_string())];
            counted(attributes, *count)
        });
        let outcomes = [
            ("answered", self.answered),
            ("cancelled", self.cancelled),
            ("failed", self.failed),
            ("refused", self.refused),
        ];
        let outcomes = outcomes
            .into_iter()
            .map(|(outcome, count)| counted(vec![("outcome", outcome.to_owned())], count));
        let of_points =
            |name, unit, help, points| Family { name, help, unit, kind: Kind::Counter, points };
        let mut families = vec![
            of_points(
                "slmops.http_requests",
                "{request}",
                "HTTP requests answered, by route and status.",
                http.collect(),
            ),
            of_points(
                "slmops.requests",
                "{request}",
                "Requests for answers, by outcome.",
                outcomes.collect(),
            ),
        ];
        if let Some((taken, failed)) = self.pushes {
            let outcome =
                |outcome: &str, count| counted(vec![("outcome", outcome.to_owned())], count);
            families.push(of_points(
                "slmops.otlp_pushes",
                "{push}",
                "Pushes of all this to the collector, by outcome.",
                vec![outcome("taken", taken), outcome("failed", failed)],
            ));
        }
        let number = |kind, (name, unit, help, value): (_, _, _, f64)| {
            Family::number(kind, name, unit, help, since, value)
        };
        let counters = [
            (
                "slmops.prompt_tokens",
                "{token}",
                "Prompt tokens of answered requests.",
                self.prompt_tokens as f64,
            ),
            (
                "slmops.cached_prompt_tokens",
                "{token}",
                "Of these, tokens found in the cache.",
                self.cached_tokens as f64,
            ),
            (
                "slmops.restored_prompt_tokens",
                "{token}",
                "Of these, tokens that came from the disk.",
                self.restored_tokens as f64,
            ),
            (
                "slmops.context_shifts",
                "{shift}",
                "Times that an answer's context was full and a part of it was forgotten.",
                self.context_shifts as f64,
            ),
            (
                "slmops.drafted_tokens",
                "{token}",
                "Tokens guessed ahead.",
                self.drafted_tokens as f64,
            ),
            (
                "slmops.accepted_tokens",
                "{token}",
                "Of these, tokens that were right.",
                self.accepted_tokens as f64,
            ),
            (
                "slmops.generated_tokens",
                "{token}",
                "Tokens generated.",
                self.generated_tokens as f64,
            ),
            (
                "slmops.worker_crashes",
                "{process}",
                "Worker processes that ended unasked.",
                self.worker_crashes as f64,
            ),
            (
                "slmops.sleeps",
                "{sleep}",
                "Times that an idle model's memory was freed.",
                self.sleeps as f64,
            ),
            ("slmops.wakes", "{wake}", "Times that a request loaded it again.", self.wakes as f64),
            (
                "slmops.wake",
                "s",
                "Seconds in which the model was loaded again for a request.",
                self.wake_s,
            ),
        ];
        families.extend(counters.into_iter().map(|it| number(Kind::Counter, it)));
        let gauges = [
            (
                "slmops.requests_waiting",
                "{request}",
                "Requests that wait for a sequence.",
                self.waiting as f64,
            ),
            (
                "slmops.requests_running",
                "{request}",
                "Requests that have a sequence.",
                self.running as f64,
            ),
        ];
        families.extend(gauges.into_iter().map(|it| number(Kind::Gauge, it)));
        families.extend(self.conventional());
        families
    }

    /// What OpenTelemetry's conventions name.
    fn conventional(&self) -> [Family; 4] {
        let family =
            |name, unit, help, points| Family { name, help, unit, kind: Kind::Histogram, points };
        let each = |of: fn(&Series) -> &Histogram| {
            self.series.iter().filter_map(|series| series.point(of(series), None)).collect()
        };
        let whole = self.series.iter().flat_map(|series| {
            let failed = series.failed.iter();
            let failed =
                failed.filter_map(|(kind, it)| series.point(it, Some(("error.type", kind))));
            series.point(&series.whole, None).into_iter().chain(failed)
        });
        let usage = self.series.iter().flat_map(|series| {
            let by = |kind, histogram| series.point(histogram, Some(("gen_ai.token.type", kind)));
            [by("input", &series.input_tokens), by("output", &series.output_tokens)]
        });
        [
            family(
                "gen_ai.server.request.duration",
                "s",
                "From a request's arrival to its end.",
                whole.collect(),
            ),
            family(
                "gen_ai.server.time_to_first_token",
                "s",
                "From a request's arrival to its first token.",
                each(|series| &series.first_token),
            ),
            family(
                "gen_ai.server.time_per_output_token",
                "s",
                "Between one token of an answer and the next.",
                each(|series| &series.between_tokens),
            ),
            family(
                "gen_ai.client.token.usage",
                "{token}",
                "Tokens of a request and of its answer.",
                usage.flatten().collect(),
            ),
        ]
    }
}

/// How the host is, in numbers.
pub(super) fn of_host(status: &HostStatus, since: SystemTime) -> Vec<Family> {
    let yes = |is_so: bool| f64::from(u8::from(is_so));
    let asleep = status.state == HostState::Asleep;
    let ready = asleep || status.state == HostState::Ready;
    let mut gauges = vec![
        ("slmops.model_ready", "", "1 while a model answers.", yes(ready)),
        (
            "slmops.model_asleep",
            "",
            "1 while the model's memory is free until a request comes.",
            yes(asleep),
        ),
    ];
    if let Some(effective) = &status.effective {
        gauges.extend([
            (
                "slmops.slots",
                "{sequence}",
                "Sequences decoded at the same time.",
                f64::from(effective.parallel),
            ),
            (
                "slmops.context_tokens",
                "{token}",
                "Tokens of context for each sequence.",
                f64::from(effective.context_tokens),
            ),
            (
                "slmops.queue_limit",
                "{request}",
                "Requests that may wait.",
                f64::from(effective.queue_limit),
            ),
            ("slmops.threads", "{thread}", "Compute threads.", f64::from(effective.threads)),
        ]);
    }
    gauges.extend([
        (
            "slmops.worker_memory",
            "By",
            "Resident memory of the worker.",
            status.memory.resident_bytes as f64,
        ),
        (
            "slmops.worker_peak_memory",
            "By",
            "The same at its peak.",
            status.memory.peak_bytes as f64,
        ),
    ]);
    let gauge =
        |(name, unit, help, value)| Family::number(Kind::Gauge, name, unit, help, since, value);
    gauges.into_iter().map(gauge).collect()
}
