"""A grown model in the hands of others: transformers loads it unaided, and the harness scores it as we do."""

from __future__ import annotations

import importlib

import pytest
import torch

from grow.apply import grow_checkpoint
from grow.operators import plan_growth
from lit_gpt.checkpoint import read_config
from lit_gpt.generate import load_for_inference
from lit_gpt.llama2c import to_exchange
from lit_gpt.tokenizer import Tokenizer
from pretrain.zero_shot.encoding import first_token
from pretrain.zero_shot.evaluator import evaluate_tasks
from pretrain.zero_shot.task import find_tasks

pytestmark = pytest.mark.eval

LIMIT = 20
TASKS = ("sciq", "piqa")


@pytest.mark.filterwarnings("default")  # the harness's own
def test_a_grown_model_loads_unaided_and_scores_the_same_here_and_there(root, tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    huggingface, transformers = pytest.importorskip("lm_eval.models.huggingface"), pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(root / "scripts"))
    harness = importlib.import_module("harness")
    evals = data_dir("evals")
    source = to_exchange(data_dir("checkpoints/stories260K"), tmp_path / "source")
    grown = tmp_path / "grown"
    grow_checkpoint(source, grown, plan_growth("stack", read_config(source), n_layer=10))
    tasks = find_tasks(TASKS)

    model = transformers.AutoModelForCausalLM.from_pretrained(grown)
    tokenizer = transformers.AutoTokenizer.from_pretrained(grown, add_bos_token=True)
    theirs = harness.run(
        huggingface.HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=4), tasks, evals, limit=LIMIT
    )

    own_tokenizer = Tokenizer.load(grown)
    first = first_token(own_tokenizer, own_tokenizer.bos_id)
    ours = evaluate_tasks(load_for_inference(grown, torch.float32), own_tokenizer, tasks, evals, first, limit=LIMIT)
    own, their = (
        [(score.task, score.metric, score.value) for each in found for score in each.scores] for found in (ours, theirs)
    )
    assert own == their
    assert all(0 < value < 1 for _, _, value in own)
