#!/usr/bin/env python3
"""The parts of check-ecosystem.sh that run in Python: a model, adapters made by PEFT and by mlx-lm, and the logits of both.

    ecosystem.py model FOLDER                  writes FOLDER/model and FOLDER/data
    ecosystem.py peft-make MODEL FOLDER        adapters by PEFT, in f32 with B not zero; alpha is never the rank
    ecosystem.py mlx-make MODEL FOLDER         adapters by mlx-lm
    ecosystem.py peft-logits MODEL OUT [ADAPTER...]   OUT/NAME.json for each adapter, or for the model itself
    ecosystem.py mlx-logits MODEL OUT [ADAPTER...]
    ecosystem.py compare ONE OTHER [WORD]      differences of two files of logits; WORD `differ` wants them to differ
    ecosystem.py tokens                        the tokens whose logits are compared
"""

import json
import pathlib
import shutil
import sys
import warnings

TOKENS = [3, 17, 5, 88, 42, 61, 9, 30, 77, 12]
TOLERANCE = 1e-4
FIXTURE = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "llama"


def make_model(folder):
    """The fixture with a tokenizer of whole words, and rows to train on."""
    model, data = folder / "model", folder / "data"
    model.mkdir(parents=True)
    data.mkdir()
    shutil.copy(FIXTURE / "model.safetensors", model)
    config = json.loads((FIXTURE / "config.json").read_text())
    # mlx-lm reads the keys of older files, and the others do too.
    rope = config.pop("rope_parameters")
    config |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    (model / "config.json").write_text(json.dumps(config, indent=1))
    words = ["<unk>", "<s>", "</s>"] + [f"w{number}" for number in range(3, config["vocab_size"])]
    added = [dict(id=i, content=word, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for i, word in enumerate(words[:3])]
    tokenizer = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                     pre_tokenizer=dict(type="WhitespaceSplit"), post_processor=None, decoder=None,
                     model=dict(type="WordLevel", vocab={word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "tokenizer_config.json").write_text(json.dumps(dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")))
    rows = [" ".join(f"w{3 + (7 * row + 5 * i) % 90}" for i in range(12)) for row in range(12)]
    (data / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def write_logits(out, name, logits):
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"tokens": TOKENS, "logits": logits}))


def load_torch(model):
    import torch
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


def peft_make(model, folder):
    import peft
    import torch
    both = ["q_proj", "v_proj", "up_proj", "down_proj"]
    kinds = {
        "lora": dict(r=4, lora_alpha=10, target_modules=both),
        "rslora": dict(r=4, lora_alpha=3, target_modules=both, use_rslora=True),
        "all-linear": dict(r=3, lora_alpha=7, target_modules="all-linear"),
        "regex": dict(r=3, lora_alpha=7, target_modules=r".*\.(q|down)_proj"),
        "patterns": dict(r=4, lora_alpha=10, target_modules=both, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6},
                         alpha_pattern={"model.layers.0.self_attn.v_proj": 3, "down_proj": 5}),
        "rslora-patterns": dict(r=4, lora_alpha=10, target_modules=both, use_rslora=True, rank_pattern={"q_proj": 2},
                                alpha_pattern={"down_proj": 5}),
        "layers": dict(r=4, lora_alpha=6, target_modules=both, layers_to_transform=[1], exclude_modules=["v_proj"]),
        "dora": dict(r=4, lora_alpha=10, target_modules=both, use_dora=True),
        "saved": dict(r=4, lora_alpha=10, target_modules=both, modules_to_save=["norm"]),
        # What these take from the base's weights is written as further ranks (path_initial_model_for_weight_conversion).
        "pissa": dict(r=3, lora_alpha=7, target_modules=both, init_lora_weights="pissa"),
        "olora": dict(r=3, lora_alpha=7, target_modules=both, init_lora_weights="olora", use_rslora=True),
        # The model's head is tied to its embedding.
        "saved-head": dict(r=4, lora_alpha=10, target_modules=both, modules_to_save=["lm_head"]),
        "saved-embedding": dict(r=4, lora_alpha=10, target_modules=both, use_dora=True, modules_to_save=["embed_tokens"]),
    }
    for seed, (name, kind) in enumerate(kinds.items()):
        generator = torch.Generator().manual_seed(seed)
        adapted = peft.get_peft_model(load_torch(model), peft.LoraConfig(task_type="CAUSAL_LM", **kind))
        taken, saving = kind.get("init_lora_weights"), {}
        if taken:
            start = folder.parent / "starts" / name
            # So that PEFT takes nothing when it reads what there was at the start.
            adapted.peft_config["default"].init_lora_weights = True
            adapted.save_pretrained(start)
            adapted.peft_config["default"].init_lora_weights = taken
            saving = dict(path_initial_model_for_weight_conversion=str(start))
        with torch.no_grad():
            for key, value in adapted.named_parameters():
                if taken and "lora_" in key:
                    value.add_(torch.randn(value.shape, generator=generator) * 0.1)
                elif "lora_magnitude" in key or "modules_to_save" in key:
                    value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
                elif "lora_" in key:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        adapted.save_pretrained(folder / name, **saving)


def peft_logits(model, out, adapters):
    import peft
    import torch
    # PEFT warns of keys that are missing in a file or in the model.
    warnings.filterwarnings("error", category=UserWarning)
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
    for adapter in adapters or [None]:
        base = load_torch(model)
        adapted = peft.PeftModel.from_pretrained(base, adapter).eval() if adapter else base
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([TOKENS])).logits[0]
        write_logits(out, pathlib.Path(adapter).name if adapter else model.name, logits.tolist())


