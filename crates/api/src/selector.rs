//! Selectors: which devices something is meant for, by label and by fact.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::device::DeviceFacts;

/// The most terms in one selector.
pub const MAX_TERMS: usize = 32;
/// What every key that names a fact begins with; no label may.
pub const FACT_PREFIX: &str = "fact.";

/// A conjunction of terms: `class=small,site!=berlin-3,fact.memory>=4GB`; `all` is every device.
/// `class`, `site`, `name` and `id` are labels of every device that has them; what the
/// device says of itself is `fact.NAME` (see [`Fact`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    terms: Vec<Term>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Term {
    Label { key: String, values: Vec<String>, negated: bool },
    Fact { fact: Fact, operator: Operator, values: Vec<Value> },
}

/// What a device says of itself, as far as selectors can ask for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fact {
    /// `fact.memory`: total memory, a size.
    Memory,
    /// `fact.budget`: memory that models may use, a size.
    Budget,
    /// `fact.disk`: free bytes where models are kept, a size.
    Disk,
    /// `fact.cores`: a number.
    Cores,
    /// `fact.arch`: such as `aarch64`.
    Arch,
    /// `fact.cpu`: holds if the processor has this feature, such as `avx2`.
    Cpu,
    /// `fact.engine`: the inference engine's version.
    Engine,
    /// `fact.agent`: the agent's version.
    Agent,
}

impl Fact {
    /// Every fact and the name that stands after `fact.`.
    pub const ALL: [(&'static str, Self); 8] = [
        ("memory", Self::Memory),
        ("budget", Self::Budget),
        ("disk", Self::Disk),
        ("cores", Self::Cores),
        ("arch", Self::Arch),
        ("cpu", Self::Cpu),
        ("engine", Self::Engine),
        ("agent", Self::Agent),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, fact)| *fact == self).expect("every fact has a name").0
    }

    /// How a device's fact compares with a value: `None` where it has none.
    fn compare(self, facts: &DeviceFacts, value: &Value) -> Option<Ordering> {
        let equal = |same: bool| if same { Ordering::Equal } else { Ordering::Less };
        Some(match (self, &value.meaning) {
            (Self::Memory, Meaning::Number(number)) => facts.memory_bytes.cmp(number),
            (Self::Budget, Meaning::Number(number)) => facts.memory_budget_bytes.cmp(number),
            (Self::Disk, Meaning::Number(number)) => facts.disk_free_bytes.cmp(number),
            (Self::Cores, Meaning::Number(number)) => u64::from(facts.cores).cmp(number),
            (Self::Engine, Meaning::Version(version)) => {
                engine_version(&facts.engine)?.cmp(version)
            }
            (Self::Agent, Meaning::Version(version)) => {
                version_numbers(&facts.agent_version)?.cmp(version)
            }
            (Self::Arch, _) => equal(facts.arch == value.text),
            (Self::Cpu, _) => equal(facts.cpu_features.contains(&value.text)),
            _ => return None,
        })
    }

    fn value(self, text: &str) -> Option<Value> {
        let meaning = match self {
            Self::Memory | Self::Budget | Self::Disk => Meaning::Number(size(text)?),
            Self::Cores => Meaning::Number(text.parse().ok()?),
            Self::Engine | Self::Agent => Meaning::Version(version_numbers(text)?),
            Self::Arch | Self::Cpu => Meaning::Text,
        };
        Some(Value { text: text.to_owned(), meaning })
    }

    fn is_ordered(self) -> bool {
        !matches!(self, Self::Arch | Self::Cpu)
    }
}

