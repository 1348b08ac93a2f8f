//! An adapter added to the weight that it is on.

use candle_core::Tensor;

use super::Module;
use crate::backend::custom_ops::dora;
use crate::{Error, Result};

impl Module {
    /// `W + s (A B)ᵀ` of a weight `[n, k]`, f32; with DoRA each row of that, divided by its length, times its magnitude.
    ///
    /// # Errors
    /// Sizes that differ.
    pub fn merge(&self, weight: &Tensor) -> Result<Tensor> {
        let (k, n) = self.sizes();
        if weight.dims() != [n, k] {
            let problem = format!("it goes from {k} to {n} and is merged into a weight {:?}", weight.dims());
            return Err(Error::setting("adapter", problem));
        }
        let delta = (self.b.t()?.matmul(&self.a.t()?)? * self.scaling)?;
        let sum = (weight + delta)?;
        let Some(magnitude) = &self.magnitude else { return Ok(sum) };
        // A row of zeros has no direction and stays what it is, as where the decoder runs it.
        let lengths = sum.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(dora::SHORTEST)?;
        let factors = (magnitude.unsqueeze(1)? / lengths)?;
        Ok(sum.broadcast_mul(&factors)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const WEIGHT: [[f32; 4]; 3] = [[1.0, -2.0, 0.5, 0.25], [0.0, 1.5, -1.0, 2.0], [-0.75, 0.5, 3.0, 1.0]];

    fn module(magnitude: Option<[f32; 3]>) -> Module {
        let tensor = |rows: &[[f32; 4]; 2]| Tensor::new(rows, &Device::Cpu).unwrap();
        Module {
            a: tensor(&[[0.5, -1.0, 0.25, 2.0], [1.0, 0.0, -0.5, 0.75]]).t().unwrap().contiguous().unwrap(),
            b: Tensor::new(&[[1.0f32, -0.25, 0.0], [0.5, 2.0, -1.5]], &Device::Cpu).unwrap(),
            scaling: 1.5,
            magnitude: magnitude.map(|lengths| Tensor::new(&lengths, &Device::Cpu).unwrap()),
        }
    }

    fn merged(module: &Module) -> Vec<Vec<f32>> {
        module.merge(&Tensor::new(&WEIGHT, &Device::Cpu).unwrap()).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn the_delta_is_scaled_and_added() {
        // By hand: row 0 of B A is [1, -1, 0, 2.375], row 1 [1.875, 0.25, -1.0625, 1], row 2 -1.5 times A's second row.
        let want = [[2.5, -3.5, 0.5, 3.8125], [2.8125, 1.875, -2.59375, 3.5], [-3.0, 0.5, 4.125, -0.6875]];
        assert_eq!(merged(&module(None)), want);
    }

    #[test]
    fn rows_get_doras_magnitudes_as_in_peft() {
        // merge_adapter() of PEFT 0.21.2 with these tensors, r = 2 and lora_alpha = 3.
        let want = [
            [0.866_651_9, -1.213_312_6, 0.173_330_38, 1.321_644_2],
            [0.255_036_32, 0.170_024_22, -0.235_200_15, 0.317_378_52],
            [1.740_507_1, -0.290_084_5, -2.393_197_3, 0.398_866_2],
        ];
        for (got, want) in merged(&module(Some([2.0, 0.5, -3.0]))).iter().flatten().zip(want.iter().flatten()) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn what_cannot_be_merged_is_refused() {
        let error = module(None).merge(&Tensor::new(&WEIGHT, &Device::Cpu).unwrap().t().unwrap()).unwrap_err();
        assert!(error.to_string().contains("from 4 to 3") && error.to_string().contains("[4, 3]"), "{error}");
    }

    #[test]
    fn a_row_of_zeros_stays_one() {
        let mut dora = module(Some([1.0; 3]));
        dora.scaling = 0.0;
        let merged = dora.merge(&Tensor::zeros((3, 4), candle_core::DType::F32, &Device::Cpu).unwrap()).unwrap();
        assert_eq!(merged.to_vec2::<f32>().unwrap(), [[0.0; 4]; 3]);
    }
}
