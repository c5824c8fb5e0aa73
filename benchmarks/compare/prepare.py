"""What all providers start from: the peers' environment, real text as tokens, and one set of initial weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from tilewright.benchmarks.compare.providers import REQUIREMENTS
from tilewright.benchmarks.compare.shapes import Shape
from tilewright.corpus import build_corpus, open_corpus
from tilewright.model import Transformer, initialise
from tilewright.model.config import ModelConfig
from tilewright.trainer.errors import TrainingError

CLONE = Path(__file__).resolve().parents[2]
SEED = 0
OPTIMIZER = {"learning_rate": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}


def peers_python(console: Console) -> Path:
    """The interpreter of the environment in `build/peers`, built anew where what it should hold has changed.

    Raises:
        TrainingError: pip failed.
    """
    folder = CLONE / "build" / "peers"
    python, marker = folder / "bin" / "python", folder / "installed"
    constraints = CLONE / "constraints.txt"
    wanted = hashlib.sha256(" ".join(REQUIREMENTS).encode() + constraints.read_bytes()).hexdigest()
    if marker.is_file() and marker.read_text() == wanted:
        return python
    console.print(f"installing {', '.join(REQUIREMENTS)} for the peers in {folder.relative_to(CLONE)}")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), *REQUIREMENTS],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise TrainingError(f"the peers' environment could not be built ({last}); mend that and try again")
    marker.write_text(wanted)
    return python


def model_config(shape: Shape) -> ModelConfig:
    """The model of a shape."""
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.heads,
        head_dim=shape.hidden_size // shape.heads,
        intermediate_size=shape.intermediate_size,
        max_sequence_length=shape.length,
        tied_embeddings=True,
    )


def prepare(folder: Path, shape: Shape, steps: int, console: Console) -> None:
    """Write into `folder` what the providers' scripts read: settings, model, tokens, and weights for `transformers`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    (folder / "settings.json").write_text(json.dumps({"seed": SEED, "optimizer": OPTIMIZER}))
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(config)))
    np.save(folder / "tokens.npy", tokens(shape, steps, console))
    from safetensors.torch import save_file

    save_file(transformers_weights(config), folder / "weights.safetensors")


def tokens(shape: Shape, steps: int, console: Console) -> np.ndarray:
    """(steps, sequences, length + 1) token ids of the Python standard library's source, in the order of the corpus."""
    # A vocabulary larger than what the text can teach would be filled with accidents; ids are what costs nothing here.
    vocabulary = min(shape.vocab_size, 32000)
    corpus_folder = CLONE / "data" / f"compare-{vocabulary}"
    build_corpus("stdlib", corpus_folder, vocab_size=vocabulary, console=console)
    row = shape.length + 1
    needed = steps * shape.sequences * row
    read = open_corpus(corpus_folder).train.read(0, needed)
    return np.asarray(read).reshape(steps, shape.sequences, row).astype(np.int32)


def transformers_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The initial values that the trainer draws, under the names of `LlamaForCausalLM`, fused projections split."""
    model = Transformer(config)
    initialise(model, SEED)
    weights = model.state_dict()
    named = {"model.embed_tokens.weight": weights["embedding.weight"], "model.norm.weight": weights["norm.weight"]}
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        heads = [config.heads, config.kv_heads, config.kv_heads]
        projections = weights[ours + "attention.qkv.weight"].split([n * config.head_dim for n in heads])
        named |= {f"{theirs}self_attn.{n}_proj.weight": w for n, w in zip("qkv", projections, strict=True)}
        gate, up = weights[ours + "mlp.gate_up.weight"].chunk(2)
        named |= {
            theirs + "self_attn.o_proj.weight": weights[ours + "attention.out.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": weights[ours + "mlp.down.weight"],
            theirs + "input_layernorm.weight": weights[ours + "attention_norm.weight"],
            theirs + "post_attention_layernorm.weight": weights[ours + "mlp_norm.weight"],
        }
    return {name: weight.detach().contiguous().clone() for name, weight in named.items()}
