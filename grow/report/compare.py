"""Which models are compared with which, on what curve, and what came out: the numbers behind the headline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from grow.curves import (
    Curve,
    Speedup,
    default_window,
    loss_at,
    no_speedup,
    smooth,
    speedup,
    speedup_at,
    validation_curve,
)
from grow.runs.gather import Gathered
from grow.runs.trained_model import TrainedModel

ALONG = (0.6, 0.8)  # of the baseline's FLOPs: where the speed-up is given besides at the end


@dataclass(frozen=True)
class Comparison:
    """One grown model against the baseline."""

    grown: TrainedModel
    baseline: TrainedModel
    train: dict[str, Any]
    validation: dict[str, Any]
    same_data: bool
    """Whether both trained on the same data, as far as anybody knows."""


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a report, under one smoothing window."""

    window_tokens: float
    primary_curve: str
    """"train" or "validation"."""
    set_name: str | None
    """The validation set that stands in tables and figures."""
    pairs: tuple[Comparison, ...]
    """The headline's first."""
    reason: str | None
    """Why there is no pair."""

    @property
    def groups(self) -> list[tuple[Comparison, ...]]:
        """Pairs that differ in their seed alone, together; the headline's first."""
        groups: list[list[Comparison]] = []
        for pair in self.pairs:
            fitting = [group for group in groups if all(differ_in_seed(pair, other) for other in group)]
            if fitting:
                fitting[0].append(pair)
            else:
                groups.append([pair])
        return [tuple(group) for group in groups]

    def smoothed(self, model: TrainedModel) -> Curve:
        """A model's training losses in the common window; a shorter curve in one of its whole length."""
        return smooth(model.curve, min(self.window_tokens, model.curve.length_tokens))


def compare(gathered: Gathered) -> Comparisons:
    """Every grown model against the first baseline of its size, of its seed where there is one, or the first of all.

    The headline is the first run's growth, over all the seeds that it was repeated with. A model that continued a
    checkpoint is no baseline: it did not train from scratch.
    """
    grown, baselines = _headline_first(gathered.of_role("grown")), gathered.of_role("baseline")
    compared = [*grown, *baselines] or list(gathered.models)
    window = default_window([model.curve for model in compared]) if compared else 0.0
    pairs = tuple(_comparison(model, _baseline_of(model, baselines), window) for model in grown if baselines)
    return Comparisons(
        window_tokens=window,
        primary_curve=_primary_curve(pairs),
        set_name=_set_name(pairs, gathered.models),
        pairs=pairs,
        reason=None if pairs else _why_no_pair(gathered),
    )


def _baseline_of(grown: TrainedModel, baselines: Sequence[TrainedModel]) -> TrainedModel:
    """The first of its size, of its seed if there is one."""
    of_size = [model for model in baselines if model.parameters == grown.parameters] or baselines[:1]
    return next((model for model in of_size if grown.seed is not None and model.seed == grown.seed), of_size[0])


def differ_in_seed(one: Comparison, other: Comparison) -> bool:
    """Whether two comparisons are one experiment with two seeds, each between runs of its own seed."""
    seeds = [(pair.grown.seed, pair.baseline.seed) for pair in (one, other)]
    if None in seeds[0] or any(grown != baseline for grown, baseline in seeds) or seeds[0] == seeds[1]:
        return False
    pairs = ((one.grown, other.grown), (one.baseline, other.baseline))
    return all(_recipe(a) == _recipe(b) and have_same_data(a, b) for a, b in pairs)


def _recipe(model: TrainedModel) -> dict[str, Any]:
    """What made it, but for the seed and where it lies."""
    settings = {key: model.run_config[key] for key in model.run_config if key not in ("seed", "out_dir", "init_from")}
    grown = {"operator": model.operator, "factor": model.growth_factor, "after_tokens": model.grown_after_tokens}
    sizes = {"parameters": model.parameters, "tokens": model.tokens, "behind": model.behind.tokens}
    return {"settings": settings, "stage": model.stage, **grown, **sizes}


