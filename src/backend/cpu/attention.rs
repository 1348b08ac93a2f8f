//! Causal attention on the CPU, a tile of queries against a tile of keys at a time (Dao et al., FlashAttention, 2022).
//!
//! The query heads of one key head are taken together: a tile has `rows = queries · group` rows, `group = Hq / Hkv`, so that
//! keys and values are read once for all of them. The products of tiles are `gemm`'s, the softmax between them is ours;
//! what exists of the scores is a tile a task. Forward keeps a running maximum and sum for each row and rescales what it
//! has when the maximum grows. Tasks are (sequence, key head, tile of queries) in forward and (sequence, key head, tile of
//! keys) in backward, where dk and dv of a tile are sums in the order of the queries, and dq is added up over tiles of
//! keys, `WAVE` at a time, in their order.

use rayon::prelude::*;

use super::exp::{exp, exp_shifted, max};
use super::floats::Floats;
use super::gemm::{Matrix, MatrixMut, gemm_on_this_thread as gemm};
use super::simd;
use crate::backend::custom_ops::attention::{AttentionArgs, Sequence};

/// Rows of a tile of scores: queries times the heads that share a key head.
const ROWS: usize = 96;
/// Keys of a tile. A tile of scores takes 48 KiB.
const KEYS: usize = 128;
/// Tiles of keys whose shares of dq are held at once.
pub const WAVE: usize = 8;

/// Heads and head size.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Heads of `q`.
    pub q_heads: usize,
    /// Heads of `k` and `v`.
    pub kv_heads: usize,
    /// Head size.
    pub dim: usize,
}

impl Sizes {
    fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Queries of a tile.
    fn queries(&self) -> usize {
        (ROWS / self.group()).max(1)
    }

    /// Where the group of `head` lies in row `row` of q, o and their gradients.
    fn group_at(&self, row: usize, head: usize) -> usize {
        (row * self.q_heads + head * self.group()) * self.dim
    }

    /// As [`Self::group_at`], in lse and δ.
    fn heads_at(&self, row: usize, head: usize) -> usize {
        row * self.q_heads + head * self.group()
    }
}

/// Part of a sequence for one key head: queries or keys `start..end`, counted from the sequence's own start.
#[derive(Debug, Clone, Copy)]
struct Task {
    sequence: Sequence,
    head: usize,
    start: usize,
    end: usize,
}

/// `(o, lse)`.
pub fn forward(q: Floats, k: Floats, v: Floats, sizes: Sizes, args: AttentionArgs) -> (Vec<f32>, Vec<f32>) {
    let Sizes { dim, .. } = sizes;
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![f32::NEG_INFINITY; q.len() / dim]);
    let tasks = tasks(args.sequences, sizes, sizes.queries(), |sequence| sequence.q_len);
    let tiles: Vec<_> = tasks.par_iter().map(|task| forward_tile(task, &q, &k, &v, sizes, args)).collect();
    let width = sizes.group() * dim;
    for (task, (tile, tile_lse)) in tasks.iter().zip(&tiles) {
        let rows = task.sequence.q_start + task.start..task.sequence.q_start + task.end;
        for (row, (from, from_lse)) in rows.zip(tile.chunks_exact(width).zip(tile_lse.chunks_exact(sizes.group()))) {
            o[sizes.group_at(row, task.head)..][..width].copy_from_slice(from);
            lse[sizes.heads_at(row, task.head)..][..sizes.group()].copy_from_slice(from_lse);
        }
    }
    (o, lse)
}

/// `(dq, dk, dv)`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    q: Floats,
    k: Floats,
    v: Floats,
    o: Floats,
    lse: &[f32],
    g: Floats,
    sizes: Sizes,
    args: AttentionArgs,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let Sizes { q_heads, kv_heads, dim } = sizes;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
    let delta = deltas(&o, &g, dim);
    let tasks = tasks(args.sequences, sizes, KEYS, |sequence| sequence.k_len);
    for wave in tasks.chunks(WAVE * kv_heads) {
        let tiles: Vec<KeyTile> =
            wave.par_iter().map(|task| backward_tile(task, [&q, &k, &v, &g], lse, &delta, sizes, args)).collect();
        for (task, tile) in wave.iter().zip(&tiles) {
            let rows = tile.dk.chunks_exact(dim).zip(tile.dv.chunks_exact(dim)).enumerate();
            for (j, (from_dk, from_dv)) in rows {
                let at = ((task.sequence.k_start + task.start + j) * kv_heads + task.head) * dim;
                add(&mut dk[at..at + dim], from_dk);
                add(&mut dv[at..at + dim], from_dv);
            }
        }
        let width = sizes.group() * dim;
        dq.par_chunks_mut(q_heads * dim).enumerate().for_each(|(row, dq)| {
            for (task, tile) in wave.iter().zip(&tiles) {
                let seen = row.checked_sub(task.sequence.q_start + tile.first_query);
                if let Some(from) = seen.and_then(|index| tile.dq.get(index * width..(index + 1) * width)) {
                    add(&mut dq[task.head * width..][..width], from);
                }
            }
        });
    }
    (dq, dk, dv)
}

