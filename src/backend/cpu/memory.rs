//! How the C library treats freed memory.

/// Asks glibc to keep what is freed for the next allocation, instead of giving it back to the system. For programs that train:
/// a step allocates and frees the same few hundred megabytes each time, and pages that went back must be zeroed and mapped
/// again. Elsewhere it does nothing. It holds for the whole process, so the library never calls it by itself.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // Blocks from this size on are mapped one by one and unmapped when freed; glibc takes no more than 32 MiB.
        const MAPPED_FROM: libc::c_int = 32 << 20;
        // SAFETY: mallopt only sets parameters of the allocator, under its own lock.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        }
    }
}
