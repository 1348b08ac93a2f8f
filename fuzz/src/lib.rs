//! What the targets share: an allocator that watches sizes, and a folder whose files an input replaces.

#[path = "../../tests/common/watched.rs"]
mod watched;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use watched::{LARGEST, Watched};

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
