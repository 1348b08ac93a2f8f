//! Which modules a configuration chooses: PEFT's rule and mlx-lm's.

use std::collections::BTreeSet;

use regex::Regex;

use super::names::in_block;

/// The choice of a file's configuration.
#[derive(Debug, Clone)]
pub enum Targets {
    Peft(Selection),
    /// `keys` are names in a block or whole paths, `None` stands for all linears of a block; `num_layers` counts blocks from
    /// the last, and stands for all where it is not positive.
    Mlx {
        keys: Option<BTreeSet<String>>,
        num_layers: i64,
    },
}

impl Targets {
    /// Whether a linear of a model with so many blocks is chosen.
    pub fn include(&self, path: &str, blocks: usize) -> bool {
        match self {
            Self::Peft(selection) => selection.include(path),
            Self::Mlx { keys, num_layers } => {
                let count = usize::try_from(*num_layers).unwrap_or(0);
                let first = if count == 0 { 0 } else { blocks.saturating_sub(count) };
                let in_blocks = in_block(path).is_some_and(|(layer, name)| {
                    layer >= first && keys.as_ref().is_none_or(|keys| keys.contains(name))
                });
                in_blocks || keys.as_ref().is_some_and(|keys| keys.contains(path))
            }
        }
    }

    /// Whether the model's last block is chosen for certain: mlx-lm's names in blocks are looked for from there.
    pub fn reach_the_last_block(&self) -> bool {
        let Self::Mlx { keys, .. } = self else { return false };
        keys.as_ref().is_none_or(|keys| keys.iter().all(|key| in_block(key).is_none()))
    }

    /// Whether a module of the file lies in a block that is not chosen. Only mlx-lm's choice depends on the model's depth;
    /// PEFT's was held against the names in the file.
    pub fn leave_out(&self, path: &str, blocks: usize) -> bool {
        matches!(self, Self::Mlx { .. }) && !self.include(path, blocks)
    }
}

/// PEFT's keys `target_modules`, `exclude_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern`.
#[derive(Debug, Clone)]
pub struct Selection {
    pub targets: Names,
    pub exclude: Option<Names>,
    pub modules_to_save: Vec<String>,
    pub layers: Option<Layers>,
}

/// A list of names, each a whole path or the end of one, or a regular expression for whole paths.
#[derive(Debug, Clone)]
pub enum Names {
    AllLinear,
    Pattern(Regex),
    List(Vec<String>),
}

/// The blocks that a list of targets is restricted to.
#[derive(Debug, Clone)]
pub struct Layers {
    pub indices: BTreeSet<u64>,
    /// Each finds a block's number in a path; the first that finds one counts.
    pub patterns: Vec<Regex>,
}

impl Selection {
    pub fn include(&self, path: &str) -> bool {
        let saved = |name: &String| under(path, name);
        if self.exclude.as_ref().is_some_and(|names| names.include(path)) || self.modules_to_save.iter().any(saved) {
            return false;
        }
        match (&self.targets, &self.layers) {
            // Blocks restrict names that are ends of paths only.
            (Names::List(names), Some(layers)) => {
                let whole = names.iter().any(|name| name == path);
                whole || (self.targets.include(path) && layers.include(path))
            }
            _ => self.targets.include(path),
        }
    }
}

impl Names {
    /// Whether modules that a name ends may all be left out by these. A pattern can be held against whole paths only.
    pub fn may_exclude(&self, target: &str) -> bool {
        match self {
            Self::List(names) => names.iter().any(|name| ends_with(target, name)),
            Self::AllLinear | Self::Pattern(_) => true,
        }
    }

    pub fn include(&self, path: &str) -> bool {
        match self {
            // The output projection is a linear too, and left out by PEFT.
            Self::AllLinear => path != "lm_head",
            Self::Pattern(pattern) => pattern.is_match(path),
            Self::List(names) => names.iter().any(|name| ends_with(path, name)),
        }
    }
}

impl Layers {
    fn include(&self, path: &str) -> bool {
        let found = self.patterns.iter().find_map(|pattern| pattern.captures(path));
        let number = found.and_then(|found| found.get(1)?.as_str().parse().ok());
        number.is_some_and(|number: u64| self.indices.contains(&number))
    }
}

