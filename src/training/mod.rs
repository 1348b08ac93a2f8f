//! Fine-tuning: what is trained, on what data, and the loop.

pub mod adapter;
pub mod checkpoint;
pub mod dataset;
pub mod events;
pub mod files;
pub mod fuse;
pub mod initial;
pub mod lora;
pub mod memory;
pub mod options;
pub mod params;
pub mod sampler;
pub mod schedule;
pub mod setup;
pub mod trainer;
mod watch;

pub use lora::{LoRAConfig, LoRALayer, LoRALinear};
