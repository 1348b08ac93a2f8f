//! Models by name from the Hugging Face hub, kept in the cache folder that Python's huggingface_hub uses too.
//!
//! Only what a model is made of is downloaded: configuration, tokenizer, chat template and safetensors.

use std::io::IsTerminal;
use std::path::PathBuf;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use super::weights;
use crate::{Error, Result};

/// Where models come from and where they are kept.
#[derive(Clone)]
pub struct Hub {
    /// The hub's address, without a slash at its end.
    pub endpoint: String,
    /// Who asks: needed for gated and private models.
    pub token: Option<String>,
    /// The folder with `models--<owner>--<name>` folders.
    pub cache: PathBuf,
    /// Take what is in the cache and ask nobody.
    pub offline: bool,
}

/// Without the token.
impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { endpoint, token, cache, offline } = self;
        let token = token.as_ref().map(|_| "...");
        write!(f, "Hub {{ endpoint: {endpoint:?}, token: {token:?}, cache: {cache:?}, offline: {offline} }}")
    }
}

const ENDPOINT: &str = "https://huggingface.co";

/// Small files of a model, taken where it has them. The first two it must have.
const SMALL: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// `owner/name` or `owner/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name<'a> {
    id: &'a str,
    revision: &'a str,
}

impl<'a> Name<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        let plain = |part: &str, also: &str| {
            let allowed = |char: char| char.is_ascii_alphanumeric() || "-_.".contains(char) || also.contains(char);
            part.starts_with(|first: char| first.is_ascii_alphanumeric()) && part.chars().all(allowed)
        };
        let (owner, model) = id.split_once('/')?;
        let valid = plain(owner, "") && plain(model, "") && plain(revision, "/") && !revision.contains("..");
        valid.then_some(Self { id, revision })
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.to_string(), RepoType::Model, revision.to_string())
    }
}

/// Whether a name can be that of a model on the hub: `owner/name`, with `@revision` or without.
pub fn is_name(name: &str) -> bool {
    Name::parse(name).is_some() && !name.ends_with(".gguf")
}

impl Hub {
    /// As the environment says: `HF_ENDPOINT`, `HF_TOKEN` (else the token that `hf auth login` saved), `HF_HUB_CACHE`,
    /// `HF_HOME`, `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// There is neither `HF_HOME` nor a home folder, or `HF_ENDPOINT` is not a URL.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok().filter(|value| !value.is_empty()), std::env::home_dir())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Result<Self> {
        let home = match variable("HF_HOME").map(PathBuf::from).or_else(|| Some(home?.join(".cache/huggingface"))) {
            Some(home) => home,
            None => return Err(Error::setting("HF_HOME", "there is no home folder; set it to a folder for models")),
        };
        let cache = variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let cache = std::path::absolute(&cache).map_err(Error::io(&cache))?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_string());
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            let problem = format!("is '{endpoint}'; it must begin with https:// or http://");
            return Err(Error::setting("HF_ENDPOINT", problem));
        }
        // The saved token lies beside the default cache folder, wherever models are kept.
        let token = variable("HF_TOKEN").or_else(|| Cache::new(home.join("hub")).token());
        let offline = variable("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()));
        Ok(Self { endpoint: endpoint.trim_end_matches('/').to_string(), token, cache, offline })
    }

    /// The folder with a model's files, downloaded if they are not there yet. All files are of one commit.
    ///
    /// # Errors
    /// The name is not one, the hub has no such model or does not give it, it lacks a file that a model needs, the network
    /// or the disk fails.
    pub fn fetch(&self, name: &str) -> Result<PathBuf> {
        let failed = |problem: String| Error::Hub { model: name.to_string(), problem };
        let Some(parsed) = Name::parse(name) else {
            return Err(failed("a model of the hub is named owner/name or owner/name@revision".to_string()));
        };
        let cached = self.cached(&parsed);
        if self.offline {
            let cache = self.cache.display();
            let problem = format!("HF_HUB_OFFLINE is set, and {cache} does not hold the whole model");
            return cached.ok_or_else(|| failed(problem));
        }
        if let Some(folder) = cached.as_ref().filter(|_| is_commit(parsed.revision)) {
            return Ok(folder.clone());
        }
        let api = self.api().map_err(|error| failed(error.to_string()))?;
        let info = match api.repo(parsed.repo(parsed.revision)).info() {
            Ok(info) => info,
            Err(error) => {
                return match cached.filter(|_| is_network(&error)) {
                    Some(folder) => {
                        tracing::warn!(
                            "{} cannot be reached ({error}); {name} is taken as it is in the cache",
                            self.endpoint
                        );
                        Ok(folder)
                    }
                    None => Err(failed(self.explain(&parsed, &error))),
                };
            }
        };
        // The commit becomes a folder's name.
        if !is_commit(&info.sha) {
            return Err(failed(format!("{} gives its commit as '{}'", self.endpoint, info.sha)));
        }
        let has = |file: &str| info.siblings.iter().any(|sibling| sibling.rfilename == file);
        if let Some(problem) = lacks(&has, info.siblings.iter().map(|sibling| sibling.rfilename.as_str())) {
            return Err(failed(problem));
        }
        let repo = api.repo(parsed.repo(&info.sha));
        let get =
            |file: &str| repo.get(file).map_err(|error| failed(format!("{file}: {}", self.explain(&parsed, &error))));
        for file in SMALL.into_iter().filter(|file| has(file)) {
            get(file)?;
        }
        if has(INDEX) {
            for shard in weights::shards(&get(INDEX)?)? {
                get(&shard)?;
            }
        } else {
            get(SINGLE)?;
        }
        let cache = Cache::new(self.cache.clone());
        let repo = cache.repo(parsed.repo(parsed.revision));
        repo.create_ref(&info.sha).map_err(Error::io(&self.cache))?;
        Ok(repo.pointer_path(&info.sha))
    }

    /// The folder of the revision as it was last seen, if it holds all that a model needs.
    fn cached(&self, name: &Name) -> Option<PathBuf> {
        let repo = Cache::new(self.cache.clone()).repo(name.repo(name.revision));
        let folder = match repo.get(SMALL[0]) {
            Some(config) => config.parent()?.to_path_buf(),
            None if is_commit(name.revision) => repo.pointer_path(name.revision),
            None => return None,
        };
        let whole = SMALL[..2].iter().all(|file| folder.join(file).exists()) && weights::files(&folder).is_ok();
        whole.then_some(folder)
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(std::io::stderr().is_terminal())
            .with_user_agent("metal-candle", env!("CARGO_PKG_VERSION"))
            .build()
    }

    /// What happened, and what to do.
    fn explain(&self, name: &Name, error: &ApiError) -> String {
        let (endpoint, id) = (&self.endpoint, name.id);
        match status(error) {
            // The hub answers so for a name that does not exist, too.
            Some(401 | 403) => {
                let who = match self.token {
                    None => "without a token",
                    Some(_) => "to the owner of your token",
                };
                format!(
                    "{endpoint} does not give it {who}: it is gated, private, or not there. If it is gated, accept its terms at \
                     {endpoint}/{id}, make a token at {endpoint}/settings/tokens and set HF_TOKEN to it"
                )
            }
            Some(404) => {
                let revision = name.revision;
                format!(
                    "there is no such folder here, and {endpoint} has no such model or not its revision '{revision}'"
                )
            }
            Some(429) => format!("{endpoint} takes no more requests for now; try again later, or set HF_TOKEN"),
            Some(code) => format!("{endpoint} answered with status {code}; try again later"),
            None if is_network(error) => format!(
                "{endpoint} cannot be reached ({error}); check the network, set HF_ENDPOINT to a mirror, or give the folder of a \
                 model that is on this machine"
            ),
            None => error.to_string(),
        }
    }
}

