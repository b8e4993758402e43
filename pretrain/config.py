"""What a run is: model, data, batch, optimizer, schedule, stages. From YAML files and flags; pretrain/config_checks.py
refuses what does not fit together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from lit_gpt.config import Config, unknown_key
from lit_gpt.kernels.settings import KernelConfig
from pretrain.data_config import DataConfig, SegmentConfig
from pretrain.zero_shot.task import names_in


@dataclass(frozen=True)
class ModelConfig:
    """The model of the run's last stage: a named size, single fields replaced."""

    name: str
    """A size `lit_gpt.config` knows, e.g. 24L2048H or tiny_LLaMA_1b; or init_from: the sizes of that checkpoint."""
    block_size: int | None = None
    vocab_size: int | None = None
    """Default: the vocabulary of the data's tokenizer."""
    n_head: int | None = None
    n_query_groups: int | None = None
    head_size: int | None = None
    intermediate_size: int | None = None
    padded_vocab_size: int | None = None
    norm_eps: float | None = None
    rope_base: float | None = None
    rotary_percentage: float | None = None
    tie_embeddings: bool | None = None

    def resolve(self, vocab_size: int, origin: Config | None = None) -> Config:
        """The model's sizes; `vocab_size` (of the data) fills an open one.

        origin: the model of init_from, where `name` says so.

        Raises:
            ValueError: an unknown name or sizes that break a rule.
        """
        given = {key: value for key, value in dataclasses.asdict(self).items() if value is not None and key != "name"}
        if origin is not None:
            sizes = {"vocab_size": vocab_size, **given}
            rows = sizes.get("padded_vocab_size", origin.padded_vocab_size)
            if sizes["vocab_size"] > rows:
                raise ValueError(
                    f"the data has {sizes['vocab_size']} token ids, the embedding of init_from {rows} rows; prepare "
                    f"the data with the checkpoint's tokenizer (scripts/prepare.py --tokenizer PATH)"
                )
            return dataclasses.replace(origin, **sizes)
        return Config.from_name(self.name, **{"vocab_size": vocab_size, **given})


@dataclass(frozen=True)
class BatchConfig:
    """How many sequences make a step."""

    global_batch_size: int = 512
    """Sequences per optimizer step, over all devices."""
    micro_batch_size: int = 8
    """Sequences per forward pass on one device."""
    auto: bool = False
    """Choose micro_batch_size: the largest that divides the batch and fits the memory of every device."""

    def iters_per_step(self, n_devices: int) -> int:
        """Forward passes each device makes before one optimizer update.

        Raises:
            ValueError: the global batch cannot be dealt evenly.
        """
        per_iter = self.micro_batch_size * n_devices
        if self.global_batch_size % per_iter:
            fits = divisors(self.global_batch_size // n_devices) if self.global_batch_size % n_devices == 0 else []
            if not fits:
                raise ValueError(
                    f"{n_devices} processes do not divide batch.global_batch_size={self.global_batch_size}; use "
                    f"{_any_of(divisors(self.global_batch_size))} processes"
                )
            raise ValueError(
                f"batch.global_batch_size={self.global_batch_size} must be a multiple of micro_batch_size * devices = "
                f"{self.micro_batch_size} * {n_devices}; micro_batch_size can be {', '.join(map(str, fits))}"
            )
        return self.global_batch_size // per_iter


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [each for each in range(1, number + 1) if number % each == 0]


def _any_of(numbers: list[int]) -> str:
    """`[1, 2, 4]` -> `1, 2 or 4`."""
    return " or ".join(", ".join(map(str, part)) for part in (numbers[:-1], numbers[-1:]) if part)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), also with 8-bit moments, or Muon for the matrices of blocks and AdamW for the rest."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon: orthogonalised momentum, scaled so that AdamW's rates serve (arXiv 2502.16982). Not for a sharded model.
    adamw8bit: moments in a byte each, by torchao (arXiv 2110.02861)."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    min_learning_rate: float = 3e-5
    """Where the schedule ends."""
    beta1: float = 0.9
    """Of AdamW. Muon's momentum is 0.95."""
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed; `all` also decays norms, as TinyLlama and prts do."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the steps of one stage."""

    kind: Literal["cosine", "wsd"] = "cosine"
    """Cosine to min_learning_rate, or warm-up, stable, decay (arXiv 2404.06395)."""
    warmup_steps: int = 0
    """Linear rise from 0."""
    decay_steps: int = 0
    """wsd only: steps of linear fall to min_learning_rate at the end; 0 keeps the rate constant."""
    horizon_steps: int | None = None
    """cosine only: step at which min_learning_rate is reached. Default: the stage's last."""