fn tasks(sequences: &[Sequence], sizes: Sizes, step: usize, len: impl Fn(&Sequence) -> usize) -> Vec<Task> {
    let mut tasks = Vec::new();
    for &sequence in sequences {
        let len = len(&sequence);
        for start in (0..len).step_by(step) {
            let end = (start + step).min(len);
            tasks.extend((0..sizes.kv_heads).map(|head| Task { sequence, head, start, end }));
        }
    }
    tasks
}

/// `(o, lse)` of a tile of queries, `[queries, group, dim]` and `[queries, group]`.
fn forward_tile(
    task: &Task,
    q: &Floats,
    k: &Floats,
    v: &Floats,
    sizes: Sizes,
    args: AttentionArgs,
) -> (Vec<f32>, Vec<f32>) {
    let Task { sequence, start, end, .. } = *task;
    let (group, dim) = (sizes.group(), sizes.dim);
    let rows = (end - start) * group;
    let q = queries(q, task, start..end, sizes);
    let (mut o, mut lse) = (vec![0.0; rows * dim], vec![0.0; rows]);
    let (mut largest, mut sums) = (vec![f32::NEG_INFINITY; rows], vec![0.0_f32; rows]);
    let (first_key, last_key) = (sequence.keys(start, args.window).start, sequence.keys(end - 1, args.window).end);
    let (mut scores, mut wide_k, mut wide_v) = (vec![0.0; rows * KEYS], Vec::new(), Vec::new());
    for key in (first_key..last_key).step_by(KEYS) {
        let keys = key..(key + KEYS).min(last_key);
        let count = keys.len();
        let k = key_tile(k, task, &keys, sizes, &mut wide_k);
        let v = key_tile(v, task, &keys, sizes, &mut wide_v);
        let scores = &mut scores[..rows * count];
        gemm(MatrixMut::new(scores, rows, count), 0.0, args.scale, Matrix::new(&q, rows, dim), k.t());
        simd(
            #[inline(always)]
            || {
                for (row, scores) in scores.chunks_exact_mut(count).enumerate() {
                    let seen = visible(sequence, start + row / group, &keys, args.window);
                    scores[..seen.start].fill(0.0);
                    scores[seen.end..].fill(0.0);
                    if seen.is_empty() {
                        continue;
                    }
                    let scores = &mut scores[seen];
                    let old = largest[row];
                    let new = old.max(max(scores));
                    let shrink = exp(old - new);
                    sums[row] = sums[row] * shrink + exp_shifted(scores, new);
                    largest[row] = new;
                    if shrink != 1.0 {
                        o[row * dim..][..dim].iter_mut().for_each(|o| *o *= shrink);
                    }
                }
            },
        );
        gemm(MatrixMut::new(&mut o, rows, dim), 1.0, 1.0, Matrix::new(scores, rows, count), v);
    }
    for (row, o) in o.chunks_exact_mut(dim).enumerate() {
        let inverse = 1.0 / sums[row];
        o.iter_mut().for_each(|o| *o *= inverse);
        lse[row] = largest[row] + sums[row].ln();
    }
    (o, lse)
}

/// The gradients that come through a tile of keys.
struct KeyTile {
    /// `[keys, dim]`
    dk: Vec<f32>,
    /// `[keys, dim]`
    dv: Vec<f32>,
    /// The first query that sees a key of the tile.
    first_query: usize,
    /// The share of dq, `[queries that see a key of the tile, group, dim]`.
    dq: Vec<f32>,
}

