//! The lines of a conversation: edited on a terminal, read as they are from anything else.

use std::io::{self, BufRead, IsTerminal};

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Where lines come from.
pub enum Lines {
    /// With editing, and a history that lasts as long as the program.
    Terminal(Box<DefaultEditor>),
    /// A pipe or a file, without a prompt.
    Piped,
}

impl Lines {
    /// Editing where both ends are a terminal.
    pub fn new() -> io::Result<Self> {
        if io::stdin().is_terminal() && io::stdout().is_terminal() {
            return Ok(Self::Terminal(Box::new(DefaultEditor::new().map_err(io::Error::other)?)));
        }
        Ok(Self::Piped)
    }

    /// The next line; `None` at the end of the input.
    pub fn next(&mut self) -> io::Result<Option<String>> {
        match self {
            Self::Terminal(editor) => edited(editor),
            Self::Piped => {
                let mut line = String::new();
                let read = io::stdin().lock().read_line(&mut line)?;
                Ok((read > 0).then_some(line))
            }
        }
    }
}

/// Ctrl-C drops the line, Ctrl-D ends the input.
fn edited(editor: &mut DefaultEditor) -> io::Result<Option<String>> {
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                editor.add_history_entry(&line).map_err(io::Error::other)?;
                return Ok(Some(line));
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => return Ok(None),
            Err(ReadlineError::Io(error)) => return Err(error),
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}