def load_mlx(model):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    # The CPU's products; a GPU's are not in full f32.
    mx.set_default_device(mx.cpu)
    return load_model(model)[0]


def mlx_make(model, folder):
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    keys = ["self_attn.q_proj", "mlp.down_proj"]
    kinds = {
        "mlx-lora": dict(num_layers=2, lora_parameters=dict(rank=4, scale=2.5, dropout=0.0, keys=keys)),
        "mlx-last": dict(num_layers=1, lora_parameters=dict(rank=3, scale=1.7, dropout=0.0, keys=keys)),
        "mlx-all-keys": dict(num_layers=-1, lora_parameters=dict(rank=2, scale=3.0, dropout=0.0)),
        "mlx-dora": dict(num_layers=2, fine_tune_type="dora", lora_parameters=dict(rank=4, scale=2.5, dropout=0.0, keys=keys)),
    }
    for seed, (name, kind) in enumerate(kinds.items()):
        mx.random.seed(seed)
        adapted = load_mlx(model)
        adapted.freeze()
        dora = kind.get("fine_tune_type") == "dora"
        linear_to_lora_layers(adapted, kind["num_layers"], kind["lora_parameters"], use_dora=dora)
        tensors = dict(tree_flatten(adapted.trainable_parameters()))
        for key, value in tensors.items():
            spread = 1 + 0.3 * mx.random.uniform(shape=value.shape)
            tensors[key] = value * spread if key.endswith(".m") else mx.random.normal(value.shape) * 0.1
        out = folder / name
        out.mkdir(parents=True)
        mx.save_safetensors(str(out / "adapters.safetensors"), tensors)
        (out / "adapter_config.json").write_text(json.dumps(dict(fine_tune_type="lora", model=str(model), iters=1) | kind))


def mlx_logits(model, out, adapters):
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    for adapter in adapters or [None]:
        adapted = load_mlx(model)
        if adapter:
            adapted = load_adapters(adapted, adapter)
        adapted.eval()
        logits = adapted(mx.array([TOKENS]))[0]
        write_logits(out, pathlib.Path(adapter).name if adapter else model.name, logits.tolist())


def compare(one, other, word=None):
    (one_rows, other_rows) = (json.loads(pathlib.Path(path).read_text())["logits"] for path in (one, other))
    if len(one_rows) != len(other_rows):
        sys.exit(f"{one} has {len(one_rows)} rows and {other} {len(other_rows)}")
    pairs = [pair for rows in zip(one_rows, other_rows) for pair in zip(*rows, strict=True)]
    far, largest = max(abs(x - y) for x, y in pairs), max(abs(x) for x, _ in pairs)
    short = [f"{path.parent.name}/{path.stem}" for path in map(pathlib.Path, (one, other))]
    print(f"{far / largest:9.2e}  {short[0]}  {short[1]}")
    # Not NaN, and not below: a comparison with NaN is false.
    if (far / largest > 10 * TOLERANCE) if word == "differ" else (far / largest <= TOLERANCE):
        return
    sys.exit(f"{one} and {other} {'are the same' if word else 'differ'}")


def main():
    command, *args = sys.argv[1:]
    paths = [pathlib.Path(arg) for arg in args[:2]]
    match command:
        case "model":
            make_model(paths[0])
        case "peft-make":
            peft_make(*paths)
        case "mlx-make":
            mlx_make(*paths)
        case "peft-logits":
            peft_logits(*paths, args[2:])
        case "mlx-logits":
            mlx_logits(*paths, args[2:])
        case "compare":
            compare(*args)
        case "tokens":
            print(*TOKENS)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
