//! What rounding to codes does to an adapter that is merged.

use candle_core::{DType, Tensor};

use crate::Result;

/// How far the written weights are from having the adapter's delta Δ on them: `‖(R − Q) − Δ‖ / ‖Δ‖`, in Frobenius norms, with R the
/// written weights and Q the base as it is in the same kind. 0 is the whole delta; at 1 what was changed otherwise is as large as the
/// delta itself. An adapter that is kept apart has 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounding {
    /// Over all linears with an adapter.
    pub error: f64,
    /// The linear with the largest error, and that.
    pub worst: (String, f64),
}

/// Squares, added linear by linear.
#[derive(Debug, Default)]
pub struct Sums {
    error: f64,
    delta: f64,
    worst: Option<(String, f64)>,
}

impl Sums {
    /// Adds a weight, all in f32: `base`, `merged` = base + Δ, `kept` = Q, `written` = R.
    pub fn add(&mut self, name: &str, base: &Tensor, merged: &Tensor, kept: &Tensor, written: &Tensor) -> Result<()> {
        let delta = (merged - base)?;
        let error = ((written - kept)? - &delta)?;
        // Rows in f32, their sums in f64: a weight has more values than f32 has digits for.
        let square = |tensor: &Tensor| -> Result<f64> {
            Ok(tensor.sqr()?.sum(1)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?)
        };
        let (error, delta) = (square(&error)?, square(&delta)?);
        self.error += error;
        self.delta += delta;
        // Without a delta there is nothing to lose.
        let own = (error / delta).sqrt();
        if delta > 0.0 && self.worst.as_ref().is_none_or(|(_, worst)| own > *worst) {
            self.worst = Some((name.trim_end_matches(".weight").to_string(), own));
        }
        Ok(())
    }

    /// The result, if any delta was not zero.
    pub fn result(self) -> Option<Rounding> {
        let error = (self.error / self.delta).sqrt();
        self.worst.map(|worst| Rounding { error, worst })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_error_is_what_was_changed_otherwise_than_by_the_delta() {
        let row = |values: [f32; 2]| Tensor::new(&[values], &Device::Cpu).unwrap();
        let mut sums = Sums::default();
        // Δ = (3, 4), changed by (3, 0): an error of 4 / 5.
        sums.add("a.weight", &row([1.0, 1.0]), &row([4.0, 5.0]), &row([1.5, 1.5]), &row([4.5, 1.5])).unwrap();
        // Δ = (0, 5), changed by it: no error.
        sums.add("b.weight", &row([0.0, 0.0]), &row([0.0, 5.0]), &row([1.0, 2.0]), &row([1.0, 7.0])).unwrap();
        // No delta.
        sums.add("c.weight", &row([1.0, 0.0]), &row([1.0, 0.0]), &row([1.0, 0.0]), &row([2.0, 0.0])).unwrap();
        let Rounding { error, worst } = sums.result().unwrap();
        assert_eq!(worst, ("a".to_string(), 0.8));
        assert!((error - (17.0f64 / 50.0).sqrt()).abs() < 1e-12, "{error}");
        assert_eq!(Sums::default().result(), None);
    }
}
