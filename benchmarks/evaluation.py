"""Tokens per CPU-second of zero-shot evaluation: ours, the harness on our model, and the harness with transformers.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation

It needs LIT_GROW_DATA, or --data and --tokenizer, and for its peers the extra `eval`; without that, ours is measured
alone. One model of random weights scores the first documents of some tasks, from reading the files to the scores, in
turns. All three ways must come to the same scores. On a GPU tokens per second count. Results are added to
results/evaluation.json under their number of threads or their GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.result_files import RESULTS, add_out, add_result
from benchmarks.timing import circumstances, clock, device_key, find_device, in_turns, spread, spread_of_ratios
from lit_gpt.checkpoint import write_exchange
from lit_gpt.config import Config
from lit_gpt.model import GPT, InitialWeights, init_weights
from lit_gpt.tokenizer import Tokenizer
from pretrain.zero_shot.encoding import FirstToken, first_token
from pretrain.zero_shot.evaluator import evaluate_tasks, prepare
from pretrain.zero_shot.task import Task, data_folder, find_tasks

RESULT = RESULTS / "evaluation.json"
HARNESS = Path(__file__).resolve().parent.parent / "scripts" / "harness.py"
TASKS = ("lambada_openai", "arc_easy", "piqa", "sciq")
SIZES = dict(n_layer=8, n_embd=256, n_head=4, n_query_groups=4, intermediate_size=704, block_size=1024)
TINY = {**SIZES, "n_layer": 1, "n_embd": 32, "intermediate_size": 48}
GAP = 0.02  # of an accuracy, and relative of a perplexity: a tie that rounding decides moves one document
OURS, ADAPTED, ALONE = "ours", "the harness on our model", "the harness with transformers"

Scores = dict[str, float]
"""Task and metric -> value."""


@dataclass(frozen=True)
class Job:
    """What is evaluated."""

    model: GPT
    tokenizer: Tokenizer
    first: FirstToken
    tasks: list[Task]
    data: Path | None
    limit: int
    batch_size: int

    def tokens(self) -> int:
        """That the model reads, padding not counted."""
        size = self.model.config.block_size
        prepared = [prepare(task, self.data, self.tokenizer, self.first, size, self.limit) for task in self.tasks]
        return sum(len(row.tokens) - 1 for each in prepared for row in each.rows)

    def by_ours(self) -> Scores:
        settings = {"limit": self.limit, "batch_size": self.batch_size}
        return _values(evaluate_tasks(self.model, self.tokenizer, self.tasks, self.data, self.first, **settings))


def _values(scored: Sequence[Any]) -> Scores:
    return {f"{score.task} {score.metric}": score.value for each in scored for score in each.scores}


def ways(job: Job, tokenizer_path: str, folder: Path) -> tuple[dict[str, Callable[[], Scores]], dict[str, str]]:
    """Each way to the scores, ready to go, and those that cannot be gone, with the reason."""
    found: dict[str, Callable[[], Scores]] = {OURS: job.by_ours}
    if missing := [name for name in ("lm_eval", "datasets") if importlib.util.find_spec(name) is None]:
        why = f"not installed: {', '.join(missing)}; the extra `eval` brings it"
        return found, {ADAPTED: why, ALONE: why}
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # the harness is to look for nothing on the net
        os.environ.setdefault(variable, "1")
    harness = load_harness()
    adapted = harness.OwnModel(job.model, job.tokenizer, job.first, job.batch_size)
    found[ADAPTED] = lambda: _values(harness.run(adapted, job.tasks, job.data, limit=job.limit))
    if not (Path(tokenizer_path) / "tokenizer.json").is_file():
        return found, {ALONE: "transformers reads a tokenizer.json alone, and the tokenizer has none"}
    model = transformers_model(job, Path(tokenizer_path), folder)
    found[ALONE] = lambda: _values(harness.run(model, job.tasks, job.data, limit=job.limit))
    return found, {}


def load_harness() -> ModuleType:
    """The adapter behind `scripts/evaluate.py --harness`."""
    spec = importlib.util.spec_from_file_location("harness", HARNESS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["harness"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def transformers_model(job: Job, tokenizer: Path, folder: Path) -> Any:
    """The harness's own model class on the same weights and tokenizer."""
    from lm_eval.models.huggingface import HFLM

    described = folder / "tokenizer"
    shutil.copytree(tokenizer, described, copy_function=shutil.copyfile)
    described.chmod(0o755)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (described / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )
    config = job.model.config
    written = write_exchange(folder / "model", config, InitialWeights(config, 0), tokenizer_dir=described)
    settings = {"dtype": "float32", "batch_size": job.batch_size, "add_bos_token": job.first.id is not None}
    return HFLM(pretrained=str(written), device=job.model.lm_head.weight.device.type, **settings)


