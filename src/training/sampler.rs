//! The order in which rows are trained on: a permutation of the rows for each epoch, drawn from the seed and the epoch's
//! number alone, so that a position in the data is two numbers.

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

/// Gives batches of rows, epoch after epoch.
pub struct Sampler {
    rows: usize,
    seed: u64,
    position: Position,
    order: Vec<u32>,
}

impl Sampler {
    /// A sampler over `rows` rows that goes on from `position`.
    pub fn new(rows: usize, seed: u64, position: Position) -> Self {
        Self { rows, seed, position, order: permutation(rows, seed, position.epoch) }
    }

    /// The indices of the next `count` rows, fewer at the end of an epoch.
    pub fn next(&mut self, count: usize) -> Vec<usize> {
        if self.position.row >= self.rows {
            self.position = Position { epoch: self.position.epoch + 1, row: 0 };
            self.order = permutation(self.rows, self.seed, self.position.epoch);
        }
        let start = self.position.row;
        let end = (start + count).min(self.rows);
        self.position.row = end;
        self.order[start..end].iter().map(|&row| row as usize).collect()
    }

    /// Where the next batch starts.
    pub fn position(&self) -> Position {
        self.position
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
        let mut sampler = Sampler::new(10, 7, Position::default());
        let mut epochs = Vec::new();
        for _ in 0..2 {
            let mut seen = Vec::new();
            for expected in [4, 4, 2] {
                let rows = sampler.next(4);
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
        let mut whole = Sampler::new(11, 3, Position::default());
        let mut taken = Vec::new();
        for _ in 0..5 {
            taken.push(whole.next(3));
        }
        let mut first = Sampler::new(11, 3, Position::default());
        first.next(3);
        first.next(3);
        let mut second = Sampler::new(11, 3, first.position());
        let rest: Vec<_> = (0..3).map(|_| second.next(3)).collect();
        assert_eq!(rest, taken[2..]);
    }
}
