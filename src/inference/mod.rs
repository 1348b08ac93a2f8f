//! Generation: the key-value cache, how tokens are chosen, and the loop.

pub mod cache;
pub mod generator;
pub mod sampling;
pub mod score;

pub use cache::KvCache;
pub use generator::{End, GenerateOptions, Generation, Generator};
pub use sampling::Sampling;
