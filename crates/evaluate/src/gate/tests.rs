use slmops_api::report::{MachineFacts, MeasuredWhere};

use super::*;

/// A report of 16 chunks whose losses rise by `nll` and `kl` around per-chunk noise, and of one
/// task with `right` of 24 items right.
fn report(name: &str, nll: f64, kl: f64, right: usize) -> EvaluationReport {
    let original = Digest::of(b"original");
    // A fixed scatter over chunks, as texts differ in how hard they are.
    let hardness = |chunk: usize| 3.0 + 0.4 * ((chunk * 7 % 16) as f64 / 16.0);
    let wobble = |chunk: usize| 0.2 * ((chunk * 5 % 16) as f64 / 15.0 - 0.5);
    let chunk_nll: Vec<f64> =
        (0..16).map(|chunk| hardness(chunk) + nll * (1.0 + wobble(chunk))).collect();
    let chunk_kl: Vec<f64> = (0..16).map(|chunk| kl * (1.0 + wobble(chunk))).collect();
    let items: Vec<bool> = (0..24).map(|item| item < right).collect();
    EvaluationReport {
        version: 1,
        subject: Digest::of(name.as_bytes()),
        adapter: None,
        reference: original,
        suite: Digest::of(b"suite"),
        size_bytes: 1,
        perplexity: statistics::mean(&chunk_nll).mean.exp(),
        kl_divergence: statistics::mean(&chunk_kl),
        kl_p99: kl * 10.0,
        top1_agreement: Estimate {
            mean: 1.0 - kl,
            low: 1.0 - kl * 1.1,
            high: 1.0 - kl * 0.9,
            samples: 16,
        },
        tasks: vec![TaskResult {
            name: "facts".into(),
            accuracy: statistics::proportion(right as u32, 24),
            items,
        }],
        decode_tokens_per_s: 1.0,
        prompt_tokens_per_s: 1.0,
        time_to_first_token_ms: 1.0,
        peak_memory_bytes: 1,
        machine: MachineFacts {
            cpu: "test".into(),
            arch: "test".into(),
            cores: 1,
            memory_bytes: 1,
            kernel: "test".into(),
            measured: MeasuredWhere::Real,
        },
        engine: "test".into(),
        finished_at: jiff::Timestamp::UNIX_EPOCH,
        chunk_nll,
        chunk_kl,
    }
}

fn original() -> EvaluationReport {
    report("original", 0.0, 0.0, 22)
}

fn verdict_of(decision: &GateDecision, metric: &str) -> Verdict {
    decision.rows.iter().find(|row| row.metric == metric).expect(metric).verdict
}

#[test]
fn a_healthy_variant_passes_and_a_damaged_one_does_not() {
    let limits = Limits::against_original("Q4_K_M");
    let healthy = report("healthy", 0.03, 0.05, 22);
    let decision = decide(&healthy, &original(), &Against::Original, &limits).unwrap();
    assert_eq!(decision.verdict, Verdict::NoWorse, "{decision:#?}");
    assert!(!blocks(&decision, true));

    let damaged = report("damaged", 1.5, 1.2, 7);
    let decision = decide(&damaged, &original(), &Against::Original, &limits).unwrap();
    assert_eq!(decision.verdict, Verdict::Worse);
    for metric in ["log_likelihood", "kl_divergence", "top1_disagreement", "task:facts"] {
        assert_eq!(verdict_of(&decision, metric), Verdict::Worse, "{metric}");
    }
    assert!(blocks(&decision, false));
}

#[test]
fn a_noisy_task_is_said_to_have_too_few_samples_and_does_not_block() {
    // Two items of 24 lost: 8 % in the mean, but the interval reaches beyond the limit.
    let candidate = report("candidate", 0.0, 0.0, 20);
    let version = Against::Release(semver::Version::new(1, 0, 0));
    let decision = decide(&candidate, &original(), &version, &Limits::against_release()).unwrap();
    assert_eq!(verdict_of(&decision, "task:facts"), Verdict::TooFewSamples);
    assert_eq!(verdict_of(&decision, "log_likelihood"), Verdict::NoWorse);
    assert_eq!(decision.verdict, Verdict::TooFewSamples);
    assert!(!blocks(&decision, false));
    assert!(blocks(&decision, true));
    assert!(decision.rows.iter().all(|row| row.against == "1.0.0"));
}

