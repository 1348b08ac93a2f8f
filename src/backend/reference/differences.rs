//! What judges the references' own backward: central differences.

use crate::backend::dropout::philox;

/// Values in [-1, 1) for a test, drawn by Philox.
pub fn values(count: usize, seed: u32) -> Vec<f64> {
    let word = |i: u32| philox([i / 4, 0, 0, 0], [seed, 0])[(i % 4) as usize];
    (0..count as u32).map(|i| word(i) as f64 / 2_147_483_648.0 - 1.0).collect()
}

/// `Σ y · g`, whose gradient in y is g.
pub fn weighted_sum(y: &[f64], g: &[f64]) -> f64 {
    y.iter().zip(g).map(|(y, g)| y * g).sum()
}

/// Fails unless `gradient` is that of `loss` at `at`: `(loss(x + ε) - loss(x - ε)) / 2ε` for each element, ε = 1e-5, to 1e-8.
#[track_caller]
pub fn assert_gradient(name: &str, at: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    assert_eq!(at.len(), gradient.len(), "{name}: number of values");
    assert!(gradient.iter().any(|g| g.abs() > 1e-3), "{name}: a gradient of zeros proves nothing");
    for i in 0..at.len() {
        let moved = |by: f64| {
            let mut moved = at.to_vec();
            moved[i] += by;
            loss(&moved)
        };
        let slope = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        let error = (slope - gradient[i]).abs();
        assert!(error < 1e-8, "{name}[{i}] is {}, but the differences give {slope}", gradient[i]);
    }
}
