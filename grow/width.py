"""Operators that grow in width: pure functions from two sets of sizes to a GrowthPlan, without tensors.

All take the sizes before and after growth, of which `n_head / n_query_groups` may grow too (query heads are then added
to the groups there are), and a seed. Unless they say otherwise they keep the layers, or take a layer map to grow in
depth with: first the layers are copied, then each of them grows.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from grow.depth import interpolate
from grow.plan import GrowthPlan
from grow.width_plan import IndexMap, WidthPlan
from lit_gpt.config import Config

LayerMap = Sequence[int | None]


def split_width(
    src: Config,
    dst: Config,
    *,
    seed: int = 0,
    residual: str = "M",
    shares: str = "random",
    order: str = "cyclic",
    adjust_eps: bool = False,
    layer_map: LayerMap | None = None,
) -> GrowthPlan:
    """Copy channels, heads and neurons, and split what reads them among the copies.

    G_direct in width of "Stacking Your Transformers" (arXiv 2405.15319, section 3.1 and appendix A), after Net2Net
    (arXiv 1511.05641) and bert2BERT. With the rule M (default), E or U the function is kept for any width; with the
    rules "published" (that paper's sqrt(d/D)) and "bert2bert" (norms copied) it is not, because RMSNorm then sees a
    residual stream of another size. Random shares let the copies part at the first step; with even ones they never do.

    Args:
        src: sizes before growth.
        dst: sizes after growth.
        seed: of the shares and of a random order.
        residual: the rule for residual channels, one of RULES in grow/width_plan.py.
        shares: "random", every weight its own share of what it read, or "even".
        order: which are copied: "cyclic", 0 1 2 0 1 2, or "random", every one once and then any.
        adjust_eps: give the grown model the norm_eps with which the rules E and Z are exact.
        layer_map: layers that the grown model's start from; default: as they are.

    Raises:
        ValueError: sizes that shrink, another head_size, or a rule that does not fit the sizes.
    """
    maps = _copied(src, dst, seed, order)
    width = WidthPlan(**maps, rule=residual, shares=shares)
    return _plan("split-width", src, dst, width, seed, layer_map=layer_map, adjust_eps=adjust_eps)


def zero_width(
    src: Config,
    dst: Config,
    *,
    seed: int = 0,
    residual: str = "M",
    adjust_eps: bool = False,
    layer_map: LayerMap | None = None,
) -> GrowthPlan:
    """Add channels, heads and neurons that change nothing: W becomes [[W, A], [0, C]] with A and C random.

    G_zero in width of arXiv 2405.15319, section 3.1 and appendix A. New residual channels are zero at first, so A and C
    do not act; norm weights there are 1, so that they can train. Keeps the function with the rule M (default); the
    paper's own gamma is the rule Z, which keeps it up to norm_eps (exactly with `adjust_eps`). Where n_embd does not
    grow, the paper's form is dead (gate and up projection both zero): there new heads and neurons are random inside
    and nothing reads them yet, and so it is with new query heads in an old group.

    Raises:
        ValueError: sizes that shrink, another head_size, or a rule that does not fit the sizes.
    """
    fill = "block" if dst.n_embd > src.n_embd else "closed"
    width = WidthPlan(**_padded(src, dst), rule=residual, fill=fill)
    return _plan("zero-width", src, dst, width, seed, layer_map=layer_map, adjust_eps=adjust_eps)


def random_width(
    src: Config, dst: Config, *, seed: int = 0, residual: str = "M", layer_map: LayerMap | None = None
) -> GrowthPlan:
    """Add channels, heads and neurons with the initial weights of the grown model.

    G_random in width of arXiv 2405.15319, appendix A, and masked structural growth (arXiv 2305.02869): the plain model
    at the end of the annealing. As it stands it does not keep the function; it does under a mask that is 0 on all that
    is new, and that mask belongs to training.

    Raises:
        ValueError: sizes that shrink, another head_size, or a rule that does not fit the sizes.
    """
    width = WidthPlan(**_padded(src, dst), rule=residual, fill="random")
    return _plan("random-width", src, dst, width, seed, layer_map=layer_map)


def learn_width(src: Config, dst: Config, *, seed: int = 0, layer_map: LayerMap | None = None) -> GrowthPlan:
    """Mixtures of channels, heads and neurons, and with a layer map of layers too, whose matrices are learned.

    LiGO (arXiv 2303.00980), see grow/learned.py. At first what there is stays, norms included, and what is new is a
    random mixture of it. Does not preserve the function.

    Raises:
        ValueError: sizes that shrink, or another head_size.
    """
    width = WidthPlan(**_padded(src, dst), rule="bert2bert", fill="random")
    return _plan("learn-width", src, dst, width, seed, layer_map=layer_map)


def gradmax(src: Config, dst: Config, *, seed: int = 0) -> GrowthPlan:
    """Neurons that write in the direction in which they get the largest gradient, and write nothing yet.

    GradMax (arXiv 2201.05125) for a SwiGLU, see grow/gradmax.py. Keeps the function: the up projection is zero.

    Raises:
        ValueError: fewer neurons.
    """
    return _plan("gradmax", src, dst, WidthPlan(**_padded(src, dst)), seed, layer_map=None)


def fpi(
    src: Config,
    dst: Config,
    *,
    seed: int = 0,
    residual: str = "M",
    adjust_eps: bool = False,
    layer_map: LayerMap | None = None,
) -> GrowthPlan:
    """Function preserving initialisation: copies chosen at random, shares even.

    bert2BERT (arXiv 2110.07143), section 3.2. Keeps the function with the rule M (default) or E. As published, with the
    norms copied, it is the rule "bert2bert", which keeps it only where every channel has equally many copies. Copies
    stay equal for ever in training without noise.

    Raises:
        ValueError: sizes that shrink, another head_size, or a rule that does not fit the sizes.
    """
    width = WidthPlan(**_copied(src, dst, seed, "random"), rule=residual)
    return _plan("fpi", src, dst, width, seed, layer_map=layer_map, adjust_eps=adjust_eps)


def aki(
    src: Config, dst: Config, *, seed: int = 0, residual: str = "M", layer_map: LayerMap | None = None
) -> GrowthPlan:
    """Advanced knowledge initialisation: as `fpi`, but outputs that are copies come from the layer after.

    bert2BERT (arXiv 2110.07143), section 3.3: new heads, neurons and residual rows of layer l are those of layer l + 1
    at the mapped index; the last layer, the embedding, the head and the norms are as in `fpi`. Does not keep the
    function, and has no copies that could stay equal.

    Raises:
        ValueError: sizes that shrink, another head_size, or a rule that does not fit the sizes.
    """
    width = WidthPlan(**_copied(src, dst, seed, "random"), rule=residual, rows_from_next_layer=True)
    return _plan("aki", src, dst, width, seed, layer_map=layer_map)


def aki_pro(
    src: Config, dst: Config, *, seed: int = 0, residual: str = "M", layer_map: LayerMap | None = None
) -> GrowthPlan:
    """`aki` in width and interpolation in depth, for grouped queries too.

    AquilaMoE (arXiv 2408.06567), "AKI-Pro": layers are repeated where they stand, and where the number of query groups
    stays, query heads are copied within their group. Does not keep the function.

    Args:
        src: sizes before growth.
        dst: sizes after growth, n_layer included.
        seed: of the choice of copies.
        residual: the rule for residual channels.
        layer_map: layers to use instead of the interpolation's.

    Raises:
        ValueError: sizes that shrink, another head_size, or a rule that does not fit the sizes.
    """
    layers = interpolate(src.n_layer, dst.n_layer) if layer_map is None else layer_map
    width = WidthPlan(**_copied(src, dst, seed, "random"), rule=residual, rows_from_next_layer=True)
    return _plan("aki-pro", src, dst, width, seed, layer_map=layers)


def lemon(src: Config, dst: Config, *, seed: int = 0, residual: str = "M", adjust_eps: bool = False) -> GrowthPlan:
    """Lossless expansion in width and depth: whole copies, the rest zero; further copies of a layer are silent.

    LEMON (arXiv 2310.07999), sections 4.1 to 4.3: as many whole copies of the residual stream as fit, zero channels
    for the remainder (its form for RMSNorm), heads and neurons copied, every weight with a random share of its own;
    in depth every layer is repeated where it stands, and all but the first copy write nothing. Keeps the function with
    the rule M (default); the paper's gamma is the rule Z, which does up to norm_eps (exactly with `adjust_eps`).

    Raises:
        ValueError: sizes that shrink, another head_size, or a rule that does not fit the sizes.
    """
    maps = _copied(src, dst, seed, "cyclic")
    whole = dst.n_embd // src.n_embd * src.n_embd
    maps["channels"] = tuple(channel if at < whole else None for at, channel in enumerate(maps["channels"]))
    layers = interpolate(src.n_layer, dst.n_layer)
    further = tuple(layer for layer in range(1, len(layers)) if layers[layer] == layers[layer - 1])
    width = WidthPlan(**maps, rule=residual, shares="random")
    return _plan("lemon", src, dst, width, seed, layer_map=layers, adjust_eps=adjust_eps, identity_layers=further)


def hypercloning(
    src: Config, dst: Config, *, seed: int = 0, twin_noise: float = 0.0, layer_map: LayerMap | None = None
) -> GrowthPlan:
    """Tile every matrix k by k and divide it by k.

    HyperCloning (arXiv 2409.12903), section 3: embedding and norms tiled as they are, whole query groups copied; a
    single key/value head stays single, with its query heads copied. Keeps the function. Copies stay equal for ever in
    training without noise, unless `twin_noise` is given.

    Args:
        src: sizes before growth.
        dst: sizes after growth; n_embd a multiple of the source's.
        seed: of the noise.
        twin_noise: noise N on the columns that read one copy and -N on those that read its twin, as a share of the
            weights' root mean square; 0.316 is the paper's signal-to-noise ratio of 10 dB. The function stays.
        layer_map: layers that the grown model's start from; default: as they are.

    Raises:
        ValueError: a width that is no multiple, sizes that shrink, or another head_size.
    """
    _check_factor("hypercloning", src, dst)
    width = WidthPlan(**_copied(src, dst, seed, "cyclic"), rule="U", twin_noise=twin_noise)
    return _plan("hypercloning", src, dst, width, seed, layer_map=layer_map)


def staged_width(src: Config, dst: Config, *, seed: int = 0, layer_map: LayerMap | None = None) -> GrowthPlan:
    """Put k copies of the model side by side: block-diagonal matrices, and a head that averages.

    Staged training (arXiv 2203.06211), section 4, width operator. Keeps the function. The copies stay equal for ever in
    training without dropout or noise; nothing in the operator breaks the symmetry.

    Raises:
        ValueError: n_embd, n_query_groups and intermediate_size do not grow by one whole factor, or another head_size.
    """
    _check_factor("staged-width", src, dst)
    width = WidthPlan(**_copied(src, dst, seed, "cyclic"), rule="U", shares="block")
    return _plan("staged-width", src, dst, width, seed, layer_map=layer_map)


def student(src: Config, dst: Config, *, seed: int = 0) -> GrowthPlan:
    """A new model of the grown sizes, which copies nothing: it is to learn from the source as its teacher.

    Knowledge inheritance (arXiv 2105.13880), prts's `distill`. The teaching is a loss, see grow/distill.py.
    """
    return GrowthPlan("distill", src, dst, (None,) * dst.n_layer, seed, fresh=True)


def _plan(
    operator: str,
    src: Config,
    dst: Config,
    width: WidthPlan,
    seed: int,
    *,
    layer_map: LayerMap | None,
    adjust_eps: bool = False,
    identity_layers: tuple[int, ...] = (),
) -> GrowthPlan:
    if adjust_eps and dst.n_embd >= src.n_embd:
        dst = dataclasses.replace(dst, norm_eps=width.exact_eps(src))
    layers = tuple(range(src.n_layer)) if layer_map is None else tuple(layer_map)
    return GrowthPlan(operator, src, dst, layers, seed, identity_layers=identity_layers, width=width)


def _check_factor(operator: str, src: Config, dst: Config) -> None:
    if dst.n_embd % src.n_embd:
        below = max(dst.n_embd // src.n_embd, 1) * src.n_embd
        raise ValueError(
            f"{operator} needs a whole factor, and n_embd={src.n_embd} does not divide {dst.n_embd}; "
            f"use {below} or {below + src.n_embd}, or split-width, which takes any width"
        )


def _sizes(src: Config, dst: Config) -> dict[str, tuple[int, int]]:
    """Before and after, for every map of a width plan."""
    return {
        "channels": (src.n_embd, dst.n_embd),
        "groups": (src.n_query_groups, dst.n_query_groups),
        "slots": (src.q_per_kv, dst.q_per_kv),
        "neurons": (src.intermediate_size, dst.intermediate_size),
    }


def _copied(src: Config, dst: Config, seed: int, order: str) -> dict[str, IndexMap]:
    """Maps that keep every index and then repeat: all of them in turn, or random ones."""
    if order not in ("cyclic", "random"):
        raise ValueError(f"unknown order {order!r}; known: cyclic, random")
    maps = {}
    for name, (before, after) in _sizes(src, dst).items():
        rng = random.Random(f"{seed}/{name}")
        further = [rng.randrange(before) if order == "random" else at % before for at in range(before, after)]
        maps[name] = (*range(min(before, after)), *further)
    return maps


def _padded(src: Config, dst: Config) -> dict[str, IndexMap]:
    """Maps that keep every index; all further ones are new."""
    return {
        name: (*range(min(before, after)), *[None] * (after - before))
        for name, (before, after) in _sizes(src, dst).items()
    }
