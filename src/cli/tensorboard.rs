//! Event files that TensorBoard reads: the scalars of `metrics.jsonl`, in `runs` beside it.
//!
//! A file is a sequence of records ([`record`]), each an `Event` of tensorflow/core/util/event.proto. A process writes a file of
//! its own; a run that goes on says at which step, and TensorBoard drops what an older file has from there on.

mod record;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metal_candle::training::trainer::{Report, Validation};
use metal_candle::{Error, Result};

use self::record::{Message, framed};

/// The folder of the event files, in the adapter's.
pub const FOLDER: &str = "runs";

/// What readers look for in the first event.
const VERSION: &str = "brain.Event:2";

/// `SessionLog.START`.
const START: u64 = 1;

/// Writes one event file, each event at once.
pub struct TensorBoard {
    path: PathBuf,
    file: File,
}

impl TensorBoard {
    /// Begins a file in `runs` of an adapter's folder.
    pub fn create(adapter: &Path) -> Result<Self> {
        let folder = adapter.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let now = now();
        // Readers take the files of a folder in the order of their names.
        let name = format!("events.out.tfevents.{}.{:06}.{}", now.as_secs(), now.subsec_micros(), std::process::id());
        let path = folder.join(name);
        let file = File::create_new(&path).map_err(Error::io(&path))?;
        let mut board = Self { path, file };
        board.append(Message::new().double(1, now.as_secs_f64()).bytes(3, VERSION.as_bytes()))?;
        Ok(board)
    }

    /// One whose file takes nothing.
    #[cfg(test)]
    pub fn broken(path: &Path) -> Self {
        fs::write(path, "").unwrap();
        Self { path: path.to_path_buf(), file: File::open(path).unwrap() }
    }

    /// Says that the run goes on after `step`; 0 for a new one.
    pub fn start(&mut self, step: usize) -> Result<()> {
        // From this step on, this file is right. A new run has a validation at step 0.
        let from = if step == 0 { 0 } else { step + 1 };
        let session = Message::new().varint(1, START);
        self.append(event(from).message(7, session))
    }

    /// A report's scalars.
    pub fn report(&mut self, report: &Report) -> Result<()> {
        let scalars = [
            ("train/loss", report.loss),
            ("train/learning_rate", report.learning_rate),
            ("train/tokens_per_second", report.tokens_per_second),
            ("train/grad_norm", report.grad_norm),
        ];
        self.scalars(report.step, &scalars)
    }

    /// A validation's loss.
    pub fn validation(&mut self, now: &Validation) -> Result<()> {
        self.scalars(now.step, &[("eval/loss", now.loss)])
    }

    fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::new();
        for (tag, value) in scalars {
            summary = summary.message(1, Message::new().bytes(1, tag.as_bytes()).float(2, *value as f32));
        }
        self.append(event(step).message(5, summary))
    }

    fn append(&mut self, event: Message) -> Result<()> {
        self.file.write_all(&framed(&event.into_bytes())).map_err(Error::io(&self.path))
    }
}

/// An event of now, without what happened.
fn event(step: usize) -> Message {
    Message::new().double(1, now().as_secs_f64()).varint(2, step as u64)
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_is_on_the_disk_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut board = TensorBoard::create(folder.path()).unwrap();
        let size = |board: &TensorBoard| fs::metadata(&board.path).unwrap().len();
        // Framing 16; wall time 9; the version's key, length and text.
        assert_eq!(size(&board), 16 + 9 + 2 + 13);
        let before = size(&board);
        board.start(300).unwrap();
        // Step 301 is a key and two bytes; the session is a key, a length and two bytes.
        assert_eq!(size(&board) - before, 16 + 9 + 3 + 4);
        let before = size(&board);
        board.validation(&Validation { step: 5, loss: 1.5, perplexity: 4.48, tokens: 3 }).unwrap();
        let bytes = fs::read(&board.path).unwrap();
        let value = b"\x2a\x12\x0a\x10\x0a\x09eval/loss\x15\x00\x00\xc0\x3f";
        let payload = &bytes[before as usize + 12..bytes.len() - 4];
        assert_eq!((&payload[9..11], &payload[11..]), (&b"\x10\x05"[..], &value[..]));
        let name = board.path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FOLDER), "a file").unwrap();
        let error = TensorBoard::create(folder.path()).map(drop).unwrap_err().to_string();
        assert!(error.contains(FOLDER), "{error}");
    }
}
