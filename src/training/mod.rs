//! training

pub mod lora;

pub use lora::{LoRAConfig, LoRALayer, LoRALinear};
