"""`grow fit RUN...`: power laws through the losses of runs, what they predict, and the speed-up between them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grow.report.extra import require

if TYPE_CHECKING:
    from grow.fit import PowerLaw
    from grow.runs.families import Family
    from grow.runs.gather import Gathered

SPARE_POINTS = 3  # beyond the constants, below which a bootstrap's intervals are far too narrow
SHARE_SAID = 0.001  # of draws
BOOTSTRAP_HELD = "which held the truth of made-up losses 90 to 98 % of the time at 6 to 16 points"  # docs/report.md


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `grow fit`."""
    from grow.fit import BOOTSTRAP_DRAWS, PREDICTED, T_DRAWS
    from grow.runs.families import LOSSES, POINTS

    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run directories, of several sizes or budgets of each kind"
    )
    parser.add_argument("--offset", action="store_true", help="fit L = c + a C^b instead of L = a C^b")
    parser.add_argument(
        "--points", choices=POINTS, default="final", help="the last loss of every run, or every one; default final"
    )
    parser.add_argument("--loss", choices=LOSSES, default="train", help="which loss; default train")
    parser.add_argument(
        "--at",
        type=_budgets,
        default=[],
        metavar="FLOPS,...",
        help=f"budgets to predict for; default {PREDICTED} times the largest",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        metavar="N",
        help=f"draws behind an interval; default {T_DRAWS}, of the bootstrap of --offset {BOOTSTRAP_DRAWS}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; default 0")


def _budgets(words: str) -> list[float]:
    try:
        values = [float(word) for word in words.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{words!r} is not a list of FLOPs such as 1e21,1e22") from error
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{words!r}: FLOPs must be positive numbers")
    return values


def run(args: argparse.Namespace) -> int:
    """Fit and print.

    Raises:
        ValueError: too few runs of a kind, or a setting is wrong.
        FileNotFoundError: a run is not there. DataError: a run is damaged.
    """
    if args.offset:
        require("--offset", "scipy")
    if args.resamples is not None and args.resamples < 1:
        raise ValueError(f"--resamples {args.resamples} must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0")
    found = make_fits(args)
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if args.json else "\n".join(_lines(found)) + "\n")
    return 0


