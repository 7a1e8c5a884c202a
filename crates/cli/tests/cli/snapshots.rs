//! Help, errors and exit codes. `make generate` rewrites what is expected.

#[test]
fn help_and_errors_are_as_noted() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let home = home.path().join("home").to_string_lossy().into_owned();
    let cases = trycmd::TestCases::new();
    cases.env("SLM_HOME", &home);
    for variable in ["SLM_HUB", "SLM_TOKEN", "SLM_CA"] {
        cases.env(variable, "");
    }
    cases.insert_var("[HOME]", home).expect("a variable's name in brackets");
    cases.case("tests/cmd/*.trycmd");
}
