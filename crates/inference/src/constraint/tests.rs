use serde_json::json;

use super::*;

fn compiler() -> Compiler {
    Compiler::new(ApproximateTokEnv::single_byte_env()).expect("a vocabulary of bytes")
}

/// Whether a constraint accepts exactly `text`: every byte, and then an end.
fn accepts(constraint: &Constraint, text: &str) -> bool {
    let mut guide = compiler().guide(constraint).expect("it compiles");
    let mut over = false;
    for byte in text.bytes() {
        if over || !guide.allows(Token::from(byte)).expect("it is not too complex") {
            return false;
        }
        let mask = guide.mask().expect("a mask");
        assert!(mask.is_allowed(u32::from(byte)), "the mask disagrees at `{byte}` of {text}");
        over = guide.take(Token::from(byte)).expect("it was allowed");
    }
    over || guide.may_end().expect("it is not too complex")
}

#[track_caller]
pub(crate) fn check(constraint: Constraint, yes: &[&str], no: &[&str]) {
    for text in yes {
        assert!(accepts(&constraint, text), "`{text}` is refused by {}", constraint.grammar);
    }
    for text in no {
        assert!(!accepts(&constraint, text), "`{text}` is accepted by {}", constraint.grammar);
    }
}

#[track_caller]
fn check_gbnf(grammar: &str, by_character: bool, yes: &[&str], no: &[&str]) {
    let constraint = Constraint::gbnf("grammar", grammar).expect("GBNF");
    assert_eq!(constraint.by_character, by_character, "{}", constraint.grammar);
    check(constraint, yes, no);
}

#[test]
fn json_is_held_to_its_schema() {
    check(
        Constraint::json_object("response_format"),
        &["{}", "{\"a\": [1, -2.5e3, null, {\"b\": \"\\né\"}]}", "{\n  \"a\": true\n}"],
        &["", "[]", "{", "{a: 1}", "{\"a\": 01}", "{} x"],
    );
    let schema = json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "minLength": 1, "maxLength": 3 },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "tags": { "type": "array", "items": { "enum": ["a", "b"] }, "maxItems": 2 },
            "next": { "$ref": "#/$defs/node" },
        },
        "required": ["name", "age"],
        "additionalProperties": false,
        "$defs": { "node": {
            "anyOf": [{ "type": "null" }, { "type": "object", "additionalProperties": false,
                "properties": { "next": { "$ref": "#/$defs/node" } } }],
        } },
    });
    check(
        Constraint::json("response_format", &schema, false).expect("an object"),
        &[
            "{\"name\": \"Ann\", \"age\": 7}",
            "{\"name\":\"é\",\"age\":120,\"tags\":[\"a\",\"b\"],\"next\":{\"next\":null}}",
        ],
        &[
            "{\"age\": 7}",
            "{\"name\": \"Anna\", \"age\": 7}",
            "{\"name\": \"Ann\", \"age\": 121}",
            "{\"name\": \"Ann\", \"age\": 7, \"x\": 1}",
            "{\"name\": \"Ann\", \"age\": 7, \"tags\": [\"c\"]}",
            "{\"name\": \"Ann\", \"age\": 7",
        ],
    );
}

#[test]
fn regular_expressions_match_the_whole() {
    let regex = |text: &str| Constraint::regex("regex", text).expect("it is not empty");
    check(regex("[a-z]+/[0-9]{2}"), &["ab/12"], &["ab/1", "/12", "ab/123"]);
    check(regex("^(yes|no)$"), &["yes", "no"], &["", "yesno"]);
    check(regex("a.b"), &["a.b", "aéb"], &["a\nb"]);
    check(regex(r"\d{3}-\w+"), &["123-abc"], &["12-abc"]);
    check(regex(r"x\$"), &["x$"], &["x"]);
}

