//! The reference's next-token distributions on disk, and comparing others with them.
//!
//! Format, little endian: 16 bytes of [`MAGIC`], `u32` vocabulary, `u32` positions, 32 bytes digest
//! of the tokens; then for each position an `f32`, the log-probability of its most probable token,
//! and for each token of the vocabulary a `u16`: how far it lies below that, in steps of
//! [`STEP_NATS`]. What lies below the range counts as its end; that is less than 1e-10 of the most
//! probable token's mass for each token.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use slmops_artifact::Digest;

const MAGIC: &[u8; 16] = b"slmops-logprob-1";
const HEADER_BYTES: u64 = 16 + 4 + 4 + 32;
/// Where the number of positions stands in the header.
const POSITIONS_OFFSET: u64 = 20;
/// The range of log-probabilities that is kept below the most probable token, in nats.
const RANGE_NATS: f64 = 24.0;
/// The unit of a stored log-probability. Rounding errs by half of it at most, either way.
const STEP_NATS: f64 = RANGE_NATS / 65535.0;

/// Why a file of distributions cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DistributionsError {
    /// Reading or writing failed.
    #[error("{operation} reference distributions {}", path.display())]
    Io {
        /// What was done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error(
        "read reference distributions {}: {why}\nhint: delete the file, it is made again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The two models do not speak of the same tokens.
    #[error(
        "compare with reference distributions {}: the {what} differs\nhint: a variant must have its reference's tokenizer; check that it was made from this reference",
        path.display()
    )]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
}

/// `ln(Σ exp(logit))`, summed in double precision.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
    f64::from(max) + sum.ln()
}

/// Index of the greatest value; the lowest of equals.
pub fn first(logits: &[f32]) -> usize {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best
}

/// How many bytes a file of `positions` distributions takes.
pub fn size_bytes(vocabulary: u32, positions: u64) -> u64 {
    HEADER_BYTES + positions * (4 + 2 * u64::from(vocabulary))
}

/// Writes distributions to a new file. It is complete only after [`Writer::finish`].
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    positions: u32,
    row: Vec<u8>,
}

impl Writer {
    /// Starts the file at `path`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(
        path: &Path,
        vocabulary: u32,
        tokens: Digest,
    ) -> Result<Self, DistributionsError> {
        let io = |source| write_error(path, source);
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
        let mut header = MAGIC.to_vec();
        header.extend(vocabulary.to_le_bytes());
        header.extend(0_u32.to_le_bytes());
        header.extend(tokens.as_bytes());
        file.write_all(&header).map_err(io)?;
        Ok(Self { path: path.to_owned(), file, positions: 0, row: Vec::new() })
    }

    /// Adds the distribution of `logits`, whose [`log_sum_exp`] is `normaliser`.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn push(&mut self, logits: &[f32], normaliser: f64) -> Result<(), DistributionsError> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.row.clear();
        self.row.extend(((f64::from(max) - normaliser) as f32).to_le_bytes());
        let scale = (1.0 / STEP_NATS) as f32;
        for logit in logits {
            // A float to integer cast saturates, and turns NaN into 0.
            let steps = ((max - logit) * scale).round() as u16;
            self.row.extend(steps.to_le_bytes());
        }
        self.positions += 1;
        self.file.write_all(&self.row).map_err(|source| write_error(&self.path, source))
    }

    /// Writes the number of positions, and waits until everything is on the disk.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn finish(mut self) -> Result<(), DistributionsError> {
        let mut finish = || {
            self.file.flush()?;
            let file = self.file.get_mut();
            file.seek(SeekFrom::Start(POSITIONS_OFFSET))?;
            file.write_all(&self.positions.to_le_bytes())?;
            file.sync_all()
        };
        finish().map_err(|source| write_error(&self.path, source))
    }
}

/// What comparing one distribution with the reference's gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Compared {
    /// The candidate's [`log_sum_exp`].
    pub normaliser: f64,
    /// `KL(reference ‖ candidate)` in nats; never negative.
    pub divergence: f64,
    /// Whether both have the same most probable token.
    pub same_first: bool,
}

/// Reads distributions in the order in which they were written.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
    vocabulary: usize,
    left: u32,
    row: Vec<u8>,
    /// `exp(-steps · STEP_NATS)` for each number of steps.
    powers: Vec<f32>,
}

impl Reader {
    /// Opens the file at `path`, which must be of this vocabulary and these tokens.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or belongs to other tokens.
    pub fn open(path: &Path, vocabulary: u32, tokens: Digest) -> Result<Self, DistributionsError> {
        let io = |source| read_error(path, source);
        let damaged = |why| DistributionsError::Damaged { path: path.to_owned(), why };
        let mismatch = |what| DistributionsError::Mismatch { path: path.to_owned(), what };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact(&mut header).map_err(|_| damaged("its header is cut off"))?;
        let number =
            |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        if &header[..16] != MAGIC {
            return Err(damaged("it is no such file, or of another version"));
        }
        if number(16) != vocabulary {
            return Err(mismatch("vocabulary"));
        }
        if &header[24..] != tokens.as_bytes() {
            return Err(mismatch("tokens of the text"));
        }
        let left = number(POSITIONS_OFFSET as usize);
        if length != size_bytes(vocabulary, left.into()) {
            return Err(damaged("its length is wrong"));
        }
        let powers = (0..=u16::MAX).map(|steps| (-f64::from(steps) * STEP_NATS).exp() as f32);
        Ok(Self {
            path: path.to_owned(),
            file,
            vocabulary: vocabulary as usize,
            left,
            row: vec![0; 4 + 2 * vocabulary as usize],
            powers: powers.collect(),
        })
    }