@dataclass(frozen=True)
class OverSeeds:
    """The speed-up of one experiment over several seeds."""

    seeds: tuple[int, ...]
    speedups: tuple[float | None, ...]
    """Of each; None where there is none."""
    mean: float
    """Of those that there are, two at least."""
    stderr: float
    """Standard error of the mean."""
    flops_saved: float
    """The mean share of the FLOPs from scratch."""
    lower_bound: bool
    """Whether one of them is a lower bound."""

    @property
    def n(self) -> int:
        """How many seeds have a speed-up."""
        return sum(each is not None for each in self.speedups)


def over_seeds(group: Sequence[Comparison], curve: str) -> OverSeeds | None:
    """Mean and standard error of a group's speed-ups on a curve, "train" or "validation"; None for fewer than two."""
    results = [getattr(pair, curve) for pair in group]
    known = [result for result in results if result["speedup"] is not None]
    if len(known) < 2:
        return None
    values = [result["speedup"] for result in known]
    return OverSeeds(
        seeds=tuple(pair.grown.seed or 0 for pair in group),
        speedups=tuple(result["speedup"] for result in results),
        mean=fmean(values),
        stderr=stdev(values) / sqrt(len(values)),
        flops_saved=fmean(result["flops_saved"] for result in known),
        lower_bound=any(result["lower_bound"] for result in known),
    )


def _headline_first(grown: Sequence[TrainedModel]) -> list[TrainedModel]:
    """A run that grew several times is represented by what it ended with; the hops between follow."""
    if not grown:
        return []
    first = [model for model in grown if model.run_dir == grown[0].run_dir][-1]
    return [first, *(model for model in grown if model is not first)]


def _why_no_pair(gathered: Gathered) -> str:
    left_out = f"; the notes say why {', '.join(gathered.left_out)} could not be taken" if gathered.left_out else ""
    return _what_is_missing(gathered) + left_out


def _what_is_missing(gathered: Gathered) -> str:
    grown, baselines, continued = (gathered.of_role(role) for role in ("grown", "baseline", "continued"))
    if not gathered.models:
        return "there is no run to compare here; give one that grew and one from scratch"
    if not grown and not baselines and not continued:
        return "there is only a base model here; train the run to its end, and one from scratch to compare it with"
    if not grown:
        return "no run in this report grew; give a run with growth, and one from scratch to compare it with"
    names = ", ".join(model.name for model in continued)
    but = f" ({names} began with the weights of a checkpoint)" if continued else ""
    return f"no run in this report trained from scratch{but}; give one to compare the grown model with"


def _primary_curve(pairs: Sequence[Comparison]) -> str:
    """Above one epoch a training loss also rewards memory, so the validation loss decides, where there is one."""
    models = [model for pair in pairs for model in (pair.grown, pair.baseline)]
    repeats = any(model.epochs is not None and model.epochs > 1 for model in models)
    measured = any(pair.validation["speedup"] is not None for pair in pairs)
    return "validation" if repeats and measured else "train"


def _set_name(pairs: Sequence[Comparison], models: Sequence[TrainedModel]) -> str | None:
    if pairs and pairs[0].validation["set"] is not None:
        return pairs[0].validation["set"]
    names = [evaluation.set for model in models for evaluation in model.evaluations]
    return names[0] if names else None


def _comparison(grown: TrainedModel, baseline: TrainedModel, window: float) -> Comparison:
    refusal = _differing_data(grown, baseline)
    train = _train_speedup(grown, baseline, window, refusal)
    return Comparison(grown, baseline, train, _validation_speedup(grown, baseline), same_data=refusal is None)


def _same_tokenizer(grown: TrainedModel, baseline: TrainedModel) -> bool:
    return grown.tokenizer == baseline.tokenizer or None in (grown.tokenizer, baseline.tokenizer)


