use super::*;

fn parse(tasks: &str) -> Result<Suite, SuiteError> {
    Suite::parse(SuiteSource {
        tasks: tasks.into(),
        text: "Some text.".into(),
        plan: TextPlan::default(),
    })
}

fn test_of(line: &str) -> AnswerTest {
    let suite = parse(line).unwrap();
    match &suite.tasks()[0].items[0].check {
        Check::Answer { test, .. } => test.clone(),
        Check::Choice { .. } => panic!("a choice has no answer test"),
    }
}

fn check_error(tasks: &str, wanted: &str) {
    let error = parse(tasks).expect_err(tasks).to_string();
    assert!(error.contains(wanted), "`{error}` does not say `{wanted}`");
    assert!(error.contains("hint: "), "`{error}` has no hint");
}

#[test]
fn the_builtin_suite_is_sound() {
    let suite = Suite::builtin();
    assert_eq!(suite.tasks().len(), 3);
    for task in suite.tasks() {
        assert_eq!(task.items.len(), 24, "{}", task.name);
        let mut answers = [0; 4];
        for item in &task.items {
            let Check::Choice { choices, answer } = &item.check else { panic!("{item:?}") };
            assert_eq!(choices.len(), 4);
            let mut distinct = choices.clone();
            distinct.sort();
            distinct.dedup();
            assert_eq!(distinct.len(), 4, "{}", item.prompt);
            answers[*answer] += 1;
        }
        // A model that always takes one position must not look knowing.
        assert_eq!(answers, [6; 4], "{}", task.name);
    }
}

#[test]
fn the_digest_covers_items_text_and_plan() {
    let one = Suite::builtin();
    let other_plan = one.clone().with_plan(TextPlan { chunk_tokens: 64, chunks: 16 });
    let mut source = one.source().clone();
    source.text.push('x');
    let other_text = Suite::parse(source).unwrap();
    assert_eq!(one.digest(), Suite::parse(one.source().clone()).unwrap().digest());
    assert_ne!(one.digest(), other_plan.digest());
    assert_ne!(one.digest(), other_text.digest());
}

#[test]
fn answers_are_judged_by_kind() {
    let exact = test_of(r#"{"task":"t","kind":"exact","prompt":"p","answers":["4","four"]}"#);
    assert!(exact.passes(" four\n"));
    assert!(!exact.passes("forty"));
    let contains = test_of(r#"{"task":"t","kind":"contains","prompt":"p","text":"Paris"}"#);
    assert!(contains.passes("It is PARIS."));
    assert!(!contains.passes("It is Pari"));
    let regex = test_of(r#"{"task":"t","kind":"regex","prompt":"p","pattern":"^\\s*\\d{2}\\b"}"#);
    assert!(regex.passes(" 42 is it"));
    assert!(!regex.passes("it is 42"));
    let schema = r#"{"type":"object","required":["age"],"properties":{"age":{"type":"integer"}}}"#;
    let json = test_of(&format!(r#"{{"task":"t","kind":"json","prompt":"p","schema":{schema}}}"#));
    assert!(json.passes(r#"{"age": 7}"#));
    assert!(json.passes("```json\n{\"age\": 7}\n```"));
    assert!(!json.passes(r#"{"age": "7"}"#));
    assert!(!json.passes("seven"));
}

#[test]
fn a_bad_line_is_named() {
    let good = r#"{"task":"t","kind":"contains","prompt":"p","text":"x"}"#;
    check_error(&format!("{good}\n\nnot json"), "line 3: ");
    check_error(r#"{"task":"t","kind":"dance","prompt":"p"}"#, "dance");
    check_error(r#"{"task":"t","kind":"choice","prompt":"p","choices":["a","b"]}"#, "`answer`");
    check_error(
        r#"{"task":"t","kind":"choice","prompt":"p","choices":["a","b"],"answer":2}"#,
        "none of 2",
    );
    check_error(
        r#"{"task":"t","kind":"choice","prompt":"p","choices":["a"],"answer":0}"#,
        "2 to 26",
    );
    check_error(r#"{"task":"t","kind":"regex","prompt":"p","pattern":"("}"#, "line 1: ");
    check_error(
        r#"{"task":"t","kind":"regex","prompt":"p","pattern":"(x{999}){999}"}"#,
        "line 1: ",
    );
    check_error(r#"{"task":"t","kind":"json","prompt":"p","schema":{"type":"dance"}}"#, "schema");
    check_error(r#"{"task":"t","kind":"contains","prompt":"p","text":"x","answer":1}"#, "`answer`");
    check_error(r#"{"task":"t","kind":"contains","prompt":"","text":"x"}"#, "`prompt`");
    check_error(r#"{"task":"a\nb","kind":"contains","prompt":"p","text":"x"}"#, "`task`");
    check_error(
        r#"{"task":"t","kind":"contains","prompt":"p","text":"x","max_tokens":9999}"#,
        "`max_tokens`",
    );
    check_error(&format!("\"{}\"", "x".repeat(MAX_LINE_BYTES)), "line 1: ");
    check_error(&format!("{good}\n").repeat(MAX_ITEMS + 1), "more than 10000 items");
}

#[test]
fn schemas_that_point_elsewhere_are_refused() {
    check_error(
        r#"{"task":"t","kind":"json","prompt":"p","schema":{"$ref":"http://example.com/s.json"}}"#,
        "schema",
    );
    check_error(
        r#"{"task":"t","kind":"json","prompt":"p","schema":{"$ref":"file:///etc/passwd"}}"#,
        "schema",
    );
}

#[test]
fn suites_are_read_from_folders_and_files() {
    let folder = tempfile::tempdir().unwrap();
    let missing = Suite::load(folder.path()).unwrap_err().to_string();
    assert!(missing.contains("hint: "), "{missing}");
    let file = folder.path().join("tasks.jsonl");
    fs::write(&file, r#"{"task":"t","kind":"contains","prompt":"p","text":"x"}"#).unwrap();
    let alone = Suite::load(&file).unwrap();
    assert_eq!(alone.text(), Suite::builtin().text());
    assert_eq!(alone.digest(), Suite::load(folder.path()).unwrap().digest());
    fs::write(folder.path().join("held-out.txt"), "Our own text.").unwrap();
    assert_eq!(Suite::load(folder.path()).unwrap().text(), "Our own text.");
    fs::write(&file, [0xff, 0xfe]).unwrap();
    assert!(matches!(Suite::load(&file), Err(SuiteError::Read { .. })));
    assert!(matches!(Suite::load(&folder.path().join("none")), Err(SuiteError::Read { .. })));
}
