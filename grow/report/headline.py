"""The report's sentences: what came out, what it does not show, and how each quantity is defined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grow.report import text
from grow.report.compare import Comparison, Comparisons, OverSeeds, over_seeds
from grow.runs.gather import Gathered
from grow.runs.trained_model import TrainedModel
from lit_gpt.packed_dataset import source_of

EVEN = 0.005  # speed-ups below half a per cent are called none
CURVE_NAMES = {"train": "training", "validation": "validation"}


def headline(comparisons: Comparisons) -> dict[str, Any]:
    """The number, the sentence that says it, and what lies behind it. The same place for good and for bad news."""
    curve = CURVE_NAMES[comparisons.primary_curve]
    group = comparisons.groups[0] if comparisons.pairs else ()
    found = over_seeds(group, comparisons.primary_curve)
    if found is not None:
        return _seeds_headline(comparisons, group, found)
    pair = comparisons.pairs[0] if comparisons.pairs else None
    result = getattr(pair, comparisons.primary_curve) if pair else {"speedup": None, "reason": comparisons.reason}
    more = [_other_curve(pair, comparisons.primary_curve), *_differences(pair)] if pair else []
    if len(comparisons.pairs) > 1:
        which = f"{pair.grown.name} against {pair.baseline.name}"
        more = [f"This is {which}, the first of {len(comparisons.pairs)} pairs; the others are in the tables.", *more]
    if result["speedup"] is None:
        return {
            "verdict": "none",
            "number": text.NOTHING,
            "label": f"speed-up at equal {curve} loss",
            "sentence": "There is no speed-up to report.",
            "detail": _as_sentence(result["reason"]),
            "more": more,
        }
    verdict = "even" if abs(result["speedup"]) < EVEN else "won" if result["speedup"] > 0 else "lost"
    return {
        "verdict": verdict,
        "number": ("≥ " if result["lower_bound"] else "") + text.percent(result["speedup"]),
        "label": f"speed-up at equal {curve} loss",
        "sentence": _sentence(verdict, result),
        "detail": (
            f"Loss {text.loss(result['target_loss'])} took {text.flops(result['flops_scratch'])} FLOPs from scratch "
            f"and {text.flops(result['flops_grown'])} by growing, the base model's included."
        ),
        "more": [*_spread(result), *more],
    }


def _seeds_headline(comparisons: Comparisons, group: Sequence[Comparison], found: OverSeeds) -> dict[str, Any]:
    """That of one experiment with several seeds: no pair stands for the others."""
    name, curve = comparisons.primary_curve, CURVE_NAMES[comparisons.primary_curve]
    known = [each for each in found.speedups if each is not None]
    is_split = min(known) < 0 < max(known)
    verdict = "even" if is_split or abs(found.mean) < EVEN else "won" if found.mean > 0 else "lost"
    share = text.percent(abs(found.flops_saved), signed=False)
    sentences = {
        "won": f"Growing reached equal loss with {share} fewer FLOPs than training from scratch.",
        "lost": f"Growing did not help here: equal loss took {share} more FLOPs than training from scratch.",
        "even": "Growing made no difference here that all seeds share: equal loss took about as many FLOPs.",
    }
    each = [f"{text.percent(value)} with seed {seed}" for seed, value in zip(found.seeds, found.speedups, strict=True)]
    missing = [
        f"None with seed {pair.grown.seed}: {reason}."
        for pair in group
        if getattr(pair, name)["speedup"] is None and (reason := getattr(pair, name)["reason"])
    ]
    others = len(comparisons.pairs) - len(group)
    left = f"{others} more pair{'s' * (others != 1)} of other settings or seeds are in the tables."
    other_curve = "validation" if name == "train" else "train"
    return {
        "verdict": verdict,
        "number": ("≥ " if found.lower_bound else "") + text.percent_over_seeds(found.mean, found.stderr),
        "label": f"speed-up at equal {curve} loss, mean ± standard error over {found.n} seeds",
        "sentence": sentences[verdict],
        "detail": f"Each {group[0].grown.operator or 'grown'} run against the one from scratch of its seed, the base "
        f"model's FLOPs included: {', '.join(each)}.",
        "more": [*missing, _other_curve_over_seeds(group, other_curve), *([left] if others else [])],
    }


def _other_curve_over_seeds(group: Sequence[Comparison], name: str) -> str:
    found = over_seeds(group, name)
    if found is None:
        reason = next(
            (reason for pair in group if (reason := getattr(pair, name)["reason"])), "fewer than two have one"
        )
        return f"At equal {CURVE_NAMES[name]} loss: no mean, because {reason}."
    at_least = "at least " if found.lower_bound else ""
    number = text.percent_over_seeds(found.mean, found.stderr)
    return f"At equal {CURVE_NAMES[name]} loss: {at_least}{number} over {found.n} seeds."


def _sentence(verdict: str, result: Mapping[str, Any]) -> str:
    if verdict == "even":
        return "Growing made no difference here: equal loss took as many FLOPs as training from scratch."
    if verdict == "lost":
        more = text.percent(-result["flops_saved"], signed=False)
        return f"Growing did not help here: equal loss took {more} more FLOPs than training from scratch."
    fewer = text.percent(result["flops_saved"], signed=False)
    fewer = f"at least {fewer}" if result["lower_bound"] else fewer
    if result["reached"]:
        return f"The grown model reached the scratch model's final loss with {fewer} fewer FLOPs."
    return f"The grown model reached its own final loss with {fewer} fewer FLOPs than training from scratch."


def _spread(result: Mapping[str, Any]) -> list[str]:
    if not result.get("range"):
        return []
    low, high = (text.percent(value) for value in result["range"])
    return [f"With half and twice the smoothing window: {low} to {high}."]


def _other_curve(pair: Comparison, primary_curve: str) -> str:
    name = "validation" if primary_curve == "train" else "train"
    other = getattr(pair, name)
    if other["speedup"] is None:
        return f"At equal {CURVE_NAMES[name]} loss: none, because {other['reason']}."
    at_least = "at least " if other["lower_bound"] else ""
    loss, share = text.loss(other["target_loss"]), text.percent(other["speedup"])
    return f"At equal {CURVE_NAMES[name]} loss ({loss}): {at_least}{share}."


def _differences(pair: Comparison) -> list[str]:
    """In what the two models differ besides growth."""
    grown, baseline = pair.grown, pair.baseline
    found = []
    if None not in (grown.parameters, baseline.parameters) and grown.parameters != baseline.parameters:
        sizes = f"{text.count(grown.parameters)} and {text.count(baseline.parameters)} parameters"
        found.append(f"But {grown.name} and {baseline.name} differ in size: {sizes}.")
    if None not in (grown.tokenizer, baseline.tokenizer) and grown.tokenizer != baseline.tokenizer:
        found.append(f"But {grown.name} and {baseline.name} use different tokenizers: losses are bits per byte here.")
    seeds = [model.state.get("seed") for model in (grown, baseline)]
    if None not in seeds and seeds[0] != seeds[1]:
        found.append(f"But {grown.name} and {baseline.name} have different seeds: {seeds[0]} and {seeds[1]}.")
    return found


def _beginning(model: TrainedModel) -> list[str]:
    """What a checkpoint that the model's run began with means for its numbers."""
    if not model.began_from_checkpoint or model.start is not None:
        return []
    found = []
    if model.role == "continued":
        found.append(f"{model.name} began with the weights of a checkpoint, so no speed-up is measured against it.")
    if not model.behind.tokens:
        found.append(
            f"How long the checkpoint that {model.name} began with had been trained is not known here, so its tokens "
            f"and FLOPs may leave that out."
        )
    return found