/// A value as it was written, and what it means.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Value {
    text: String,
    meaning: Meaning,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Meaning {
    Text,
    Number(u64),
    Version(Vec<u64>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Equal,
    NotEqual,
    AtLeast,
    AtMost,
    More,
    Less,
}

impl Operator {
    /// Longer ones first, so that `>=` is not read as `>`.
    const ALL: [(&'static str, Self); 6] = [
        ("!=", Self::NotEqual),
        (">=", Self::AtLeast),
        ("<=", Self::AtMost),
        (">", Self::More),
        ("<", Self::Less),
        ("=", Self::Equal),
    ];

    fn text(self) -> &'static str {
        Self::ALL.iter().find(|(_, one)| *one == self).expect("every operator is written").0
    }

    fn holds(self, ordering: Option<Ordering>) -> bool {
        match self {
            Self::Equal => ordering == Some(Ordering::Equal),
            Self::NotEqual => ordering != Some(Ordering::Equal),
            Self::AtLeast => ordering.is_some_and(Ordering::is_ge),
            Self::AtMost => ordering.is_some_and(Ordering::is_le),
            Self::More => ordering == Some(Ordering::Greater),
            Self::Less => ordering == Some(Ordering::Less),
        }
    }
}

/// A size such as `4GB`, `512MiB` or a number of bytes.
fn size(text: &str) -> Option<u64> {
    let units = [
        ("kib", 1 << 10),
        ("mib", 1 << 20),
        ("gib", 1 << 30),
        ("kb", 1_000),
        ("mb", 1_000_000),
        ("gb", 1_000_000_000),
        ("tb", 1_000_000_000_000),
        ("", 1),
    ];
    let text = text.to_ascii_lowercase();
    let (number, unit) = units.iter().find_map(|(unit, bytes)| {
        let number = text.strip_suffix(unit)?;
        Some((number.parse::<u64>().ok()?, *bytes))
    })?;
    number.checked_mul(unit)
}

/// The numbers of a version such as `0.1.160` or `b7100`, for comparing.
pub fn version_numbers(text: &str) -> Option<Vec<u64>> {
    let text = text.trim_start_matches(['b', 'v']);
    let numbers: Option<Vec<u64>> = text
        .split(['.', '-', '+'])
        .map(|part| part.parse().ok())
        .take_while(Option::is_some)
        .collect();
    numbers.filter(|numbers| !numbers.is_empty())
}

/// The version of an engine that calls itself `llama.cpp 0.0.7100 (AVX2 FMA)`.
pub fn engine_version(engine: &str) -> Option<Vec<u64>> {
    engine.split_whitespace().find_map(version_numbers)
}

/// Why a string is not a [`Selector`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not a selector: {why}")]
pub struct ParseSelectorError {
    given: String,
    why: String,
}

impl Selector {
    /// The selector of every device.
    pub fn all() -> Self {
        Self::default()
    }

    /// Whether a device with these facts and these labels, as `label` gives them by key, is meant.
    pub fn matches<'l>(
        &self,
        label: impl Fn(&str) -> Option<&'l str>,
        facts: &DeviceFacts,
    ) -> bool {
        self.terms.iter().all(|term| match term {
            Term::Label { key, values, negated } => {
                let equal = label(key).is_some_and(|label| values.iter().any(|it| it == label));
                equal != *negated
            }
            Term::Fact { fact, operator: Operator::NotEqual, values } => {
                let same = |value| fact.compare(facts, value) == Some(Ordering::Equal);
                !values.iter().any(same)
            }
            Term::Fact { fact, operator, values } => {
                values.iter().any(|value| operator.holds(fact.compare(facts, value)))
            }
        })
    }

    /// The values asked of the label `key` by its `=` terms, such as the classes of
    /// `class=small|large`.
    pub fn values_of(&self, key: &str) -> Vec<&str> {
        let values = self.terms.iter().filter_map(|term| match term {
            Term::Label { key: asked, values, negated: false } if asked == key => Some(values),
            _ => None,
        });
        values.flatten().map(String::as_str).collect()
    }
}

fn parse_term(part: &str) -> Result<Term, String> {
    let usual = "write `all`, or terms such as `class=small`, `class=small|medium`, `site!=berlin` \
                 and `fact.memory>=4GB`, joined by commas";
    let good = |text: &str| {
        !text.is_empty()
            && text.len() <= crate::id::MAX_NAME_BYTES
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte))
    };
    let start = part.find(['=', '!', '<', '>']).ok_or(usual)?;
    let (key, rest) = part.split_at(start);
    let found = Operator::ALL.iter().find_map(|(text, one)| Some((*one, rest.strip_prefix(text)?)));
    let (operator, values) = found.ok_or(usual)?;
    let key = key.trim();
    let values: Vec<&str> = values.split('|').map(str::trim).collect();
    if !good(key) || !values.iter().all(|value| good(value)) {
        return Err(usual.to_owned());
    }
    let Some(name) = key.strip_prefix(FACT_PREFIX) else {
        let negated = match operator {
            Operator::Equal => false,
            Operator::NotEqual => true,
            _ => return Err(format!("`{key}` is a label: it is compared by = and != alone")),
        };
        let values = values.into_iter().map(str::to_owned).collect();
        return Ok(Term::Label { key: key.to_owned(), values, negated });
    };
    let fact = Fact::ALL.iter().find(|(known, _)| *known == name).map(|(_, fact)| *fact);
    let fact = fact.ok_or_else(|| {
        let known: Vec<&str> = Fact::ALL.iter().map(|(name, _)| *name).collect();
        format!("there is no fact `{name}`; facts are {}", known.join(", "))
    })?;
    if !fact.is_ordered() && !matches!(operator, Operator::Equal | Operator::NotEqual) {
        return Err(format!("`{key}` is compared by = and != alone"));
    }
    let values: Result<Vec<Value>, String> = values
        .into_iter()
        .map(|text| fact.value(text).ok_or_else(|| format!("`{text}` is no value of `{key}`")))
        .collect();
    Ok(Term::Fact { fact, operator, values: values? })
}

