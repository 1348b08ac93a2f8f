//! Which dtypes and shapes run on which kernels. The dispatch in `fused_lora.rs` and `linear.rs` follows these rules.

/// One way through an op on CUDA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The op's name, as in `backend::custom_ops`.
    pub op: &'static str,
    /// dtypes of the activations, then of the adapter or the weight.
    pub dtypes: &'static str,
    /// The shapes that take it.
    pub shapes: &'static str,
    /// What runs.
    pub kernel: &'static str,
    /// Whether it is the op's fast path.
    pub fast: bool,
}

const fn path(op: &'static str, dtypes: &'static str, shapes: &'static str, kernel: &'static str, fast: bool) -> Path {
    Path { op, dtypes, shapes, kernel, fast }
}

const ADAPTED: &str = "bf16 or f16 with its own or f32 adapters; f32 with f32";

/// Every way through the CUDA ops, fast ones first. The same in every build.
pub fn paths() -> Vec<Path> {
    const LORA: &str = "fused_lora";
    const LINEAR: &str = "linear";
    vec![
        path(
            LORA,
            ADAPTED,
            "k and n multiples of 8, x and y on 16 bytes, r up to 64",
            "one pass over x on tensor cores",
            true,
        ),
        path(
            LORA,
            ADAPTED,
            "the same with r up to 16 and few rows (two an SM)",
            "a block a row, bound by latency",
            true,
        ),
        path(LORA, ADAPTED, "the same with r 33 to 64", "the same, bound by the products' instructions", false),
        path(LORA, ADAPTED, "the same with r 65 to 256", "a pass over x for every 64 ranks", false),
        path(LORA, ADAPTED, "any other k, n or alignment", "tensor cores, element by element from memory", false),
        path(
            LORA,
            "f16 or bf16 with f32 gradients g",
            "any",
            "backward by the f32 kernels, the adapter cast to f32",
            false,
        ),
        path(LORA, "any of these", "strided tensors", "a contiguous copy first", false),
        path(LINEAR, "x and W of one dtype", "any", "cuBLASLt", true),
        path(
            LINEAR,
            "x and W of two dtypes, or g of another than W's",
            "any",
            "both cast to f32, then cuBLASLt",
            false,
        ),
        path(LINEAR, "any", "the bias's gradient", "Candle's sum", false),
        path(
            "lora_linear",
            ADAPTED,
            "as fused_lora and linear",
            "fused_lora into y, then cuBLASLt adds x Wᵀ in its epilogue",
            true,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::paths;

    #[test]
    fn every_op_has_a_fast_path() {
        for op in ["fused_lora", "linear", "lora_linear"] {
            assert!(paths().iter().any(|path| path.op == op && path.fast), "{op}");
        }
    }
}
