"""Text from the finished models: the same prompts, the same seed, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grow.runs.trained_model import TrainedModel, read_corpus_manifest
from lit_gpt.errors import DataError

if TYPE_CHECKING:
    from lit_gpt.model import GPT
    from lit_gpt.tokenizer import Tokenizer

PROMPTS = ("def __init__(self,", "import os\n", "# The")
SETTINGS: dict[str, Any] = {"max_new_tokens": 96, "temperature": 0.8, "top_k": 50, "seed": 0}
MAX_PARAMETERS = 2_000_000_000  # larger models would keep a CPU busy for minutes and need 8 GB


def sample_texts(models: Sequence[TrainedModel], prompts: Sequence[str]) -> dict[str, Any]:
    """Continuations of each prompt by each model, and for models without any the reason."""
    texts: dict[str, list[dict[str, str]]] = {prompt: [] for prompt in prompts}
    skipped = []
    for model in models:
        try:
            for prompt, continuation in _continuations(model, prompts).items():
                texts[prompt].append({"name": model.name, "text": continuation})
        except (DataError, OSError, ValueError, ModuleNotFoundError) as error:
            skipped.append({"name": model.name, "reason": str(error)})
    return {
        "settings": SETTINGS,
        "prompts": [{"prompt": prompt, "texts": found} for prompt, found in texts.items() if found],
        "skipped": skipped,
    }


def no_samples(reason: str) -> dict[str, Any]:
    """What stands in the report where no text was asked for."""
    return {"settings": SETTINGS, "prompts": [], "skipped": [{"name": "all models", "reason": reason}]}


def _continuations(model: TrainedModel, prompts: Sequence[str]) -> dict[str, str]:
    if model.checkpoint is None:
        raise DataError("its final checkpoint is not there")
    if (model.parameters or 0) > MAX_PARAMETERS:
        raise ValueError(f"{model.parameters:,} parameters are too many to sample from here")
    tokenizer, first_id = _tokenizer(model)
    gpt = _load(model.checkpoint)
    return {prompt: _continue(gpt, tokenizer, first_id, prompt) for prompt in prompts}


def _tokenizer(model: TrainedModel) -> tuple[Tokenizer, int | None]:
    """The tokenizer beside the training data, and the token that stands between documents there."""
    from lit_gpt.tokenizer import Tokenizer

    folder = next(iter(model.train_folders.values()), None)
    if folder is None or not Path(folder).is_dir():
        raise FileNotFoundError(f"the folder of its training data ({folder}), which holds the tokenizer, is not there")
    tokenizer = Tokenizer.load(Path(folder))
    if model.tokenizer not in (None, tokenizer.fingerprint):
        raise DataError(f"{folder} holds another tokenizer now than the model was trained with")
    return tokenizer, read_corpus_manifest(folder).get("separator_id")


def _load(checkpoint: Path) -> GPT:
    from lit_gpt.checkpoint import read_config, read_weights
    from lit_gpt.model import GPT

    model = GPT(read_config(checkpoint))
    model.load_state_dict(dict(read_weights(checkpoint)))
    return model.eval()


def _continue(model: GPT, tokenizer: Tokenizer, first_id: int | None, prompt: str) -> str:
    from lit_gpt.generate import generate

    ids = [int(token) for token in tokenizer.encode(prompt)]
    ids = ids if first_id is None else [first_id, *ids]
    room = model.config.block_size - len(ids)
    if room < 1:
        raise ValueError(f"a prompt of {len(ids)} tokens fills block_size={model.config.block_size}; use a shorter one")
    settings = {**SETTINGS, "max_new_tokens": min(SETTINGS["max_new_tokens"], room)}
    full = generate(model, ids, **settings, eos_ids=() if first_id is None else (first_id,))
    return tokenizer.decode(full[len(ids) :])
