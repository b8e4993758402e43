"""Layers that are made from two neighbours of the source, by one of the FUSIONS of grow/plan.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grow.plan import GrowthPlan
from grow.prediction import Predictor, join, split
from grow.transport import ALIGNED_BY, align, aligned_mean
from grow.width_tensors import generator
from lit_gpt.axes import BLOCK_PREFIX, layer_of, name_in_block, with_layer
from lit_gpt.errors import DataError


class FusedLayers:
    """Makes the parameters of a plan's fused layers, one at a time.

    What is costly, the alignment of two layers or the network of a kind of matrix, is made when it is first needed and
    kept for the next parameter. Everything is computed on the CPU, so that the plan and the weights give the same bits
    wherever they lie; another number of threads or another CPU may round otherwise.
    """

    def __init__(self, plan: GrowthPlan) -> None:
        self._plan = plan
        self._alignments: dict[int, dict[str, Tensor]] = {}
        self._predictors: dict[tuple[str, int], Predictor] = {}

    def weight(self, name: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The parameter `name` of a fused layer.

        Args:
            name: in the grown model.
            weights: name -> tensor of the source. Those of the two layers are read; for a network to predict matrices
                from, those of the same kind of all layers, which it holds at a time.

        Raises:
            DataError: what is compared or learned from holds NaN or infinity.
            ValueError: scipy is needed and not installed.
        """
        layer = layer_of(name)
        assert layer in self._plan.fused_layers
        below = self._plan.layer_map[layer]
        lower, upper = (weights[with_layer(name, source)] for source in (below, below + 1))
        if lower.is_meta:
            return torch.empty_like(lower)
        if self._plan.fusion == "aligned":
            return aligned_mean(name, lower.cpu(), upper.cpu(), self._alignment(below, weights))
        if lower.dim() == 1:
            return aligned_mean(name, lower.cpu(), upper.cpu(), {})
        return self._predicted(name_in_block(name), lower.cpu(), upper.cpu(), weights)

    def _alignment(self, below: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the layers `below` and `below + 1` of the source."""
        if below not in self._alignments:
            lower, upper = (
                {part: _finite(weights, f"{BLOCK_PREFIX}{layer}.{part}") for part in ALIGNED_BY}
                for layer in (below, below + 1)
            )
            self._alignments[below] = align(lower, upper, self._plan.src)
        return self._alignments[below]

    def _predicted(self, part: str, lower: Tensor, upper: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        config = self._plan.src
        pairs = zip(split(part, lower, config), split(part, upper, config), strict=True)
        middle = [self._predictor(part, i, weights).between(*pair) for i, pair in enumerate(pairs)]
        return join(part, middle, config)

    def _predictor(self, part: str, index: int, weights: Mapping[str, Tensor]) -> Predictor:
        """For the matrices that lie at `index` in what a layer has under the name `part`."""
        if (part, index) not in self._predictors:
            names = [f"{BLOCK_PREFIX}{layer}.{part}" for layer in range(self._plan.src.n_layer)]
            matrices = [split(part, _finite(weights, name), self._plan.src)[index] for name in names]
            random = generator(self._plan.seed, "predicted", f"{part}/{index}")
            self._predictors[part, index] = Predictor.fit(matrices, random)
        return self._predictors[part, index]


def _finite(weights: Mapping[str, Tensor], name: str) -> Tensor:
    weight = weights[name].cpu()
    if not bool(torch.isfinite(weight).all()):
        raise DataError(f"{name} holds NaN or infinity, and no layer can be made from it; use another operator")
    return weight
