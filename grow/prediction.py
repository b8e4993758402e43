"""A small network that learns to predict a layer's matrices from those of its neighbours (LESA, arXiv 2502.13794).

The matrices of one kind of all layers, side by side, have a singular value decomposition U S [V_1^T .. V_L^T]. Layer l
is U S V_l^T, and its neighbours differ from it in V alone. The network is given a row of V_{l-1}^T and of V_{l+1}^T,
one singular direction at a time, and learns that of V_l^T. Then it is given those of two neighbours, and U S V^T is the
layer between them. Legend: L layers, M outputs and N inputs of a matrix.

That a sample is a direction, and the loss, are as in the authors' notebook, which sets the numbers below. What becomes
of norms is not in it: here they are the mean of the two neighbours' (grow/fused.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grow.width_tensors import compute_dtype
from lit_gpt.config import Config
from lit_gpt.hf import fuse_qkv, split_qkv

HIDDEN = 256
EPOCHS = 10
BATCH = 64
LEARNING_RATE = 1e-3
NORM_WEIGHT = 5e-4  # of the difference of norms in the loss
SMALLEST = 1e-7  # singular values below this share of the largest are rounding in the Gram matrix, whose root they are
QKV_PART = "attn.attn.weight"


@dataclass(frozen=True)
class Predictor:
    """What predicts matrices of one kind."""

    directions: Tensor
    """(M, M): U."""
    scales: Tensor
    """(M): S; zero where it cannot be told from zero."""
    parameters: list[Tensor]
    """Of the network: weight and bias of three linear maps, fp32."""

    @classmethod
    def fit(cls, matrices: Sequence[Tensor], random: torch.Generator) -> Predictor:
        """Learn from all layers.

        Args:
            matrices: (M, N) of each layer, three or more, on the CPU.
            random: what the network and the order of its samples are drawn from.
        """
        directions, scales = decompose(matrices)
        untrained = cls(directions, scales, new_network(2 * matrices[0].size(1), matrices[0].size(1), random))
        slices = torch.empty((len(matrices), *matrices[0].shape))  # (L, M, N)
        for slice_, matrix in zip(slices, matrices, strict=True):
            slice_.copy_(untrained.slice_of(matrix))
        train(untrained.parameters, slices, random)
        return untrained

    def slice_of(self, matrix: Tensor) -> Tensor:
        """(M, N) matrix -> (M, N) V^T."""
        along = self.directions.T @ matrix.to(self.directions)
        return torch.where(self.scales > 0, 1 / self.scales, 0)[:, None] * along

    def matrix_of(self, slice_: Tensor) -> Tensor:
        """The inverse of `slice_of`: U S V^T."""
        return self.directions @ (self.scales[:, None] * slice_.to(self.directions))

    @torch.no_grad()
    def between(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The matrix (M, N) that lies between those of two neighbours, in their dtype."""
        neighbours = torch.cat([self.slice_of(lower), self.slice_of(upper)], dim=1).float()
        return self.matrix_of(network(self.parameters, neighbours)).to(lower.dtype)


def decompose(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """U (M, M) and S (M) of the singular value decomposition of matrices (M, N) side by side.

    They are the eigenvectors and the roots of the eigenvalues of the sum of W W^T, for which the matrices need not lie
    side by side in memory.
    """
    gram = torch.zeros(matrices[0].size(0), matrices[0].size(0), dtype=torch.float64)
    for matrix in matrices:
        gram.addmm_(matrix.double(), matrix.double().T)
    squares, directions = torch.linalg.eigh(gram)
    scales = squares.clamp_min(0).sqrt()
    scales[scales <= SMALLEST * scales.max()] = 0
    dtype = compute_dtype(matrices[0].dtype)
    return directions.to(dtype), scales.to(dtype)


def new_network(n_in: int, n_out: int, random: torch.Generator) -> list[Tensor]:
    """Three linear maps n_in -> HIDDEN -> HIDDEN -> n_out; initialised as torch does it, but from a generator."""
    parameters = []
    for fan_in, fan_out in ((n_in, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, n_out)):
        for shape in ((fan_out, fan_in), (fan_out,)):
            parameters.append(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=random))
    return parameters


def network(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """(samples, n_in) -> (samples, n_out)"""
    for at in (0, 2):
        x = F.relu(F.linear(x, parameters[at], parameters[at + 1]))
    return F.linear(x, *parameters[4:])


def train(parameters: Sequence[Tensor], slices: Tensor, random: torch.Generator) -> None:
    """Fit the network in place to slices (L, M, N), every one but the first and the last from its two neighbours."""
    below, middle, above = (slices[at : len(slices) - 2 + at].flatten(0, 1) for at in range(3))  # views
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(middle), generator=random).split(BATCH):
                predicted = network(parameters, torch.cat([below[batch], above[batch]], dim=1))
                optimizer.zero_grad()
                loss(predicted, middle[batch]).backward()
                optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def loss(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared error, with a small share of that of the norm of the whole batch."""
    of_norms = F.mse_loss(predicted.norm(), wanted.norm())
    return (1 - NORM_WEIGHT) * F.mse_loss(predicted, wanted) + NORM_WEIGHT * of_norms


def split(part: str, weight: Tensor, config: Config) -> tuple[Tensor, ...]:
    """The matrices in a parameter of a layer: q, k and v of the fused one, else the parameter itself."""
    return split_qkv(weight, config) if part == QKV_PART else (weight,)


def join(part: str, matrices: Sequence[Tensor], config: Config) -> Tensor:
    """The inverse of `split`."""
    return fuse_qkv(*matrices, config) if part == QKV_PART else matrices[0]
