//! Which kernels one call of an op launches, with which grids, threadgroup memory and parameters: a file an op.
//!
//! Nothing here touches a device: the host side for Apple GPUs encodes these launches, and the tests run the same ones where
//! there is no Apple GPU.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod dequantize;
pub mod embedding;
pub mod fused_lora;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;

use candle_core::DType;

use crate::{Error, Result};

/// Threads of a simdgroup.
pub const LANES: usize = 32;
/// What every Apple GPU allows a threadgroup, in bytes.
pub const THREADGROUP_BYTES: usize = 32 << 10;

/// A text of kernels, compiled as one library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The LoRA op.
    Lora,
    /// Norm, rotary embedding, SwiGLU and embedding.
    Decoder,
    /// The loss and the optimizer.
    Training,
    /// Attention.
    Attention,
    /// Quantized blocks to elements.
    Dequantize,
}

impl Source {
    /// Every text.
    pub const ALL: [Self; 5] = [Self::Lora, Self::Decoder, Self::Training, Self::Attention, Self::Dequantize];

    /// The text that is compiled. All but the LoRA op's begin with `common.metal`.
    pub fn text(self) -> &'static str {
        match self {
            Self::Lora => include_str!("../kernels.metal"),
            Self::Decoder => concat!(include_str!("common.metal"), include_str!("decoder.metal")),
            Self::Attention => concat!(
                include_str!("common.metal"),
                include_str!("attention_tiles.metal"),
                include_str!("attention.metal")
            ),
            Self::Training => concat!(include_str!("common.metal"), include_str!("training.metal")),
            Self::Dequantize => concat!(include_str!("common.metal"), include_str!("dequantize.metal")),
        }
    }

    /// The file, for messages.
    pub fn file(self) -> &'static str {
        match self {
            Self::Lora => "kernels.metal",
            Self::Decoder => "decoder.metal",
            Self::Training => "training.metal",
            Self::Attention => "attention.metal",
            Self::Dequantize => "dequantize.metal",
        }
    }
}

