//! What the targets share: an allocator that watches sizes, and a folder whose files an input replaces.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The largest request since the last [`bounded`] began.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Watched;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as this function's own.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as this function's own.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as this function's own.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as this function's own.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Runs `read` on an input and fails when it asks at once for more than `base` bytes and `per_byte` for each of the input's.
pub fn bounded(input: &[u8], base: usize, per_byte: usize, read: impl FnOnce()) {
    LARGEST.store(0, Ordering::Relaxed);
    read();
    let (largest, allowed) = (LARGEST.load(Ordering::Relaxed), base + per_byte * input.len());
    assert!(
        largest <= allowed,
        "{largest} bytes were asked for at once; {} bytes of input allow {allowed}",
        input.len()
    );
}

/// A folder under the system's temporary one that is there until the process ends. `TMPDIR=/dev/shm` keeps it off the disk.
pub fn folder() -> PathBuf {
    tempfile::tempdir().expect("a temporary folder can be made").keep()
}

/// Writes a file of a folder anew.
pub fn write(folder: &Path, name: &str, bytes: &[u8]) {
    fs::write(folder.join(name), bytes).expect("the temporary folder can be written");
}

/// A file of the fuzz folder's own.
pub fn file(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("files").join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
