"""When to grow and by how much: the fitted rules of arXiv 2405.15319, and the budget that follows from them.

Legend: N parameters and D tokens of the model that is wanted, C FLOPs that may be spent, d tokens of the base, g growth
factor. C = 6 N D, the base's FLOPs included, as in that paper, whose table 4 follows from eq. 2 in this way. N may be a
round number, so it is in the rules alone; what is spent is 6 x all parameters x tokens of each model, the paper's axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log, log10

from grow.planning.model_sizes import named, nearest_model
from grow.report.text import scaled
from grow.sizes import with_depth
from lit_gpt.config import Config
from lit_gpt.flops import count_non_embedding, count_parameters

FITTED_PARAMETERS = (0.3e9, 5e9)
"""Eq. 2 was fitted to models of 0.41, 1.1 and 3 B parameters, for which this leaves some room; so does the next."""
FITTED_FLOPS = (5e19, 2e21)
"""It was fitted to budgets of 0.8e20 to 1.2e21 FLOPs."""
FACTOR = 4
"""The paper's recommendation."""
MEASURED_FACTORS = (2, 4)
"""Where its measurements at 1.1 and 3 B have their optimum; at 3 B 16 still beats training from scratch."""
LONGEST_BASE = 50e9
"""The most tokens that the runs behind eq. 2 trained a base on."""
MOST_TOKENS = 10**16
"""More than that is no corpus: the largest published ones have some 10^13, and it may have been meant as FLOPs."""
LARGE_SHARE = 0.25  # of the tokens: a base that takes more leaves little to gain
COUNTS = ("given", "total", "non-embedding")
"""Conventions for N: the number that was given, all parameters, or those of the blocks and the final norm."""


def growth_timing(parameters: float, flops: float) -> float:
    """d, tokens to train the base on (eq. 2). It rises with N and falls with C.

    Args:
        parameters: N, of the grown model.
        flops: C, of base and grown model together.
    """
    return 10 ** (0.88 * log10(parameters) + 163.27 / log10(flops) - 5.74)


def fitted_growth_factor(parameters: float, flops: float) -> float:
    """g by eq. 50, which the paper fits in an appendix and does not follow: it recommends 4 for every size."""
    return 10 ** (1.01 * log10(parameters) - 29.88 / log10(flops) - 7.36)


@dataclass(frozen=True)
class Phase:
    """The training of one of the two models."""

    config: Config
    tokens: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return count_parameters(self.config)

    @property
    def flops(self) -> int:
        """In the paper's convention."""
        return 6 * self.parameters * self.tokens


@dataclass(frozen=True)
class Guideline:
    """A budget, and how growing would spend it."""

    tokens: int
    """D: what training from scratch would spend the budget on."""
    count: str
    """One of COUNTS: which number of parameters is N."""
    parameters: dict[str, float]
    """N in every convention that is known."""
    timing: dict[str, float]
    """d by eq. 2 in every convention."""
    factor: float
    """Layers of the target over layers of the base."""
    wanted_factor: float
    base: Phase
    target: Phase
    base_tokens_given: bool
    """Whether the user chose d, instead of eq. 2."""

    @property
    def rule_parameters(self) -> float:
        """N of eq. 2 and eq. 50."""
        return self.parameters[self.count]

    @property
    def rule_flops(self) -> float:
        """C of eq. 2 and eq. 50, in the same convention."""
        return 6 * self.rule_parameters * self.tokens

    @property
    def budget_flops(self) -> int:
        """What is spent, all parameters of the model counted, whatever N is."""
        return 6 * self.target.parameters * self.tokens

    @property
    def fitted_factor(self) -> float:
        """g by eq. 50."""
        return fitted_growth_factor(self.rule_parameters, self.rule_flops)

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.rule_parameters

    def warnings(self) -> list[str]:
        """What about this plan lies outside what was measured, in sentences."""
        return [*_domain_warnings(self), *_plan_warnings(self)]


def make_guideline(
    tokens: int,
    *,
    parameters: int | None = None,
    model: Config | None = None,
    vocab_size: int = 32000,
    count: str | None = None,
    factor: float | None = None,
    base_tokens: int | None = None,
) -> Guideline:
    """Timing, factor, base and the split of the budget, for the model or for one of about as many parameters.

    Args:
        tokens: D, which training from scratch would take.
        parameters: N; or give model.
        model: sizes of the wanted model.
        vocab_size: of a model that is found by its number of parameters.
        count: one of COUNTS. Default: given with parameters, else total.
        factor: g. Default: FACTOR.
        base_tokens: d. Default: by eq. 2.

    Raises:
        ValueError: settings that contradict each other, or a base that takes as many tokens as training from scratch.
    """
    if (parameters is None) == (model is None):
        raise ValueError("give the size of the model once: its number of parameters, its name, or its depth and width")
    factor = FACTOR if factor is None else factor
    if model is None:
        model = nearest_model(parameters, vocab_size)
    if tokens > MOST_TOKENS:
        in_flops = tokens / (6 * (parameters or count_parameters(model)))
        raise ValueError(
            f"{power(tokens)} tokens are more text than there is; give at most {power(MOST_TOKENS)}. If these are "
            f"FLOPs, they pay for C / 6 N = {power(in_flops)} tokens of this model"
        )
    known = {} if parameters is None else {"given": float(parameters)}
    known |= {"total": float(count_parameters(model)), "non-embedding": float(count_non_embedding(model))}
    count = count or next(iter(known))
    if count not in known:
        raise ValueError(f"count={count!r} must be one of {', '.join(known)}")
    timing = {name: growth_timing(n, 6 * n * tokens) for name, n in known.items()}
    base = Phase(_base(model, factor), round(timing[count]) if base_tokens is None else base_tokens)
    _check_base(base, tokens, by_rule=base_tokens is None)
    from_scratch = Phase(model, tokens)
    left_flops = from_scratch.flops - base.flops
    return Guideline(
        tokens=tokens,
        count=count,
        parameters=known,
        timing=timing,
        factor=model.n_layer / base.config.n_layer,
        wanted_factor=factor,
        base=base,
        target=Phase(model, round(left_flops / (6 * from_scratch.parameters))),
        base_tokens_given=base_tokens is not None,
    )