def _as_sentence(reason: str) -> str:
    return f"{reason[:1].upper()}{reason[1:]}."


def claim(models: Sequence[TrainedModel], *, repeated: bool = False) -> str:
    """What the result does not show; `repeated`: it is a mean over the seeds of these models."""
    if not models:
        return "Points of others are drawn as they are; nothing is claimed about them."
    seeds = sorted({str(model.state["seed"]) for model in models if model.state.get("seed") is not None})
    corpora = sorted({source_of(said) or name for model in models for name, said in model.corpora.items()})
    sizes = list(dict.fromkeys(text.count(model.parameters) for model in models if model.parameters))
    seed = f"One seed ({seeds[0]})" if len(seeds) == 1 else "One run of each"
    if repeated:
        seed = f"{len(seeds)} seeds ({', '.join(seeds)})"
    corpus = f"one corpus ({', '.join(corpora)})" if corpora else "one corpus"
    size = f"one size ({sizes[0]} parameters)" if sizes else "one size"
    if len(sizes) > 1:
        size = f"sizes of {', '.join(sizes[:-1])} and {sizes[-1]} parameters"
    return (
        f"{seed}, {corpus}, {size}: this is what happened here. Another seed, corpus or size may give another number, "
        f"and nothing more is claimed."
    )


def definitions(comparisons: Comparisons, unit: str) -> list[dict[str, str]]:
    """What each quantity in the report means; `unit` is that of the losses."""
    window = text.count(comparisons.window_tokens)
    return [
        {
            "term": "Speed-up",
            "text": (
                "FLOPs from scratch / FLOPs of the grown model − 1 at equal loss (arXiv 2405.15319, eq. 48). The grown "
                "model is charged for its base. The loss is the scratch model's final one if the grown model reached "
                "it, else the grown model's final one, and the speed-up is then mostly negative. Between logged points "
                "log FLOPs is interpolated; nothing is extrapolated."
            ),
        },
        {
            "term": "FLOPs",
            "text": "6 × all parameters × training tokens, embeddings in, validation out; parents are included.",
        },
        {
            "term": "Training loss",
            "text": (
                f"{unit.capitalize()}, the mean of the last {window} tokens at every point of every curve; a shorter "
                f"stage is averaged over its whole length."
            ),
        },
        {
            "term": "Tokens",
            "text": "What the model itself was trained on; the line below adds those of the models before it.",
        },
        {"term": "Time", "text": "Wall time of training steps, without validation and checkpoints."},
        {
            "term": "Connection rate",
            "text": "R_c: the share of neighbouring layers that also followed each other in the base.",
        },
    ]


