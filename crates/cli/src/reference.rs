//! docs/cli.md, made from the very definitions that parse the command line.

#![cfg(test)]

use clap::{Command, CommandFactory};

use crate::args::Args;

const WIDTH: usize = 100;

fn reference() -> String {
    let mut root = Args::command().term_width(WIDTH);
    root.build();
    let mut text = String::from(
        "# Command line\n\n\
         Made from the program itself by `make generate`; do not edit.\n\n\
         Results go to stdout, talk and progress to stderr. `--output json` works everywhere.\n\
         Environment variables and files: [configuration.md](configuration.md).\n",
    );
    section(&mut root, "", &mut text);
    text
}

fn section(command: &mut Command, parent: &str, text: &mut String) {
    let name = format!("{parent}{}", command.get_name());
    let level = if parent.is_empty() { "##" } else { "###" };
    let help = command.render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    text.push_str(&format!("\n{level} {name}\n\n```text\n{}\n```\n", help.join("\n").trim_end()));
    let prefix = format!("{name} ");
    for child in command.get_subcommands_mut().filter(|child| child.get_name() != "help") {
        section(child, &prefix, text);
    }
}

#[test]
fn the_reference_is_what_the_program_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
    let wanted = reference();
    if std::env::var_os("SLM_REGENERATE").is_some() {
        std::fs::write(path, &wanted).expect("docs/cli.md can be written");
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(found == wanted, "docs/cli.md is out of date; mend it with: make generate");
}

#[test]
fn the_definitions_hold_together() {
    Args::command().debug_assert();
}

#[test]
fn every_command_that_does_something_has_an_example() {
    fn look(command: &Command, path: &str, without: &mut Vec<String>) {
        let path = format!("{path} {}", command.get_name());
        let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        if !command.has_subcommands() && !after.contains("$ slm") {
            without.push(path.clone());
        }
        for child in command.get_subcommands() {
            look(child, &path, without);
        }
    }
    let mut without = Vec::new();
    look(&Args::command(), "", &mut without);
    assert!(without.is_empty(), "no example in the help of: {without:?}");
}
