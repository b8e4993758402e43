"""GradMax (arXiv 2201.05125) for a SwiGLU: new neurons that keep the function and get the largest first gradient.

A neuron j computes w3_j silu(w1_j x) (w2_j x). The paper zeroes what goes into a new neuron; a SwiGLU with both of its
sides zero never trains, so here w1_j is random, w2_j is zero and w3_j is what the gradient of w2_j,

    G_j^T w3_j   with   G_j = sum over tokens t of silu(w1_j x_t) delta_t x_t^T      (C, C),

is largest for: the first left singular vector of G_j, as long as the layer's old columns of w3 are on average. x_t is
the input of the MLP and delta_t the gradient of the loss at its output.

Legend: N tokens of the batch, C n_embd, F intermediate_size, n new neurons that are made at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grow.plan import GrowthPlan
from grow.tensors import grown_weight
from grow.width_tensors import compute_dtype, generator
from lit_gpt.axes import EMBEDDING, layer_of, name_in_block, parameter_shapes, with_layer
from lit_gpt.errors import NonFiniteError
from lit_gpt.flops import Flops, flops_per_token
from lit_gpt.lazy_tensors import LazyTensors, TensorSpec, spec_of
from lit_gpt.model import GPT

GATE, UP, DOWN = (f"mlp.swiglu.{name}.weight" for name in ("w1", "w2", "w3"))
NEURONS_AT_ONCE = 256  # N x 256 products are held, 16 MB in fp32 for 16,384 tokens
TOLERANCE = 1e-4  # relative change of a singular value in one iteration
MAX_ITERATIONS = 200


@dataclass(frozen=True)
class Directions:
    """What a power iteration found for n neurons."""

    vectors: Tensor
    """(n, C): first left singular vectors, of length 1."""
    values: Tensor
    """(n,): singular values; with vectors of length s the gradient of the neuron's up projection is s times as long."""
    multiplied: int
    """Products of one neuron's G or its transpose with a vector."""
    n_open: int
    """Neurons that had not converged when the iterations ran out."""


@dataclass(frozen=True)
class GradMax:
    """The new neurons of all layers."""

    columns: list[Tensor]
    """Per layer (C, new neurons): the new columns of w3."""
    n_open: int
    """Neurons whose direction had not converged; it is a good one all the same."""
    flops: Flops
    """Of the gradient on the batch and of the iterations."""


def gradmax_columns(
    plan: GrowthPlan, weights: Mapping[str, Tensor], rows: Tensor, separator_id: int | None = None
) -> GradMax:
    """The new columns of w3 in every layer, from the gradient on one batch.

    The source is held as a model in fp32 (or float64), with inputs and gradients of all its MLPs: 2 L N C numbers.

    Args:
        plan: of the operator gradmax.
        weights: of the source.
        rows: (B, T + 1) int64; the last column is only a target.
        separator_id: token that ends a document, where tokens of other documents are not seen.

    Raises:
        NonFiniteError: the loss on the batch or its gradient is not a number.
    """
    plan = without_noise(plan)
    dtype, device = compute_dtype(weights[EMBEDDING].dtype), weights[EMBEDDING].device
    model = GPT(plan.src).to(device, dtype)
    model.load_state_dict({name: weights[name].to(dtype) for name in parameter_shapes(plan.src)})
    model.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(True)  # one is enough for gradients to reach every layer
    inputs, gradients = mlp_inputs_and_gradients(model, rows.to(device), separator_id)
    columns, n_open, multiplied = [], 0, 0
    for layer, (x, delta) in enumerate(zip(inputs, gradients, strict=True)):
        gates = grown_weight(plan, with_layer(GATE, layer), weights)[plan.src.intermediate_size :]
        found = top_directions(gates.to(dtype), x, delta, seed=plan.seed, name=with_layer(DOWN, layer))
        length = model.transformer.h[layer].mlp.swiglu.w3.weight.detach().norm(dim=0).mean()
        columns.append((found.vectors * length).T)
        n_open += found.n_open
        multiplied += found.multiplied
    n_tokens, width = rows[:, 1:].numel(), plan.src.n_embd
    n_new = plan.src.n_layer * (plan.dst.intermediate_size - plan.src.intermediate_size)
    products = 2.0 * n_tokens * width * (2 * multiplied + n_new)  # each needs x and delta, and once its gate
    flops = flops_per_token(plan.src).times(n_tokens) + Flops(products, products, products)
    return GradMax(columns, n_open, flops)


