"""transformers' provider: `LlamaForCausalLM` with `sdpa`, torch's fused AdamW, clipping, on given weights and tokens.

    python train_transformers.py FOLDER STEPS --dtype autocast|bfloat16|float32 [--compile]

`autocast`: float32 parameters, matrix products in bfloat16; `bfloat16`: parameters and optimizer state in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from step_log import StepLog  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Take the steps."""
    log = StepLog()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--dtype", choices=("autocast", "bfloat16", "float32"), required=True)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    settings = json.loads((arguments.folder / "settings.json").read_text())
    model = build(arguments.folder, torch.bfloat16 if arguments.dtype == "bfloat16" else torch.float32)
    optimizer = adamw(model, settings["optimizer"])
    forward: Any = torch.compile(model) if arguments.compile else model
    tokens = torch.from_numpy(np.load(arguments.folder / "tokens.npy").astype(np.int64))
    for step in range(arguments.steps):
        inputs, targets = tokens[step, :, :-1].contiguous(), tokens[step, :, 1:].contiguous()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.dtype == "autocast"):
            # The targets are shifted already.
            out = forward(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["optimizer"]["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.step(out.loss.item())
        del out
    log.end()


def build(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of `model.json` with the weights of `weights.safetensors`."""
    config = json.loads((folder / "model.json").read_text())
    settings: Any = LlamaConfig  # its annotations leave out what it takes
    architecture: Any = LlamaForCausalLM
    model = architecture(
        settings(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            num_key_value_heads=config["kv_heads"],
            head_dim=config["head_dim"],
            max_position_embeddings=config["max_sequence_length"],
            rms_norm_eps=config["norm_eps"],
            rope_theta=config["rotary_base"],
            tie_word_embeddings=config["tied_embeddings"],
            attn_implementation="sdpa",
        )
    ).to(dtype)
    missing, unexpected = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    trained: torch.nn.Module = model.train()
    return trained


def adamw(model: torch.nn.Module, settings: dict[str, Any]) -> torch.optim.AdamW:
    """Fused AdamW; matrices are decayed, the embedding and the norms are not."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim >= 2 and "embed" not in name]
    plain = [p for name, p in named if p.ndim < 2 or "embed" in name]
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": plain, "weight_decay": 0.0},
    ]
    rates = {"lr": settings["learning_rate"], "betas": settings["betas"], "eps": settings["eps"]}
    return torch.optim.AdamW(groups, **rates, fused=True)


if __name__ == "__main__":
    main()
