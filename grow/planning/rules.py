"""The rules that are published for growing a model, and disagree: what each says here, its source and its domain.

What is said of arXiv 2405.15319 is from its full text; of the others from their abstracts and public accounts of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any

from grow.paper import PrintedSpeedup, printed_speedups
from grow.planning.guideline import FITTED_FLOPS, FITTED_PARAMETERS, Guideline, short
from grow.planning.model_sizes import nearest_model
from grow.sizes import with_depth
from lit_gpt.flops import count_parameters

STACKING = "arXiv 2405.15319"
CHINCHILLA = 20  # tokens per parameter at the compute optimum of arXiv 2203.15556


@dataclass(frozen=True)
class Rule:
    """One published rule, applied to a plan."""

    name: str
    about: str
    """timing, factor, operator, selection or optimizer."""
    says: str
    value: float | None
    """d in tokens where it is about timing, g where it is about the factor; None where it gives no number."""
    source: str
    domain: str
    in_domain: bool | None
    """Whether the plan lies where it was measured; None where the plan does not tell."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def rules(plan: Guideline) -> list[Rule]:
    """Every rule for this plan, those of one subject together."""
    return [*_timing(plan), *_factor(plan), *_other(plan)]


def _timing(plan: Guideline) -> Iterator[Rule]:
    n, c = plan.rule_parameters, plan.rule_flops
    fitted = FITTED_PARAMETERS[0] <= n <= FITTED_PARAMETERS[1] and FITTED_FLOPS[0] <= c <= FITTED_FLOPS[1]
    d = plan.timing[plan.count]
    yield Rule(
        "stacking, eq. 2",
        "timing",
        f"grow after {short(d)} tokens: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74",
        d,
        f"{STACKING}, section 4",
        "fitted to G_stack, g = 4, 0.41 to 3 B parameters, 0.8e20 to 1.2e21 FLOPs, d from 0 to 50 B",
        fitted,
    )
    yield Rule(
        "stacking, as it was run",
        "timing",
        "grow after 10 B tokens",
        10e9,
        f"{STACKING}, section 4: the runs of all four sizes",
        "0.41 to 7 B parameters and 100 to 750 B tokens",
        0.35e9 <= n <= 7.5e9 and 100e9 <= plan.tokens <= 750e9,
    )
    late = 0.8 * plan.tokens
    one_layer = count_parameters(with_depth(plan.target.config, 1)) / count_parameters(plan.target.config)
    cost = 0.8 * one_layer + 0.2
    yield Rule(
        "zero- and one-layer bases",
        "timing",
        f"grow late, at about 80 % of the steps ({short(late)} tokens), from one layer or none, with a rate that stays "
        f"constant until a last decay (wsd); from one layer that is {cost:.0%} of the FLOPs of training from scratch",
        late,
        "arXiv 2511.04981",
        "GPT-2 to 7 B, LLaMA 3 and DeepSeek-V3 families, muP; with a cosine schedule late growth fails there",
        None,
    )
    yield Rule(
        "recycled checkpoints",
        "timing",
        "the longer the base was trained the better, if only what is spent after growth counts",
        None,
        "arXiv 2510.08008",
        "mixtures of experts, 17 to 70 B parameters, converged bases; what the base cost is left out, here it is not",
        False,
    )
    yield Rule(
        "staged training",
        "timing",
        "grow when the loss falls more slowly per FLOP than the larger model's would: at a slope of log loss against "
        "log compute of about -0.0575 (depth) or -0.0475 (width): grow_when: loss_slope",
        None,
        "arXiv 2203.06211",
        "GPT-2 to 768 M parameters, C4, operators that preserve the function; the slopes are for these",
        None,
    )


def _factor(plan: Guideline) -> Iterator[Rule]:
    n = plan.rule_parameters
    yield Rule(
        "stacking, recommended",
        "factor",
        "g = 4 for every size; the optimum was between 2 and 4",
        4,
        f"{STACKING}, section 4",
        "G_stack at 1.1 B (g = 1, 2, 4, 8, 24) and 3 B (g = 1, 4, 8, 16, 32)",
        1e9 <= n <= 3.5e9,
    )
    g = plan.fitted_factor
    yield Rule(
        "stacking, eq. 50",
        "factor",
        f"g = {g:.3g}: log10 g = 1.01 log10 N - 29.88 / log10 C - 7.36. Not to be used: it gives 24.5 for Llama 3 8B, "
        f"and the paper itself recommends 4",
        g,
        f"{STACKING}, appendix F",
        "1.1 and 3 B parameters",
        1e9 <= n <= 3.5e9,
    )
    ratio = plan.tokens_per_parameter
    yield Rule(
        "warm starts",
        "factor",
        f"g = 2 is the most reliable, beyond some g training from scratch is cheaper, and the gain fades above "
        f"{CHINCHILLA} tokens per parameter; here there are {ratio:.3g}",
        2,
        "arXiv 2605.13405",
        "dense language models, other operators than stacking, up to about 20 tokens per parameter",
        ratio <= CHINCHILLA,
    )
    yield Rule(
        "zero- and one-layer bases",
        "factor",
        f"g = {plan.target.config.n_layer}: from one layer to all of them in one step, copies or random layers alike; "
        f"several steps do worse",
        plan.target.config.n_layer,
        "arXiv 2511.04981",
        "as for its timing; in the stacking paper one-layer bases lose (1.1 and 3 B, cosine, early growth)",
        None,
    )


