"""Eager training in fp32 on a CPU, to the bit: hashes of losses and weights that no change may move.

Another build of torch and another kind of CPU add up in other orders, so a hash belongs to one of them; elsewhere the
test is skipped, and tests/golden/test_losses.py compares with a tolerance. To add those of this machine, before a
change: `OMP_NUM_THREADS=1 python -m tests.golden.test_bits`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from lit_gpt.axes import parameter_shapes
from lit_gpt.config import Config
from lit_gpt.kernels.products import cpu_multiplies_bf16
from lit_gpt.model import GPT
from tests.toys import toy_config, toy_tokens, toy_weights

HASHES = Path(__file__).with_name("bits.json")
STEPS = 5
# name: sizes, and whether documents are kept apart
MODELS: dict[str, tuple[Config, bool]] = {
    "grouped queries": (toy_config(n_embd=64, intermediate_size=96, block_size=32), False),
    "documents": (toy_config(n_embd=64, block_size=32), True),
    "head norms, tied, scaled": (
        toy_config(n_embd=64, qk_norm="head", tie_embeddings=True, embedding_scale=2.0, rotary_percentage=0.5),
        False,
    ),
    "full norms after, gelu, biases, window": (
        toy_config(
            n_query_groups=4,
            qk_norm="full",
            norm_placement="after",
            activation="gelu_tanh",
            qkv_bias=True,
            proj_bias=True,
            mlp_bias=True,
            sliding_window=5,
            sliding_layers=[True, False],
        ),
        False,
    ),
    "norms plus one": (toy_config(norm_plus_one=True, n_query_groups=1), False),
}


def machine() -> str:
    """What the order of sums depends on: the build of torch, the CPU, and what torch makes of it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    bf16 = "bf16" if cpu_multiplies_bf16() else "no bf16"
    return f"torch {torch.__version__.split('+')[0]}, {cpu}, {torch.backends.cpu.get_cpu_capability()}, {bf16}"


def digest_of(name: str) -> str:
    """Of the losses and the final weights of a few steps of AdamW."""
    config, apart = MODELS[name]
    model = GPT(config)
    model.load_state_dict(toy_weights(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    digest = hashlib.sha256()
    for step in range(STEPS):
        tokens = toy_tokens(config, n_rows=4, seed=step)
        loss = model(tokens[:, :-1], tokens[:, 1:], separator_id=0 if apart else None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        digest.update(loss.detach().numpy().tobytes())
    weights = model.state_dict()
    for parameter in parameter_shapes(config):
        digest.update(weights[parameter].numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_eager_fp32_on_a_cpu_keeps_its_bits(name):
    assert torch.get_num_threads() == 1
    known = json.loads(HASHES.read_text())
    if machine() not in known:
        pytest.skip(f"no hashes of {machine()!r}")
    assert digest_of(name) == known[machine()][name]


def main() -> None:
    known = json.loads(HASHES.read_text()) if HASHES.exists() else {}
    known[machine()] = {name: digest_of(name) for name in MODELS}
    HASHES.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
