//! RMS norm: `rms_norm_*` of `decoder.metal`.

use candle_core::DType;

use super::{Binding, Launch, Plan, Slot, Source, narrow, params, type_suffix};
use crate::Result;

const OP: &str = "rms_norm";
/// Ranges of rows that dw is summed in, on every device, so that the bits are the same.
const PARTS: usize = 32;
const COLUMN_THREADS: usize = 128;

params! {
    /// `RmsNormParams` of decoder.metal.
    pub struct Params {
        /// m
        pub rows: u32,
        /// n
        pub width: u32,
        /// Added to the mean of squares.
        pub eps: f32,
        /// Rows that one partial sum of dw covers.
        pub rows_per_part: u32,
        /// How many there are.
        pub parts: u32,
    }
}

/// The sizes and dtypes of one call.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// m
    pub rows: usize,
    /// n
    pub width: usize,
    /// Added to the mean of squares.
    pub eps: f64,
    /// Of x and all that has its shape.
    pub x: DType,
    /// Of the weight: x's or f32.
    pub weight: DType,
}

impl Call {
    fn params(&self) -> Result<Params> {
        let parts = self.rows.div_ceil(PARTS).max(1);
        Ok(Params {
            rows: narrow(OP, "m", self.rows)?,
            width: narrow(OP, "n", self.width)?,
            eps: self.eps as f32,
            rows_per_part: parts as u32,
            parts: self.rows.div_ceil(parts) as u32,
        })
    }

    fn row_launch(&self, kernel: String, bindings: Vec<Binding>) -> Result<Launch> {
        let params = self.params()?.bytes();
        Ok(Launch::over_rows(Source::Decoder, kernel, bindings, params, [self.rows, self.width], 1))
    }

    /// `y` and `rstd` of x, or with `residual` of [`Slot::Sum`] = x + residual, which is written too.
    ///
    /// # Errors
    /// Sizes that the kernels cannot take.
    pub fn forward(&self, residual: bool) -> Result<Plan> {
        use Binding::{Params, Read, Write};
        let suffix = type_suffix(&[self.x, self.weight]);
        let (kernel, bindings) = match residual {
            false => (
                format!("rms_norm_forward{suffix}"),
                vec![Read(Slot::X), Read(Slot::Weight), Write(Slot::Y), Write(Slot::Rstd), Params],
            ),
            true => (
                format!("rms_norm_forward_add{suffix}"),
                vec![
                    Read(Slot::X),
                    Read(Slot::Residual),
                    Read(Slot::Weight),
                    Write(Slot::Sum),
                    Write(Slot::Y),
                    Write(Slot::Rstd),
                    Params,
                ],
            ),
        };
        let launch = self.row_launch(kernel, bindings)?;
        Ok(Plan { launches: self.unless_empty(vec![launch]), ..Plan::default() })
    }

    /// `dx` += and, where it is wanted, `dweight` +=.
    ///
    /// # Errors
    /// Sizes that the kernels cannot take.
    pub fn backward(&self, dweight: bool) -> Result<Plan> {
        use Binding::{Params, Read, Write};
        let params = self.params()?;
        let bindings =
            vec![Read(Slot::X), Read(Slot::Weight), Read(Slot::Rstd), Read(Slot::G), Write(Slot::Dx), Params];
        let kernel = format!("rms_norm_backward{}", type_suffix(&[self.x, self.weight]));
        let mut plan = Plan::default();
        plan.launches.push(self.row_launch(kernel, bindings)?);
        if dweight {
            let columns = |kernel, bindings, parts| Launch {
                source: Source::Decoder,
                kernel,
                bindings,
                params: params.bytes(),
                grid: [self.width.div_ceil(COLUMN_THREADS), parts, 1],
                threads: COLUMN_THREADS,
                threadgroup_bytes: 0,
            };
            let bindings = vec![Read(Slot::X), Read(Slot::Rstd), Read(Slot::G), Write(Slot::Parts), Params];
            let kernel = format!("rms_norm_weight_parts{}", type_suffix(&[self.x]));
            plan.launches.push(columns(kernel, bindings, params.parts as usize));
            let bindings = vec![Read(Slot::Parts), Write(Slot::Dweight), Params];
            plan.launches.push(columns("rms_norm_weight_sum".to_string(), bindings, 1));
            plan.scratch.push((Slot::Parts, params.parts as usize * self.width));
        }
        plan.launches = self.unless_empty(plan.launches);
        Ok(plan)
    }

    fn unless_empty(&self, launches: Vec<Launch>) -> Vec<Launch> {
        if self.rows == 0 { Vec::new() } else { launches }
    }
}