#[test]
fn each_number_format_has_the_limits_of_its_purpose() {
    for (name, bits) in [("Q8_0", 8), ("q4_k_m", 4), ("IQ4_NL", 4), ("F16", 16), ("Q2_K", 2)] {
        assert_eq!(nominal_bits(name), bits, "{name}");
    }
    let order = ["F16", "Q8_0", "Q5_K_M", "Q4_0", "Q3_K_M", "Q2_K"];
    for pair in order.windows(2) {
        let (tight, loose) = (Limits::against_original(pair[0]), Limits::against_original(pair[1]));
        assert!(tight.kl_divergence <= loose.kl_divergence, "{pair:?}");
        assert!(tight.log_likelihood <= loose.log_likelihood, "{pair:?}");
    }
    // What a Q4 may lose, a Q8 may not.
    let variant = report("variant", 0.05, 0.10, 22);
    let check = |quantisation| {
        let limits = Limits::against_original(quantisation);
        decide(&variant, &original(), &Against::Original, &limits).unwrap().verdict
    };
    assert_eq!(check("Q4_K_M"), Verdict::NoWorse);
    assert_eq!(check("Q8_0"), Verdict::Worse);
}

#[test]
fn reports_that_cannot_be_compared_are_refused() {
    let limits = Limits::against_release();
    let check = |baseline: &EvaluationReport, against: &Against, wanted: &str| {
        let error = decide(&original(), baseline, against, &limits).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("hint: "), "{error}");
    };
    let version = Against::Release(semver::Version::new(1, 0, 0));
    let mut other_suite = original();
    other_suite.suite = Digest::of(b"another suite");
    check(&other_suite, &version, "suite");
    let mut fewer_chunks = original();
    fewer_chunks.chunk_nll.pop();
    check(&fewer_chunks, &version, "chunks of text");
    let mut other_tasks = original();
    other_tasks.tasks[0].name = "others".into();
    check(&other_tasks, &version, "task facts");
    check(&report("another", 0.0, 0.0, 22), &Against::Original, "its reference is");
}

#[test]
fn against_a_release_of_another_original_divergence_is_left_out() {
    let mut previous = report("previous", 0.0, 0.5, 22);
    previous.reference = Digest::of(b"the original before fine-tuning");
    let version = Against::Release(semver::Version::new(1, 0, 0));
    let decision = decide(&original(), &previous, &version, &Limits::against_release()).unwrap();
    let metrics: Vec<&str> = decision.rows.iter().map(|row| row.metric.as_str()).collect();
    assert_eq!(metrics, ["log_likelihood", "task:facts"]);
}

#[test]
fn what_is_no_number_is_worse() {
    let mut broken = original();
    broken.chunk_nll[3] = f64::NAN;
    let version = Against::Release(semver::Version::new(1, 0, 0));
    let decision = decide(&broken, &original(), &version, &Limits::against_release()).unwrap();
    assert_eq!(verdict_of(&decision, "log_likelihood"), Verdict::Worse);
}

#[test]
fn combined_decisions_keep_every_row_and_the_worst_verdict() {
    let good = decide(&original(), &original(), &Against::Original, &Limits::against_release());
    let bad = decide(
        &report("damaged", 2.0, 2.0, 3),
        &original(),
        &Against::Original,
        &Limits::against_release(),
    );
    let (good, bad) = (good.unwrap(), bad.unwrap());
    let rows = good.rows.len() + bad.rows.len();
    let combined = combine([good, bad]);
    assert_eq!(combined.verdict, Verdict::Worse);
    assert_eq!(combined.rows.len(), rows);
    assert_eq!(combine([]).verdict, Verdict::NoWorse);
}
