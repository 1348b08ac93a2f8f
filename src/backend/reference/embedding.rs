//! Embedding look-up in f64; rows of length `n`.

/// `y[t] = table[ids[t]]`.
pub fn forward(table: &[f64], ids: &[u32], n: usize) -> Vec<f64> {
    ids.iter().flat_map(|&id| table[id as usize * n..][..n].iter().copied()).collect()
}

/// `dtable[ids[t]] += g[t]` from zero, for a table of `vocab` rows.
pub fn backward(ids: &[u32], g: &[f64], n: usize, vocab: usize) -> Vec<f64> {
    let mut dtable = vec![0.0; vocab * n];
    for (token, &id) in ids.iter().enumerate() {
        for i in 0..n {
            dtable[id as usize * n + i] += g[token * n + i];
        }
    }
    dtable
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let (table, g, ids) = (values(12, 1), values(12, 2), [3, 0, 3, 1]);
        let dtable = backward(&ids, &g, 3, 4);
        assert_gradient("dtable", &table, &dtable, |table| weighted_sum(&forward(table, &ids, 3), &g));
    }
}
