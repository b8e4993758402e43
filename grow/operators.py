"""The growth operators by name, aliases included: the only list of them; and how a name becomes a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from grow import depth
from grow.layer_map import LayerMap, format_layer_map, further_copies
from grow.plan import GrowthPlan
from grow.sizes import scaled_depth, with_depth
from lit_gpt.config import Config

FUNCTION = {
    "bitwise": "the function, bit for bit in every dtype",
    "exactly": "the function, up to rounding in fp32 and wider",
    "up to eps": "the function, but for norm_eps, which is the same for a norm of other width",
    "no": "the weights, not the function",
}
"""What can become of the function of a model when it grows."""


@dataclass(frozen=True)
class Operator:
    """What can be said of an operator without running it."""

    name: str
    aliases: tuple[str, ...]
    """Other names: those of papers, of prts's --method and of other tools. `-` and `_` are equal."""
    axis: str
    """What grows: "depth", "width" or "both"."""
    function: str
    """Whether the grown model computes what its source does; one of FUNCTION."""
    paper: str
    summary: str
    layers: Callable[[int, int], LayerMap] | None = None
    """Source depth, grown depth -> layer map; None where the user has to give the map."""
    identity_copies: bool = False
    """Whether further copies of a layer are identity layers."""
    trained: str = "all"
    """The parameters that its paper trains afterwards."""
    options: tuple[str, ...] = ("n_layer", "factor")
    """Arguments of `plan_growth`, beside seed and noise, that it takes."""

    @property
    def preserves(self) -> bool:
        """Whether the grown model computes the same function as its source, if only up to norm_eps."""
        return self.function != "no"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shown = ("name", "aliases", "axis", "preserves", "function", "paper", "summary", "options", "trained")
        values = {key: getattr(self, key) for key in shown}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


BY_MAP = ("n_layer", "factor", "layer_map")
STACKING_PAPER = "arXiv 2405.15319"

_ALL = (
    Operator(
        name="stack",
        aliases=("gstack", "g_stack", "stacking", "direct_depth", "b2b"),
        axis="depth",
        function="no",
        paper=STACKING_PAPER,
        summary="the whole tower, repeated: 123123",
        layers=depth.stack,
        options=BY_MAP,
    ),
    Operator(
        name="interpolate",
        aliases=("interpolation", "interleave", "interleaving", "inner_stacking"),
        axis="depth",
        function="no",
        paper=STACKING_PAPER,
        summary="every layer, repeated where it stands: 112233",
        layers=depth.interpolate,
        options=BY_MAP,
    ),
    Operator(
        name="partial",
        aliases=("partial_stack", "partial_stacking", "passthrough"),
        axis="depth",
        function="no",
        paper=STACKING_PAPER,
        summary="the layers of an explicit map: 1-23*2-3",
        options=BY_MAP,
    ),
    Operator(
        name="gradual",
        aliases=("gs", "gradual_stack", "gradual_stacking", "stackbert"),
        axis="depth",
        function="no",
        paper="StackBERT, ICML 2019",
        summary="copies of the last layers on top, at most twice the depth per hop: 123 -> 12323 -> 1232312323",
        layers=depth.gradual,
    ),
    Operator(
        name="mslt",
        aliases=("stacking_2",),
        axis="depth",
        function="no",
        paper="arXiv 2011.13635",
        summary="as gradual, but the layers that were there are frozen until the last stage",
        layers=depth.gradual,
        trained="new layers, ln_f and lm_head; all in the last stage",
    ),
    Operator(
        name="solar",
        aliases=("dus", "depth_up_scaling"),
        axis="depth",
        function="no",
        paper="arXiv 2312.15166",
        summary="two towers, one without its last m layers and one without its first m: 123456 -> 1234-3456",
        layers=depth.solar,
    ),
    Operator(
        name="midas",
        aliases=("gradual_middle_stacking", "middle_stacking"),
        axis="depth",
        function="no",
        paper="arXiv 2409.19044",
        summary="the middle block, twice: 123456 -> 1234-3456",
        layers=depth.midas,
    ),
    Operator(
        name="lidas",
        aliases=(),
        axis="depth",
        function="no",
        paper="arXiv 2512.08819",
        summary="the layers around the middle, twice: 1234 -> 12-23-34",
        layers=depth.lidas,
    ),
    Operator(
        name="zero-depth",
        aliases=("lemon_depth", "g_zero_depthwise"),
        axis="depth",
        function="bitwise",
        paper=STACKING_PAPER,
        summary="as interpolate, but further copies are identity layers: 1(1)2(2)3(3)",
        layers=depth.interpolate,
        identity_copies=True,
        options=BY_MAP,
    ),
    Operator(
        name="llama-pro",
        aliases=("block_expansion",),
        axis="depth",
        function="bitwise",
        paper="arXiv 2401.02415",
        summary="an identity copy after every P layers: 123(3)456(6)",
        layers=depth.llama_pro,
        identity_copies=True,
        trained="new layers",
    ),
    Operator(
        name="staged-depth",
        aliases=("staged_training_depth",),
        axis="depth",
        function="bitwise",
        paper="arXiv 2203.06211",
        summary="an identity copy after every layer, by zero proj and w3 where the paper zeroes norms, which with a "
        "SwiGLU never train: 1(1)2(2)3(3)",
        layers=depth.staged_depth,
        identity_copies=True,
    ),
    Operator(
        name="random-depth",
        aliases=("msg_depth",),
        axis="depth",
        function="no",
        paper=STACKING_PAPER,
        summary="new layers on top, at once: 123-new*3. The paper's mask, which opens them slowly and preserves the "
        "function at first, is not available; this is the model once it is open",
        layers=depth.random_depth,
        options=BY_MAP,
    ),
    Operator(
        name="one-layer",
        aliases=(),
        axis="depth",
        function="no",
        paper="arXiv 2511.04981",
        summary="the only layer of the source, everywhere: 111",
        layers=depth.one_layer,
    ),
    Operator(
        name="zero-layer",
        aliases=(),
        axis="depth",
        function="no",
        paper="arXiv 2511.04981",
        summary="embedding, final norm and head of the source, and only new layers: new*3",
        layers=depth.zero_layer,
    ),
    Operator(
        name="inheritune",
        aliases=("prefix",),
        axis="depth",
        function="no",
        paper="arXiv 2404.08634",
        summary="the first layers of a larger model, the one operator that shrinks: 123456 -> 123",
        layers=depth.inheritune,
    ),
)
OPERATORS: dict[str, Operator] = {op.name: op for op in _ALL}
BY_NAME: dict[str, Operator] = {
    name.replace("-", "_"): op for op in OPERATORS.values() for name in (op.name, *op.aliases)
}