/// A full commit, which never changes.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// What is missing among a model's files, with what is there instead.
fn lacks<'a>(has: &impl Fn(&str) -> bool, all: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut missing: Vec<&str> = SMALL[..2].iter().copied().filter(|file| !has(file)).collect();
    if !has(INDEX) && !has(SINGLE) {
        missing.push(SINGLE);
    }
    if missing.is_empty() {
        return None;
    }
    let other: Vec<&str> = all.filter(|file| file.ends_with(".gguf")).take(5).collect();
    let advice = if other.is_empty() {
        "a model here is config.json, tokenizer.json and safetensors".to_string()
    } else {
        format!("it has GGUF files ({}): download one and give its path", other.join(", "))
    };
    Some(format!("it has no {}; {advice}", missing.join(", ")))
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// Whether the request did not get as far as an answer.
fn is_network(error: &ApiError) -> bool {
    matches!(error, ApiError::RequestError(error) if !matches!(**error, ureq::Error::StatusCode(_) | ureq::Error::Json(_)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn names() {
        for name in ["HuggingFaceTB/SmolLM2-135M", "a/b@main", "a/b_c.d@refs/pr/3", "Qwen/Qwen3-0.6B"] {
            assert!(is_name(name), "{name}");
        }
        for name in
            ["", "gpt2", "/tmp/x", "./a/b", "../a", "a/b/c", "a/..", "a/b@", "a/b@../../x", "a/b c", "~/m", "a/b.gguf"]
        {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn the_environment_is_honoured() {
        let hub = |variables: &[(&str, &str)]| {
            let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
            Hub::from_variables(find, Some(PathBuf::from("/nowhere")))
        };
        let plain = hub(&[]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.token, plain.offline), (ENDPOINT, None, false));
        assert_eq!(plain.cache, Path::new("/nowhere/.cache/huggingface/hub"));
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "saved\n").unwrap();
        let home = home.path().to_str().unwrap();
        let set = hub(&[("HF_HOME", home), ("HF_ENDPOINT", "http://localhost:1/"), ("HF_HUB_OFFLINE", "1")]).unwrap();
        assert_eq!(
            (set.endpoint.as_str(), set.token.as_deref(), set.offline),
            ("http://localhost:1", Some("saved"), true)
        );
        assert_eq!(set.cache, Path::new(home).join("hub"));
        let set = hub(&[("HF_HOME", home), ("HF_TOKEN", "given"), ("HF_HUB_CACHE", "/elsewhere")]).unwrap();
        assert_eq!((set.token.as_deref(), set.cache.as_path()), (Some("given"), Path::new("/elsewhere")));
        assert!(hub(&[("HF_ENDPOINT", "huggingface.co")]).is_err());
        assert!(Hub::from_variables(|_| None, None).unwrap_err().to_string().contains("HF_HOME"));
    }
}