def check_alike(scores: dict[str, Scores]) -> None:
    """Refuse ways that do something else.

    Raises:
        RuntimeError: they come to other scores than ours.
    """
    for way, values in scores.items():
        for name, value in values.items():
            expected = scores[OURS][name]
            if abs(value - expected) > GAP * max(1.0, abs(expected)):
                raise RuntimeError(f"{name} is {value} by {way} and {expected} by {OURS}")


def make_job(args: argparse.Namespace, device: torch.device) -> Job:
    tokenizer = Tokenizer.load(args.tokenizer)
    vocab = {"vocab_size": tokenizer.vocab_size, "padded_vocab_size": tokenizer.vocab_size}
    model = GPT(Config(name="benchmark", **vocab, **(TINY if args.quick else SIZES)))
    init_weights(model, 0)
    model.requires_grad_(False).to(device)
    tasks, data = find_tasks(list(TASKS)), data_folder(args.data)
    first = first_token(tokenizer, tokenizer.bos_id)
    return Job(model, tokenizer, first, tasks, data, args.limit, args.batch_size)


def add_data(parser: argparse.ArgumentParser, tokenizer: str) -> None:
    """`--data` and `--tokenizer`, by default what is under $LIT_GROW_DATA; without that the latter is required."""
    folder = os.environ.get("LIT_GROW_DATA")
    default = None if folder is None else str(Path(folder, "tokenizers", tokenizer))
    parser.add_argument("--data", metavar="DIR", help="evaluation files (default: evals in $LIT_GROW_DATA)")
    what = f"a file, a folder, or `bytes` (default: tokenizers/{tokenizer} in $LIT_GROW_DATA)"
    parser.add_argument("--tokenizer", metavar="PATH", default=default, required=default is None, help=what)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data(parser, "llama2")
    parser.add_argument("--limit", type=int, default=50, help="documents of each task (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at a time (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="timed evaluations by every way (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two documents, two turns")
    add_out(parser, RESULT, unless_quick=True)
    args = parser.parse_args(arguments)
    if args.quick:
        args.limit, args.turns = 2, 2
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    device = find_device(args.device)
    job, by = make_job(args, device), clock(device)
    tokens = job.tokens()
    with tempfile.TemporaryDirectory() as folder:
        found, absent = ways(job, args.tokenizer, Path(folder))
        scores = {name: way() for name, way in found.items()}  # the first time loads what it loads
        check_alike(scores)
        samples = in_turns(found, args.turns, device)
    secs = {name: [getattr(each, by) for each in samples[name]] for name in found}
    result = {
        "command": f"python -m benchmarks.evaluation --limit {args.limit} --turns {args.turns}",
        "what": f"{', '.join(TASKS)}, {args.limit} documents each, on random weights, fp32",
        **circumstances(device, args.turns),
        "shape": {"n_layer": job.model.config.n_layer, "n_embd": job.model.config.n_embd},
        "vocab_size": job.tokenizer.vocab_size,
        "batch_size": args.batch_size,
        "tokens": tokens,
        "tokens_per_sec": {name: spread([tokens / each for each in times]) for name, times in secs.items()},
        "ours_over": {name: spread_of_ratios(times, secs[OURS]) for name, times in secs.items() if name != OURS},
        "absent": absent,
        "scores": scores,
    }
    print_table(result)
    if args.out or not args.quick:
        add_result(args.out or RESULT, device_key(device), result)
    return 0


def print_table(result: dict[str, Any]) -> None:
    unit = "CPU-second" if result["clock"] == "cpu_secs" else "second"
    for name, rate in result["tokens_per_sec"].items():
        spreads = f"({rate['q1']:,.0f} - {rate['q3']:,.0f})"
        ratio = result["ours_over"].get(name)
        more = "" if ratio is None else f"; ours is {ratio['median']:.2f} times as fast"
        print(f"{name}: {rate['median']:,.0f} tokens per {unit} {spreads}{more}")
    for name, why in result["absent"].items():
        print(f"{name} left out: {why}")


if __name__ == "__main__":
    raise SystemExit(main())