def _differing_data(grown: TrainedModel, baseline: TrainedModel) -> str | None:
    """Why the training losses do not compare."""
    if have_same_data(grown, baseline):
        return None
    return f"{grown.name} and {baseline.name} were trained on different data, so their training losses do not compare"


def have_same_data(one: TrainedModel, other: TrainedModel) -> bool:
    """Whether two models were trained on the same data, as far as anybody knows."""
    ours, theirs = (_training_data(model, _same_tokenizer(one, other)) for model in (one, other))
    return ours == theirs or not ours or not theirs


def _training_data(model: TrainedModel, same_tokenizer: bool) -> set[tuple[str, str]]:
    """What identifies it: the token files, or, for another tokenizer's, the text they were made of, if known."""
    if same_tokenizer:
        return set(model.data_fingerprints.items())
    return {("text", said["corpus_sha256"]) for said in model.corpora.values() if said.get("corpus_sha256")}


def _train_speedup(grown: TrainedModel, baseline: TrainedModel, window: float, refusal: str | None) -> dict[str, Any]:
    if refusal:
        return {**_as_dict(no_speedup(refusal)), "window": window, "range": None, "along": []}
    result, *others = (
        speedup(smooth(grown.curve, tokens), smooth(baseline.curve, tokens))
        for tokens in (window, window / 2, window * 2)
    )
    values = [other.speedup for other in (result, *others) if other.speedup is not None]
    spread = [min(values), max(values)] if result.speedup is not None else None
    along = _along(smooth(grown.curve, window), smooth(baseline.curve, window))
    return {**_as_dict(result), "window": window, "range": spread, "along": along}


def _along(grown: Curve, baseline: Curve) -> list[dict[str, Any]]:
    """The speed-up at losses that the baseline had on its way."""
    budgets = [share * float(baseline.flops[-1]) for share in ALONG]
    losses = [loss_at(baseline, flops) for flops in budgets]
    return [_as_dict(speedup_at(grown, baseline, loss)) for loss in losses if loss is not None]


def _validation_speedup(grown: TrainedModel, baseline: TrainedModel) -> dict[str, Any]:
    set_name, refusal = _common_set(grown, baseline)
    curves = [validation_curve(model.evaluations, set_name or "") for model in (grown, baseline)]
    if refusal or None in curves:
        return {**_as_dict(no_speedup(refusal or "")), "window": None, "set": set_name, "points": None}
    points = {model.name: len(curve) for model, curve in zip((grown, baseline), curves, strict=True)}
    return {**_as_dict(speedup(*curves)), "window": None, "set": set_name, "points": points}


def _common_set(grown: TrainedModel, baseline: TrainedModel) -> tuple[str | None, str | None]:
    """The first validation set both were measured on in the same way, or None and why there is none."""
    ways = [{e.set: (e.data, e.limit) for e in model.evaluations if e.metric == "loss"} for model in (grown, baseline)]
    shared = [name for name in ways[0] if name in ways[1]]
    if not _same_tokenizer(grown, baseline):  # token files and limits in tokens differ, whatever the text
        same = [name for name in shared if ways[0][name][1] is ways[1][name][1] is None]
    else:
        same = [name for name in shared if ways[0][name] == ways[1][name]]
    if same:
        return same[0], None
    if shared:
        return None, f"the validation set {shared[0]!r} was not the same, or not as long, for both models"
    return None, f"{grown.name} and {baseline.name} have no validation set in common"


def _as_dict(result: Speedup) -> dict[str, Any]:
    flops = (result.flops_baseline, result.flops_grown)
    return {
        "speedup": result.speedup,
        "target_loss": result.target_loss,
        "flops_scratch": result.flops_baseline,
        "flops_grown": result.flops_grown,
        "flops_saved": None if result.speedup is None else 1 - flops[1] / flops[0],
        "reached": result.reached,
        "lower_bound": result.lower_bound,
        "reason": result.reason,
    }
