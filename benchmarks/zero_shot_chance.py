"""Random weights score as chance does: the seven tasks in full, on small models that nobody has trained.

Run `python -m benchmarks.zero_shot_chance`; it writes results/zero_shot_chance.json. It needs LIT_GROW_DATA, or --data,
a folder of evaluation data (docs/evaluation.md), and --tokenizer, one of few tokens, so that a model's head is cheap.
Chance is 28.6 %. Untrained models of 70 M to 6.9 B parameters scored 27.8 to 28.7 (EleutherAI's published Pythia at
step 0): single tasks are off by more, as short and long answers are not equally likely to be right.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.evaluation import add_data
from benchmarks.machine import describe
from benchmarks.result_files import RESULTS, add_out, write_result
from grow.scores import AVERAGED
from lit_gpt.config import Config
from lit_gpt.model import GPT, init_weights
from lit_gpt.tokenizer import Tokenizer
from pretrain.zero_shot.encoding import first_token
from pretrain.zero_shot.evaluator import evaluate_tasks
from pretrain.zero_shot.metrics import average
from pretrain.zero_shot.task import data_folder, find_tasks

RESULT = RESULTS / "zero_shot_chance.json"
LIMIT_POINTS = 2.0
SIZES = dict(n_layer=2, n_embd=64, n_head=4, n_query_groups=4, intermediate_size=176, block_size=2048)


def measure(seed: int, tokenizer: Tokenizer, data: Path | None) -> dict[str, Any]:
    """Scores of one model, in per cent."""
    model = GPT(Config(vocab_size=tokenizer.vocab_size, padded_vocab_size=tokenizer.vocab_size, **SIZES))
    init_weights(model, seed)
    model.requires_grad_(False)
    began = time.perf_counter()
    first = first_token(tokenizer, tokenizer.bos_id)
    scored = evaluate_tasks(model, tokenizer, find_tasks(list(AVERAGED)), data, first)
    scores = [score for each in scored for score in each.scores]
    mean = average(scores)
    assert mean is not None, "all seven were asked for"
    accuracies = {f"{each.task} {each.metric}": 100 * each.value for each in scores if each.chance is not None}
    return {
        "seed": seed,
        "average": 100 * mean.value,
        "stderr": 100 * (mean.stderr or 0.0),
        "chance": 100 * (mean.chance or 0.0),
        "documents": mean.n,
        "secs": time.perf_counter() - began,
        **accuracies,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser, "sp1000")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="models (%(default)s)")
    add_out(parser, RESULT)
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.tokenizer)
    results = []
    for seed in range(args.seeds):
        results.append(measure(seed, tokenizer, data_folder(args.data)))
        print(json.dumps({key: round(value, 2) for key, value in results[-1].items()}), flush=True)
    kept = all(abs(each["average"] - each["chance"]) < LIMIT_POINTS for each in results)
    record = {
        "command": f"python -m benchmarks.zero_shot_chance --data DIR --tokenizer PATH --seeds {args.seeds}",
        "what": f"the seven tasks in full on random weights, {SIZES['n_layer']} layers of width {SIZES['n_embd']}, "
        f"a tokenizer of {tokenizer.vocab_size} tokens",
        "limits": {"points_from_chance": LIMIT_POINTS, "kept": kept},
        "results": results,
        "machine": describe(),
    }
    write_result(args.out, record)
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
