//! Generation: the key-value cache, how tokens are chosen, the loop, and several adapters over one model.

pub mod cache;
pub mod generator;
pub mod registry;
pub mod sampling;
pub mod score;

pub use cache::KvCache;
pub use generator::{End, GenerateOptions, Generation, Generator, TextStream};
pub use registry::AdapterRegistry;
pub use sampling::Sampling;
