//! Every op in plain f64 loops, forward and backward side by side: the judge of all kernels.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
pub mod embedding;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
