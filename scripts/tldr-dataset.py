#!/usr/bin/env python3
"""Turns a checkout of tldr-pages into rows to fine-tune on: a sentence in, a shell command out.

    git clone --depth 1 https://github.com/tldr-pages/tldr
    python3 scripts/tldr-dataset.py tldr data/tldr

writes train.jsonl and valid.jsonl with {"prompt", "completion"}. Placeholders {{x}} become x, pairs of a short and a long
option the long one; rows over 160 characters are left out; no command of valid.jsonl is in train.jsonl.
The pages are (c) the tldr-pages team and contributors, CC BY 4.0.
"""

import json
import random
import re
import sys
from pathlib import Path

LONGEST = 160
TRAIN, VALID = 12_000, 600


def examples(page):
    """The page's command and its (description, command line) pairs."""
    lines = page.read_text(encoding="utf-8").splitlines()
    name = next(line[2:].strip() for line in lines if line.startswith("# "))
    description = None
    for line in lines:
        if line.startswith("- "):
            description = line[2:].strip().rstrip(":")
        elif description and line.startswith("`") and line.endswith("`"):
            yield name, description, command(line.strip("`"))
            description = None


def command(text):
    text = re.sub(r"\{\{\[([^|\]]+)\|([^\]]+)\]\}\}", lambda pair: pair[2], text)
    return re.sub(r"\{\{(.*?)\}\}", lambda placeholder: placeholder[1], text).replace("\\{\\{", "{{").replace("\\}\\}", "}}")


def clean(description):
    """Brackets mark mnemonic letters: [c]reate."""
    return re.sub(r"\[([a-zA-Z0-9-]{1,2})\]", r"\1", description).replace("`", "")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    pages = sorted((source / "pages").glob("*/*.md"))
    if not pages:
        sys.exit(f"{source}: has no pages/*/*.md; give the folder of a checkout of tldr-pages")
    rows = {}
    for page in pages:
        for name, description, line in examples(page):
            prompt = f"Write one shell command with `{name}`. {clean(description)}."
            if len(prompt) + len(line) <= LONGEST:
                rows.setdefault(name, {})[prompt] = line
    names = sorted(rows)
    random.Random(0).shuffle(names)
    valid, train = [], []
    for name in names:
        split = valid if len(valid) < VALID else train
        split += [{"prompt": prompt, "completion": line} for prompt, line in rows[name].items()]
    random.Random(1).shuffle(train)
    out.mkdir(parents=True, exist_ok=True)
    for path, split in [("train.jsonl", train[:TRAIN]), ("valid.jsonl", valid[:VALID])]:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        (out / path).write_text(text, encoding="utf-8")
        print(f"{out / path}: {text.count(chr(10))} rows")


main()
