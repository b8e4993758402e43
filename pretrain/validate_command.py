"""`pretrain validate CHECKPOINT`: the validation loss of a checkpoint of a run, on the run's sets or on others."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.errors import EXIT_OK

if TYPE_CHECKING:
    from torch import Tensor

    from lit_gpt.config import Config
    from pretrain.config import RunConfig


@dataclass(frozen=True)
class SetLoss:
    """What was measured on one validation set."""

    checkpoint: str
    step: int | None
    """None where nobody wrote it down."""
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
    """Measure a checkpoint, or the last one of a run, on every validation set.

    flags: settings of its run to replace, e.g. ["--data.validation", "other/data"]; one that no run wrote needs that.

    Raises:
        ValueError: bad settings, or no validation data. DataError, OSError: a damaged or missing file.
    """
    from lit_gpt.checkpoint import TRAINING, detect_form, find_checkpoint, read_config, read_exchange, read_training
    from lit_gpt.legacy import is_legacy

    found = find_checkpoint(path, deep=True)
    if is_legacy(found) or detect_form(found) != TRAINING:
        folder = read_exchange(found)
        return _measure(found, read_config(found), folder.weights, folder.provenance or {}, flags)
    checkpoint = read_training(found, verify=found == Path(path))
    return _measure(found, read_config(found), checkpoint.model, checkpoint.state, flags)


def _settings(state: Mapping[str, Any], flags: Sequence[str]) -> RunConfig:
    """Those of the run that wrote the checkpoint, with some replaced.

    Raises:
        ValueError: no run wrote it, and nobody says what to measure it on.
    """
    from lit_gpt.settings_files import merge
    from pretrain.command_line import config_of, normalise, settings_of, split_arguments
    from pretrain.origin import FROM_CHECKPOINT

    _, replaced, _ = split_arguments(normalise(list(flags)))
    given = settings_of(replaced)
    own = state.get("run_config")
    if own is None:
        data = given.get("data", {})
        measured_on = data.get("train", data.get("validation"))
        if measured_on is None:
            raise ValueError("this checkpoint does not say what data its run had; give --data.validation DIR")
        sizes = {"name": FROM_CHECKPOINT}
        own = {"out_dir": ".", "model": sizes, "stages": [{"name": "none", "max_steps": 1}]}
        own |= {"data": {"train": measured_on}}
    of_training = ("kernels", "fp8", "optimizer")  # and of the machine that trained it
    own = {key: value for key, value in own.items() if key not in of_training}
    return config_of(merge(own, given))


def _measure(
    path: Path, model_config: Config, weights: Mapping[str, Tensor], state: Mapping[str, Any], flags: Sequence[str]
) -> list[SetLoss]:
    from lit_gpt.counts import parse_token_count
    from pretrain.config import ParallelConfig
    from pretrain.corpus import read_corpus
    from pretrain.data import open_validation_sets
    from pretrain.evaluate import evaluate
    from pretrain.parallel import build_model, choose_compute, launch, with_kernels
    from pretrain.world import ALONE

    config = _settings(state, flags)
    corpus = read_corpus(config.data, look_beside=config.model.vocab_size is None)
    sets, _ = open_validation_sets(config.data, model_config, corpus, separator_id=state.get("separator_id"))
    if not sets:
        raise ValueError("there is no validation data beside the training data; give --data.validation DIR")
    device = launch(config, ALONE).device
    compute = choose_compute(config, device, total_tokens=0)  # nothing is trained that would repay compiling
    compute = with_kernels(compute, config, device, [model_config], state.get("separator_id"))
    model = build_model(model_config, weights, compute, ParallelConfig(), ALONE, device=device)
    limit = config.validation.max_tokens
    max_tokens = None if limit is None else parse_token_count(limit)
    measured = []
    for each in sets:
        found = evaluate(model, each, config.batch.micro_batch_size, max_tokens, device)
        assert found is not None, "nobody interrupts it"
        values = (found.nats_per_token, found.stderr, found.bits_per_byte, found.n_tokens, found.limited)
        measured.append(SetLoss(str(path), state.get("step_count"), each.name, *values))
    return measured


def describe(found: SetLoss) -> str:
    stderr = "" if found.stderr is None else f" (standard error {found.stderr:.4f})"
    bpb = "" if found.bpb is None else f", {found.bpb:.4f} bits per byte"
    part = " of the set's start" if found.limited else ""
    step = "" if found.step is None else f", step {found.step:,}"
    return f"{found.set}: {found.loss:.4f} nats per token{stderr}{bpb}, {found.n:,} tokens{part}{step}"


def main(argv: Sequence[str]) -> int:
    """Run what follows `pretrain validate`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pretrain validate",
        description="The validation loss of a checkpoint, on the sets of its run.",
        epilog="Settings of its run may be replaced: --data.validation DIR (needed where no run wrote it), "
        "--validation.max-tokens 1M, --device cpu.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="any checkpoint, or a run (its last one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args, flags = parser.parse_known_args(argv)
    found = validate(args.checkpoint, flags)
    if args.json:
        sys.stdout.write(json.dumps({"sets": [asdict(each) for each in found]}, indent=2) + "\n")
    else:
        sys.stdout.write("".join(f"{describe(each)}\n" for each in found))
    return EXIT_OK
