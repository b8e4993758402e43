"""`pretrain validate CHECKPOINT`: the validation loss of a checkpoint of a run, on the run's sets or on others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.errors import EXIT_OK, DataError

if TYPE_CHECKING:
    from lit_gpt.checkpoint import TrainingCheckpoint
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class SetLoss:
    """What was measured on one validation set."""

    checkpoint: str
    step: int
    set: str
    loss: float
    """Nats per token."""
    stderr: float | None
    bpb: float | None
    """Bits per byte of text; None where that is not known."""
    n: int
    """Tokens."""
    limited: bool


def validate(path: str | Path, flags: Sequence[str] = ()) -> list[SetLoss]:
    """Measure a checkpoint in training form, or the last one of a run, on every validation set.

    flags: settings of its run to replace, e.g. ["--data.validation", "other/data"].

    Raises:
        ValueError: bad settings, or no validation data. DataError, OSError: a damaged or missing file.
    """
    from lit_gpt.checkpoint import read_training

    found = _newest_valid(Path(path))
    checkpoint = read_training(found, verify=found == Path(path))
    return _measure(str(found), checkpoint, _settings(checkpoint, flags))


def _newest_valid(path: Path) -> Path:
    """A checkpoint itself; of a run the one that training would take up at.

    Raises:
        DataError: there is none.
    """
    from lit_gpt.atomic import MANIFEST
    from lit_gpt.checkpoint import latest

    if not path.is_dir() or (path / MANIFEST).exists():
        return path

    def warn(skipped: Path, reason: str) -> None:
        sys.stderr.write(f"warning: {skipped} is passed over: {reason}\n")

    found = latest(path / "checkpoints", deep=True, on_skip=warn)
    if found is None:
        raise DataError(f"{path} holds no valid checkpoint; give a checkpoint, or a run that has saved one")
    return found


def _settings(checkpoint: TrainingCheckpoint, flags: Sequence[str]) -> RunConfig:
    """Those of the run that wrote the checkpoint, with some replaced."""
    from lit_gpt.settings_files import merge
    from pretrain.command_line import config_of, normalise, settings_of, split_arguments

    _, replaced, _ = split_arguments(normalise(list(flags)))
    return config_of(merge(checkpoint.state["run_config"], settings_of(replaced)))


def _measure(name: str, checkpoint: TrainingCheckpoint, config: RunConfig) -> list[SetLoss]:
    from lit_gpt.config import Config
    from lit_gpt.counts import parse_token_count
    from pretrain.config import ParallelConfig
    from pretrain.corpus import read_corpus
    from pretrain.data import open_validation_sets
    from pretrain.evaluate import evaluate
    from pretrain.parallel import build_model, choose_compute, launch
    from pretrain.world import ALONE

    model_config = Config(**checkpoint.state["model_config"])
    corpus = read_corpus(config.data, look_beside=config.model.vocab_size is None)
    sets, _ = open_validation_sets(config.data, model_config, corpus, separator_id=checkpoint.state.get("separator_id"))
    if not sets:
        raise ValueError("there is no validation data beside the training data; give --data.validation DIR")
    device = launch(config, ALONE).device
    compute = choose_compute(config, device, total_tokens=0)  # nothing is trained that would repay compiling
    model = build_model(model_config, checkpoint.model, compute, ParallelConfig(), ALONE, device=device)
    limit = config.validation.max_tokens
    max_tokens = None if limit is None else parse_token_count(limit)
    measured = []
    for each in sets:
        found = evaluate(model, each, config.batch.micro_batch_size, max_tokens, device)
        assert found is not None, "nobody interrupts it"
        values = (found.nats_per_token, found.stderr, found.bits_per_byte, found.n_tokens, found.limited)
        measured.append(SetLoss(name, checkpoint.state["step_count"], each.name, *values))
    return measured


def describe(found: SetLoss) -> str:
    stderr = "" if found.stderr is None else f" (standard error {found.stderr:.4f})"
    bpb = "" if found.bpb is None else f", {found.bpb:.4f} bits per byte"
    part = " of the set's start" if found.limited else ""
    return f"{found.set}: {found.loss:.4f} nats per token{stderr}{bpb}, {found.n:,} tokens{part}, step {found.step:,}"


def main(argv: Sequence[str]) -> int:
    """Run what follows `pretrain validate`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pretrain validate",
        description="The validation loss of a checkpoint, on the sets of its run.",
        epilog="Settings of its run may be replaced: --data.validation DIR, --validation.max-tokens 1M, --device cpu.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="one in training form, or a run (its last one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args, flags = parser.parse_known_args(argv)
    found = validate(args.checkpoint, flags)
    if args.json:
        sys.stdout.write(json.dumps({"sets": [asdict(each) for each in found]}, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{describe(each)}\n" for each in found))
    return EXIT_OK
