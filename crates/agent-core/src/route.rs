//! The cheapest way to a model file: whole, or by deltas from one that is here.

use slmops_api::delta::{Delta, MAX_CHAIN};
use slmops_artifact::Digest;

use crate::Blob;

/// Deltas to apply one after the other, the first one to a file among `bases`, the last one giving
/// `target`: those of the fewest bytes. Empty where the whole file is as cheap.
pub fn cheapest(offered: &[Delta], bases: &[Digest], target: Blob) -> Vec<Delta> {
    // Each way ends at the target, and grows at its beginning.
    let mut ways: Vec<(u64, Vec<&Delta>)> = vec![(0, Vec::new())];
    let mut best: Option<(u64, Vec<&Delta>)> = None;
    for _ in 0..MAX_CHAIN {
        let mut longer = Vec::new();
        for (bytes, way) in &ways {
            let end = way.first().map_or(target.digest, |first| first.from);
            for delta in offered.iter().filter(|delta| delta.to == end) {
                let bytes = bytes.saturating_add(delta.bytes);
                let fits = delta.to != target.digest || delta.to_bytes == target.size_bytes;
                let round =
                    delta.from == target.digest || way.iter().any(|later| later.from == delta.from);
                let dear = bytes >= best.as_ref().map_or(target.size_bytes, |(bytes, _)| *bytes);
                if !fits || round || dear {
                    continue;
                }
                let mut way = way.clone();
                way.insert(0, delta);
                if bases.contains(&delta.from) {
                    best = Some((bytes, way));
                } else {
                    longer.push((bytes, way));
                }
            }
        }
        ways = longer;
    }
    best.map(|(_, way)| way.into_iter().cloned().collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn delta(from: &str, to: &str, bytes: u64) -> Delta {
        let blob = digest(&format!("{from}-{to}-{bytes}"));
        Delta { from: digest(from), to: digest(to), to_bytes: 100, blob, bytes, header_bytes: 1 }
    }

    /// The bytes of each step from the files `bases` to the file `c` of 100 bytes.
    fn check(offered: &[Delta], bases: &[&str], expected: &[u64]) {
        let bases: Vec<Digest> = bases.iter().map(|base| digest(base)).collect();
        let target = Blob { digest: digest("c"), size_bytes: 100 };
        let way = cheapest(offered, &bases, target);
        let bytes: Vec<u64> = way.iter().map(|step| step.bytes).collect();
        assert_eq!(bytes, expected);
        let mut at = way.first().map(|step| step.from);
        for step in &way {
            assert_eq!(at, Some(step.from));
            at = Some(step.to);
        }
        assert!(way.is_empty() || at == Some(target.digest));
    }

    #[test]
    fn the_fewest_bytes_win() {
        let offered = [delta("a", "c", 50), delta("a", "b", 10), delta("b", "c", 20)];
        check(&offered, &["a"], &[10, 20]);
        check(&offered, &["b"], &[20]);
        check(&offered, &["a", "b"], &[20]);
        check(&offered, &["x"], &[]);
        check(&offered[..1], &["a"], &[50]);
        check(&[delta("a", "c", 5), delta("a", "b", 10), delta("b", "c", 20)], &["a"], &[5]);
    }

    #[test]
    fn what_saves_nothing_or_leads_nowhere_is_not_taken() {
        check(&[delta("a", "c", 100)], &["a"], &[]);
        check(&[delta("a", "b", 60), delta("b", "c", 40)], &["a"], &[]);
        check(&[delta("b", "c", 1), delta("c", "b", 1)], &["a"], &[]);
        let other_size = Delta { to_bytes: 99, ..delta("a", "c", 1) };
        check(&[other_size], &["a"], &[]);
        // No chain is longer than MAX_CHAIN.
        let chain =
            [delta("z", "y", 1), delta("y", "x", 1), delta("x", "b", 1), delta("b", "c", 1)];
        check(&chain, &["y"], &[1, 1, 1]);
        check(&chain, &["z"], &[]);
    }
}
