//! A device's labels, as small as they can be: a fleet has few keys and few values, each many times.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// Labels by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(Vec<(Arc<str>, Arc<str>)>);

impl Labels {
    /// The value of a label.
    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.binary_search_by(|(known, _)| (**known).cmp(key));
        found.ok().map(|index| &*self.0[index].1)
    }

    /// Sets a label.
    pub fn insert(&mut self, key: impl Into<Arc<str>>, value: impl Into<Arc<str>>) {
        let (key, value) = (key.into(), value.into());
        match self.0.binary_search_by(|(known, _)| known.cmp(&key)) {
            Ok(index) => self.0[index].1 = value,
            Err(index) => self.0.insert(index, (key, value)),
        }
    }

    /// All of them by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }
}

impl<K: Into<Arc<str>>, V: Into<Arc<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<T: IntoIterator<Item = (K, V)>>(labels: T) -> Self {
        let mut all = Self::default();
        labels.into_iter().for_each(|(key, value)| all.insert(key, value));
        all
    }
}

/// Texts that stand in many devices, each kept once.
#[derive(Debug, Default)]
pub struct Texts {
    known: HashSet<Arc<str>>,
    /// How many there may be until those that nobody has any more are let go.
    room: usize,
}

impl Texts {
    /// Labels with what others have as well kept once. What only one device has stays its own.
    pub fn share(&mut self, labels: &BTreeMap<String, String>) -> Labels {
        let own = |key: &str| ["id", "name"].contains(&key);
        let mut shared = Vec::with_capacity(labels.len());
        for (key, value) in labels {
            let value = if own(key) { value.as_str().into() } else { self.keep(value) };
            shared.push((self.keep(key), value));
        }
        Labels(shared)
    }

    fn keep(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.known.get(text) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.room {
            self.known.retain(|text| Arc::strong_count(text) > 1);
            self.room = (2 * self.known.len()).max(1024);
        }
        let text: Arc<str> = text.into();
        self.known.insert(Arc::clone(&text));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(labels: &[(&str, &str)]) -> BTreeMap<String, String> {
        labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn labels_are_found_set_and_listed_by_key() {
        let mut labels: Labels = [("site", "rome"), ("class", "small")].into_iter().collect();
        assert_eq!(
            (labels.get("site"), labels.get("sit"), labels.get("z")),
            (Some("rome"), None, None)
        );
        labels.insert("floor", "2");
        labels.insert("site", "oslo");
        let all: Vec<_> = labels.iter().collect();
        assert_eq!(all, [("class", "small"), ("floor", "2"), ("site", "oslo")]);
        assert_eq!(Labels::default().get("site"), None);
    }

    #[test]
    fn the_same_text_is_kept_once_and_let_go_with_the_last() {
        let mut texts = Texts::default();
        let one = texts.share(&map(&[("name", "a"), ("site", "rome")]));
        let two = texts.share(&map(&[("name", "b"), ("site", "rome")]));
        assert!(Arc::ptr_eq(&one.0[1].1, &two.0[1].1));
        assert_eq!(one.0[0].1.as_ref(), "a");
        assert_eq!(one, map(&[("name", "a"), ("site", "rome")]).into_iter().collect());
        // Values that came and went do not stay.
        for number in 0..10_000 {
            texts.share(&map(&[("batch", &number.to_string())]));
        }
        assert!(texts.known.len() <= 1024, "{}", texts.known.len());
        assert!(texts.known.contains("rome"));
    }
}
