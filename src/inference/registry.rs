//! Several adapters over one model, of which one is active.

use crate::models::decoder::{Decoder, Fitted};
use crate::training::adapter::AdapterFile;
use crate::{Error, Result};

/// A decoder and its adapters, all of them in memory on the decoder's device. Activating one hands its tensors to the linears by
/// reference count: nothing is copied.
///
/// The registry owns the decoder, so what is active is always what it says. A [`Generator`](super::Generator) borrows the
/// decoder and its cache dies with it; the adapter cannot be changed under one:
///
/// ```compile_fail,E0502
/// use metal_candle::inference::{AdapterRegistry, Generator};
/// use metal_candle::models::TextTokenizer;
///
/// fn turn(registry: &mut AdapterRegistry, tokenizer: &TextTokenizer) -> metal_candle::Result<()> {
///     let mut generator = Generator::new(registry.decoder(), tokenizer)?;
///     registry.activate(None)?;
///     generator.clear();
///     Ok(())
/// }
/// ```
pub struct AdapterRegistry {
    decoder: Decoder,
    /// In the order that they were added in.
    adapters: Vec<Named>,
    active: Option<usize>,
    /// What is set when none is active.
    bare: Fitted,
}

struct Named {
    name: String,
    fitted: Fitted,
}

impl AdapterRegistry {
    /// A registry without adapters. One that the decoder carries goes.
    pub fn new(mut decoder: Decoder) -> Result<Self> {
        let bare = decoder.bare();
        decoder.set_adapters(&bare)?;
        Ok(Self { decoder, adapters: Vec::new(), active: None, bare })
    }

    /// The model with the active adapter on it.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The model with the active adapter on it, without the others.
    pub fn into_decoder(self) -> Decoder {
        self.decoder
    }

    /// Puts an adapter on the list; it is not activated.
    ///
    /// # Errors
    /// A name that is empty or taken, an adapter that does not fit the model.
    pub fn add(&mut self, name: &str, adapter: &AdapterFile) -> Result<()> {
        if name.is_empty() {
            return Err(Error::setting("adapter", "its name is empty"));
        }
        if self.list().any(|taken| taken == name) {
            let problem = format!("its name is taken; there are {}", self.names());
            return Err(Error::setting(format!("adapter '{name}'"), problem));
        }
        // DoRA's scales and the shapes of whole tensors are those of the base.
        let active = self.active;
        self.activate(None)?;
        let fitted = adapter.fitted(&self.decoder, self.decoder.device());
        self.set(active)?;
        let fitted = fitted.map_err(|error| match error {
            Error::Setting { problem, .. } => Error::setting(format!("adapter '{name}'"), problem),
            other => other,
        })?;
        self.adapters.push(Named { name: name.to_string(), fitted });
        Ok(())
    }

    /// Makes an adapter the active one; `None` leaves the model as it was trained.
    ///
    /// # Errors
    /// A name that is not on the list, which the error gives; the active adapter stays.
    pub fn activate(&mut self, name: Option<&str>) -> Result<()> {
        let index = name.map(|name| self.index(name)).transpose()?;
        self.set(index)
    }

    /// Takes an adapter off the list and frees it. If it was the active one, none is.
    ///
    /// # Errors
    /// A name that is not on the list, which the error gives.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let index = self.index(name)?;
        if self.active == Some(index) {
            self.activate(None)?;
        }
        self.adapters.remove(index);
        self.active = self.active.map(|active| active - usize::from(active > index));
        Ok(())
    }

    /// The names, in the order that they were added in.
    pub fn list(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|adapter| adapter.name.as_str())
    }

    /// The name of the active adapter.
    pub fn active(&self) -> Option<&str> {
        self.active.map(|index| self.adapters[index].name.as_str())
    }

    fn set(&mut self, index: Option<usize>) -> Result<()> {
        self.decoder.set_adapters(index.map_or(&self.bare, |index| &self.adapters[index].fitted))?;
        self.active = index;
        Ok(())
    }

    fn index(&self, name: &str) -> Result<usize> {
        let index = self.list().position(|known| known == name);
        index.ok_or_else(|| {
            Error::setting(format!("adapter '{name}'"), format!("is not there; there are {}", self.names()))
        })
    }

    fn names(&self) -> String {
        if self.adapters.is_empty() { "none".to_string() } else { self.list().collect::<Vec<_>>().join(", ") }
    }
}