#[test]
fn gbnf_means_what_llama_cpp_means() {
    check_gbnf("root ::= \"yes\" | \"no\"", false, &["yes", "no"], &["", "yesno", "y"]);
    check_gbnf("root ::= [a-z]+ \"x\" # a comment", false, &["ax", "xx", "abcx"], &["a", "x"]);
    check_gbnf(
        "root ::= (item \",\"\n  )* last\nitem ::= [0-9]{1,2}\nlast ::= \"end\" \"!\"?\n",
        false,
        &["end", "end!", "1,22,end"],
        &["1end", "111,end", ",end"],
    );
    check_gbnf(
        r#"root ::= [^"\\\x41\u00e9] "\t\"\[" [-+] [+-] ."#,
        false,
        &["b\t\"[-+é", "\n\t\"[+-\n"],
        &["A\t\"[-+x", "é\t\"[-+x", "\"\t\"[-+x"],
    );
    check_gbnf("root ::= \"a\"{2} \"b\"{1,} \"\"", false, &["aab", "aabbb"], &["ab", "aa"]);
    // With recursion.
    check_gbnf(
        "root ::= \"(\" root \")\" | [a-z]+ \"x\" | ",
        true,
        &["", "()", "((ax))", "(xx)"],
        &["(", "(x)", "())"],
    );
    // A greedy lexer would take `ab` for the first one, and never come to `aby`.
    check_gbnf(
        "root ::= (\"ab\" \"x\" | [a-z] \"b\" \"y\") root?",
        true,
        &["abx", "aby", "zby", "abxabyzby"],
        &["zbx", "ab"],
    );
    check_gbnf(
        "root ::= value\nvalue ::= object | string\nobject ::= \"{\" ws (string \":\" ws value (\",\" ws string \":\" ws value)*)? \"}\" ws\nstring ::= \"\\\"\" ([^\"\\\\\\x7F\\x00-\\x1F] | \"\\\\\" ([\"\\\\bfnrt] | \"u\" [0-9a-fA-F]{4}))* \"\\\"\" ws\nws ::= | \" \" | \"\\n\" [ \\t]{0,20}",
        true,
        &["\"a\"", "{}", "{\"a\": \"b\", \"c\": {\n\t}}"],
        &["{\"a\"}", "{\"a\": 1}", "\"a"],
    );
    // Left recursion.
    check_gbnf("root ::= root \"a\" | \"b\"", true, &["b", "baa"], &["a", ""]);
}

#[test]
fn wrong_gbnf_is_refused_with_its_place() {
    let check = |grammar: &str, wanted: &str| {
        let error = Constraint::gbnf("grammar", grammar).expect_err(grammar).to_string();
        assert!(error.contains(wanted), "`{wanted}` is not in: {error}");
    };
    check("", "no rule `root`");
    check("a ::= \"b\"", "no rule `root`");
    check("root ::= a", "the rule `a` is used and not defined");
    check("root ::= \"a\"\nroot ::= \"b\"", "line 2: the rule `root` is defined twice");
    check("root ::= \"a\n", "line 2: it ends inside");
    check("root ::= [a", "it ends inside");
    check("root ::= []", "matches nothing");
    check("root ::= [z-a]", "ends before it begins");
    check("root ::= (\"a\"", "expected `)`");
    check("root ::= \"a\")", "expected the end of the line");
    check("root = \"a\"", "expected `::=`");
    check("\n\nroot ::= \"a\"{3,2}", "line 3: the second number");
    check("root ::= \"a\"{x}", "expected `{m}`");
    check("root ::= \"a\"{99999}", "more than 10000 repetitions");
    check("root ::= \"\\q\"", "unknown escape");
    check("root ::= \"\\xZZ\"", "expected 2 hexadecimal digits");
    check("root ::= \"\\uD800\"", "expected 4 hexadecimal digits");
    check("root ::= <[5]>", "not supported");
    check(&format!("root ::= {}", "(".repeat(100)), "nested deeper than 12");
    check(&format!("root ::= \"a\"{}", "*".repeat(100_000)), "too many signs");
    check(&"x".repeat(MAX_CONSTRAINT_BYTES + 1), "longer than");
}

#[test]
fn wrong_schemas_and_expressions_are_refused() {
    let check = |constraint: Result<Constraint, ConstraintError>, wanted: &str| {
        let outcome = constraint.map_err(|error| error.to_string());
        let error = outcome.and_then(|constraint| compiler().guide(&constraint).map(|_| ()));
        let error = error.expect_err(wanted);
        assert!(error.contains(wanted), "`{wanted}` is not in: {error}");
    };
    let json = |schema: Value| Constraint::json("response_format", &schema, false);
    check(json(json!(true)), "must be an object");
    check(json(json!({ "type": "colour" })), "colour");
    check(json(json!({ "$ref": "#/nowhere" })), "nowhere");
    check(json(json!({ "type": "string", "minLength": 3, "maxLength": 2 })), "nsatisfiable");
    check(json(json!({ "type": "object", "uniqueItems": 5, "if": {} })), "if");
    check(Constraint::regex("regex", "(a"), "unclosed group");
    check(Constraint::regex("regex", "^$"), "empty");
    check(Constraint::regex("regex", r"(a)\1"), "backreferences");
}

#[test]
fn a_guide_of_a_known_constraint_begins_anew() {
    let mut compiler = compiler();
    let constraint = Constraint::regex("regex", "ab").expect("a regex");
    for _ in 0..3 {
        let mut guide = compiler.guide(&constraint).expect("it compiles");
        assert!(!guide.take(Token::from(b'a')).expect("a comes first"));
        assert!(!guide.may_end().expect("it says"));
        assert!(!guide.allows(Token::from(b'a')).expect("it says"));
        assert!(guide.take(Token::from(b'b')).expect("b comes next"));
    }
    assert_eq!(compiler.compiled.len(), 1);
    for count in 0..2 * MAX_COMPILED {
        let constraint = Constraint::regex("regex", &format!("a{{{count},}}b")).expect("a regex");
        compiler.guide(&constraint).expect("it compiles");
    }
    assert_eq!(compiler.compiled.len(), MAX_COMPILED);
}