def _other(plan: Guideline) -> Iterator[Rule]:
    ratio = plan.base.tokens / plan.base.parameters
    yield Rule(
        "stacking, as compared",
        "operator",
        "stack had the lowest loss of eight operators, and interpolation was behind it",
        None,
        f"{STACKING}, sections 3 and 5",
        "dense models of 1.1 B parameters, bases of 10 and 50 B tokens",
        1e9 <= plan.rule_parameters <= 1.5e9,
    )
    yield Rule(
        "recycled checkpoints",
        "operator",
        f"interpolate, but for bases that have seen less than about {CHINCHILLA} tokens per parameter; here they are "
        f"{ratio:.3g}",
        None,
        "arXiv 2510.08008",
        "converged mixtures of experts, 17 to 70 B parameters",
        False,
    )
    yield Rule(
        "middle copies",
        "operator",
        "grow step by step by copies of the middle block (midas): equal perplexity, better at reasoning",
        None,
        "arXiv 2409.19044, 2512.08819",
        "1 to 8 B parameters, several stages of growth",
        1e9 <= plan.rule_parameters <= 8e9,
    )
    yield Rule(
        "compare after training on",
        "selection",
        "the loss right after growth does not rank operators: train each on for a while, at equal FLOPs",
        None,
        f"{STACKING}; arXiv 2406.02469, 2604.04281, 2605.13405",
        "growth in depth and in width, several operators; all four agree",
        None,
    )
    yield Rule(
        "optimizer state",
        "optimizer",
        "start AdamW and the schedule again (stacking), or carry the moments over (2203.06211, 2604.04281), or reset a "
        "part and warm up again (2602.02472): --optimizer-policy reset or map",
        None,
        f"{STACKING}; arXiv 2203.06211, 2604.04281, 2602.02472",
        "the last three preserve the function, stacking does not",
        None,
    )


@dataclass(frozen=True)
class Speedups:
    """What one size of the stacking paper gained: FLOPs of training from scratch over those of growing, minus one."""

    nominal: float
    """The name of the size, in numbers."""
    measured: dict[float, float]
    """Tokens of training from scratch -> speed-up at equal training loss."""
    source: str

    @property
    def size(self) -> str:
        return short(self.nominal).replace(" ", "")

    @property
    def parameters(self) -> int:
        """All of them."""
        return count_parameters(nearest_model(self.nominal))


def measured_speedups() -> list[Speedups]:
    """What the paper prints, by size."""
    by_size: dict[float, list[PrintedSpeedup]] = {}
    for each in printed_speedups():
        by_size.setdefault(each.parameters, []).append(each)
    return [
        Speedups(
            nominal,
            {each.tokens: each.speedup for each in of_size},
            " and ".join(dict.fromkeys(each.where.lower() for each in of_size)),
        )
        for nominal, of_size in by_size.items()
    ]


NEAR = 1.5  # a size, or a number of tokens, that differs by more was not measured


@dataclass(frozen=True)
class Expectation:
    """The speed-up that was measured nearest to a plan. It is one run per size, without error bars."""

    low: float
    high: float
    size: str
    source: str
    domain: str
    in_domain: bool
    """Whether size, tokens, factor and timing are near those of the runs; if not, nobody has measured this."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def expected_speedup(plan: Guideline) -> Expectation:
    """What the stacking paper measured at the size that is nearest to the plan's."""
    given = plan.count == "given"
    sizes = [(each.nominal if given else each.parameters, each) for each in measured_speedups()]
    parameters = plan.parameters["given" if given else "total"]
    size, nearest = min(sizes, key=lambda pair: abs(log(pair[0] / parameters)))
    tokens = sorted(nearest.measured)
    near = (
        max(size, parameters) <= NEAR * min(size, parameters)
        and tokens[0] / NEAR <= plan.tokens <= tokens[-1] * NEAR
        and plan.factor == 4
        and 10e9 / 3 <= plan.base.tokens <= 30e9
    )
    span = " to ".join(short(t) for t in dict.fromkeys((tokens[0], tokens[-1])))
    return Expectation(
        low=min(nearest.measured.values()),
        high=max(nearest.measured.values()),
        size=nearest.size,
        source=f"{STACKING}, {nearest.source}",
        domain=f"G_stack with g = 4 and d = 10 B, {span} tokens, SlimPajama; one run, no error bars",
        in_domain=near,
    )