macro_rules! slots {
    ($($(#[$doc:meta])* $slot:ident),* $(,)?) => {
        /// A tensor that a launch binds, by the name that its op's document gives it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs)]
        pub enum Slot {
            $($(#[$doc])* $slot),*
        }
    };
}

slots! {
    // Of several ops.
    X, Y, G, Dx, Weight, Dweight, Ids,
    /// The parts of a sum that several threadgroups make.
    Parts,
    // fused_lora: `[m, k]`, `[k, r]`, `[r, n]`; h and u `[m, r]` f32; gradients f32.
    A, B,
    /// h = drop(x) A
    H,
    /// u = s · g Bᵀ
    U,
    Da, Db, PartialA, PartialB,
    // rms_norm
    Residual, Sum, Rstd,
    // rope
    Cos, Sin, Positions,
    // swiglu
    Gate, Up, Dgate, Dup,
    // embedding
    Table, Dtable,
    /// Where the tokens of each id start, and where the last ones end.
    Starts,
    /// The tokens, by id.
    Tokens,
    // adamw
    Block, Grads,
    // cross_entropy
    Logits, Targets, Losses,
    // attention
    Q, K, V, O, Lse, Delta, Dq, Dk, Dv,
    /// Rows of four: q_start, q_len, k_start, k_len.
    Sequences,
}

/// One buffer index of a launch; its place in [`Launch::bindings`] is the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// Read only.
    Read(Slot),
    /// Written, or read and written.
    Write(Slot),
    /// [`Launch::params`].
    Params,
}

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The text that has the kernel.
    pub source: Source,
    /// The kernel's name in its library.
    pub kernel: String,
    /// By buffer index.
    pub bindings: Vec<Binding>,
    /// The parameters as the kernel reads them.
    pub params: Vec<u8>,
    /// Threadgroups of the grid.
    pub grid: [usize; 3],
    /// Threads of a threadgroup, a multiple of [`LANES`].
    pub threads: usize,
    /// Bytes of threadgroup memory at index 0, a multiple of 16.
    pub threadgroup_bytes: usize,
}

/// Launches in order, and the tensors that they need beside the op's own.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// In order: each may read what an earlier one wrote.
    pub launches: Vec<Launch>,
    /// Elements of each f32 scratch tensor.
    pub scratch: Vec<(Slot, usize)>,
    /// Numbers of the host that kernels read.
    pub tables: Vec<(Slot, Vec<u32>)>,
}

/// A struct of a kernel's parameters: fields of four bytes, `bytes()` as the kernel reads them, `LAYOUT` for the tests.
macro_rules! params {
    ($(#[$doc:meta])* pub struct $name:ident { $($(#[$field_doc:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, PartialEq, Default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $name {
            /// Each field's name and offset.
            pub const LAYOUT: &[(&'static str, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field))),*];

            /// Field after field.
            pub fn bytes(&self) -> Vec<u8> {
                [$(self.$field.to_ne_bytes()),*].concat()
            }
        }
    };
}
use params;

/// A count that kernels take in 31 bits, so that loops and tiles may run past the end in 32.
fn narrow(op: &'static str, name: &str, value: usize) -> Result<u32> {
    i32::try_from(value)
        .map(|value| value as u32)
        .map_err(|_| Error::op(op, format!("{name} is {value}; the Metal kernels count to 2³¹ - 1")))
}

/// The end of a kernel's name: its dtypes; nothing where all are f32.
fn type_suffix(types: &[DType]) -> String {
    match types.iter().all(|dtype| *dtype == DType::F32) {
        true => String::new(),
        false => types.iter().map(|dtype| format!("_{}", dtype.as_str())).collect(),
    }
}

/// Threads of a threadgroup that shares `count` elements: whole simdgroups, at most `most` threads.
fn threads(count: usize, most: usize) -> usize {
    count.next_multiple_of(LANES).clamp(LANES, most)
}

/// Threads of a threadgroup of elementwise kernels, and elements that each makes.
const ELEMENT_THREADS: usize = 256;
const ELEMENTS: usize = 4;

impl Launch {
    /// A launch over `count` elements.
    fn over_elements(source: Source, kernel: String, bindings: Vec<Binding>, params: Vec<u8>, count: usize) -> Self {
        Self {
            source,
            kernel,
            bindings,
            params,
            grid: [count.div_ceil(ELEMENT_THREADS * ELEMENTS), 1, 1],
            threads: ELEMENT_THREADS,
            threadgroup_bytes: 0,
        }
    }

    /// A launch with a threadgroup for each of `rows` rows of `width` elements; `sums` floats a simdgroup to share.
    fn over_rows(
        source: Source,
        kernel: String,
        bindings: Vec<Binding>,
        params: Vec<u8>,
        [rows, width]: [usize; 2],
        sums: usize,
    ) -> Self {
        // A thread with less than four elements is not worth its simdgroup's part of the sums.
        let threads = threads(width.div_ceil(4), 512);
        Self {
            source,
            kernel,
            bindings,
            params,
            grid: [rows, 1, 1],
            threads,
            threadgroup_bytes: (sums * threads / LANES * size_of::<f32>()).next_multiple_of(16),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::adamw::Step;
    use crate::backend::custom_ops::swiglu::Activation;
    use crate::backend::quantized::Kind;

    #[test]
    fn counts_beyond_31_bits_are_refused() {
        let step = Step {
            grad_scale: 1.0,
            decay: 1.0,
            beta2: 0.0,
            one_minus_beta1: 1.0,
            one_minus_beta2: 1.0,
            step_size: 0.0,
            root_correction2: 1.0,
            epsilon: 1.0,
        };
        let many = 1 << 31;
        let norm = |rows, width| rms_norm::Call { rows, width, eps: 0.0, x: DType::F32, weight: DType::F32 };
        for plan in [
            norm(many, 1).forward(false),
            norm(1, many).forward(true),
            norm(many, 1).backward(true),
            swiglu::forward(many, DType::F16, Activation::Silu),
            swiglu::backward(many, DType::BF16, Activation::GeluTanh),
            rope::rotate(&[0], many, 2, DType::F32, false),
            embedding::gather(&[0], many, DType::F32),
            embedding::backward(&[0], many, DType::F32),
            adamw::step(many, step),
            adamw::squares(many),
            cross_entropy::rows(&[0], many, None),
            dequantize::blocks(Kind::Nf4, 8 * many, DType::F32),
        ] {
            let error = plan.unwrap_err().to_string();
            assert!(error.contains("2147483648"), "{error}");
        }
    }

    #[test]
    fn a_threadgroup_has_whole_simdgroups() {
        for width in [1, 31, 100, 128, 129, 5000, 1 << 20] {
            let plan = cross_entropy::rows(&[0, 0], width, Some(1.0)).unwrap();
            let Launch { threads, threadgroup_bytes, grid, .. } = plan.launches[0].clone();
            assert!(threads.is_multiple_of(LANES) && (LANES..=512).contains(&threads), "{threads}");
            assert!(threadgroup_bytes >= 2 * 4 * threads / LANES && threadgroup_bytes.is_multiple_of(16));
            assert_eq!(grid, [2, 1, 1]);
        }
    }
}
