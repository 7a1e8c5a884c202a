//! Finding what two files have in common, wherever it is: for bytes of unknown structure.

use std::ops::Range;

/// Bytes that are looked for at once; more where the old file is so long that it would have too
/// many blocks.
const MIN_BLOCK_BYTES: usize = 512;
/// The most blocks of the old file that are remembered: 16 MiB of memory.
const MAX_BLOCKS: usize = 1 << 20;
/// The base of the rolling hash, a polynomial modulo 2^64.
const BASE: u64 = 0x9e37_79b9_7f4a_7c15;

/// A stretch of the new bytes that the old ones have too.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Match {
    pub(crate) new: Range<usize>,
    /// Where the old bytes begin.
    pub(crate) old: usize,
}

/// Stretches of `new` that are somewhere in `old`, in order, each as long as it goes. Those shorter
/// than two blocks may be missed.
pub(crate) fn matches(old: &[u8], new: &[u8]) -> Vec<Match> {
    let block = old.len().div_ceil(MAX_BLOCKS).next_power_of_two().max(MIN_BLOCK_BYTES);
    let blocks = Blocks::of(old, block);
    let leaving = BASE.wrapping_pow(block as u32);
    let mut found = Vec::new();
    let (mut at, mut done) = (0, 0);
    let Some(first) = new.get(..block) else { return found };
    let mut hash = hash_of(first);
    loop {
        let window = &new[at..at + block];
        if let Some(start) = blocks.find(hash, window) {
            let (after, rest) = (start + block, at + block);
            let forward = common_start(&old[after..], &new[rest..]);
            let backward = common_end(&old[..start], &new[done..at]);
            let end = rest + forward;
            found.push(Match { new: at - backward..end, old: start - backward });
            (at, done) = (end, end);
            let Some(next) = new.get(at..at + block) else { return found };
            hash = hash_of(next);
            continue;
        }
        let Some(&entering) = new.get(at + block) else { return found };
        hash = hash
            .wrapping_mul(BASE)
            .wrapping_add(u64::from(entering))
            .wrapping_sub(leaving.wrapping_mul(u64::from(window[0])));
        at += 1;
    }
}

fn hash_of(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |hash: u64, &byte| hash.wrapping_mul(BASE).wrapping_add(u64::from(byte)))
}

fn common_start(a: &[u8], b: &[u8]) -> usize {
    const STEP: usize = 64;
    let equal = |(a, b): &(&[u8], &[u8])| a == b;
    let whole = a.chunks_exact(STEP).zip(b.chunks_exact(STEP)).take_while(equal).count() * STEP;
    whole + a[whole..].iter().zip(&b[whole..]).take_while(|(a, b)| a == b).count()
}

fn common_end(a: &[u8], b: &[u8]) -> usize {
    a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count()
}

/// Where the blocks of a file are, by their hashes: an open table, at most half full.
struct Blocks<'a> {
    bytes: &'a [u8],
    block: usize,
    /// The upper half of a hash, and the number of the block, from 1; 0 where there is none.
    table: Vec<u64>,
}

impl<'a> Blocks<'a> {
    fn of(bytes: &'a [u8], block: usize) -> Self {
        let size = (2 * (bytes.len() / block) + 2).next_power_of_two();
        let mut blocks = Self { bytes, block, table: vec![0; size] };
        for (index, bytes) in bytes.chunks_exact(block).enumerate() {
            let (tag, mut slot) = blocks.place(hash_of(bytes));
            // Of equal blocks the first one does.
            while blocks.table[slot] != 0 && blocks.table[slot] >> 32 != tag {
                slot = (slot + 1) % size;
            }
            if blocks.table[slot] == 0 {
                blocks.table[slot] = tag << 32 | (index as u64 + 1);
            }
        }
        blocks
    }

    /// A hash's tag, and where in the table it would be.
    fn place(&self, hash: u64) -> (u64, usize) {
        // The lowest bits of the polynomial depend on the lowest bits of bytes alone.
        let mixed = (hash ^ hash >> 32).wrapping_mul(BASE);
        (mixed >> 32, (mixed >> 16) as usize % self.table.len())
    }

    /// Where the file has the block `wanted`, whose hash is given.
    fn find(&self, hash: u64, wanted: &[u8]) -> Option<usize> {
        let (tag, mut slot) = self.place(hash);
        loop {
            let entry = self.table[slot];
            if entry == 0 {
                return None;
            }
            if entry >> 32 == tag {
                let start = (entry as u32 as usize - 1) * self.block;
                return (self.bytes[start..start + self.block] == *wanted).then_some(start);
            }
            slot = (slot + 1) % self.table.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize, mut state: u64) -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn what_was_moved_is_found() {
        let old = noise(100_000, 1);
        let own = noise(3000, 2);
        let new = [&old[60_123..90_001], &own, &old[5..40_007], &old[99_000..]].concat();
        let found = matches(&old, &new);
        let expected = [
            Match { new: 0..29_878, old: 60_123 },
            Match { new: 32_878..72_880, old: 5 },
            Match { new: 72_880..73_880, old: 99_000 },
        ];
        // The last is shorter than two blocks.
        assert_eq!(found[..2], expected[..2]);
        assert!(found.len() == 2 || found[2] == expected[2], "{found:?}");
    }

    #[test]
    fn odd_inputs_end() {
        let zeros = vec![0; 10_000];
        assert_eq!(matches(&zeros, &zeros), [Match { new: 0..10_000, old: 0 }]);
        for (old, new) in
            [(&zeros[..0], &zeros[..]), (&zeros, &zeros[..100]), (&zeros[..100], &zeros)]
        {
            assert_eq!(matches(old, new), []);
        }
        // The old zeros end, the new ones go on: found again and again.
        let covered: usize =
            matches(&zeros[..5000], &zeros).iter().map(|found| found.new.len()).sum();
        assert_eq!(covered, 10_000);
    }
}
