//! How A and B of a new adapter begin.
//!
//! The default and `gaussian` draw A and leave B zero. PiSSA (Meng et al., 2024) takes the r largest singular triplets of W,
//! `s (A B)ᵀ = U S Vᵀ`, and OLoRA (Büyükakyüz, 2024) the first r columns of Q and rows of R of `W = Q R`; both then train on what is left,
//! `W - s (A B)ᵀ`, so that the model is what it was before the first step. The forms are PEFT's (`tuners/lora/layer.py`).

use candle_core::{DType, Device, Tensor};
use nalgebra::DMatrix;

use super::lora::{kaiming_uniform, normal};
use super::options::{InitLoraWeights, TrainerOptions};
use crate::Result;
use crate::backend::custom_ops::Weight;

/// Singular vectors beyond r that PiSSA's search carries along, and its passes over W: what it misses of the largest singular values is
/// then small in any spectrum that falls at all (Halko, Martinsson & Tropp, 2011).
const BEYOND: usize = 16;
const PASSES: usize = 8;

/// `(A, B)` `[k, r]` and `[r, n]`, f32 on the CPU, of the `number`th adapter of a run, on a weight `[n, k]`.
///
/// # Errors
/// A device that has no room for W in f32.
pub fn adapter(weight: Weight, options: &TrainerOptions, number: u64) -> Result<(Tensor, Tensor)> {
    let &[n, k] = weight.dims() else { unreachable!("linears have weights [n, k]") };
    let rank = options.rank;
    // Each adapter draws from a seed of its own, spread by the golden ratio's bits.
    let seed = options.seed.wrapping_add((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let drawn = |values: Vec<f32>| {
        let a = Tensor::from_vec(values, (k, rank), &Device::Cpu)?;
        Ok((a, Tensor::zeros((rank, n), DType::F32, &Device::Cpu)?))
    };
    let wide = || Ok::<_, crate::Error>(weight.to_dense(DType::F32)?.detach().to_dtype(DType::F32)?);
    match options.init_lora_weights {
        InitLoraWeights::Default => drawn(kaiming_uniform(k, rank, seed)),
        InitLoraWeights::Gaussian => drawn(normal(k * rank, 1.0 / rank as f64, seed)),
        InitLoraWeights::Pissa => largest(&wide()?, rank, options.scaling(), seed),
        InitLoraWeights::Olora => orthonormal(&wide()?, rank),
    }
}

/// `A = V √(S / s)`, `B = √(S / s) Uᵀ` of the r largest singular values of W, by subspace iteration.
fn largest(w: &Tensor, rank: usize, scaling: f64, seed: u64) -> Result<(Tensor, Tensor)> {
    let (n, k) = w.dims2()?;
    let width = (rank + BEYOND).min(n).min(k);
    let start = Tensor::from_vec(normal(k * width, 1.0, seed), (k, width), &Device::Cpu)?.to_device(w.device())?;
    let mut columns = orthonormalized(&w.matmul(&start)?)?.0;
    let mut rows;
    let mut pass = 1;
    loop {
        // Wᵀ Q = P R, so that W is Q Rᵀ Pᵀ on the subspace.
        let (p, r) = orthonormalized(&w.t()?.matmul(&columns)?)?;
        rows = (p, r);
        if pass == PASSES {
            break;
        }
        columns = orthonormalized(&w.matmul(&rows.0)?)?.0;
        pass += 1;
    }
    let (p, r) = rows;
    let svd = r.transpose().svd(true, true);
    let (Some(u), Some(v_t)) = (svd.u, svd.v_t) else { unreachable!("both were asked for") };
    let roots: Vec<f64> = svd.singular_values.iter().map(|value| (value.max(0.0) / scaling).sqrt()).collect();
    // nalgebra sorts the singular values, the largest first.
    let a = scaled(&p, |row, column| v_t[(column, row)] * roots[column], rank)?;
    let b = scaled(&columns, |row, column| u[(row, column)] * roots[column], rank)?.t()?.contiguous()?;
    Ok((a, b))
}

/// `basis M` on the CPU, for an `M` `[width, rank]` given by its entries.
fn scaled(basis: &Tensor, entry: impl Fn(usize, usize) -> f64, rank: usize) -> Result<Tensor> {
    let width = basis.dims()[1];
    let entries = (0..width * rank).map(|at| entry(at / rank, at % rank) as f32).collect::<Vec<_>>();
    let factor = Tensor::from_vec(entries, (width, rank), &Device::Cpu)?;
    Ok(basis.to_device(&Device::Cpu)?.matmul(&factor)?)
}

/// `A = (first r rows of R)ᵀ`, `B = (first r columns of Q)ᵀ` of `W = Q R`, which the first r columns of W determine.
fn orthonormal(w: &Tensor, rank: usize) -> Result<(Tensor, Tensor)> {
    let (q, _) = orthonormalized(&w.narrow(1, 0, rank)?)?;
    let a = w.t()?.matmul(&q)?;
    Ok((a.to_device(&Device::Cpu)?.contiguous()?, q.to_device(&Device::Cpu)?.t()?.contiguous()?))
}

/// Q where the matrix is, and R, of a tall matrix, computed in f64.
fn orthonormalized(tall: &Tensor) -> Result<(Tensor, DMatrix<f64>)> {
    let (rows, columns) = tall.dims2()?;
    let values: Vec<f32> = tall.to_device(&Device::Cpu)?.contiguous()?.flatten_all()?.to_vec1()?;
    let qr = DMatrix::from_row_iterator(rows, columns, values.into_iter().map(f64::from)).qr();
    let q = qr.q();
    let values: Vec<f32> = q.transpose().iter().map(|&value| value as f32).collect();
    Ok((Tensor::from_vec(values, (rows, columns), &Device::Cpu)?.to_device(tall.device())?, qr.r()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(n: usize, k: usize) -> Tensor {
        Tensor::from_vec(normal(n * k, 1.0, 5), (n, k), &Device::Cpu).unwrap()
    }

    fn norm(tensor: &Tensor) -> f64 {
        f64::from(tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
    }

    fn options(init: InitLoraWeights, rank: usize) -> TrainerOptions {
        TrainerOptions { init_lora_weights: init, rank, alpha: 6.0, ..Default::default() }
    }

    /// s (A B)ᵀ.
    fn product(a: &Tensor, b: &Tensor, options: &TrainerOptions) -> Tensor {
        (a.matmul(b).unwrap().t().unwrap() * options.scaling()).unwrap()
    }

    #[test]
    fn pissa_takes_the_largest_singular_values() {
        for (n, k) in [(40, 60), (60, 40), (12, 70), (5, 9)] {
            let (w, options) = (random(n, k), options(InitLoraWeights::Pissa, 3));
            let (a, b) = adapter(Weight::Dense(&w), &options, 0).unwrap();
            assert_eq!((a.dims(), b.dims()), ([k, 3].as_slice(), [3, n].as_slice()));
            let values: Vec<f32> = w.flatten_all().unwrap().to_vec1().unwrap();
            let all = DMatrix::from_row_iterator(n, k, values.into_iter().map(f64::from)).singular_values();
            let left = norm(&(&w - product(&a, &b, &options)).unwrap());
            let least = all.iter().skip(3).map(|value| value * value).sum::<f64>().sqrt();
            assert!((left / least - 1.0).abs() < 1e-3, "[{n}, {k}]: {left} is left where {least} can be");
            // A and B share the root of each singular value.
            let lengths = |t: &Tensor, dim: usize| t.sqr().unwrap().sum(dim).unwrap().to_vec1::<f32>().unwrap();
            for (i, (a, b)) in lengths(&a, 0).into_iter().zip(lengths(&b, 1)).enumerate() {
                let wanted = all[i] / options.scaling();
                assert!((f64::from(a) / wanted - 1.0).abs() < 2e-2 && (a / b - 1.0).abs() < 1e-3, "{a} {b} {wanted}");
            }
        }
    }

    #[test]
    fn olora_takes_the_first_columns_and_rows() {
        let (w, options) = (random(30, 20), options(InitLoraWeights::Olora, 4));
        let (a, b) = adapter(Weight::Dense(&w), &options, 0).unwrap();
        // Q has orthonormal columns, and Q R is W in the first r columns.
        let gram: Vec<Vec<f32>> = b.matmul(&b.t().unwrap()).unwrap().to_vec2().unwrap();
        for (i, row) in gram.iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                assert!((value - f32::from(u8::from(i == j))).abs() < 1e-5);
            }
        }
        let first = |tensor: &Tensor| tensor.narrow(1, 0, 4).unwrap();
        let qr = a.matmul(&b).unwrap().t().unwrap().contiguous().unwrap();
        assert!(norm(&(first(&w) - first(&qr)).unwrap()) < 1e-4 * norm(&w));
    }
}
