//! Which dtypes and shapes run on which kernels. The dispatch in the ops' files follows these rules.

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
    const ATTENTION: &str = "attention";
    const FLOATS: &str = "f32, f16, bf16";
    const HOPPER: &str =
        "compute capability 9.0; sizes multiples of 8, on 16 bytes, a third of the multiprocessors' tiles of 256 x 256";
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
        path(
            LORA,
            ADAPTED,
            "r over 32, as linear's first way takes its sizes",
            "as lora_linear's, without the base",
            true,
        ),
        path(LORA, ADAPTED, "r 33 to 64 elsewhere", "one pass over x, bound by the products' instructions", false),
        path(LORA, ADAPTED, "r 65 to 256 elsewhere", "a pass over x for every 64 ranks", false),
        path(LORA, ADAPTED, "any other k, n or alignment", "tensor cores, element by element from memory", false),
        path(
            LORA,
            "f16 or bf16 with f32 gradients g",
            "any",
            "backward by the f32 kernels, the adapter cast to f32",
            false,
        ),
        path(LORA, "any of these", "strided tensors", "a contiguous copy first", false),
        path(LINEAR, "bf16", HOPPER, "own kernel on wgmma", true),
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
            "bf16 with its own or f32 adapters",
            HOPPER,
            "own kernel on wgmma: the adapter is a segment of the base's inner dimension; up to three linears at once",
            true,
        ),
        path("lora_linear", ADAPTED, "any other", "fused_lora into y, then cuBLASLt adds x Wᵀ in its epilogue", false),
        path(
            ATTENTION,
            "bf16",
            "compute capability 9.0; head sizes to 64 and 97 to 128, multiples of 8; more than 64 queries, scale over 0, on 16 bytes",
            "wgmma",
            true,
        ),
        path(
            ATTENTION,
            "f16, bf16",
            "any other head sizes to 128 that are multiples of 8, on 16 bytes",
            "tiles on tensor cores",
            true,
        ),
        path(
            ATTENTION,
            "f32, f16, bf16",
            "any other head size up to 256; keys in several sequences",
            "a warp a row",
            false,
        ),
        path("rms_norm", FLOATS, "rows of a multiple of 8, on 16 bytes", "a block a row, 16 bytes an access", true),
        path("rms_norm", FLOATS, "any other", "a block a row, an element an access", false),
        path("rope", FLOATS, "head sizes that are multiples of 16, on 16 bytes", "16 bytes an access", true),
        path("rope", FLOATS, "any other", "an element an access", false),
        path("swiglu", FLOATS, "SwiGLU and GeGLU, a multiple of 8 elements, on 16 bytes", "16 bytes an access", true),
        path("swiglu", FLOATS, "any other", "an element an access", false),
        path("embedding", FLOATS, "any", "a block a row; backward a block an id", true),
        path("cross_entropy", FLOATS, "any", "chunks of rows: linear, softmax and its gradient, linear", true),
        path("dequantize", FLOATS, "any kind", "eight values a thread, into a buffer that lives for one product", true),
        path("adamw", "f32", "any", "one launch for all trained values", true),
    ]
}

#[cfg(test)]
mod tests {
    use super::paths;

    #[test]
    fn every_op_has_a_fast_path() {
        let ops = ["fused_lora", "linear", "lora_linear", "attention", "rms_norm", "rope", "swiglu", "embedding"];
        for op in ops.into_iter().chain(["cross_entropy", "dequantize", "adamw"]) {
            assert!(paths().iter().any(|path| path.op == op && path.fast), "{op}");
        }
    }
}
