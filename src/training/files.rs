//! Writing so that what is there is whole: beside, fsynced, renamed.

use std::fs::{self, File};
use std::path::Path;

use crate::{Error, Result};

/// Writes a file through `write` beside its place, then renames it there. A crash leaves the old file or the new one.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    write_beside(path, |file, _| write(file))
}

/// [`write_atomically`] for a `write` that also reads: it is told where the file lies meanwhile.
pub fn write_beside<T>(path: &Path, write: impl FnOnce(&mut File, &Path) -> Result<T>) -> Result<T> {
    let folder = parent(path);
    let mut file = tempfile::Builder::new().prefix(".writing-").tempfile_in(folder).map_err(Error::io(path))?;
    let at = file.path().to_path_buf();
    let written = write(file.as_file_mut(), &at)?;
    file.as_file().sync_all().map_err(Error::io(path))?;
    file.persist(path).map_err(|error| Error::io(path)(error.error))?;
    allow_reading(path)?;
    sync_folder(folder)?;
    Ok(written)
}

/// Fills a folder through `write` beside its place, then renames it there; one that was there is replaced. A crash leaves no
/// folder of this name that is not whole.
pub fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let above = parent(path);
    fs::create_dir_all(above).map_err(Error::io(above))?;
    let temporary = tempfile::Builder::new().prefix(".writing-").tempdir_in(above).map_err(Error::io(path))?;
    write(temporary.path())?;
    for entry in fs::read_dir(temporary.path()).map_err(Error::io(temporary.path()))? {
        let file = entry.map_err(Error::io(temporary.path()))?.path();
        File::open(&file).and_then(|file| file.sync_all()).map_err(Error::io(&file))?;
    }
    sync_folder(temporary.path())?;
    if path.exists() {
        fs::remove_dir_all(path).map_err(Error::io(path))?;
    }
    allow_entering(temporary.path())?;
    fs::rename(temporary.keep(), path).map_err(Error::io(path))?;
    sync_folder(above)
}

/// Refuses to write a file that is there, unless it may be replaced and is none of what is read.
pub fn check_output_file(output: &Path, replace: bool, sources: &[&Path]) -> Result<()> {
    let Ok(real) = output.canonicalize() else { return Ok(()) };
    if real.is_dir() {
        return Err(Error::file(output, "is a folder; name a file to write"));
    }
    if sources.iter().any(|source| source.canonicalize().is_ok_and(|source| source == real)) {
        return Err(Error::file(output, "is read; choose another --output"));
    }
    if !replace {
        return Err(Error::file(output, "is already there; choose another --output, or replace it with --force"));
    }
    Ok(())
}

/// Refuses to write a folder that is there, unless it may be replaced and is an adapter's or a model's, and one that holds
/// what is read.
pub fn check_output(output: &Path, replace: bool, sources: &[&Path]) -> Result<()> {
    let Ok(real) = output.canonicalize() else { return Ok(()) };
    if real.is_file() {
        return Err(Error::file(output, "is a file; name a folder to write"));
    }
    let inside = |source: &&&Path| source.canonicalize().is_ok_and(|source| source.starts_with(&real));
    if let Some(source) = sources.iter().find(inside) {
        let problem = format!("holds {}, which is read; choose another --output", source.display());
        return Err(Error::file(output, problem));
    }
    if !replace {
        return Err(Error::file(output, "is already there; choose another --output, or replace it with --force"));
    }
    let ours = ["config.json", "adapter_config.json"].iter().any(|name| output.join(name).exists());
    let empty = fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_none());
    if ours || empty {
        return Ok(());
    }
    Err(Error::file(output, "is not the folder of an adapter or a model, and --force replaces nothing else"))
}

/// Removes what writers that were killed left in a folder.
pub fn remove_leftovers(folder: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(".writing-") {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Temporary files are private; what replaces a user's file should be as readable as a new file is.
pub(super) fn allow_reading(path: &Path) -> Result<()> {
    set_mode(path, 0o644)
}

/// As [`allow_reading`], for a folder.
fn allow_entering(path: &Path) -> Result<()> {
    set_mode(path, 0o755)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::io(path))?;
    }
    #[cfg(not(unix))]
    let _ = (path, mode);
    Ok(())
}

/// A rename is on the disk only when its folder is.
fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_atomically(&path, |file| file.write_all(b"old").map_err(Error::io("a"))).unwrap();
        let failed = write_atomically(&path, |file| {
            file.write_all(b"half").map_err(Error::io("a"))?;
            Err(Error::op("write", "planted"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/checkpoint");
        let fill =
            |name: &'static str| move |folder: &Path| fs::write(folder.join(name), name).map_err(Error::io(folder));
        replace_folder(&path, fill("one")).unwrap();
        replace_folder(&path, fill("two")).unwrap();
        assert!(!path.join("one").exists() && path.join("two").exists());
        assert!(replace_folder(&path, |_| Err(Error::op("write", "planted"))).is_err());
        assert!(path.join("two").exists());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