def make_fits(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the command says: a law for each family, predictions, speed-ups over scratch."""
    from grow.fit import PREDICTED
    from grow.runs.families import SCRATCH, families, left_out
    from grow.runs.gather import gather
    from grow.runs.units import in_comparable_unit

    gathered = in_comparable_unit(gather(args.runs))
    found = families(gathered, points=args.points, loss=args.loss)
    left = [*left_out(gathered, found), *_of_others(gathered)]
    if not found:
        raise ValueError(
            "\n".join(
                [
                    f"no run here has a {args.loss} loss to fit; give runs from scratch or grown ones",
                    *gathered.notes,
                    *left,
                ]
            )
        )
    laws, notes = _fit_all(found, args)
    fitted = [family for family in found if family.name in laws]
    at = args.at or [PREDICTED * max(float(family.flops.max()) for family in fitted)]
    scratch = laws.get(SCRATCH)
    return {
        "form": "c + a C^b" if args.offset else "a C^b",
        "points": args.points,
        "loss": args.loss,
        "unit": gathered.unit,
        "resamples": max(len(law.draws) for law in laws.values()),
        "seed": args.seed,
        "families": [_as_dict(family, laws[family.name], at) for family in fitted],
        "speedups": [
            each
            for name, law in laws.items()
            if scratch is not None and name != SCRATCH
            for each in _speedups(name, law, scratch, at)
        ],
        "notes": [*gathered.notes, *left, *notes, *_cautions(args, fitted, laws)],
    }


def _fit_all(found: Sequence[Family], args: argparse.Namespace) -> tuple[dict[str, PowerLaw], list[str]]:
    """Family -> law, and notes on families with too few points, unless that is true of all."""
    from grow.fit import fit_power_law

    laws, refusals = {}, []
    settings = {"with_offset": args.offset, "n_draws": args.resamples}
    for number, family in enumerate(found):
        try:
            laws[family.name] = fit_power_law(family.flops, family.loss, **settings, seed=args.seed + number)
        except ValueError as error:
            refusals.append(f"family {family.name!r} ({', '.join(family.models)}): {error}")
    if not laws:
        if args.points == "final":
            refusals.append("where there are no more runs, --points every takes all losses of each one")
        raise ValueError("\n".join(refusals))
    return laws, [f"Left out: {refusal}." for refusal in refusals]


def _of_others(gathered: Gathered) -> list[str]:
    paths = dict.fromkeys(str(model.path) for model in gathered.external)
    what = "Left out, because files of other people's models are for grow report alone"
    return [f"{what}: {', '.join(paths)}."] if paths else []


def _as_dict(family: Family, law: PowerLaw, at: list[float]) -> dict[str, Any]:
    constants = {name: {"value": getattr(law, name), "interval": law.interval(name)} for name in "abc"}
    return {
        "name": family.name,
        "runs": list(family.models),
        "flops": family.flops.tolist(),
        "losses": family.loss.tolist(),
        **constants,
        "rms_log_residual": law.rms_log_residual,
        "predictions": [
            {
                "flops": flops,
                "loss": float(law.predict(flops)),
                "interval": law.predicted_interval(flops),
                "times_beyond": flops / float(family.flops.max()),
            }
            for flops in at
        ],
    }


def _speedups(name: str, law: PowerLaw, scratch: PowerLaw, at: list[float]) -> Iterator[dict[str, Any]]:
    from grow.fit import predict_speedup

    for flops in at:
        found = predict_speedup(law, scratch, flops)
        yield {
            "family": name,
            "flops_scratch": flops,
            "loss": found.loss,
            "speedup": found.speedup,
            "interval": found.interval,
            "never": found.never,
        }


def _cautions(args: argparse.Namespace, fitted: Sequence[Family], laws: Mapping[str, PowerLaw]) -> list[str]:
    notes = []
    if args.points == "every":
        notes.append("Losses of one run are not independent, so these intervals are too narrow.")
    for family in fitted:
        n, constants = len(family.flops), 3 if args.offset else 2
        if not len(laws[family.name].draws):
            notes.append(f"{family.name}: as many points as constants, so the law meets them and has no interval.")
        elif args.offset and n < constants + SPARE_POINTS:
            notes.append(f"{family.name}: {n} points for {constants} constants; intervals from so few are too narrow.")
    return notes


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    from grow.report import text

    which = "The final" if found["points"] == "final" else "Every"
    how = "averaged over the last tenth of the run before it" if found["loss"] == "train" else "on its first set"
    what = "training" if found["loss"] == "train" else "validation"
    yield f"{which} {what} loss of each run, {how}, in {found['unit']}; C: FLOPs, base models included."
    has_offset = found["form"].startswith("c")
    intervals = f"bootstrap over points, {BOOTSTRAP_HELD}" if has_offset else "Student's t"
    yield f"L = {found['form']}, least squares of log L; intervals: 95 %, {intervals}."
    for family in found["families"]:
        yield ""
        yield f"{family['name']}: {len(family['losses'])} points of {', '.join(family['runs'])}"
        for name in "abc" if has_offset else "ab":
            yield f"  {name} = {family[name]['value']:.5g}{_between(family[name]['interval'], '{:.5g}'.format)}"
        yield f"  root mean square of the residuals: {100 * family['rms_log_residual']:.2g} % of the loss"
        for each in family["predictions"]:
            beyond = f", {each['times_beyond']:.3g} times the largest budget" if each["times_beyond"] > 1 else ""
            interval = _between(each["interval"], text.loss)
            yield f"  at {text.flops(each['flops'])} FLOPs: {text.loss(each['loss'])}{interval}{beyond}"
    if found["speedups"]:
        yield ""
    for each in found["speedups"]:
        where = f"the loss from scratch at {text.flops(each['flops_scratch'])} FLOPs ({text.loss(each['loss'])})"
        number, interval = text.percent(each["speedup"]), _between(each["interval"], text.percent)
        said = f"never reaches {where}" if each["speedup"] is None else f"{number}{interval} at {where}"
        share = text.percent(each["never"], signed=False)
        never = f"; {share} of the draws never reach it" if each["never"] >= SHARE_SAID else ""
        yield f"{each['family']} over scratch: {said}{never}"
    if found["notes"]:
        yield from ("", *found["notes"])


def _between(interval: Sequence[float] | None, write: Callable[[float], str]) -> str:
    return "" if interval is None else f" [{write(interval[0])}, {write(interval[1])}]"