@dataclass(frozen=True)
class StageConfig:
    """One call of fit: a size, a length, how the model grew into it, and what of it trains."""

    name: str
    max_tokens: int | str | None = None
    """Training tokens of this stage, rounded down to whole steps; or give max_steps."""
    max_steps: int | None = None
    """0 in the first stage of a run with init_from: that checkpoint as it is, for the second stage to grow."""
    grow_when: Literal["loss_slope"] | None = None
    """loss_slope: end the stage before that, once its logged losses fall too slowly for its FLOPs, and grow."""
    slope: float | None = None
    """With grow_when: slope of log loss against log FLOPs that ends it. Default: that of arXiv 2203.06211 for GPT-2,
    -0.0575 if the next growth is in depth, else -0.0475."""
    n_layer: int | None = None
    """Blocks during this stage. Default: those of `model`."""
    n_embd: int | None = None
    """Width during this stage. Default: that of `model`; a width that is not given follows from those that are."""
    n_head: int | None = None
    n_query_groups: int | None = None
    intermediate_size: int | None = None
    operator: str | None = None
    """Growth operator that leads from the stage before to this one; see `grow operators`. Without one nothing grows."""
    layer_map: str | None = None
    """Explicit layer map, e.g. "12-3456*5-56"; layers count from 1."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the operator takes beyond sizes, in the words of `grow apply`: {residual: M, noise: 0.2, seed: 1}."""
    optimizer_policy: Literal["reset", "map", "map-old-zero-new"] = "reset"
    """What becomes of AdamW's moments at growth."""
    trainable: Literal["auto", "all", "new", "new-and-head"] = "auto"
    """all parameters, those of new layers, or these with ln_f and lm_head. auto: what the operator's paper trains."""
    mask_steps: int | None = None
    """random-depth, random-width: steps over which new parts open; 0: at once. Default: 5000, as in prts."""
    mask_phases: Literal["together", "in-turn"] = "together"
    """in-turn: neurons and layers, then channels, then heads, mask_steps each (masked structural growth)."""
    distill_weight: float | None = None
    """Share of the loss that a teacher gives. Default: 1 for the operator distill, otherwise 0."""
    distill_steps: int | None = None
    """Steps of the stage for which the teacher stays. Default: all."""
    teacher: str | None = None
    """Checkpoint of the teacher. Default: the model of the stage before."""
    learning_rate: float | None = None
    """Replaces optimizer.learning_rate during this stage."""
    min_learning_rate: float | None = None
    warmup_steps: int | None = None
    """Replaces schedule.warmup_steps during this stage."""
    continue_schedule: bool = False
    """Go on along the schedule of the stage before, which then spans both, instead of starting it again."""
    rewarmup_steps: int = 0
    """With continue_schedule: linear rise from 0 to the schedule's rate after growth."""


@dataclass(frozen=True)
class ValidationConfig:
    """When the validation sets are measured, besides step 0, growth and the end."""

    every_steps: int = 0
    """0: only at step 0, around growth and at the end."""
    max_tokens: int | str | None = None
    """Tokens per set, from its start; default: all. A limited value is marked as such."""


@dataclass(frozen=True)
class ZeroShotConfig:
    """Tasks that the model is scored on while it trains: at step 0, around growth, at the end. None by default."""

    tasks: str | list[str] = ""
    """Names, e.g. piqa,sciq; paper: the seven of the paper's average; all: every one there is."""
    data: str | None = None
    """Folder of the evaluation files. Default: evals in $LIT_GROW_DATA."""
    tasks_dir: str | None = None
    """Folder with YAML files of tasks of your own."""
    every_steps: int = 0
    """Score at multiples of this, too; 0: not."""
    limit: int | None = None
    """Only the first documents of each task. Default: all. A limited score is marked as such."""
    micro_batch_size: int = 16
    """Sequences per forward pass on one device."""

    @property
    def names(self) -> list[str]:
        """What `tasks` names; empty: nothing is scored."""
        return names_in(self.tasks) if isinstance(self.tasks, str) else list(self.tasks)


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is written and how much of it stays."""

    every_steps: int = 1000
    keep_last: int = 2
    """Newest checkpoints that stay; a growth parent and a stage's end always do."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this stay too; 0: none."""
    async_save: bool | None = None
    """Copy periodic checkpoints in memory and write them while training goes on. Default: on several processes, and on
    CUDA; a single CPU process would train and write on the same cores, and needs its memory."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What a periodic checkpoint that cannot be written does to the run. The last one of a stage always stops it."""


@dataclass(frozen=True)
class LoggingConfig:
    """What a run says while it runs."""

    every_steps: int = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class GuardConfig:
    """Steps that are not made, and when a run gives up."""

    max_skipped_steps: int = 10
    """Steps in a row whose loss or gradient is no number (or a spike) before the run stops with exit code 4."""
    spike_sigmas: float | None = None
    """Skip a step whose loss or gradient norm is that many standard deviations above the mean of the window."""
    window_steps: int = 128
    """Accepted steps that a spike is measured against."""
    rollbacks: int = 0
    """Before stopping, go back to the last checkpoint and leave out the samples of the skipped steps, so many times."""


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share a model; started by torchrun or srun, one per device."""

    strategy: Literal["auto", "fsdp", "ddp"] = "auto"
    """fsdp: each holds a part of weights, gradients and moments (FSDP2). ddp: each holds all. auto: fsdp on several."""
    replicas: int | None = None
    """fsdp: whole copies of the model, each sharded over as many processes (HSDP), e.g. one per node. Default: 1."""
    reshard_after_forward: bool = True
    """fsdp: free a block's gathered weights after its forward pass; false is faster and needs memory for the model."""


