"""A grown model and its optimizer state as mappings that make each tensor on access; grow/apply.py stores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from grow.fused import FusedLayers
from grow.operators import is_learned, needs_data
from grow.plan import OPTIMIZER_POLICIES, GrowthPlan
from grow.tensors import grown_moments, grown_weight, state_like
from lit_gpt.axes import EMBEDDING, parameter_shapes
from lit_gpt.errors import DataError
from lit_gpt.lazy_tensors import CastWeights, LazyTensors, Renamed, TensorSpec, fill_from, spec_of

OptimizerState = Mapping[str, Mapping[str, Tensor]]
"""Parameter name -> "exp_avg", "exp_avg_sq" (shaped like the parameter) and "step" (a scalar)."""

GIVE_DATA = "name some: grow apply --data PATH, a folder of scripts/prepare.py or token files"


class GrownWeights(LazyTensors):
    """Name -> tensor of the grown model, made from the source on every access: no weight is held.

    With a dtype, the source's weights are cast to it before they are grown. A plan with a reference needs its weights.

    Raises:
        ValueError: a plan that needs training samples.
    """

    def __init__(
        self,
        plan: GrowthPlan,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        if needs_data(plan):
            raise ValueError(f"{plan.operator} makes weights from training samples, and there are none; {GIVE_DATA}")
        self._plan = plan
        self._names = parameter_shapes(plan.dst)
        self._weights = weights if dtype is None else CastWeights(weights, dtype)
        self._reference = reference
        self._fused = FusedLayers(plan)
        self._copied = copied_parameters(plan) if dtype is None else {}

    def fill(self, name: str, target: Tensor) -> None:
        """Of a parameter that is one of the source as it is, no more is read than belongs into `target`."""
        if name in self._copied:
            fill_from(self._weights, self._copied[name], target)
        else:
            super().fill(name, target)

    def __getitem__(self, name: str) -> Tensor:
        return grown_weight(self._plan, name, self._weights, fused=self._fused, reference=self._reference)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def spec(self, name: str) -> TensorSpec:
        like = spec_of(self._weights, self._plan.source_of(name) or EMBEDDING)
        return dataclasses.replace(like, shape=self._names[name])


def copied_parameters(plan: GrowthPlan) -> dict[str, str]:
    """Parameters of the grown model that are, bit for bit, parameters of the source -> those.

    {} where the model grows in width or gets noise, although a norm may be a copy even then.
    """
    if plan.width is not None or plan.noise:
        return {}
    return {name: source for name, source in plan.sources().items() if source is not None}


class GrownOptimizer(Mapping[str, LazyTensors]):
    """Name -> optimizer state of a parameter of the grown model, made on every access; empty under "reset".

    Raises:
        ValueError: unknown policy, or one that needs moments where there are none.
        DataError: parameters are missing or unexpected in the optimizer state.
    """

    def __init__(self, plan: GrowthPlan, optimizer_state: OptimizerState, policy: str) -> None:
        check_optimizer(plan, optimizer_state, policy)
        self._plan = plan
        self._state = optimizer_state
        self._old_only = policy == "map-old-zero-new"
        self._sources = {} if policy == "reset" else plan.sources()
        firsts = {source: name for name, source in reversed(self._sources.items())}
        self._first_copies = set(firsts.values())
        self._copies = self.copies()

    def __getitem__(self, name: str) -> LazyTensors:
        if name not in self._sources:
            raise KeyError(name)
        return GrownSlots(
            self._plan,
            name,
            self._state,
            from_zero=self._is_forgotten(name),
            first_copies=self._old_only,
            copied=self._copies.get(name),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def _is_forgotten(self, name: str) -> bool:
        return self._old_only and name not in self._first_copies

    def copies(self) -> dict[str, str]:
        """Parameters whose state is, bit for bit, that of a parameter of the source -> those."""
        if self._plan.width is not None:
            return {}
        return {
            name: source
            for name, source in self._sources.items()
            if source in self._state and not self._is_forgotten(name)
        }


class GrownSlots(LazyTensors):
    """Slot -> tensor of the optimizer state of one parameter of the grown model, made on every access."""

    def __init__(
        self,
        plan: GrowthPlan,
        name: str,
        state: OptimizerState,
        *,
        from_zero: bool,
        first_copies: bool,
        copied: str | None = None,
    ) -> None:
        self._plan = plan
        self._name = name
        self._state = state
        self._options = {"from_zero": from_zero, "first_copies": first_copies}
        self._like = state_like(state, name, plan.source_of(name))
        self._copied = copied
        """The parameter of the source whose state this is, bit for bit, if it is one's."""

    def fill(self, slot: str, target: Tensor) -> None:
        """Of a copy, no more is read than belongs into `target`."""
        if self._copied is None:
            super().fill(slot, target)
        else:
            fill_from(self._state[self._copied], slot, target)

    def __getitem__(self, slot: str) -> Tensor:
        return grown_moments(self._plan, self._name, _OneSlot(self._state, slot), **self._options)[slot]

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def spec(self, slot: str) -> TensorSpec:
        like = spec_of(self._like, slot)
        return dataclasses.replace(like, shape=parameter_shapes(self._plan.dst)[self._name] if like.shape else ())


class _OneSlot(Mapping[str, LazyTensors]):
    """An optimizer state of which one slot alone is seen, so that no other one is read."""

    def __init__(self, state: OptimizerState, slot: str) -> None:
        self._state = state
        self._slot = slot

    def __getitem__(self, name: str) -> LazyTensors:
        return Renamed({self._slot: (self._state[name], self._slot)})

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def check_policy(plan: GrowthPlan, policy: str) -> None:
    """Refuse a policy that does not exist, or that no optimizer state could serve after this growth.

    Raises:
        ValueError: see above.
    """
    if policy not in OPTIMIZER_POLICIES:
        raise ValueError(f"unknown optimizer policy {policy!r}; known: {', '.join(OPTIMIZER_POLICIES)}")
    if policy != "reset" and is_learned(plan):
        raise ValueError(
            f"optimizer policy {policy!r} does not go with {plan.operator}: its weights are trained mixtures, of which "
            f"the source's moments say nothing; use 'reset'"
        )


def check_optimizer(plan: GrowthPlan, optimizer_state: OptimizerState, policy: str) -> None:
    """Refuse a policy that does not exist or that this optimizer state cannot serve; raises as GrownOptimizer does."""
    check_policy(plan, policy)
    if policy == "reset":
        return
    if not optimizer_state:
        raise ValueError(f"optimizer policy {policy!r} needs moments, and the source has none; use 'reset'")
    strange = set(optimizer_state) - set(parameter_shapes(plan.src))
    if strange:
        raise DataError(
            f"the optimizer state does not belong to the source: it names {len(strange)} parameters that the source "
            f"does not have, e.g. {min(strange)}; use policy 'reset'"
        )
