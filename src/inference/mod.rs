//! Generation.

pub mod cache;

pub use cache::KvCache;
