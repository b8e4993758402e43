"""Run directories as `pretrain` leaves them, with made-up losses: power laws, noise, a spike at growth."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grow.scores import METRICS
from lit_gpt.atomic import atomic_directory
from lit_gpt.config import Config
from lit_gpt.flops import flops_per_token

TOKENS_PER_STEP = 2048
VOCAB_SIZE = 4096
LARGE = Config(name="8L128H", block_size=256, vocab_size=VOCAB_SIZE, n_layer=8, n_head=2, n_embd=128)
SMALL = Config(name="2L128H", block_size=256, vocab_size=VOCAB_SIZE, n_layer=2, n_head=2, n_embd=128)
TOKENIZER = {"kind": "sentencepiece", "sha256": "c0ffee" * 10 + "c0ff", "vocab_size": VOCAB_SIZE}
VERSIONS = {"python": "3.11.7", "lit-grow": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"}


def base_loss(tokens: np.ndarray) -> np.ndarray:
    return 3.3 + 5.0 * (1 + tokens / 30_000) ** -0.62


def scratch_loss(tokens: np.ndarray) -> np.ndarray:
    return 2.7 + 5.6 * (1 + tokens / 42_000) ** -0.46


def grown_loss(tokens: np.ndarray) -> np.ndarray:
    """Above the base right after growth, and soon where a model from scratch is 400,000 tokens later."""
    return scratch_loss(tokens + 380_000) + 2.1 * np.exp(-tokens / 25_000)


def useless_growth_loss(tokens: np.ndarray) -> np.ndarray:
    return scratch_loss(tokens * 0.8)


@dataclass
class Stage:
    """One stage to write down."""

    name: str
    config: Config
    steps: int
    loss: Callable[[np.ndarray], np.ndarray]
    operator: str | None = None


@dataclass
class SyntheticRun:
    """A run directory to write; change a field to make another story."""

    path: Path
    stages: list[Stage]
    seed: int = 3407
    noise: float = 0.05
    log_every: int = 2
    tokens_per_step: int = TOKENS_PER_STEP
    samples: int = 50_000
    """In the training set; less than 8 times the steps makes several epochs."""
    data_folder: str = "out/demo/data"
    fingerprint: str = "fa" * 32
    tokenizer: dict[str, Any] = field(default_factory=lambda: dict(TOKENIZER))
    validation_every: int = 50
    init_from: str | None = None
    """Checkpoint that the run began with."""
    parent_tokens: int = 0
    """Trained on by the time of that checkpoint."""
    checkpoints: bool = True
    tasks: tuple[str, ...] = ()
    """Benchmark tasks whose scores are written at every validation: better where the loss is lower."""
    limit: int | None = None
    """Documents of each task that were scored, if not all."""
    write_weights: Callable[[Path, Config, dict[str, Any]], None] | None = None
    """Writes a real checkpoint instead of one with state.json alone."""

    def write(self) -> Path:
        self.path.mkdir(parents=True)
        self.rng = np.random.default_rng(len(self.stages) * 1000 + self.seed)
        self.metrics: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.step, self.tokens, self.flops, self.seconds = 0, 0, 0.0, 0.0
        for number, stage in enumerate(self.stages, 1):
            self._train(number, stage)
        (self.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.metrics))
        (self.path / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.evals))
        stages = [{"name": stage.name, "operator": stage.operator} for stage in self.stages]
        config = {"data": {"train": self.data_folder}, "stages": stages, "seed": self.seed, "init_from": self.init_from}
        (self.path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        return self.path

    def _train(self, number: int, stage: Stage) -> None:
        if stage.operator:
            self._grow(number, stage)
        begin = self.step
        self._evaluate(number, stage, "after_growth" if stage.operator else "start", 0)
        flops_per_step = flops_per_token(stage.config).paper * self.tokens_per_step
        every: list[float] = []
        for stage_step in range(1, stage.steps + 1):
            self.step, self.tokens = begin + stage_step, self.tokens + self.tokens_per_step
            self.flops += flops_per_step
            self.seconds += 0.012 * stage.config.n_layer + 0.02
            every.append(
                float(stage.loss(np.array(stage_step * self.tokens_per_step)) + self.noise * self.rng.normal())
            )
            if stage_step == stage.steps or self.step % self.log_every == 0:
                self._log(number, stage, stage_step, sum(every) / len(every))
                every = []
            if stage_step < stage.steps and self.step % self.validation_every == 0:
                self._evaluate(number, stage, "every", stage_step)
        self._evaluate(number, stage, "end" if number == len(self.stages) else "before_growth", stage.steps)
        if self.checkpoints:
            self._save(number, stage)

    def _grow(self, number: int, stage: Stage) -> None:
        src, dst = self.stages[number - 2].config, stage.config
        layer_map = [layer % src.n_layer for layer in range(dst.n_layer)]
        connections = sum(b == a + 1 for a, b in zip(layer_map, layer_map[1:], strict=False))
        plan = {"operator": stage.operator, "src": src.to_dict(), "dst": dst.to_dict(), "layer_map": layer_map}
        self.history.append(
            {
                "operator": stage.operator,
                "plan": {**plan, "seed": self.seed, "options": {}},
                "connection_rate": f"{connections}/{dst.n_layer - 1}",
                "optimizer_policy": "reset",
                "parent": "0" * 64,
                "step_count": self.step,
                "tokens": self.tokens,
                "flops_total": self.flops,
            }
        )

    def _counters(self, number: int, stage: Stage) -> dict[str, Any]:
        place = {"step": self.step, "stage": number, "stage_name": stage.name}
        return {**place, "tokens": self.tokens, "flops_total": self.flops}

    def _log(self, number: int, stage: Stage, stage_step: int, loss: float) -> None:
        rest = {"stage_step": stage_step, "loss": loss, "bpb": loss / 2.4, "lr": 2e-3, "grad_norm": 1.0, "mfu": None}
        clock = {"position": self.step * 8, "seconds": self.seconds, "time": 1.76e9 + self.seconds}
        self.metrics.append({**self._counters(number, stage), **rest, **clock})

    def _evaluate(self, number: int, stage: Stage, when: str, stage_step: int) -> None:
        value = float(stage.loss(np.array(stage_step * self.tokens_per_step))) + 0.08
        common = {**self._counters(number, stage), "when": when, "set": "stdlib", "n": 65_536}
        common |= {"limit": None, "checkpoint": None, "data": "beef" * 16}
        for metric, number_, stderr in (
            ("loss", value, 0.02),
            ("perplexity", math.exp(value), None),
            ("bpb", value / 2.4, None),
        ):
            self.evals.append({**common, "metric": metric, "value": number_, "stderr": stderr})
        self._score(self._counters(number, stage), when, value)

    def _score(self, counters: dict[str, Any], when: str, loss: float) -> None:
        n = self.limit or 1000
        for task in self.tasks:
            value, stderr = math.exp(loss), 1.0
            if METRICS[task].startswith("acc"):
                value = 0.9 - 0.1 * loss
                stderr = math.sqrt(value * (1 - value) / (n - 1))
            record = {"when": when, "task": task, "metric": METRICS[task], "value": value, "stderr": stderr}
            self.evals.append({**counters, **record, "n": n, "limit": self.limit, "checkpoint": None, "data": None})

    def _save(self, number: int, stage: Stage) -> None:
        path = self.path / "checkpoints" / f"stage-{number:02d}" / f"step-{self.step:010d}"
        state = {
            "format": 1,
            "model_config": stage.config.to_dict(),
            "stage": number,
            "stage_name": stage.name,
            "seed": self.seed,
            "tokenizer": self.tokenizer,
            "compute": {"precision": "fp32", "compile": "none", "reason": "made up"},
            "parent_tokens": self.parent_tokens,
            "run_config": {"init_from": self.init_from},
            "data": {
                "position": self.step * 8,
                "segments": [[0, "proportional"]],
                "sources": {"stdlib": {"samples": self.samples, "fingerprint": self.fingerprint}},
            },
            "history": self.history,
            "command": ["pretrain", "--config", "configs/demo.yaml", "--out_dir", f"out/demo/{self.path.name}"],
            "versions": VERSIONS,
        }
        if self.write_weights is not None:
            self.write_weights(path, stage.config, state)
            return
        with atomic_directory(path, "training") as directory:
            (directory / "state.json").write_text(json.dumps(state))


def stacked_run(path: Path, *, loss: Callable[[np.ndarray], np.ndarray] = grown_loss, **changes: Any) -> SyntheticRun:
    """Two layers for 300,000 tokens, stacked to eight for 700,000 more."""
    stages = [Stage("base", SMALL, 146, base_loss), Stage("grown", LARGE, 341, loss, operator="stack")]
    return SyntheticRun(path, stages, **changes)


def scratch_run(path: Path, **changes: Any) -> SyntheticRun:
    """Eight layers for 800,000 tokens."""
    return SyntheticRun(path, [Stage("scratch", LARGE, 390, scratch_loss)], **changes)


def sized(n_layer: int) -> Config:
    """LARGE with another number of layers."""
    return dataclasses.replace(LARGE, name=f"{n_layer}L128H", n_layer=n_layer)


def power_law_loss(config: Config, *, gain: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """Loss 60 (FLOPs x gain)^-0.09 of a model of this size; `gain` is how much cheaper it gets there."""
    cost = flops_per_token(config).paper
    return lambda tokens: 60.0 * (np.maximum(tokens, TOKENS_PER_STEP / 8) * cost * gain) ** -0.09


def swept_run(
    path: Path, base_steps: int, *, n_layer_src: int = 2, operator: str = "stack", steps: int = 300, **changes: Any
) -> Path:
    """A base of `n_layer_src` layers for `base_steps` steps, then LARGE, whose loss is lowest for 120 base steps.

    At equal FLOPs the loss is that from scratch plus 0.05 (log10 of base_steps / 120)^2 - 0.2, and 0.05 times the
    square of log2 of the growth factor over 4 on top.
    """
    base = sized(n_layer_src)
    spent = flops_per_token(base).paper / flops_per_token(LARGE).paper * base_steps * TOKENS_PER_STEP
    at_best = power_law_loss(LARGE)
    off = 0.05 * math.log10(base_steps / 120) ** 2 + 0.05 * math.log2(LARGE.n_layer / n_layer_src / 4) ** 2
    stages = [
        Stage("base", base, base_steps, power_law_loss(base)),
        Stage("grown", LARGE, steps, lambda tokens: at_best(tokens + spent) - 0.2 + off, operator=operator),
    ]
    return SyntheticRun(path, stages, noise=changes.pop("noise", 0.0), **changes).write()
