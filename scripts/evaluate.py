"""Zero-shot scores of any checkpoint: ours, a Hugging Face folder, or a file of TinyLlama or prts.

evaluate.py CKPT                                  the paper's seven tasks, HellaSwag and WikiText, in full
evaluate.py CKPT --tasks piqa,sciq --limit 100    some of them, on their first documents
evaluate.py CKPT --harness                        the same by lm-evaluation-harness, which the extra `eval` brings
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion_command import dashed
from loading import find_device, find_first_id, find_tokenizer, own_words

from lit_gpt.errors import run_command

if TYPE_CHECKING:
    from lit_gpt.tokenizer import Tokenizer
    from pretrain.zero_shot.metrics import Score
    from pretrain.zero_shot.task import Task

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "float32": "float32", "bfloat16": "bfloat16"}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a folder, a .pth or .bin file, or a run")
    parser.add_argument(
        "--tasks", default="all", metavar="A,B", help="names; paper: the seven of its average; or all (%(default)s)"
    )
    parser.add_argument("--tasks-dir", type=Path, metavar="DIR", help="tasks of your own, one YAML file each")
    parser.add_argument("--data", metavar="DIR", help="evaluation files (default: evals in $LIT_GROW_DATA)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--harness", action="store_true", help="score with lm-evaluation-harness")
    parser.add_argument("--tokenizer", metavar="PATH", help="a file, a folder, or `bytes` (default: the checkpoint's)")
    parser.add_argument(
        "--first-id",
        metavar="ID",
        help="token before every text, `bos` or `none` (default: the one that separated documents, else bos where "
        "the tokenizer puts it)",
    )
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens read at a time (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="sequences at a time (%(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of weights and products (fp32)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the scores, as lines like evals.jsonl's")
    return parser.parse_args([dashed(argument) for argument in argv])


@dataclass(frozen=True)
class Report:
    """Turns scores into records, and writes them while the evaluation goes on."""

    common: dict[str, Any]
    """What `score_records` needs beside scores."""
    out: Path | None
    talks: bool
    """Whether a line on stderr says what is done."""
    records: list[dict[str, Any]]
    began: float

    def add(self, scores: Sequence[Score]) -> None:
        """Take the scores of one task."""
        from pretrain.evaluation_records import score_records

        new = score_records(scores=scores, **self.common)
        self.records.extend(new)
        if self.out is not None:
            append(self.out, "".join(json.dumps(record) + "\n" for record in new))
        if self.talks:
            secs = time.perf_counter() - self.began
            sys.stderr.write(f"{scores[0].task}: {scores[0].n} documents, {secs:.0f} s since the start\n")


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    _check(args)
    from pretrain.zero_shot.task import data_file, data_folder, find_tasks, names_in

    tasks = find_tasks(names_in(args.tasks), args.tasks_dir)
    data = data_folder(args.data)
    for task in tasks:
        data_file(task, data)  # refuses before a large model is read
    if args.out is not None:
        check_out(args.out)  # refuses before anything is computed
    scores, report = _evaluate(args, tasks, data)
    if args.json:
        print(json.dumps({"checkpoint": str(args.checkpoint), "scores": report.records}, indent=1))
    else:
        print("\n".join(table(scores)))
        print("\n".join(_notes(report.common, scores)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, and a harness that is not there."""
    for name in ("limit", "batch_size", "block_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not args.tasks.strip(", "):
        raise ValueError("--tasks names no task; leave it out for all")
    missing = [name for name in ("lm_eval", "datasets") if args.harness and util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--harness needs what is not installed: {', '.join(missing)}; "
            f"install the [eval] extra: pip install 'lit-grow[eval]'"
        )


def check_out(path: Path) -> None:
    """Refuse a file that could not be written, and leave everything as it was.

    Raises:
        OSError: it is a folder or may not be changed, or no file can be made where it would be.
    """
    if path.exists():
        path.open("ab").close()
        return
    folder = next(each for each in path.parents if each.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        error.filename = str(folder)
        raise


def append(path: Path, lines: str) -> None:
    """Put lines at the end of a file. It is opened each time: a run that is resumed meanwhile replaces its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read() == b"\n" else f"\n{lines}"  # behind half a line of a killed run
        file.write(lines.encode())


def _evaluate(args: argparse.Namespace, tasks: Sequence[Task], data: Path | None) -> tuple[list[Score], Report]:
    """Load the checkpoint and score the tasks; the average comes last, where there is one."""
    import torch

    from lit_gpt.checkpoint import find_checkpoint, manifest_sha256
    from lit_gpt.fingerprint import weights_sha256
    from lit_gpt.generate import load_for_inference
    from pretrain.evaluation_records import OWN_EVALUATOR, moment
    from pretrain.zero_shot.encoding import first_token
    from pretrain.zero_shot.evaluator import check_vocabulary, evaluate_tasks
    from pretrain.zero_shot.metrics import average

    path = find_checkpoint(args.checkpoint)
    state, _ = own_words(path)
    tokenizer = find_tokenizer(args.tokenizer, path, state)
    _warn_of_another_tokenizer(tokenizer, state)
    first = first_token(tokenizer, _first_id(args.first_id, tokenizer, state))
    device = find_device(args.device, torch.cuda.device_count())
    model = load_for_inference(path, getattr(torch, DTYPES[args.dtype]), device)
    check_vocabulary(tokenizer, model.config.padded_vocab_size, first.id)
    if args.block_size is not None and args.block_size > model.config.block_size:
        raise ValueError(f"--block-size {args.block_size} is above the model's, {model.config.block_size}")
    common = {
        "at": moment(state, "evaluate"),
        "checkpoint": manifest_sha256(path),
        "weights": weights_sha256(model.state_dict()),
        "first": first,
        "dtype": DTYPES[args.dtype],
        "evaluator": _harness().NAME if args.harness else OWN_EVALUATOR,
    }
    report = Report(common, args.out, not args.json, [], time.perf_counter())
    scores: list[Score] = []

    def take(found: Sequence[Score]) -> None:
        scores.extend(found)
        report.add(found)

    settings = {"block_size": args.block_size, "limit": args.limit, "batch_size": args.batch_size}
    run: Callable[..., Any] = _harness().evaluate_tasks if args.harness else evaluate_tasks
    run(model, tokenizer, tasks, data, first, **settings, on_task=lambda scored: take(scored.scores))
    mean = average(scores)
    if mean is not None:
        take([mean])
    return scores, report


def _harness() -> Any:
    """The adapter, imported where it is wanted: it loads the harness, which must not look for anything on the net."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import harness

    return harness


def _warn_of_another_tokenizer(tokenizer: Tokenizer, state: dict[str, Any]) -> None:
    """No error: one tokenizer may come as two files."""
    trained_with = (state.get("tokenizer") or {}).get("sha256")
    if trained_with not in (None, tokenizer.fingerprint):
        sys.stderr.write("warning: the tokenizer is another file than the one the checkpoint was trained with\n")


def _first_id(given: str | None, tokenizer: Tokenizer, state: dict[str, Any]) -> int | None:
    """As for generation, but a bos that the tokenizer itself would not put before a text is left out."""
    from pretrain.zero_shot.encoding import default_first_id

    if given is None:
        return default_first_id(tokenizer, state.get("separator_id"))
    return find_first_id(given, tokenizer, state)


def table(scores: Sequence[Score]) -> list[str]:
    """Lines of a table: accuracies in per cent; a mark where not all documents were scored."""
    from pretrain.zero_shot.metrics import shown

    rows = [("task", "metric", "value", "stderr", "chance", "n", "")]
    for score in scores:
        percent = score.chance is not None
        rows.append(
            (
                score.task,
                score.metric,
                shown(score.value, percent),
                "-" if score.stderr is None else shown(score.stderr, percent),
                "-" if score.chance is None else shown(score.chance, percent),
                f"{score.n:,}",
                "limited" if score.is_limited else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if i in (0, 1, 6) else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _notes(common: dict[str, Any], scores: Sequence[Score]) -> list[str]:
    first_id = common["first"].id
    first = "nothing" if first_id is None else f"token {first_id}"
    lines = [f"zero-shot by {common['evaluator']}, {common['dtype']}; {first} is put before every text"]
    if any(score.is_limited for score in scores):
        lines.append("limited: the first documents only; not to be compared with scores of whole sets")
    return lines


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
