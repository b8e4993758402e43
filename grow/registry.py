"""The growth operators as a table: the only list of them, with their aliases, and the names that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grow import depth, width
from grow.layer_map import LayerMap
from grow.plan import GrowthPlan
from grow.sizes import more_neurons, wider
from grow.trainable import TRAINABLE
from lit_gpt.config import Config

FUNCTION = {
    "bitwise": "the function, bit for bit in every dtype",
    "exactly": "the function, up to rounding in fp32 and wider",
    "exactly (width only)": "the function, up to rounding in fp32 and wider, where only the width grows",
    "up to eps": "the function, but for norm_eps, which is the same for a norm of other width",
    "no": "the weights, not the function",
    "no layers": "embedding, final norm and head alone, for all layers are new",
    "nothing": "nothing, for every weight is new",
}
"""What can become of the function of a model when it grows."""
PRESERVING = ("bitwise", "exactly", "exactly (width only)", "up to eps")
"""Those of FUNCTION that keep it, if only up to norm_eps."""


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
    """Source depth, grown depth -> layer map; None where the user has to give the map, or `width` makes it."""
    width: Callable[..., GrowthPlan] | None = None
    """Source sizes, grown sizes, seed and options -> plan; None where the width stays."""
    masked: bool = False
    """Whether new parts open slowly in training, see grow/masks.py."""
    identity_copies: bool = False
    """Whether further copies of a layer are identity layers."""
    trainable: str = "all"
    """The parameters that its paper trains afterwards; one of TRAINABLE in grow/trainable.py."""
    fusion: str | None = None
    """How further copies of a layer are made instead, from it and the layer after it: one of grow.plan.FUSIONS."""
    options: tuple[str, ...] = ("n_layer", "factor")
    """Arguments of `plan_growth`, beside seed and noise, that it takes; with "data" it makes weights from samples."""
    grown_sizes: Callable[..., Config] = wider
    """Source sizes and the widths that were asked for -> grown sizes; for operators in width."""

    @property
    def needs_data(self) -> bool:
        """Whether it reads training samples."""
        return "data" in self.options

    @property
    def is_learned(self) -> bool:
        """Whether what it makes of the weights is trained, so that moments of the source mean nothing afterwards."""
        return "learn_steps" in self.options

    @property
    def trained(self) -> str:
        """`trainable` in words."""
        return TRAINABLE[self.trainable]

    @property
    def preserves(self) -> bool:
        """Whether the grown model computes the same function as its source, if only up to norm_eps."""
        return self.function in PRESERVING

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shown = ("name", "aliases", "axis", "preserves", "function", "paper", "summary", "options", "trained")
        values = {key: getattr(self, key) for key in shown}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


BY_MAP = ("n_layer", "factor", "layer_map")
SIZES = ("n_embd", "n_head", "n_query_groups", "intermediate_size")
WIDTH = (*SIZES, "factor")
BOTH = ("n_layer", *WIDTH)
LEARNING = ("learn_steps", "learn_rate", "batch_size")
"""How operators that read data use it; no part of the sizes."""
LEARN_STEPS = 100  # LiGO's own; arXiv 2303.00980 saves no more compute with 1,000 or 10,000
BATCH_SIZE = 8  # samples of block_size tokens: per step of learned growth, and all that gradmax reads
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
        summary="as gradual, but only what is new and the head are trained, until a last stage trains all",
        layers=depth.gradual,
        trainable="new-and-head",
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
        trainable="new",
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
        aliases=("msg_depth", "msg"),
        axis="depth",
        function="no",
        paper=STACKING_PAPER,
        summary="new layers on top: 123-new*3. In training a mask opens them slowly (mask_steps), so that the function "
        "is kept at first",
        layers=depth.random_depth,
        masked=True,
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
        function="no layers",
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
        summary="the first layers of a larger model, the one operator that shrinks: 123456 -> 123; with --reference it "
        "grows such a model again, by the next layers of the larger one: 123 -> 123[4][5]",
        layers=depth.inheritune,
        options=("n_layer", "factor", "reference"),
    ),
    Operator(
        name="opt-deus",
        aliases=("optimal_transport",),
        axis="depth",
        function="bitwise",
        paper="arXiv 2508.08011",
        summary="in the uppermost gaps the mean of the two layers around, heads and neurons of the upper one in the "
        "order of the lower one's, as an identity layer: 1234 -> 12(2+3)3(3+4)4",
        layers=depth.opt_deus,
        identity_copies=True,
        fusion="aligned",
        trainable="new",
    ),
    Operator(
        name="lesa",
        aliases=(),
        axis="depth",
        function="no",
        paper="arXiv 2502.13794",
        summary="in the uppermost gaps a layer that a network, fitted to the source's layers, predicts from the two "
        "around: 1 2 3 4 -> 1 2 2+3 3 3+4 4",
        layers=depth.lesa,
        fusion="predicted",
    ),
    Operator(
        name="split-width",
        aliases=("direct_width", "net2net"),
        axis="width",
        function="exactly",
        paper=STACKING_PAPER,
        summary="copies of channels, heads and neurons, and what reads them is split among the copies, at random",
        width=width.split_width,
        options=(*WIDTH, "residual", "shares", "order", "adjust_eps"),
    ),
    Operator(
        name="zero-width",
        aliases=("zero",),
        axis="width",
        function="exactly",
        paper=STACKING_PAPER,
        summary="new channels, heads and neurons that change nothing at first",
        width=width.zero_width,
        options=(*WIDTH, "residual", "adjust_eps"),
    ),
    Operator(
        name="random-width",
        aliases=("msg_width",),
        axis="width",
        function="no",
        paper=STACKING_PAPER,
        summary="new channels, heads and neurons with initial weights. In training a mask opens them slowly "
        "(mask_steps), so that the function is kept at first",
        width=width.random_width,
        masked=True,
        options=(*WIDTH, "residual"),
    ),
    Operator(
        name="fpi",
        aliases=("bert2bert",),
        axis="both",
        function="exactly (width only)",
        paper="arXiv 2110.07143",
        summary="copies chosen at random, split evenly, so that they stay equal for ever; layers are stacked, which "
        "changes the function",
        layers=depth.repeat_top,
        width=width.fpi,
        options=(*BOTH, "residual", "adjust_eps"),
    ),
    Operator(
        name="aki",
        aliases=(),
        axis="both",
        function="no",
        paper="arXiv 2110.07143",
        summary="as fpi, but the outputs that are copies come from the layer after; layers are stacked",
        layers=depth.repeat_top,
        width=width.aki,
        options=(*BOTH, "residual"),
    ),
    Operator(
        name="aki-pro",
        aliases=(),
        axis="both",
        function="no",
        paper="arXiv 2408.06567",
        summary="as aki, for grouped queries too; layers are interpolated",
        width=width.aki_pro,
        options=(*BOTH, "residual"),
    ),
    Operator(
        name="lemon",
        aliases=(),
        axis="both",
        function="exactly",
        paper="arXiv 2310.07999",
        summary="whole copies split at random, the rest zero; layers as by zero-depth",
        width=width.lemon,
        options=(*BOTH, "residual", "adjust_eps"),
    ),
    Operator(
        name="hypercloning",
        aliases=("cloning",),
        axis="width",
        function="exactly",
        paper="arXiv 2409.12903",
        summary="every matrix tiled k by k and divided by k; copies stay equal for ever unless --twin-noise parts them",
        width=width.hypercloning,
        options=(*WIDTH, "twin_noise"),
    ),
    Operator(
        name="staged-width",
        aliases=("staged_training_width",),
        axis="width",
        function="exactly",
        paper="arXiv 2203.06211",
        summary="k copies of the model side by side, block-diagonal; they stay equal for ever",
        width=width.staged_width,
        options=WIDTH,
    ),
    Operator(
        name="distill",
        aliases=("knowledge_inheritance",),
        axis="both",
        function="nothing",
        paper="arXiv 2105.13880",
        summary="a new model that copies nothing and learns from the source as its teacher: distill_weight in training",
        width=width.student,
        options=BOTH,
    ),
    Operator(
        name="learn-depth",
        aliases=("ligo", "ligo_depth"),
        axis="depth",
        function="no",
        paper="arXiv 2303.00980",
        summary="every layer a mixture of all layers of the source, by matrices that are trained on data first; they "
        "start as stack: 12312",
        layers=depth.learn_depth,
        options=("n_layer", "factor", "data", *LEARNING),
    ),
    Operator(
        name="learn-width",
        aliases=("ligo_width",),
        axis="both",
        function="no",
        paper="arXiv 2303.00980",
        summary="channels, heads and neurons as mixtures of those of the source, and layers as by learn-depth, by "
        "matrices that are trained on data first",
        layers=depth.learn_depth,
        width=width.learn_width,
        options=(*BOTH, "data", *LEARNING),
    ),
    Operator(
        name="gradmax",
        aliases=(),
        axis="width",
        function="exactly",
        paper="arXiv 2201.05125",
        summary="new neurons that change nothing at first and write where the gradient on data is largest; the number "
        "of neurons is all that grows",
        width=width.gradmax,
        options=("intermediate_size", "factor", "data", "batch_size"),
        grown_sizes=more_neurons,
    ),
)
OPERATORS: dict[str, Operator] = {op.name: op for op in _ALL}
BY_NAME: dict[str, Operator] = {
    name.replace("-", "_"): op for op in OPERATORS.values() for name in (op.name, *op.aliases)
}

IN_WIDTH = {"b2b": "fpi", "msg": "random-width", "ligo": "learn-width"}
"""Methods of prts that are another operator when the width grows."""

UNAVAILABLE: dict[str, str] = {
    "scratch": "it grows nothing; leave the operator out",
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
