//! Fine-tuning: what is trained, on what data, and the loop.

pub mod checkpoint;
pub mod options;
pub mod params;
pub mod sampler;
pub mod schedule;
pub mod setup;
pub mod trainer;
