"""Where a run stands: the counters that a checkpoint keeps and a resumed run continues from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lit_gpt.flops import Flops
from pretrain.guards import NOTHING_SKIPPED
from pretrain.loss_slope import Bin


@dataclass
class TrainState:
    """Counters of a run. `stage` counts from 1; `step_count` never goes back within a run."""

    stage: int = 1
    stage_step: int = 0
    step_count: int = 0
    iter_num: int = 0
    grown_into_stage: int = 1
    """Growth into a stage happens if and only if this is lower than the stage."""
    position: int = 0
    """Samples of the global data order that are used up."""
    tokens: int = 0
    """Training tokens of this run, all stages."""
    flops: Flops = field(default_factory=Flops)
    """Of this run, all stages."""
    flops_computed: float = 0.0
    """As flops.paper, without the gradients that frozen parameters made unnecessary."""
    parent_tokens: int = 0
    parent_flops: Flops = field(default_factory=Flops)
    """Of the runs this one grew from."""
    seconds: float = 0.0
    """Wall time spent in training steps, without validation and checkpoints."""
    guard: dict[str, Any] = field(default_factory=lambda: dict(NOTHING_SKIPPED))
    """Skipped steps, what spikes are measured against, losses since the last log line: see pretrain/guards.py."""
    validation_owed: str | None = None
    """`when` of a validation that is due before the next step: a stage's first, or one that a stop cut short."""
    slope_bins: list[Bin] = field(default_factory=list)
    """Losses of a stage that ends by their slope: see pretrain/loss_slope.py."""
    ended_stage: int = 0
    """The last stage that the slope of its loss ended before its time."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One record per growth, oldest first."""

    @property
    def moment(self) -> tuple[int, int, int, str | None]:
        """What a checkpoint of this state is for: two of one moment are the same."""
        return self.stage, self.step_count, self.grown_into_stage, self.validation_owed

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `to_dict`; keys of the checkpoint that are not counters are left out."""
        known = {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
        losses = {
            key: values[key] for key in ("loss_sum", "loss_count") if key in values
        }  # of before there was a guard
        known.setdefault("guard", {**NOTHING_SKIPPED, **losses})
        known.setdefault("flops_computed", known["flops"]["paper"])  # written before anything could be frozen
        known["flops"], known["parent_flops"] = Flops(**known["flops"]), Flops(**known["parent_flops"])
        return cls(**known)

    @property
    def total_flops(self) -> Flops:
        """Of this run and of everything it grew from."""
        return self.flops + self.parent_flops
