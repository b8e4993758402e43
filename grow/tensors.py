"""One tensor of a grown model at a time, weights or moments, made from a plan and the source's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from grow.fused import FusedLayers
from grow.plan import GrowthPlan
from grow.width_tensors import compute_dtype, generator, widened_moment, widened_weight, widening
from lit_gpt.axes import EMBEDDING, layer_of, name_in_block, parameter_shapes, with_layer
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec, spec_of
from lit_gpt.model import init_std, init_tensor


def grown_weight(
    plan: GrowthPlan,
    name: str,
    weights: Mapping[str, Tensor],
    *,
    fused: FusedLayers | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The parameter `name` of the grown model, with storage of its own.

    Args:
        plan: what to do.
        name: of a parameter of the grown model.
        weights: name -> tensor of the source; only what the parameter starts from is read.
        fused: of this plan; what it keeps saves work where several parameters are made. Default: a new one.
        reference: name -> tensor of the reference, where the plan has one.

    Returns:
        A tensor of the shape that `parameter_shapes(plan.dst)` gives, in dtype and on the device of its source; those
        without a source are in dtype and on the device of the embedding.
    """
    source = plan.source_of(name)
    if source is not None and plan.width is not None:
        following = _following(plan, source)
        after = None if following is None else weights[following]
        wide = widening(plan.width, plan.src, plan.dst)
        grown = widened_weight(wide, name, plan.seed, weights[source], after)
    elif source is not None:
        grown = weights[source].clone()
    else:
        grown = _without_source(plan, name, weights, fused or FusedLayers(plan), reference)
    return with_noise(grown, plan, name) if plan.noise and grown.dim() == 2 else grown


def _without_source(
    plan: GrowthPlan,
    name: str,
    weights: Mapping[str, Tensor],
    fused: FusedLayers,
    reference: Mapping[str, Tensor] | None,
) -> Tensor:
    """A parameter that is zero, made from two layers, from the reference, or new."""
    layer, like = layer_of(name), spec_of(weights, EMBEDDING)
    kind = {"dtype": like.dtype, "device": like.device}
    if plan.is_silenced(name):
        return torch.zeros(parameter_shapes(plan.dst)[name], **kind)
    if layer in plan.fused_layers:
        return fused.weight(name, weights).to(**kind)
    if layer in plan.reference_layers:
        if reference is None:
            raise ValueError(f"{name} comes from the reference {plan.reference.path_name}; give its weights too")
        return reference[with_layer(name, plan.layer_map[layer])].to(**kind, copy=True)
    return init_tensor(name, plan.dst, plan.seed).to(**kind)


def with_noise(weight: Tensor, plan: GrowthPlan, name: str) -> Tensor:
    """(1 - noise) * weight + noise * fresh weights of the initial distribution: arXiv 2405.15319, appendix I.2."""
    fresh = torch.empty(weight.shape, dtype=torch.float32)
    fresh.normal_(0.0, init_std(name, plan.dst), generator=generator(plan.seed, "noise", name))
    wide = weight.to(compute_dtype(weight.dtype))
    return wide.mul(1 - plan.noise).add(fresh.to(wide), alpha=plan.noise).to(weight.dtype)


class WithNoise(LazyTensors):
    """Weights of a grown model that were made without the plan's noise, with it, on every access."""

    def __init__(self, plan: GrowthPlan, weights: Mapping[str, Tensor]) -> None:
        self._plan = plan
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        return with_noise(weight, self._plan, name) if self._plan.noise and weight.dim() == 2 else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def spec(self, name: str) -> TensorSpec:
        return spec_of(self._weights, name)


def _following(plan: GrowthPlan, source: str) -> str | None:
    """The parameter of the layer after, where the plan takes rows from it; the last layer has none."""
    layer = layer_of(source)
    if plan.width is None or not plan.width.rows_from_next_layer or layer is None:
        return None
    return with_layer(source, layer + 1) if layer + 1 < plan.src.n_layer else None


def state_like(moments: Mapping[str, Mapping[str, Tensor]], name: str, source: str | None) -> Mapping[str, Tensor]:
    """The state whose slots the parameter `name` will have: that of its source, or of one of the same kind, as an
    optimizer may keep other slots for matrices than for the rest."""
    if source in moments:
        return moments[source]
    alike = (each for each in moments if name_in_block(each) == name_in_block(name))
    return moments[next(alike, next(iter(moments)))]


def grown_moments(
    plan: GrowthPlan,
    name: str,
    moments: Mapping[str, Mapping[str, Tensor]],
    *,
    from_zero: bool = False,
    first_copies: bool = False,
) -> dict[str, Tensor]:
    """The optimizer state of the parameter `name` of the grown model.

    Args:
        plan: what was done to the weights.
        name: of a parameter of the grown model.
        moments: of the source, parameter name -> "exp_avg", "exp_avg_sq" (shaped like the parameter), "step" (scalar).
        from_zero: forget them: zeros and step 0. Parameters without a source, and those whose source was frozen and
            has no moments, start so in any case.
        first_copies: forget those of further copies of a channel, head or neuron.

    Returns:
        The same keys as the source has.
    """
    source = plan.source_of(name)
    shape = parameter_shapes(plan.dst)[name]
    if source not in moments or from_zero:
        state = state_like(moments, name, source)
        like = {slot: spec_of(state, slot) for slot in state}
        return {
            slot: torch.zeros(shape if spec.shape else (), dtype=spec.dtype, device=spec.device)
            for slot, spec in like.items()
        }
    if plan.width is None:
        return {key: value.clone() for key, value in moments[source].items()}
    following = _following(plan, source)
    wide = widening(plan.width, plan.src, plan.dst)
    return {
        key: value.clone()
        if not value.dim()
        else widened_moment(
            wide,
            name,
            value,
            moments[following][key] if following in moments else None,
            power=2 if key.endswith("sq") else 1,
            first_copies=first_copies,
        )
        for key, value in moments[source].items()
    }
