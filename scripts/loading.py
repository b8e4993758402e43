"""What the commands on a single checkpoint share: its tokenizer, what it says of itself, where to compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_gpt.tokenizer import Tokenizer


def own_words(checkpoint: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What a checkpoint says of itself, in state.json or growth.json, and its special ids where it names them."""
    from lit_gpt.checkpoint import TRAINING, detect_form, read_exchange, read_training

    if detect_form(checkpoint) == TRAINING:
        return read_training(checkpoint, verify=False).state, {}
    folder = read_exchange(checkpoint, verify=False)
    return folder.provenance or {}, folder.special_ids


def find_tokenizer(given: str | None, checkpoint: Path, state: dict[str, Any]) -> Tokenizer:
    """The one that is named, that lies beside the weights, or that lies with the data the checkpoint was trained on.

    Raises:
        FileNotFoundError: there is none.
    """
    from lit_gpt.conversion import tokenizer_place
    from lit_gpt.tokenizer import Tokenizer

    place = Path(given) if given is not None else tokenizer_place(checkpoint, state)
    if place is not None:
        return Tokenizer.load(place)
    raise FileNotFoundError(f"{checkpoint} has no tokenizer, nor has its training data; give --tokenizer PATH")


def find_device(given: str | None, n_gpus: int) -> str:
    """Where to compute: what is given, or a GPU where there is one.

    Raises:
        ValueError: it is neither the CPU nor a GPU of this machine.
    """
    known = ["cpu", *(["cuda"] if n_gpus else []), *(f"cuda:{number}" for number in range(n_gpus))]
    if given is not None and given not in known:
        raise ValueError(f"--device {given} is not here; this machine has {', '.join(known)}")
    return given or ("cuda" if n_gpus else "cpu")


def find_first_id(given: str | None, tokenizer: Tokenizer, state: dict[str, Any]) -> int | None:
    """The token that a text begins with: what is given, what separated documents in training, or bos.

    Raises:
        ValueError: neither a number nor `bos` nor `none`, or a bos that the tokenizer does not have.
    """
    if given is None:
        separator = state.get("separator_id")
        return tokenizer.bos_id if separator is None else separator
    if given == "bos" and tokenizer.bos_id is None:
        raise ValueError("--first-id bos: the tokenizer has none; give a number, or none")
    if given not in ("bos", "none") and not given.isdecimal():
        raise ValueError(f"--first-id {given} must be a token's number, bos, or none")
    return {"bos": tokenizer.bos_id, "none": None}[given] if given in ("bos", "none") else int(given)
