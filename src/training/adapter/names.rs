//! Names of modules: what a file calls a module, and the path that it has in a model here.

/// The path in the model for a module's name in a file, which may lack PEFT's prefix or the model's, or name the text part of
/// a model of several.
pub fn path_of(key: &str) -> String {
    let key = key.strip_prefix("language_model.").unwrap_or(key);
    match key.strip_prefix("model.language_model.") {
        Some(rest) => format!("model.{rest}"),
        None if key.starts_with("layers.") => format!("model.{key}"),
        None => key.to_string(),
    }
}

/// A name in a PEFT file without the prefixes that PEFT's wrappers give it.
pub fn without_prefix(name: &str) -> &str {
    ["base_model.model.", "base_model."].iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
}

/// The block of a module and its name in it.
pub fn in_block(path: &str) -> Option<(usize, &str)> {
    let (layer, name) = path.split_once("layers.")?.1.split_once('.')?;
    Some((layer.parse().ok()?, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_comes_to_the_same_path() {
        for name in [
            "base_model.model.model.layers.3.mlp.up_proj",
            "base_model.model.layers.3.mlp.up_proj",
            "model.layers.3.mlp.up_proj",
            "layers.3.mlp.up_proj",
            "base_model.model.language_model.model.layers.3.mlp.up_proj",
            "base_model.model.model.language_model.layers.3.mlp.up_proj",
        ] {
            assert_eq!(path_of(without_prefix(name)), "model.layers.3.mlp.up_proj", "{name}");
        }
        assert_eq!(path_of(without_prefix("base_model.model.lm_head")), "lm_head");
        assert_eq!(path_of(without_prefix("base_model.model.model.embed_tokens")), "model.embed_tokens");
        assert_eq!(path_of(without_prefix("base_model.model.score")), "score");
        assert_eq!(in_block("model.layers.12.self_attn.q_proj"), Some((12, "self_attn.q_proj")));
        assert_eq!(in_block("lm_head"), None);
    }
}