    /// Compares the next stored distribution with that of `logits`.
    ///
    /// `KL(P ‖ Q) = Σ p (ln p − ln q)` (Kullback and Leibler, "On information and sufficiency",
    /// 1951), P renormalised after its rounding.
    ///
    /// # Errors
    /// No distribution is left, or reading fails.
    pub fn compare_next(&mut self, logits: &[f32]) -> Result<Compared, DistributionsError> {
        let damaged = |why| DistributionsError::Damaged { path: self.path.clone(), why };
        if self.left == 0 {
            return Err(damaged("it has fewer positions than the text"));
        }
        if logits.len() != self.vocabulary {
            return Err(damaged("its vocabulary is not the model's"));
        }
        self.left -= 1;
        self.file.read_exact(&mut self.row).map_err(|source| read_error(&self.path, source))?;
        let top = f64::from(f32::from_le_bytes(self.row[..4].try_into().expect("4 bytes")));
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (mut theirs, mut ours, mut cross) = (0.0_f64, 0.0_f64, 0.0_f64);
        let mut reference_first = None;
        for (index, (steps, logit)) in self.row[4..].chunks_exact(2).zip(logits).enumerate() {
            let steps = u16::from_le_bytes([steps[0], steps[1]]);
            if steps == 0 && reference_first.is_none() {
                reference_first = Some(index);
            }
            let weight = f64::from(self.powers[usize::from(steps)]);
            let below = logit - max;
            theirs += weight;
            ours += f64::from(below.exp());
            // Both logarithms relative to their own maximum; the constants follow below.
            cross += weight * (-f64::from(steps) * STEP_NATS - f64::from(below));
        }
        if !top.is_finite() || !ours.is_finite() {
            return Err(damaged("it, or the model, has logits that are not numbers"));
        }
        let divergence = cross / theirs + ours.ln() - theirs.ln();
        Ok(Compared {
            normaliser: f64::from(max) + ours.ln(),
            divergence: divergence.max(0.0),
            same_first: reference_first == Some(first(logits)),
        })
    }
}

fn write_error(path: &Path, source: io::Error) -> DistributionsError {
    DistributionsError::Io { operation: "write", path: path.to_owned(), source }
}

fn read_error(path: &Path, source: io::Error) -> DistributionsError {
    DistributionsError::Io { operation: "read", path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_divergence(reference: &[f32], candidate: &[f32], wanted: f64) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let tokens = Digest::of(b"tokens");
        let mut writer = Writer::create(file.path(), reference.len() as u32, tokens).unwrap();
        writer.push(reference, log_sum_exp(reference)).unwrap();
        writer.finish().unwrap();
        let mut reader = Reader::open(file.path(), reference.len() as u32, tokens).unwrap();
        let compared = reader.compare_next(candidate).unwrap();
        // Rounding moves each log-probability by half a step at most.
        assert!((compared.divergence - wanted).abs() < STEP_NATS, "{compared:?} is not {wanted}");
        assert_eq!(compared.same_first, first(reference) == first(candidate));
        assert!((compared.normaliser - log_sum_exp(candidate)).abs() < 1e-9);
        assert!(reader.compare_next(candidate).is_err(), "no second position was written");
    }

    #[test]
    fn divergence_is_that_of_the_definition() {
        let exact = |p: &[f32], q: &[f32]| -> f64 {
            let (zp, zq) = (log_sum_exp(p), log_sum_exp(q));
            let term = |(p, q): (&f32, &f32)| {
                let (p, q) = (f64::from(*p) - zp, f64::from(*q) - zq);
                p.exp() * (p - q)
            };
            p.iter().zip(q).map(term).sum()
        };
        let one = [2.0, 1.0, -3.0, 0.5];
        let other = [1.0, 2.5, -1.0, 0.0];
        check_divergence(&one, &one, 0.0);
        check_divergence(&one, &other, exact(&one, &other));
        // Shifting all logits changes nothing, however far.
        let shifted = one.map(|logit| logit + 500.0);
        check_divergence(&shifted, &other, exact(&one, &other));
        // A token far below the kept range.
        check_divergence(&[10.0, -60.0], &[10.0, 9.0], exact(&[10.0, -60.0], &[10.0, 9.0]));
    }

    #[test]
    fn damaged_and_foreign_files_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let tokens = Digest::of(b"tokens");
        let mut writer = Writer::create(file.path(), 3, tokens).unwrap();
        writer.push(&[1.0, 2.0, 3.0], log_sum_exp(&[1.0, 2.0, 3.0])).unwrap();
        writer.finish().unwrap();
        let good = std::fs::read(file.path()).unwrap();
        assert_eq!(good.len() as u64, size_bytes(3, 1));
        let error = |bytes: &[u8], vocabulary, tokens| {
            std::fs::write(file.path(), bytes).unwrap();
            Reader::open(file.path(), vocabulary, tokens).err().map(|error| error.to_string())
        };
        assert_eq!(error(&good, 3, tokens), None);
        for cut in 0..good.len() {
            assert!(error(&good[..cut], 3, tokens).is_some(), "cut at {cut}");
        }
        assert!(error(&good, 4, tokens).unwrap().contains("vocabulary"));
        assert!(error(&good, 3, Digest::of(b"others")).unwrap().contains("tokens"));
    }
}