UNAVAILABLE: dict[str, str] = {
    "learn_depth": "its mixing matrices are trained on data first; stack has the weights that they start from",
    "learn_width": "its mixing matrices are trained on data first",
    "ligo": "its mixing matrices are trained on data first; stack has the weights that they start from in depth",
    "msg": "its masks open during training; random-depth is what they end with in depth",
    "gradmax": "its new neurons are made from gradients on data",
    "lesa": "its layers are predicted by a network trained on the source; interpolate copies a neighbour instead",
    "opt_deus": "its layers are fused from their neighbours by optimal transport; llama-pro inserts identity copies",
    "scratch": "it grows nothing; leave the operator out",
    "distill": "it is a loss for training beside a teacher, not a way to make weights",
    "split_width": "growing in width is not built in",
    "zero_width": "growing in width is not built in",
    "zero": "growing in width is not built in; zero-depth grows in depth",
    "random_width": "growing in width is not built in",
    "fpi": "growing in width is not built in",
    "aki": "growing in width is not built in",
    "aki_pro": "growing in width is not built in",
    "lemon": "growing in width is not built in; lemon-depth grows in depth",
    "hypercloning": "growing in width is not built in",
    "staged_width": "growing in width is not built in",
}
"""Names of published methods that cannot be asked for, and what to know about each."""

RETIRED: dict[str, str] = {
    "milk": "prts swaps modules in by twelve fixed windows of 500 steps, whose blending is switched off and whose "
    "state is not saved; no result with it is published. Use stack",
    "incubation": "prts's code for it (arXiv 2212.04129) cannot run, and it trains modules one at a time inside a "
    "frozen meta model, which is another way to train and grows no trained model. Use stack, or gradual",
    "gradual_incubation": "prts's code for it cannot run. Use gradual",
}
"""Names of prts's methods that are not offered on purpose, and why."""
RETIRED["gi"] = RETIRED["gradual_incubation"]