fn backward_tile(
    task: &Task,
    [q, k, v, g]: [&Floats; 4],
    lse: &[f32],
    delta: &[f32],
    sizes: Sizes,
    args: AttentionArgs,
) -> KeyTile {
    let Task { sequence, head, start, end } = *task;
    let (group, dim, count, keys) = (sizes.group(), sizes.dim, end - start, start..end);
    let (mut wide_k, mut wide_v) = (Vec::new(), Vec::new());
    let k = key_tile(k, task, &keys, sizes, &mut wide_k);
    let v = key_tile(v, task, &keys, sizes, &mut wide_v);
    // Query i has the position `before + i`; it sees keys up to that, and with a window none older.
    let before = sequence.k_len - sequence.q_len;
    let first_query = start.saturating_sub(before).min(sequence.q_len);
    let beyond = args.window.map_or(sequence.q_len, |window| (end - 1).saturating_add(window).saturating_sub(before));
    let beyond = beyond.clamp(first_query, sequence.q_len);
    let (mut dk, mut dv) = (vec![0.0; count * dim], vec![0.0; count * dim]);
    let mut dq = vec![0.0; (beyond - first_query) * group * dim];
    let (mut p, mut ds) = (vec![0.0; sizes.queries() * group * count], vec![0.0; sizes.queries() * group * count]);
    for tile in (first_query..beyond).step_by(sizes.queries()) {
        let tile = tile..(tile + sizes.queries()).min(beyond);
        let rows = tile.len() * group;
        let (q, g) = (queries(q, task, tile.clone(), sizes), queries(g, task, tile.clone(), sizes));
        let (q, g) = (Matrix::new(&q, rows, dim), Matrix::new(&g, rows, dim));
        let (p, ds) = (&mut p[..rows * count], &mut ds[..rows * count]);
        gemm(MatrixMut::new(p, rows, count), 0.0, args.scale, q, k.t());
        gemm(MatrixMut::new(ds, rows, count), 0.0, 1.0, g, v.t());
        simd(
            #[inline(always)]
            || {
                for (row, (p, ds)) in p.chunks_exact_mut(count).zip(ds.chunks_exact_mut(count)).enumerate() {
                    let query = tile.start + row / group;
                    let at = sizes.heads_at(sequence.q_start + query, head) + row % group;
                    let seen = visible(sequence, query, &keys, args.window);
                    for outside in [0..seen.start, seen.end..count] {
                        p[outside.clone()].fill(0.0);
                        ds[outside].fill(0.0);
                    }
                    let (lse, delta) = (lse[at], delta[at]);
                    for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen]) {
                        *p = exp(*p - lse);
                        *ds = *p * (*ds - delta);
                    }
                }
            },
        );
        let (p, ds) = (Matrix::new(p, rows, count), Matrix::new(ds, rows, count));
        gemm(MatrixMut::new(&mut dv, count, dim), 1.0, 1.0, p.t(), g);
        gemm(MatrixMut::new(&mut dk, count, dim), 1.0, args.scale, ds.t(), q);
        let dq = &mut dq[(tile.start - first_query) * group * dim..];
        gemm(MatrixMut::new(dq, rows, dim), 0.0, args.scale, ds, k);
    }
    KeyTile { dk, dv, first_query, dq }
}

/// The part of the tile `keys` that a query sees, counted from the tile's start.
#[inline(always)]
fn visible(
    sequence: Sequence,
    query: usize,
    keys: &std::ops::Range<usize>,
    window: Option<usize>,
) -> std::ops::Range<usize> {
    let seen = sequence.keys(query, window);
    let end = seen.end.clamp(keys.start, keys.end) - keys.start;
    (seen.start.clamp(keys.start, keys.end) - keys.start).min(end)..end
}

/// Rows of q or g for the heads of one key head, `[queries, group, dim]`.
fn queries(q: &Floats, task: &Task, range: std::ops::Range<usize>, sizes: Sizes) -> Vec<f32> {
    let width = sizes.group() * sizes.dim;
    let mut rows = vec![0.0; range.len() * width];
    for (query, row) in range.zip(rows.chunks_exact_mut(width)) {
        q.widen_into(sizes.group_at(task.sequence.q_start + query, task.head), row);
    }
    rows
}

/// Keys or values of one head, `[keys, dim]`: where they lie when they are f32, else widened into `wide`.
fn key_tile<'a>(
    k: &Floats<'a>,
    task: &Task,
    keys: &std::ops::Range<usize>,
    sizes: Sizes,
    wide: &'a mut Vec<f32>,
) -> Matrix<'a> {
    let Sizes { kv_heads, dim, .. } = sizes;
    let at = |key: usize| ((task.sequence.k_start + key) * kv_heads + task.head) * dim;
    if let Some(k) = k.as_f32() {
        return Matrix::with_row_stride(&k[at(keys.start)..], keys.len(), dim, kv_heads * dim);
    }
    wide.resize(keys.len() * dim, 0.0);
    for (key, row) in keys.clone().zip(wide.chunks_exact_mut(dim)) {
        k.widen_into(at(key), row);
    }
    Matrix::new(wide, keys.len(), dim)
}

/// `δ = rowsum(g ∘ o)` of every row of length `dim`.
fn deltas(o: &Floats, g: &Floats, dim: usize) -> Vec<f32> {
    // Rows that one task takes.
    const BLOCK: usize = 256;
    let mut delta = vec![0.0; o.len() / dim];
    delta.par_chunks_mut(BLOCK).enumerate().for_each(|(block, delta)| {
        let (start, len) = (block * BLOCK * dim, delta.len() * dim);
        let (o, g) = (o.range(start, len), g.range(start, len));
        simd(
            #[inline(always)]
            || {
                for ((delta, o), g) in delta.iter_mut().zip(o.chunks_exact(dim)).zip(g.chunks_exact(dim)) {
                    *delta = o.iter().zip(g).map(|(o, g)| o * g).sum();
                }
            },
        )
    });
    delta
}

#[inline(always)]
fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}
