"""Attention within documents: what a run's losses are with and without it, and that no run drifts into or out of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_gpt.checkpoint import latest
from lit_gpt.model import GPT, init_weights
from pretrain.command_line import Invocation, config_of
from pretrain.preflight import preflight
from tests.pretrain.conftest import write_prepared
from tests.pretrain.test_continue import cut_back_to, records

SEPARATOR = 2


def write_documents(folder: Path, separator_id: int = SEPARATOR) -> Path:
    """A prepared folder of documents of five tokens, so that every sample holds several."""
    tokens = np.random.default_rng(0).integers(3, 259, 2000)
    tokens[4::5] = SEPARATOR
    path = write_prepared(folder, tokens) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "separator_id": separator_id}))
    return folder


@pytest.fixture
def masked(settings, tmp_path) -> dict[str, object]:
    """Settings of a run of three steps that saves after each."""
    changes = {
        "data": {"train": str(write_documents(tmp_path / "documents")), "document_mask": True},
        "stages": [{"name": "main", "n_layer": 1, "max_steps": 3}],
        "checkpoints": {"every_steps": 1, "keep_last": 9},
        "validation": {"every_steps": 0, "max_tokens": 32},
    }
    return {**settings, **changes}


@pytest.mark.parametrize("is_masked", [False, True])
def test_the_loss_is_that_of_a_model_that_sees_whole_samples_or_single_documents(
    masked, pretrain, batches_of, is_masked
):
    """Of the first step to the bit. What the model makes of a separator is tested with the model."""
    masked["data"]["document_mask"] = is_masked
    result = pretrain(masked)
    assert result.returncode == 0, result.stderr
    assert ("token 2 ends each" in result.stdout) == is_masked
    plan = preflight(Invocation(config_of(masked), fresh=True))
    model = GPT(plan.stages[0].config)
    init_weights(model, plan.config.seed)
    seen = {"separator_id": SEPARATOR} if is_masked else {}

    first, second = (torch.from_numpy(rows) for rows in batches_of[:2])
    losses = [model(rows[:, :-1], rows[:, 1:], **seen).detach() / 2 for rows in (first, second)]
    assert records(masked)[0]["loss"] == float(losses[0] + losses[1])

    held_out = torch.from_numpy(plan.validation[0].read(np.arange(2))[0])
    nats = model(held_out[:, :-1], held_out[:, 1:], reduction="none", **seen).double().mean()
    assert records(masked, "evals.jsonl")[0]["value"] == pytest.approx(float(nats), rel=1e-9)


def test_a_masked_run_resumes_to_the_bit(masked, pretrain):
    assert pretrain(masked).returncode == 0
    losses = [record["loss"] for record in records(masked)]
    cut_back_to(masked, 1)
    assert pretrain(masked).returncode == 0
    assert [record["loss"] for record in records(masked)] == losses


def test_a_run_neither_begins_nor_ends_to_mask_in_mid_course(masked, pretrain):
    assert pretrain(masked).returncode == 0
    cut_back_to(masked, 1)
    masked["data"]["document_mask"] = False
    result = pretrain(masked)
    assert (result.returncode, "data.document_mask: True in the checkpoint, False now" in result.stderr) == (2, True)


def test_documents_that_end_otherwise_than_before_are_refused_on_resume(masked, pretrain, tmp_path):
    assert pretrain(masked).returncode == 0
    cut_back_to(masked, 1)
    write_documents(tmp_path / "documents", separator_id=3)
    result = pretrain(masked)
    assert result.returncode == 2
    assert "were ended by token 2, now they are by token 3" in result.stderr


def test_a_run_that_starts_from_one_that_saw_otherwise_says_so(masked, pretrain, tmp_path):
    assert pretrain(masked).returncode == 0
    parent = latest(Path(masked["out_dir"]) / "checkpoints")
    data = {"train": masked["data"]["train"]}
    result = pretrain({**masked, "data": data, "init_from": str(parent), "out_dir": str(tmp_path / "next")})
    assert result.returncode == 0, result.stderr
    assert "init_from was trained with data.document_mask=True, this run is with False" in result.stderr