@dataclass(frozen=True)
class StopConfig:
    """When a run saves and stops by itself; the same command goes on."""

    after: str | None = None
    """How long a sitting may take, e.g. 8h, 1d12h or 2-12:00:00. Default: as long as it needs."""
    margin_secs: float = 60.0
    """Under SLURM: how long before the end of the job's time, besides twice the time that saving took."""


@dataclass(frozen=True)
class RunConfig:
    """One run of one or more stages. The same command starts it and, while it is unfinished, resumes it."""

    out_dir: str
    """The run's folder."""
    model: ModelConfig
    data: DataConfig
    stages: list[StageConfig]
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    zero_shot: ZeroShotConfig = ZeroShotConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    parallel: ParallelConfig = ParallelConfig()
    guards: GuardConfig = GuardConfig()
    stop: StopConfig = StopConfig()
    kernels: KernelConfig = KernelConfig()
    seed: int = 3407
    """Of the initial weights, the data order and growth."""
    precision: Literal["auto", "fp32", "bf16", "bf16-true"] = "auto"
    """bf16: fp32 weights and optimizer, bf16 computation. auto: bf16 where the hardware multiplies it, else fp32."""
    compile: Literal["auto", "none", "block", "model"] = "auto"
    """torch.compile. auto: block on CUDA, and on a CPU in bf16 with a C++ compiler when the run repays it."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """8-bit products in blocks, by torchao: one scale per tensor, or one per row. Needs sm_89, bf16 and compile."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Make activations of a block again in backward: all of them (full), or all but products and attention."""
    device: str = "auto"
    """auto, cpu or cuda."""
    init_from: str | None = None
    """Checkpoint whose weights (and data position, history and FLOPs, if it has them) this run starts from."""


LISTS = {(RunConfig, "stages"): ("stage", StageConfig), (DataConfig, "segments"): ("segment", SegmentConfig)}
"""Settings that are lists of sections: what one is called in a message, and its class."""


def known_keys(section: type) -> dict[str, type | None]:
    """Keys of a settings class; the value is the class of a nested section or None."""
    sections = {
        "model": ModelConfig,
        "data": DataConfig,
        "batch": BatchConfig,
        "optimizer": OptimizerConfig,
        "schedule": ScheduleConfig,
        "validation": ValidationConfig,
        "zero_shot": ZeroShotConfig,
        "checkpoints": CheckpointConfig,
        "logging": LoggingConfig,
        "parallel": ParallelConfig,
        "guards": GuardConfig,
        "stop": StopConfig,
        "kernels": KernelConfig,
    }
    return {f.name: sections.get(f.name) if section is RunConfig else None for f in dataclasses.fields(section)}


def unknown_key_problems(values: Mapping[str, Any]) -> list[str]:
    """One line for every key of parsed YAML settings that no setting has, with the nearest one."""
    problems = []
    for where, section, given in _sections(values):
        known = list(known_keys(section))
        more = "; pretrain --stages.help explains all" if section is StageConfig else ""
        problems += [f"{where}{unknown_key(str(key), known)}{more}" for key in given if key not in known]
    return problems


def null_problems(values: Mapping[str, Any]) -> list[str]:
    """One line for every setting that is null and cannot be, as where a YAML file has a key and nothing behind it."""
    return [
        f"{where}{key} is empty (null); give a value, or leave it out for its default"
        for where, section, given in _sections(values)
        for key, kinds in get_type_hints(section).items()
        if key in given and given[key] is None and type(None) not in get_args(kinds)
    ]


def _sections(
    values: Mapping[str, Any], section: type = RunConfig, where: str = ""
) -> Iterator[tuple[str, type, Mapping[str, Any]]]:
    """Parsed YAML settings and all sections in them: where each stands, its class, its keys and values."""
    yield where, section, values
    known = known_keys(section)
    for key, value in values.items():
        inner = known.get(key)
        if inner is not None and isinstance(value, Mapping):
            yield from _sections(value, inner, f"{where}{key}: ")
        elif isinstance(value, list) and (section, key) in LISTS:
            what, item_section = LISTS[section, key]
            for number, item in enumerate(value, 1):
                if isinstance(item, Mapping):
                    yield from _sections(item, item_section, f"{where}{what} {number}: ")


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The settings as plain data for YAML and JSON."""
    return dataclasses.asdict(config)