def operator(name: str) -> Operator:
    """The operator behind a name or an alias; case, `-` and `_` do not matter.

    Raises:
        ValueError: there is none, or it is not available; the message says why, or names the nearest and all known.
    """
    wanted = name.lower().replace("-", "_")
    if wanted in BY_NAME:
        return BY_NAME[wanted]
    if wanted in UNAVAILABLE:
        raise ValueError(f"operator {name!r} is not available: {UNAVAILABLE[wanted]}. See `grow operators`")
    if wanted in RETIRED:
        raise ValueError(f"operator {name!r} is retired: {RETIRED[wanted]}")
    near = get_close_matches(wanted, BY_NAME, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0].replace('_', '-')!r}?" if near else ";"
    raise ValueError(f"unknown growth operator {name!r}{hint} Known: {', '.join(OPERATORS)}")


def plan_growth(
    name: str,
    src: Config,
    *,
    n_layer: int | None = None,
    factor: float | None = None,
    layer_map: str | Sequence[int | None] | None = None,
    seed: int = 0,
    noise: float = 0.0,
) -> GrowthPlan:
    """Plan the growth of a model of sizes `src`; no weights are needed.

    Args:
        name: of the operator, or an alias.
        src: sizes before growth.
        n_layer: layers after growth. One of n_layer, factor and layer_map says how deep the grown model is.
        factor: layers after growth over layers before.
        layer_map: the map to use instead of the operator's own: text with layers counted from 1, or a sequence of
            layers counted from 0, None for a new one.
        seed: seed of whatever the operator draws.
        noise: share of every grown matrix that is replaced by noise, see `GrowthPlan.noise`.

    Raises:
        ValueError: unknown operator, sizes that contradict each other or the operator, or a map that does not fit.
    """
    op = operator(name)
    _check_options(op, {"layer_map": layer_map})
    layers = _layers(op, src.n_layer, scaled_depth(src.n_layer, n_layer, factor), layer_map)
    identity_layers = further_copies(layers) if op.identity_copies else ()
    if op.identity_copies:
        _check_preserved(op, src.n_layer, layers, identity_layers)
    options = {"layer_map": layer_map} if isinstance(layer_map, str) else {}
    return GrowthPlan(
        operator=op.name,
        src=src,
        dst=with_depth(src, len(layers)),
        layer_map=layers,
        seed=seed,
        options=options,
        identity_layers=identity_layers,
        noise=noise,
    )


def function_of(plan: GrowthPlan) -> str:
    """What a plan makes of the function, one of FUNCTION."""
    if plan.is_identity:
        return "bitwise"
    return "no" if plan.noise else operator(plan.operator).function


def _check_options(op: Operator, given: dict[str, object]) -> None:
    foreign = [name for name, value in given.items() if value is not None and name not in op.options]
    if foreign:
        others = ", ".join(other.name for other in OPERATORS.values() if foreign[0] in other.options)
        raise ValueError(
            f"{op.name} takes {', '.join(op.options)}, and not {', '.join(foreign)}; "
            f"leave it out, or use an operator that takes {foreign[0]}: {others}"
        )


def _layers(
    op: Operator, n_layer_src: int, n_layer_dst: int | None, layer_map: str | Sequence[int | None] | None
) -> LayerMap:
    if layer_map is not None:
        layers = depth.partial(n_layer_src, n_layer_dst, layer_map)
    elif op.layers is None:
        raise ValueError(f"{op.name} needs a layer map, e.g. '1-23*2-3' (layers count from 1); give one, or use stack")
    elif n_layer_dst is None:
        options = " or ".join(("n_layer", "factor", "a layer map")[: len(op.options)])
        raise ValueError(f"how deep is the grown model? Give {op.name} {options}")
    else:
        _check_not_smaller(op, n_layer_src, n_layer_dst)
        layers = op.layers(n_layer_src, n_layer_dst)
    _check_not_smaller(op, n_layer_src, len(layers))
    return layers


def _check_not_smaller(op: Operator, n_layer_src: int, n_layer_dst: int) -> None:
    if n_layer_dst < n_layer_src and op.name != "inheritune":
        raise ValueError(
            f"{op.name} cannot shrink {n_layer_src} layers to {n_layer_dst}; ask for {n_layer_src} or more, "
            f"or take the first layers by inheritune"
        )


def _check_preserved(op: Operator, n_layer_src: int, layers: LayerMap, identity_layers: tuple[int, ...]) -> None:
    """An explicit map may be anything; an operator that promises the function refuses what would change it."""
    acting = [layer for i, layer in enumerate(layers) if i not in identity_layers]
    if acting != list(range(n_layer_src)):
        raise ValueError(
            f"{op.name} preserves the function, for which the first copies of the layers must be all layers of the "
            f"source in their order, and those of {format_layer_map(layers)} are {format_layer_map(acting)}; "
            f"use partial to grow by this map as it is"
        )
