"""Lines of evals.jsonl: losses on validation sets and scores of tasks, those of a run and those of a command alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lit_gpt.stored_state import flops_behind, tokens_behind

if TYPE_CHECKING:
    from pretrain.evaluate import Evaluation
    from pretrain.held_out import ValidationSet
    from pretrain.zero_shot.encoding import FirstToken
    from pretrain.zero_shot.metrics import Score

OWN_EVALUATOR = "lit-grow"


def moment(state: Mapping[str, Any], when: str) -> dict[str, Any]:
    """Where a model stands in its training, None for what nobody knows.

    `tokens` are those of its run, `tokens_total` and `flops_total` count those of the models it grew from as well.

    Args:
        state: its state.json; or growth.json, which knows totals alone.
        when: why it is measured now.
    """
    return {
        "step": state.get("step_count"),
        "stage": state.get("stage"),
        "stage_name": state.get("stage_name"),
        "when": when,
        **_spent(state),
    }


def _spent(state: Mapping[str, Any]) -> dict[str, Any]:
    if "flops" not in state:  # growth.json, whose `tokens` are those of all runs
        return {"tokens": None, "tokens_total": state.get("tokens"), "flops_total": state.get("flops_total")}
    if "converted_from" in state and not tokens_behind(state):  # a file of others that does not say it
        return {"tokens": None, "tokens_total": None, "flops_total": None}
    return {
        "tokens": state["tokens"],
        "tokens_total": tokens_behind(state),
        "flops_total": flops_behind(state).paper,
    }


def loss_records(
    at: Mapping[str, Any], measured: ValidationSet, result: Evaluation, max_tokens: int | None, weights: str
) -> list[dict[str, Any]]:
    """One record per metric of a validation set.

    Args:
        at: `moment`.
        measured: the set.
        result: what came out.
        max_tokens: how many were wanted; None: all.
        weights: `weights_sha256`.
    """
    values = (
        ("loss", result.nats_per_token, result.stderr),
        ("perplexity", result.perplexity, None),
        ("bpb", result.bits_per_byte, None),
    )
    rest = {
        "n": result.n_tokens,
        "limit": max_tokens if result.limited else None,
        "checkpoint": None,  # measured on the weights in memory, before they are saved
        "weights": weights,
        "data": measured.source.fingerprint,
    }
    return [
        {**at, "set": measured.name, "metric": metric, "value": value, "stderr": stderr, **rest}
        for metric, value, stderr in values
    ]


def score_records(
    at: Mapping[str, Any],
    scores: Sequence[Score],
    *,
    checkpoint: str | None,
    weights: str,
    first: FirstToken,
    dtype: str,
    evaluator: str = OWN_EVALUATOR,
) -> list[dict[str, Any]]:
    """One record per score of a task.

    Args:
        at: `moment`.
        scores: of one task or several.
        checkpoint: sha256 of its manifest, see `manifest_sha256`; None of weights in memory.
        weights: `weights_sha256`.
        first: what texts begin with.
        dtype: of products, e.g. float32.
        evaluator: who scored.
    """
    model = {"checkpoint": checkpoint, "weights": weights}
    how = {"evaluator": evaluator, "num_fewshot": 0, "first_id": first.id, "dtype": dtype}
    return [{**at, **asdict(score), **model, **how} for score in scores]