def notes(gathered: Gathered, comparisons: Comparisons) -> list[str]:
    """What a reader has to know before using the numbers."""
    found = list(gathered.notes)
    for pair in comparisons.pairs[1:]:
        found += _differences(pair)
    for model in gathered.models:
        if model.epochs is not None and model.epochs > 1:
            found.append(
                f"{model.name} read its data {text.epochs(model.epochs)} times; its training loss also rewards memory."
            )
        if model.total_seconds is None:
            what = "its base" if model.role == "grown" else "the checkpoint it began with"
            found.append(f"{model.name} has no line against wall time, because the time of {what} is not known here.")
        found += _beginning(model)
    sets = dict.fromkeys(e.set for model in gathered.models for e in model.evaluations if e.metric == "loss")
    if comparisons.set_name in sets and len(sets) > 1:
        others = ", ".join(name for name in sets if name != comparisons.set_name)
        found.append(f"Validation losses are those on {comparisons.set_name}; those on {others} are not shown.")
    limits = {e.limit for model in gathered.models for e in model.evaluations if e.set == comparisons.set_name}
    if limits - {None}:
        tokens = text.count(max(limit for limit in limits if limit is not None))
        found.append(f"Validation was limited to the first {tokens} tokens of the set.")
    return list(dict.fromkeys(found))
