//! Apple GPUs.
pub mod plan;