/// Whether a name is a path or ends it, in whole parts.
pub fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// Whether a path is a module that a name ends, or lies under it.
pub fn under(path: &str, name: &str) -> bool {
    format!(".{path}.").contains(&format!(".{name}."))
}

/// Whether a tensor belongs to a module that a name of `modules_to_save` ends: PEFT compares letters there, not parts, so that
/// `norm` names `input_layernorm` too.
pub fn saved(tensor: &str, name: &str) -> bool {
    tensor.contains(&format!("{name}."))
}

/// A regular expression that must match a whole path.
pub fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"\A(?:{pattern})\z"))
}

/// How PEFT reads a key of `rank_pattern` and `alpha_pattern`: as the end of a path, in whole parts.
pub fn ending(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"\A(.*\.)?({pattern})\z"))
}

/// What finds a block's number: the first number behind a name, or behind a name that fits the pattern.
pub fn numbered(pattern: Option<&str>) -> Result<Regex, regex::Error> {
    match pattern {
        None => Regex::new(r"\A.*?\.[^.]*\.(\d+)\."),
        Some(pattern) => Regex::new(&format!(r"\A(?:.*?\.)?(?:{pattern})\.(\d+)\.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "model.layers.1.self_attn.q_proj";

    fn list(names: &[&str]) -> Selection {
        let targets = Names::List(names.iter().map(|name| name.to_string()).collect());
        Selection { targets, exclude: None, modules_to_save: Vec::new(), layers: None }
    }

    fn layers(indices: &[u64], pattern: Option<&str>) -> Option<Layers> {
        Some(Layers { indices: indices.iter().copied().collect(), patterns: vec![numbered(pattern).unwrap()] })
    }

    #[test]
    fn a_list_names_ends_in_whole_parts() {
        assert!(list(&["q_proj"]).include(PATH) && list(&["self_attn.q_proj"]).include(PATH));
        assert!(!list(&["proj"]).include(PATH) && !list(&["q_proj", "k_proj"]).include("model.layers.1.mlp.up_proj"));
        let excluded = Selection { exclude: Some(Names::Pattern(whole(r".*\.1\..*").unwrap())), ..list(&["q_proj"]) };
        assert!(!excluded.include(PATH) && excluded.include("model.layers.0.self_attn.q_proj"));
        let saved = Selection { modules_to_save: vec!["self_attn".into()], ..list(&["q_proj"]) };
        assert!(!saved.include(PATH));
    }

    #[test]
    fn blocks_restrict_ends_and_not_whole_paths() {
        let of = |indices: &[u64], pattern| Selection { layers: layers(indices, pattern), ..list(&["q_proj"]) };
        assert!(of(&[1], None).include(PATH) && !of(&[0], None).include(PATH));
        assert!(of(&[1], Some("layers")).include(PATH) && !of(&[1], Some("h")).include(PATH));
        assert!(Selection { layers: layers(&[0], None), ..list(&[PATH]) }.include(PATH));
    }

    #[test]
    fn a_pattern_matches_a_whole_path() {
        let of = |pattern| Selection { targets: Names::Pattern(whole(pattern).unwrap()), ..list(&[]) };
        assert!(of(r".*\.(q|v)_proj").include(PATH) && !of("q_proj").include(PATH) && !of(".*self_attn").include(PATH));
        assert!(ending("q_proj").unwrap().is_match(PATH) && !ending("proj").unwrap().is_match(PATH));
    }

    #[test]
    fn mlx_counts_blocks_from_the_last() {
        let of = |keys: Option<&[&str]>, num_layers| Targets::Mlx {
            keys: keys.map(|keys| keys.iter().map(|key| key.to_string()).collect()),
            num_layers,
        };
        assert!(of(Some(&["self_attn.q_proj"]), 1).include(PATH, 2));
        assert!(!of(Some(&["self_attn.q_proj"]), 1).include(PATH, 3) && !of(Some(&["q_proj"]), 1).include(PATH, 2));
        assert!(of(Some(&["self_attn.q_proj"]), -1).include(PATH, 99) && of(None, 0).include(PATH, 99));
        assert!(of(Some(&[PATH]), 1).include(PATH, 99) && !of(Some(&[]), -1).include(PATH, 2));
    }
}
