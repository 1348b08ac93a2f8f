//! The adapters that `generate` and `chat` hold over one model.

use std::path::{Path, PathBuf};

use clap::Args;
use metal_candle::inference::AdapterRegistry;
use metal_candle::models::ModelFiles;
use metal_candle::training::adapter::AdapterFile;
use metal_candle::{Error, Result};

use super::model::ModelArgs;

/// The name that stands for no adapter.
pub const NONE: &str = "none";

/// Which adapters, and which of them is active.
#[derive(Args)]
pub struct AdaptersArgs {
    /// The folder of an adapter to put on the model; may be given several times, the folder's name or NAME tells them apart
    #[arg(long, value_name = "[NAME=]FOLDER", value_parser = named, help_heading = "Model")]
    adapter_path: Vec<(String, PathBuf)>,
    /// Which adapter is active, none for the bare model [default: the first]
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    adapter: Option<String>,
}

impl AdaptersArgs {
    /// Opens the model with all adapters, one of them active.
    pub fn open(&self, model: &ModelArgs) -> Result<(ModelFiles, AdapterRegistry)> {
        let loaded = self.adapter_path.iter().map(|(_, folder)| AdapterFile::load(folder));
        let loaded = loaded.collect::<Result<Vec<_>>>()?;
        let (files, decoder) = model.open(&loaded.iter().collect::<Vec<_>>())?;
        let mut registry = AdapterRegistry::new(decoder)?;
        for ((name, _), adapter) in self.adapter_path.iter().zip(&loaded) {
            registry.add(name, adapter)?;
        }
        let first = self.adapter_path.first().map(|(name, _)| name.as_str());
        let picked = self.adapter.as_deref().or(first);
        registry.activate(picked.filter(|name| *name != NONE))?;
        if let (None, Some(first), 2..) = (&self.adapter, first, loaded.len()) {
            let names = registry.list().collect::<Vec<_>>().join(", ");
            eprintln!("note: adapter {first} is active; --adapter picks another of {names}");
        }
        Ok((files, registry))
    }
}

/// `name=folder`, or a folder that gives its own name. What stands before `=` is part of a path where it holds a separator.
fn named(text: &str) -> Result<(String, PathBuf)> {
    let (name, folder) = match text.split_once('=') {
        Some((name, folder)) if !name.contains(std::path::is_separator) => (Some(name.to_string()), folder),
        _ => (None, text),
    };
    let wrong = |problem: &str| Error::setting(format!("'{text}'"), problem);
    let name = name.or_else(|| name_of(Path::new(folder)));
    let name = name.ok_or_else(|| wrong("the folder has no name of its own; write NAME=FOLDER"))?;
    if name.is_empty() || folder.is_empty() {
        return Err(wrong("a name or a folder is empty; write NAME=FOLDER or FOLDER"));
    }
    if name == NONE {
        return Err(wrong("the name none stands for no adapter; write another NAME=FOLDER"));
    }
    Ok((name, folder.into()))
}

/// `.` and `..` are followed to the folder that they stand for.
fn name_of(folder: &Path) -> Option<String> {
    let name = |folder: &Path| Some(folder.file_name()?.to_string_lossy().into_owned());
    name(folder).or_else(|| name(&folder.canonicalize().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_named_or_names_itself() {
        for (text, name, folder) in [
            ("one=runs/a", "one", "runs/a"),
            ("runs/a", "a", "runs/a"),
            ("runs/a/", "a", "runs/a/"),
            ("./x=y", "x=y", "./x=y"),
            ("n=./x=y", "n", "./x=y"),
        ] {
            assert_eq!(named(text).unwrap(), (name.to_string(), folder.into()), "{text}");
        }
        let here = std::env::current_dir().unwrap();
        assert_eq!(named(".").unwrap().0, here.file_name().unwrap().to_string_lossy());
        for text in ["=a", "a=", "", "/", "none=a", "runs/none"] {
            assert!(named(text).is_err(), "{text}");
        }
    }
}