def _base(model: Config, factor: float) -> Config:
    """The shallow model whose tower, repeated a whole number of times, is nearest to the wanted factor."""
    if model.n_layer == 1:
        raise ValueError(
            "a model of one layer has no shallower base; give it more layers, or grow it in width (grow operators)"
        )
    if not 1 < factor <= model.n_layer:
        raise ValueError(
            f"factor={factor:g} must be above 1 and at most {model.n_layer}, the layers of the model: the base is that "
            f"many times shallower"
        )
    depths = [n for n in range(1, model.n_layer) if model.n_layer % n == 0]
    n_layer = min(depths, key=lambda n: (abs(log(model.n_layer / n / factor)), n))
    return named(with_depth(model, n_layer))


def _check_base(base: Phase, tokens: int, *, by_rule: bool) -> None:
    """The base is smaller than the target, so with fewer tokens it costs less than the budget, too."""
    if base.tokens < tokens:
        return
    whose = "eq. 2 gives the base" if by_rule else "the base is to have"
    raise ValueError(
        f"{whose} {short(base.tokens)} tokens; it must have fewer than training from scratch, {short(tokens)}. "
        + ("This far from where it was fitted eq. 2 does not hold: train" if by_rule else "Train")
        + " on more tokens, choose a shorter base by --base-tokens, or train from scratch"
    )


def _domain_warnings(plan: Guideline) -> Iterator[str]:
    n, c = plan.rule_parameters, plan.rule_flops
    if not FITTED_PARAMETERS[0] <= n <= FITTED_PARAMETERS[1]:
        side = "above" if n > FITTED_PARAMETERS[1] else "below"
        tested = ", like those in the paper's table 4, which no run has tested" if side == "above" else ""
        yield f"N = {short(n)} is {side} the 0.41 to 3 B that eq. 2 was fitted to: its d is an extrapolation{tested}"
    if not FITTED_FLOPS[0] <= c <= FITTED_FLOPS[1]:
        side = "above" if c > FITTED_FLOPS[1] else "below"
        yield f"C = {power(c)} FLOPs is {side} the 0.8e20 to 1.2e21 that eq. 2 was fitted to: its d is an extrapolation"
    if plan.base.tokens > LONGEST_BASE:
        yield f"d = {short(plan.base.tokens)} tokens is above the 50 B that were tried at most"
    if not MEASURED_FACTORS[0] <= plan.factor <= MEASURED_FACTORS[1]:
        yield (
            f"g = {plan.factor:g} is outside 2 to 4, where the paper measured its optimum (at 1.1 and 3 B), and eq. 2 "
            f"was fitted at g = 4"
        )
    elif plan.factor != FACTOR and not plan.base_tokens_given:
        yield f"eq. 2 was fitted at g = 4; this plan has g = {plan.factor:g}"


def _plan_warnings(plan: Guideline) -> Iterator[str]:
    if plan.factor != plan.wanted_factor:
        yield (
            f"{plan.target.config.n_layer} layers cannot be stacked from a tower that is {plan.wanted_factor:g} times "
            f"shallower: the base has {plan.base.config.n_layer} (g = {plan.factor:g}). The operator interpolate takes "
            f"any depth, {max(1, round(plan.target.config.n_layer / plan.wanted_factor))} for instance"
        )
    share = plan.base.tokens / plan.tokens
    if share > LARGE_SHARE:
        yield f"the base would see {share:.0%} of the tokens, which leaves little to gain"
    given, total = plan.parameters.get("given"), plan.parameters["total"]
    if given is not None and abs(log(given / total)) > log(1.1):
        yield (
            f"the proposed model has {short(total)} parameters, {total / given - 1:+.0%} from the {short(given)} "
            f"given; the rules take the number given, FLOPs, hours and memory are the model's. --depth and --width "
            f"choose another"
        )


def short(value: float) -> str:
    """7e9 -> "7 B": to one digit more than in reports, and with a plain space, for terminals."""
    number, suffix = scaled(value)
    return f"{number:.4g} {suffix}".rstrip()


def power(value: float) -> str:
    """1.26e22 -> "1.26e22": as options take it."""
    return f"{value:.3g}".replace("e+", "e")
