//! A conversation: its turns, and the file that keeps it, a row of training data.

use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use metal_candle::models::{Message, TextTokenizer};
use metal_candle::training::dataset::rows::{self, RowKind};
use metal_candle::training::files::write_atomically;
use metal_candle::{Error, Result};
use serde_json::{Value, json};

/// The turns so far.
pub struct Conversation {
    /// What every conversation begins with.
    start: Vec<Message>,
    messages: Vec<Message>,
    /// Descriptions of tools, of a conversation that was loaded.
    tools: Option<Value>,
    /// The file that was last saved or loaded, which may be replaced.
    file: Option<PathBuf>,
}

impl Conversation {
    /// One that begins so, and does again after [`Conversation::clear`].
    pub fn new(start: Vec<Message>) -> Self {
        Self { messages: start.clone(), start, tools: None, file: None }
    }

    /// Begins anew.
    pub fn clear(&mut self) {
        *self = Self::new(std::mem::take(&mut self.start));
    }

    /// What the model is given when the user says this next.
    pub fn asked(&self, text: &str, tokenizer: &TextTokenizer) -> Result<String> {
        let mut messages = self.messages.clone();
        messages.push(Message::new("user", text));
        tokenizer.render_chat(&messages, self.tools.as_ref(), true)
    }

    /// Adds a turn of each side.
    pub fn add(&mut self, user: &str, assistant: String) {
        self.messages.extend([Message::new("user", user), Message::new("assistant", assistant)]);
    }

    /// Writes the conversation as a row of JSONL and says so.
    ///
    /// # Errors
    /// A conversation without turns; a file that is there and is not the one last saved or loaded.
    pub fn save(&mut self, path: &Path) -> Result<String> {
        if self.messages.is_empty() {
            return Err(Error::file(path, "is not written: there is nothing to save"));
        }
        if path.exists() && self.file.as_deref() != Some(path) {
            return Err(Error::file(path, "is there already; choose another name"));
        }
        let mut row = json!({"messages": self.messages});
        if let Some(tools) = &self.tools {
            row["tools"] = tools.clone();
        }
        write_atomically(path, |file| writeln!(file, "{row}").map_err(Error::io(path)))?;
        self.file = Some(path.to_path_buf());
        Ok(format!("{} messages are in {}", self.messages.len(), path.display()))
    }

    /// Goes on with the conversation of a file, in place of this one, and says so.
    ///
    /// # Errors
    /// A file that does not hold one conversation, with the reason.
    pub fn load(&mut self, path: &Path) -> Result<String> {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        let mut lines = text.lines().filter(|line| !line.trim().is_empty());
        let (Some(line), None) = (lines.next(), lines.next()) else {
            let count = text.lines().filter(|line| !line.trim().is_empty()).count();
            return Err(Error::file(path, format!("has {count} rows; one conversation is loaded")));
        };
        let (row, unread) = rows::parse(line.as_bytes()).map_err(|reason| Error::file(path, reason))?;
        let RowKind::Messages { messages, tools, .. } = row else {
            return Err(Error::file(path, "is not a conversation; its row needs messages"));
        };
        if !unread.is_empty() {
            return Err(Error::file(path, format!("has keys that would be lost: {}", unread.join(", "))));
        }
        (self.messages, self.tools, self.file) = (messages, tools, Some(path.to_path_buf()));
        Ok(format!("{} messages are from {}", self.messages.len(), path.display()))
    }
}

impl fmt::Display for Conversation {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for Message { role, content, extra } in &self.messages {
            write!(f, "{role}: {}", content.as_deref().unwrap_or_default())?;
            for (key, value) in extra {
                write!(f, " {key} {value}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
