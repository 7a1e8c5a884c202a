use serde_json::json;

use super::*;
use crate::constraint::tests::check;

const SYNTAXES: [Syntax; 4] = [TAGGED, LIST, BARE, FENCED];

fn tool(name: &str) -> Tool {
    Tool {
        name: name.to_owned(),
        description: Some("Looks something up.".to_owned()),
        parameters: json!({
            "type": "object",
            "properties": { "city": { "type": "string" }, "days": { "$ref": "#/$defs/days" } },
            "required": ["city"],
            "additionalProperties": false,
            "$defs": { "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        }),
        strict: true,
    }
}

fn call(name: &str, arguments: &str) -> ToolCall {
    ToolCall { id: String::new(), name: name.to_owned(), arguments: arguments.to_owned() }
}

/// What a reader finds in a text that comes in pieces of `size` characters, calls as they are.
fn read(syntax: Syntax, text: &str, size: usize) -> (String, Vec<ToolCall>) {
    let mut reader = Reader::new(syntax, &[tool("weather"), tool("weather_at")]);
    let letters: Vec<char> = text.chars().collect();
    let mut found: Vec<Found> =
        letters.chunks(size).flat_map(|piece| reader.push(&String::from_iter(piece))).collect();
    found.extend(reader.finish());
    let (mut content, mut calls) = (String::new(), Vec::<ToolCall>::new());
    for found in found {
        match found {
            Found::Text(text) => content.push_str(&text),
            Found::Begin { index, name } => {
                assert_eq!(index, calls.len());
                calls.push(call(&name, ""));
            }
            Found::Arguments { index, text } => calls[index].arguments.push_str(&text),
        }
    }
    assert_eq!(reader.calls(), calls.len());
    (content, calls)
}

#[test]
fn calls_are_found_however_they_come() {
    let one = vec![call("weather_at", "{\"city\": \"a }]{\\\"[ b\", \"days\": {\"x\": [1]}}")];
    let mut two = one.clone();
    two.push(call("weather", "{}"));
    for syntax in SYNTAXES {
        for size in [1, 2, 3, 7, 1000] {
            let check = |text: &str, content: &str, calls: &[ToolCall]| {
                let wanted = (content.to_owned(), calls.to_vec());
                assert_eq!(
                    read(syntax, text, size),
                    wanted,
                    "{syntax:?}, pieces of {size}: {text}"
                );
            };
            check("", "", &[]);
            check(
                "Just text, é < ` {\"name\": \"other\"}  ",
                "Just text, é < ` {\"name\": \"other\"}  ",
                &[],
            );
            check(&syntax.write(&one), "", &one);
            if syntax.between.is_some() {
                check(&syntax.write(&two), "", &two);
                check(&format!("Let me see.\n\n{}", syntax.write(&two)), "Let me see.", &two);
            }
            // Cut off.
            let whole = syntax.write(&one);
            let place = whole.find("[1]").expect("it is in there");
            let cut = call("weather_at", "{\"city\": \"a }]{\\\"[ b\", \"days\": {\"x\": ");
            check(&whole[..place], "", &[cut]);
            check(&whole[..syntax.trigger.len()], "", &[]);
            // A call that nothing announced.
            let middle = syntax.middle();
            check(&format!("{{\"name\": \"weather{middle}{{}}}}"), "", &[call("weather", "{}")]);
        }
    }
}

#[test]
fn grammars_allow_text_and_well_formed_calls() {
    let tools = [tool("weather"), tool("weather_at")];
    for syntax in SYNTAXES {
        let write = |calls: &[ToolCall]| syntax.write(calls);
        let good = call("weather", "{\"city\": \"Bonn\", \"days\": 3}");
        let other = call("weather_at", "{\"city\":\"Ulm\"}");
        let wrong = [
            write(&[call("weather", "{\"days\": 3}")]),
            write(&[call("weather", "{\"city\": \"Bonn\", \"days\": 12}")]),
            write(&[call("weather", "{\"city\": \"Bonn\", \"hours\": 12}")]),
            write(&[call("other", "{\"city\": \"Bonn\"}")]),
            write(std::slice::from_ref(&good))[..20].to_owned(),
        ];
        let wrong: Vec<&str> = wrong.iter().map(String::as_str).collect();
        let (one, two) =
            (write(std::slice::from_ref(&good)), write(&[good.clone(), other.clone()]));
        let constraint = |choice: Choice, parallel| {
            syntax.constraint(&tools, &choice, parallel, None).expect("good schemas")
        };
        check(
            constraint(Choice::Required, true),
            &[&one, &write(std::slice::from_ref(&other))],
            &wrong,
        );
        check(constraint(Choice::Required, true), &[], &["", "Hello"]);
        check(constraint(Choice::Named("weather".to_owned()), true), &[&one], &[&write(&[other])]);
        // A call of an unknown tool that nothing announces is text.
        let announced: Vec<&str> = wrong[..3].to_vec();
        check(
            constraint(Choice::Auto, true),
            &["", "Hello, it is 3 o'clock.\n", "{\"name\": \"Bonn\"}", &one],
            &announced,
        );
        if syntax.between.is_some() {
            check(constraint(Choice::Required, true), &[&two], &[]);
            check(constraint(Choice::Required, false), &[&one], &[&two]);
            let after_text = format!("I look.\n{two}");
            check(constraint(Choice::Auto, true), &[&two, &after_text], &[]);
            let bare =
                format!("{{\"name\": \"weather\", \"{}\": {{\"city\": \"A\"}}}}", syntax.arguments);
            check(constraint(Choice::Auto, true), &[&bare], &[]);
        }
        // Text that is held to a schema of its own.
        let answer = Constraint::json_object("response_format");
        let both = syntax.constraint(&tools, &Choice::Auto, true, Some(&answer));
        match both {
            Ok(both) => {
                check(both, &["{\"answer\": 42}", "{\"name\": \"weather\"}", &one], &["Hello"])
            }
            Err(_) => assert_eq!(syntax, BARE),
        }
    }
}

#[test]
fn families_are_known_by_their_templates() {
    for (architecture, template, syntax) in [
        ("qwen2", "{{ tools }}…<tool_call>…", TAGGED),
        ("llama", "…<|python_tag|>…", BARE),
        ("llama", "You are a helpful AI assistant named SmolLM", LIST),
        ("gemma3", "<start_of_turn>", FENCED),
        ("mamba", "", TAGGED),
    ] {
        assert_eq!(Syntax::of(architecture, template), syntax, "{architecture}");
    }
    let told = TAGGED.instructions(&[tool("weather").definition()], &Choice::Auto);
    assert!(told.contains("\"description\":\"Looks something up.\""), "{told}");
    assert!(told.ends_with("<tool_call>\n{\"name\": \"NAME\", \"arguments\": {\"ARGUMENT\": \"VALUE\"}}\n</tool_call>"), "{told}");
}
