//! Every op in plain f64 loops, forward and backward side by side: the judge of all kernels.
