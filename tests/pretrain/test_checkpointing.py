"""A run's folder of checkpoints beside checkpoints that share files with it."""

from __future__ import annotations

import torch

from grow.apply import grow_checkpoint, grow_weights
from grow.operators import plan_growth
from lit_gpt.checkpoint import read_training, verify
from pretrain.checkpointing import RunCheckpoints
from pretrain.config import CheckpointConfig
from pretrain.state import TrainState
from tests.toys import toy_config, toy_model, toy_tokens, toy_weights


def test_a_checkpoint_that_was_grown_by_links_outlives_the_one_its_run_removes(tmp_path):
    config = toy_config()
    model = toy_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpoints = RunCheckpoints(tmp_path / "run", CheckpointConfig(keep_last=1), {"model_config": config.to_dict()})
    checkpoints.save(model, optimizer, TrainState(step_count=1))
    parent = checkpoints.last
    plan = plan_growth("stack", config, factor=2)
    grow_checkpoint(parent, tmp_path / "grown", plan)
    shared = [file for file in (tmp_path / "grown").iterdir() if file.stat().st_nlink == 2]

    tokens = toy_tokens(config)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    checkpoints.save(model, optimizer, TrainState(step_count=2))

    assert not parent.exists() and shared and all(file.stat().st_nlink == 1 for file in shared)
    assert verify(tmp_path / "grown") == [] == verify(checkpoints.last)
    grown = read_training(tmp_path / "grown").model
    for name, weight in grow_weights(plan, toy_weights(config)).items():
        assert torch.equal(grown[name], weight), name
