//! The order in which rows are trained on: a permutation of the rows for each epoch, drawn from the seed and the epoch's
//! number alone, so that a position in the data is two numbers.
//!
//! Rows of a pass lie end to end, without padding, so that nothing is gained by putting rows of like length together: a pass costs
//! what its tokens cost. What a pass may hold is counted in rows, or in tokens.

use serde::{Deserialize, Serialize};

use super::dataset::Row;
use crate::backend::dropout::philox;
use crate::models::decoder::Batch;

/// How far the data has been read: rows taken from an epoch's permutation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Epochs completed.
    pub epoch: u64,
    /// Rows taken in this epoch.
    pub row: usize,
}

/// What a pass holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Batching {
    /// So many rows.
    Rows(usize),
    /// As many whole rows as have no more tokens than this together, and at least one.
    Tokens(usize),
}

impl Batching {
    /// How many of the next rows, of these lengths, a pass takes.
    fn take(self, lengths: impl Iterator<Item = usize>) -> usize {
        match self {
            Self::Rows(rows) => lengths.take(rows).count(),
            Self::Tokens(budget) => {
                let mut tokens = 0;
                let fits = lengths.take_while(|length| {
                    tokens += length;
                    tokens <= budget
                });
                fits.count().max(1)
            }
        }
    }
}

/// Gives batches of rows, epoch after epoch.
pub struct Sampler {
    lengths: Vec<usize>,
    batching: Batching,
    seed: u64,
    position: Position,
    order: Vec<u32>,
}

impl Sampler {
    /// A sampler over rows of these lengths that goes on from `position`.
    pub fn new(lengths: Vec<usize>, batching: Batching, seed: u64, position: Position) -> Self {
        let order = permutation(lengths.len(), seed, position.epoch);
        Self { lengths, batching, seed, position, order }
    }

    /// The indices of the next pass's rows, fewer at the end of an epoch.
    pub fn next_pass(&mut self) -> Vec<usize> {
        if self.position.row >= self.lengths.len() {
            self.position = Position { epoch: self.position.epoch + 1, row: 0 };
            self.order = permutation(self.lengths.len(), self.seed, self.position.epoch);
        }
        let rest = &self.order[self.position.row..];
        let count = self.batching.take(rest.iter().map(|&row| self.lengths[row as usize])).min(rest.len());
        self.position.row += count;
        rest[..count].iter().map(|&row| row as usize).collect()
    }

    /// Where the next batch starts.
    pub fn position(&self) -> Position {
        self.position
    }
}

/// The passes of so many epochs, the last begun one to its share.
pub fn passes(lengths: &[usize], batching: Batching, seed: u64, epochs: f64) -> usize {
    let mut sampler = Sampler::new(lengths.to_vec(), batching, seed, Position::default());
    let mut passes = 0;
    loop {
        sampler.next_pass();
        passes += 1;
        let Position { epoch, row } = sampler.position();
        if epoch as f64 + row as f64 / lengths.len().max(1) as f64 >= epochs {
            return passes;
        }
    }
}

/// Lays rows end to end.
pub fn collate<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Batch {
    let mut batch = Batch::default();
    for row in rows {
        batch.tokens.extend_from_slice(&row.tokens);
        batch.targets.extend_from_slice(&row.targets);
        batch.lengths.push(row.tokens.len());
    }
    batch
}

/// Fisher-Yates with words of Philox; the counter's last word keeps it apart from the dropout masks of the same seed.
fn permutation(rows: usize, seed: u64, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..rows as u32).collect();
    for last in (1..rows).rev() {
        let words =
            philox([last as u32, epoch as u32, (epoch >> 32) as u32, u32::MAX], [seed as u32, (seed >> 32) as u32]);
        let word = (words[1] as u64) << 32 | words[0] as u64;
        order.swap(last, ((word as u128 * (last as u128 + 1)) >> 64) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_once_an_epoch_in_an_order_of_its_own() {
        let mut sampler = Sampler::new(vec![1; 10], Batching::Rows(4), 7, Position::default());
        let mut epochs = Vec::new();
        for _ in 0..2 {
            let mut seen = Vec::new();
            for expected in [4, 4, 2] {
                let rows = sampler.next_pass();
                assert_eq!(rows.len(), expected);
                seen.extend(rows);
            }
            let mut sorted = seen.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
            epochs.push(seen);
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_ne!(permutation(10, 7, 0), permutation(10, 8, 0));
    }

    #[test]
    fn a_position_continues_the_order() {
        let lengths: Vec<usize> = (0..11).map(|i| 1 + i * 5 % 7).collect();
        for batching in [Batching::Rows(3), Batching::Tokens(9)] {
            let sampler = |position| Sampler::new(lengths.clone(), batching, 3, position);
            let mut whole = sampler(Position::default());
            let taken: Vec<_> = (0..7).map(|_| whole.next_pass()).collect();
            let mut first = sampler(Position::default());
            first.next_pass();
            first.next_pass();
            let mut second = sampler(first.position());
            let rest: Vec<_> = (0..5).map(|_| second.next_pass()).collect();
            assert_eq!(rest, taken[2..]);
        }
    }

    #[test]
    fn a_packed_pass_holds_what_fits() {
        let lengths = vec![5, 3, 9, 2, 2, 7, 1, 30, 4];
        let mut sampler = Sampler::new(lengths.clone(), Batching::Tokens(10), 1, Position::default());
        let mut seen = Vec::new();
        let mut before = usize::MAX;
        while seen.len() < lengths.len() {
            let rows = sampler.next_pass();
            let tokens: usize = rows.iter().map(|&row| lengths[row]).sum();
            assert!(tokens <= 10 || rows.len() == 1, "{rows:?}");
            // A pass ends only where the next row does not fit.
            assert!(before == usize::MAX || before + lengths[rows[0]] > 10, "{before} and {rows:?}");
            before = tokens;
            seen.extend(rows);
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
    }

    #[test]
    fn passes_of_epochs() {
        let lengths = vec![4; 10];
        assert_eq!(passes(&lengths, Batching::Tokens(12), 0, 1.0), 4);
        assert_eq!(passes(&lengths, Batching::Tokens(12), 0, 2.0), 8);
        assert_eq!(passes(&lengths, Batching::Tokens(12), 0, 0.5), 2);
    }
}