impl FromStr for Selector {
    type Err = ParseSelectorError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        if given.trim() == "all" {
            return Ok(Self::all());
        }
        let error =
            |why: String| ParseSelectorError { given: given.chars().take(200).collect(), why };
        let mut terms = Vec::new();
        for part in given.split(',').map(str::trim) {
            if terms.len() == MAX_TERMS {
                return Err(error(format!("it has more than {MAX_TERMS} terms")));
            }
            terms.push(parse_term(part).map_err(error)?);
        }
        Ok(Self { terms })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("all");
        }
        for (index, term) in self.terms.iter().enumerate() {
            if index > 0 {
                f.write_str(",")?;
            }
            match term {
                Term::Label { key, values, negated } => {
                    let operator = if *negated { "!=" } else { "=" };
                    write!(f, "{key}{operator}{}", values.join("|"))?;
                }
                Term::Fact { fact, operator, values } => {
                    let values: Vec<&str> =
                        values.iter().map(|value| value.text.as_str()).collect();
                    let (name, operator) = (fact.name(), operator.text());
                    write!(f, "{FACT_PREFIX}{name}{operator}{}", values.join("|"))?;
                }
            }
        }
        Ok(())
    }
}

impl Serialize for Selector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> DeviceFacts {
        DeviceFacts {
            hostname: "host".to_owned(),
            arch: "aarch64".to_owned(),
            kernel: "Linux 6.1".to_owned(),
            cpu: "test".to_owned(),
            cpu_features: vec!["asimddp".to_owned(), "i8mm".to_owned()],
            cores: 4,
            memory_bytes: 4 << 30,
            memory_budget_bytes: 300_000_000,
            disk_free_bytes: 1 << 30,
            agent_version: "0.2.1".to_owned(),
            engine: "llama.cpp 0.0.7100 (DOTPROD)".to_owned(),
            endpoint: None,
            time_zone: None,
            metered: false,
            shares_at: None,
            obeys: vec![],
        }
    }

    fn check(selector: &str, expected: bool) {
        let label = |key: &str| match key {
            "class" => Some("small"),
            "site" => Some("berlin-3"),
            _ => None,
        };
        let parsed: Selector = selector.parse().unwrap();
        assert_eq!(parsed.matches(label, &facts()), expected, "{selector}");
        assert_eq!(parsed.to_string(), selector);
    }

    #[test]
    fn labels() {
        check("all", true);
        check("class=small", true);
        check("class=small|large,site!=berlin-4", true);
        check("class!=small|large", false);
        check("floor=2", false);
        check("floor!=2", true);
    }

    #[test]
    fn facts_are_compared_by_what_they_mean() {
        check("fact.memory>=4GB", true);
        check("fact.memory>=4GiB", true);
        check("fact.memory>4GiB", false);
        check("fact.budget<300MB", false);
        check("fact.budget<=300MB", true);
        check("fact.disk>=1000000", true);
        check("fact.cores=2|4", true);
        check("fact.cores!=2|4", false);
        check("fact.arch=aarch64,fact.cpu=i8mm", true);
        check("fact.cpu=avx2", false);
        check("fact.cpu!=avx2", true);
        check("fact.engine>=0.0.7099", true);
        check("fact.engine>=0.0.10000", false);
        check("fact.engine>=0.1", false);
        check("fact.agent<0.10.0", true);
    }

    #[test]
    fn nonsense_is_refused_with_the_reason() {
        for (bad, why) in [
            ("", "write `all`"),
            ("class", "write `all`"),
            ("class=", "write `all`"),
            ("class=a b", "write `all`"),
            ("class>=small", "is a label"),
            ("fact.mmeory>=4GB", "facts are memory"),
            ("fact.memory>=much", "`much` is no value"),
            ("fact.arch>=aarch64", "by = and != alone"),
            ("fact.cores>=four", "`four` is no value"),
            ("fact.memory>=99999999999TB", "is no value"),
        ] {
            let error = bad.parse::<Selector>().unwrap_err().to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
        let many = vec!["a=b"; MAX_TERMS + 1].join(",");
        assert!(many.parse::<Selector>().unwrap_err().to_string().contains("more than 32"));
    }

    #[test]
    fn versions_are_numbers() {
        assert_eq!(version_numbers("b7100"), Some(vec![7100]));
        assert_eq!(version_numbers("0.1.160-rc1"), Some(vec![0, 1, 160]));
        assert_eq!(version_numbers("cpp"), None);
        assert_eq!(engine_version("llama.cpp 0.0.7100 (AVX2)"), Some(vec![0, 0, 7100]));
    }
}
