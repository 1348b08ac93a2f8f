//! Embedding look-up and its gradient on the CPU.

use super::Element;

/// Copies row `ids[t]` of `table` to row `t` of `y`; rows of length `n`.
pub fn forward<T: Element>(table: &[T], ids: &[u32], n: usize, y: &mut [T]) {
    for (y, &id) in y.chunks_exact_mut(n).zip(ids) {
        y.copy_from_slice(&table[id as usize * n..][..n]);
    }
}

/// `dtable[ids[t]] += g[t]`, in the order of the tokens.
pub fn backward<T: Element>(ids: &[u32], g: &[T], n: usize, dtable: &mut [f32]) {
    for (g, &id) in g.chunks_exact(n).zip(ids) {
        for (to, from) in dtable[id as usize * n..][..n].iter_mut().zip(g) {
            *to += from.widen();
        }
    }
}