def mlp_inputs_and_gradients(
    model: GPT, rows: Tensor, separator_id: int | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer the input of the MLP and the gradient of the loss at its output, (B T, C) each.

    Args:
        model: its gradients are left as they were.
        rows: (B, T + 1) int64.
        separator_id: as in `GPT.forward`.

    Raises:
        NonFiniteError: the loss or a gradient is not a number.
    """
    with _recorded(model) as (inputs, outputs):
        loss = model(rows[:, :-1], rows[:, 1:], separator_id=separator_id)
    gradients = torch.autograd.grad(loss, outputs)
    if not (loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)):
        raise NonFiniteError(
            f"gradmax: the loss on its batch is {loss.item()}, or its gradient is not a number; "
            f"look at the data and at the weights of the source"
        )
    return [x.flatten(0, 1) for x in inputs], [gradient.flatten(0, 1) for gradient in gradients]


@contextmanager
def _recorded(model: GPT) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Inputs (detached) and outputs of all MLPs of the next forward, in the order of the layers."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def record(_: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.append(arguments[0].detach())
        outputs.append(output)

    hooks = [block.mlp.register_forward_hook(record) for block in model.transformer.h]
    try:
        yield inputs, outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def top_directions(
    gates: Tensor,
    x: Tensor,
    delta: Tensor,
    *,
    seed: int = 0,
    name: str = "",
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Directions:
    """First left singular vectors of G_j = sum_t silu(gates_j x_t) delta_t x_t^T, by power iteration without G_j.

    Args:
        gates: (n, C) rows of w1.
        x: (N, C) inputs.
        delta: (N, C) gradients at the output.
        seed: of the vectors that the iteration starts from, with `name`.
        name: see seed.
        tolerance: a neuron is done when its singular value changes by less than this share in one iteration.
        max_iterations: of a neuron.
    """
    parts = [
        _iterate(part, x, delta, start, tolerance, max_iterations)
        for part, start in zip(
            gates.split(NEURONS_AT_ONCE), _starts(gates, seed, name).split(NEURONS_AT_ONCE), strict=True
        )
    ]
    return Directions(
        vectors=torch.cat([part.vectors for part in parts]),
        values=torch.cat([part.values for part in parts]),
        multiplied=sum(part.multiplied for part in parts),
        n_open=sum(part.n_open for part in parts),
    )


def _starts(gates: Tensor, seed: int, name: str) -> Tensor:
    drawn = torch.empty(gates.shape).normal_(generator=generator(seed, "gradmax", name))
    return F.normalize(drawn.to(gates), dim=1)


def _iterate(
    gates: Tensor, x: Tensor, delta: Tensor, start: Tensor, tolerance: float, max_iterations: int
) -> Directions:
    """`top_directions` for as many neurons as are made at once; start (n, C) are left vectors of length 1."""
    size = delta.norm().clamp(min=torch.finfo(delta.dtype).tiny)
    delta = delta / size  # squares of a mean loss's gradients come near the smallest numbers of fp32
    vectors, values = start.clone(), start.new_zeros(len(start))
    left, multiplied = torch.arange(len(start), device=start.device), 0
    activation = F.silu(x @ gates.T)  # (N, n)
    for _ in range(max_iterations):
        right = (activation * (delta @ vectors[left].T)).T @ x  # G^T u, (n, C)
        new = (activation * (x @ right.T)).T @ delta  # G G^T u
        found, length = right.norm(dim=1), new.norm(dim=1, keepdim=True)
        multiplied += 2 * len(left)
        vectors[left] = torch.where(length > 0, new / length, vectors[left])
        going = (found - values[left]).abs() > tolerance * found
        values[left] = found
        left, activation = left[going], activation[:, going]
        if not len(left):
            break
    return Directions(vectors, values * size, multiplied, len(left))


def without_noise(plan: GrowthPlan) -> GrowthPlan:
    """The plan without its noise, which goes on top of all that is made here: see `grow.tensors.WithNoise`."""
    return dataclasses.replace(plan, noise=0.0)


class GradMaxWeights(LazyTensors):
    """Name -> tensor of the grown model without noise, made from the source and the new columns on every access."""

    def __init__(self, plan: GrowthPlan, weights: Mapping[str, Tensor], columns: list[Tensor]) -> None:
        self._plan = without_noise(plan)
        self._weights = weights
        self._columns = columns
        self._names = parameter_shapes(plan.dst)

    def __getitem__(self, name: str) -> Tensor:
        grown = grown_weight(self._plan, name, self._weights)
        layer, old = layer_of(name), self._plan.src.intermediate_size
        if layer is not None and name_in_block(name) == UP:
            grown[old:] = 0.0
        elif layer is not None and name_in_block(name) == DOWN:
            grown[:, old:] = self._columns[layer].to(grown)
        return grown

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def spec(self, name: str) -> TensorSpec:
        return dataclasses.replace(spec_of(self._weights, name), shape=self._names[name])
