"""Operators that grow in depth: pure functions from two depths to a layer map, layers counted from 0, None for new.

Where an operator preserves the function, its plan makes every further copy of a layer an identity layer: attn.proj and
mlp.swiglu.w3 are zero, so the block adds nothing to the residual stream, in any dtype, and both matrices get a gradient
in the first step. See grow/operators.py for which do.
"""

from __future__ import annotations

from collections.abc import Sequence

from grow.layer_map import LayerMap, check_layer_map, parse_layer_map


def stack(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Repeat the whole tower, 0 1 2 0 1 2.

    G_stack, or G_direct in depth, of "Stacking Your Transformers" (arXiv 2405.15319). All parameters of a layer are
    copied. Does not preserve the function: the loss rises at growth and falls below scratch's in training.

    Raises:
        ValueError: the source's depth does not divide the grown one.
    """
    if n_layer_dst % n_layer_src:
        below = n_layer_dst // n_layer_src * n_layer_src
        raise ValueError(
            f"stack needs a whole factor, and {n_layer_src} layers do not divide {n_layer_dst}; "
            f"use {max(below, n_layer_src)} or {below + n_layer_src} layers, give a layer map, or use interpolate"
        )
    return tuple(layer % n_layer_src for layer in range(n_layer_dst))


def interpolate(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Repeat every layer where it stands, 0 0 1 1 2 2; any depth will do.

    "Interpolation" of arXiv 2405.15319, section 5, also known as interleaving; the remainder is spread evenly.
    Does not preserve the function, and keeps fewer neighbours together than stacking (a lower connection rate).
    """
    return tuple(layer * n_layer_src // n_layer_dst for layer in range(n_layer_dst))


def partial(n_layer_src: int, n_layer_dst: int | None, layer_map: str | Sequence[int]) -> LayerMap:
    """The layers that an explicit map names, e.g. "12-3456*5-56".

    Partial stacking of arXiv 2405.15319, section 5: repeating a part of the tower; the closer a map's connection rate
    is to that of stacking, the better it did there. Does not preserve the function.

    Args:
        n_layer_src: layers of the source.
        n_layer_dst: layers the map must have; None takes as many as it has.
        layer_map: text as in grow/layer_map.py (layers from 1), or a sequence of layers counted from 0.

    Raises:
        ValueError: the map is malformed, names a layer that does not exist, or has another length.
    """
    if isinstance(layer_map, str):
        return parse_layer_map(layer_map, n_layer_src=n_layer_src, n_layer=n_layer_dst)
    layers = tuple(layer_map)
    check_layer_map(layers, n_layer_src, len(layers) if n_layer_dst is None else n_layer_dst)
    return layers


def gradual(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Append copies of the last layers, 0 1 2 1 2; one hop of gradual stacking.

    StackBERT (Gong et al., ICML 2019) doubles per hop, which is stacking by 2; prts's `gs` and MSLT (arXiv 2011.13635)
    append as many of the last layers as are missing. Does not preserve the function.

    Raises:
        ValueError: more than twice the source's depth, for which the rule names no layers.
    """
    more = n_layer_dst - n_layer_src
    if more > n_layer_src:
        hops = [n_layer_src]
        while hops[-1] < n_layer_dst:
            hops.append(min(2 * hops[-1], n_layer_dst))
        raise ValueError(
            f"gradual growth at most doubles the depth, and {n_layer_dst} is more than twice {n_layer_src}; "
            f"grow in hops, each a stage of its own: {' -> '.join(map(str, hops))}"
        )
    return (*range(n_layer_src), *range(n_layer_src - more, n_layer_src))


def solar(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """The tower without its last m layers, then the tower without its first m; the grown depth says m.

    Depth up-scaling of SOLAR (arXiv 2312.15166): L' = 2 (L - m), 48 layers from 32 with m = 8. Does not preserve the
    function.

    Raises:
        ValueError: an odd depth, or one above twice the source's.
    """
    if n_layer_dst == n_layer_src:
        return tuple(range(n_layer_src))
    if n_layer_dst % 2 or not n_layer_src < n_layer_dst <= 2 * n_layer_src:
        first = n_layer_src + n_layer_src % 2
        raise ValueError(
            f"solar joins two towers of L - m layers, so that {n_layer_src} layers grow to an even number of "
            f"{first} to {2 * n_layer_src}, and not to {n_layer_dst}; choose one of these"
        )
    left_out = n_layer_src - n_layer_dst // 2
    return (*range(n_layer_src - left_out), *range(left_out, n_layer_src))


def llama_pro(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """A copy after every P layers, 0 1 1 2 3 3, with P = L / (L' - L); the copies are identity layers.

    Block expansion of LLaMA Pro (arXiv 2401.02415), where only the copies are trained afterwards.

    Raises:
        ValueError: P is not whole.
    """
    more = n_layer_dst - n_layer_src
    if more == 0:
        return tuple(range(n_layer_src))
    if n_layer_src % more:
        depths = ", ".join(str(n_layer_src + n) for n in _divisors(n_layer_src))
        raise ValueError(
            f"llama-pro adds a layer after every P, and {more} more do not divide {n_layer_src} layers; "
            f"depths that work: {depths}; zero-depth takes any"
        )
    period = n_layer_src // more
    return tuple(layer for i in range(n_layer_src) for layer in ((i, i) if (i + 1) % period == 0 else (i,)))


def midas(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Repeat the middle block, 0 1 2 3 2 3 4 5: of n blocks of b = L' - L layers number ceil(n / 2).

    One hop of gradual middle stacking (arXiv 2409.19044). Does not preserve the function.

    Raises:
        ValueError: the source is not made of blocks of b layers.
    """
    end = _middle(n_layer_src, n_layer_dst, "midas", 1)
    return _inserted(n_layer_src, end, range(end - (n_layer_dst - n_layer_src), end))


def lidas(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """As midas, but the inserted layers are the ones around the insertion point: b / 2 from below, b / 2 from above.

    arXiv 2512.08819. Does not preserve the function.

    Raises:
        ValueError: the source is not made of two or more blocks of b layers, or b is odd.
    """
    block = n_layer_dst - n_layer_src
    if block % 2:
        raise ValueError(
            f"lidas inserts half a block from below and half from above, but {block} more layers are an odd number; "
            f"add an even number, or use midas"
        )
    at = _middle(n_layer_src, n_layer_dst, "lidas", 2)
    return _inserted(n_layer_src, at, range(at - block // 2, at + block // 2))


def staged_depth(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Every layer, followed by a copy that is an identity layer, 0 0 1 1: exactly twice the depth.

    Staged training (arXiv 2203.06211) makes its identity layers by zero norm weights. With a SwiGLU the MLP of such a
    layer never gets a gradient, so here attn.proj and mlp.swiglu.w3 are zero instead, from which all of it trains.

    Raises:
        ValueError: another factor than 2.
    """
    if n_layer_dst not in (n_layer_src, 2 * n_layer_src):
        raise ValueError(
            f"staged-depth doubles the depth, {n_layer_src} layers to {2 * n_layer_src}, and not to {n_layer_dst}; "
            f"zero-depth takes any depth"
        )
    return interpolate(n_layer_src, n_layer_dst)


def repeat_top(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Repeat the tower as often as it fits, then its last layers, 0 1 2 0 1 2 1 2; any depth will do.

    How bert2BERT (arXiv 2110.07143) grows in depth. Does not preserve the function.
    """
    repeats, rest = divmod(n_layer_dst, n_layer_src)
    return (*(*range(n_layer_src),) * repeats, *range(n_layer_src - rest, n_layer_src))


def learn_depth(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Repeat the whole tower, 0 1 2 0 1; any depth will do. What mixing matrices over layers start from.

    LiGO (arXiv 2303.00980): every layer of the grown model is a learned mixture of all layers of the source, see
    grow/learned.py. Does not preserve the function.
    """
    return tuple(layer % n_layer_src for layer in range(n_layer_dst))


def random_depth(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """The source's layers with new ones on top, which start from the initial weights of the grown model.

    G_random in depth of arXiv 2405.15319 once its mask is fully open (c = 1). Does not preserve the function: that is
    the work of the mask, which starts closed and opens during training.
    """
    return (*range(n_layer_src), *[None] * (n_layer_dst - n_layer_src))


def one_layer(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Every layer starts from the only one of the source (arXiv 2511.04981). Does not preserve the function.

    Raises:
        ValueError: the source has more than one layer.
    """
    if n_layer_src != 1:
        raise ValueError(
            f"one-layer grows a model of 1 layer, and the source has {n_layer_src}; use stack, "
            f"or partial with a map such as '1*{n_layer_dst}'"
        )
    return (0,) * n_layer_dst


def zero_layer(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """Only new layers; the embedding, the final norm and the head come from the source (arXiv 2511.04981).

    There the source has no layers at all; a checkpoint here has at least one, and this operator leaves them out. Does
    not preserve the function.
    """
    del n_layer_src  # none of the source's layers is used
    return (None,) * n_layer_dst


def inheritune(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """The first layers of a larger model (arXiv 2404.08634): the one operator that shrinks. The function changes.

    Its second half, which appends the next layers of that model to such a prefix, is the same map of the larger model
    with the prefix's own layers in the place of the first ones: `plan_growth` with a reference.

    Raises:
        ValueError: more layers than the larger model has, or none.
    """
    if not 1 <= n_layer_dst <= n_layer_src:
        raise ValueError(
            f"inheritune takes the first layers of a larger model, 1 to {n_layer_src} of them, and not {n_layer_dst}; "
            f"to append more layers of the model that this one was cut from, name it by `grow apply --reference`, "
            f"or in a stage by options: {{reference: PATH}}; use stack to grow"
        )
    return tuple(range(n_layer_dst))


def opt_deus(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """A layer in each of the uppermost gaps between two layers, 0 1 1 2 2 3, made from the two: k of them in k gaps.

    OpT-DeUS (arXiv 2508.08011). Further copies in this map stand for the new layers; a plan lists them as fused layers,
    see grow/fused.py, and as identity layers, so that the function is kept. There only they are trained afterwards.

    Raises:
        ValueError: more layers than there are gaps.
    """
    return _in_gaps(n_layer_src, n_layer_dst, "opt-deus")


def lesa(n_layer_src: int, n_layer_dst: int) -> LayerMap:
    """As opt-deus, but a network predicts the new layers, which act at once. Does not preserve the function.

    LESA (arXiv 2502.13794), where 16 layers go between layers 15 to 31 of 32.

    Raises:
        ValueError: more layers than there are gaps.
    """
    return _in_gaps(n_layer_src, n_layer_dst, "lesa")


def _in_gaps(n_layer_src: int, n_layer_dst: int, name: str) -> LayerMap:
    more = n_layer_dst - n_layer_src
    if more >= n_layer_src > 0 and more:
        raise ValueError(
            f"{name} puts one layer into a gap between two, and {n_layer_src} layers have {n_layer_src - 1} gaps: "
            f"at most {2 * n_layer_src - 1} layers, and not {n_layer_dst}; use stack, or grow in several hops"
        )
    first = n_layer_src - 1 - more
    return tuple(layer for i in range(n_layer_src) for layer in ((i, i) if first <= i < n_layer_src - 1 else (i,)))


def _middle(n_layer_src: int, n_layer_dst: int, name: str, min_blocks: int) -> int:
    """Layers below the insertion point: those of the first ceil(n / 2) of n blocks of L' - L layers."""
    block = n_layer_dst - n_layer_src
    if block == 0:
        return 0
    if n_layer_src % block or n_layer_src // block < min_blocks:
        blocks = [n for n in _divisors(n_layer_src) if n_layer_src // n >= min_blocks]
        blocks = [n for n in blocks if name == "midas" or n % 2 == 0]
        depths = ", ".join(str(n_layer_src + n) for n in blocks) or "none"
        raise ValueError(
            f"{name} adds one block of a model made of {min_blocks} or more such blocks; {n_layer_src} layers are not "
            f"made of blocks of {block}. Depths that work: {depths}; deeper in several hops"
        )
    n_blocks = n_layer_src // block
    return -(-n_blocks // 2) * block


def _inserted(n_layer_src: int, at: int, layers: Sequence[int]) -> LayerMap:
    return (*range(at), *layers, *range(at, n_layer_src))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
