"""The one dict behind a report: report.json is this dict, and page and figures show nothing that is not in it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from fractions import Fraction
from typing import Any

from grow.layer_map import format_layer_map, is_connected, layer_texts
from grow.plan import MARKS
from grow.report.charts import build_charts, line_styles
from grow.report.compare import Comparisons, over_seeds
from grow.report.guideline_charts import charts_of_runs
from grow.report.headline import claim, definitions, headline, notes
from grow.report.isoflop import isoflop_charts
from grow.report.law_charts import law_charts
from grow.report.score_charts import score_charts
from grow.report.tables import build_tables
from grow.runs.gather import Gathered
from grow.runs.trained_model import TrainedModel
from lit_gpt.config import Config
from lit_gpt.packed_dataset import source_of

FORMAT = 2
FINAL = ("end", "before_growth", "every")  # moments whose last evaluation is that of the finished model


def build_report(gathered: Gathered, comparisons: Comparisons, samples: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the report says; JSON values only."""
    pair = comparisons.pairs[0] if comparisons.pairs else None
    primary = getattr(pair, comparisons.primary_curve) if pair else {}
    group = comparisons.groups[0] if pair else ()
    seeds = over_seeds(group, comparisons.primary_curve)
    claimed = [model for each in group for model in (each.grown, each.baseline)] if seeds else []
    claimed = claimed or ([pair.grown, pair.baseline] if pair else gathered.models[::-1])
    styles = line_styles(gathered.models, gathered.external)
    rows = _of_one_kind([_row(model, comparisons, styles[model.name]) for model in gathered.models])
    scores, no_scores = score_charts(gathered, styles)
    laws, no_laws = law_charts(gathered, comparisons, styles)
    isoflops, no_isoflops, optima = isoflop_charts(gathered, comparisons)
    rules, no_rules = charts_of_runs(gathered)
    tables, no_tables = build_tables(gathered, comparisons, rows)
    return {
        "format": FORMAT,
        "headline": headline(comparisons),
        "target_loss": None if seeds else primary.get("target_loss"),
        "speedup_at_equal_loss": seeds.mean if seeds else primary.get("speedup"),
        "over_seeds": dataclasses.asdict(seeds) if seeds else None,
        "reason": primary.get("reason") if pair else comparisons.reason,
        "primary_curve": comparisons.primary_curve,
        "pair": {"grown": pair.grown.name, "scratch": pair.baseline.name} if pair else None,
        "speedup_train": pair.train if pair else None,
        "speedup_validation": pair.validation if pair else None,
        "window_tokens": comparisons.window_tokens,
        "unit": gathered.unit,
        "claim": claim(claimed, repeated=seeds is not None),
        "runs": rows,
        "external": [
            {"name": model.name, "file": str(model.path), "style": styles[model.name], "points": len(model.points)}
            for model in gathered.external
        ],
        "growths": [_growth(model, gathered, comparisons) for model in gathered.of_role("grown")],
        "charts": [*build_charts(gathered, comparisons, styles), *scores, *laws, *isoflops, *rules],
        "optima": optima,
        "tables": tables,
        "missing": [*no_scores, *no_laws, *no_isoflops, *no_rules, *no_tables],
        "samples": dict(samples),
        "definitions": definitions(comparisons, gathered.unit) if gathered.models else [],
        "reproduction": _reproduction(gathered.models),
        "corpora": _corpora(gathered.models),
        "notes": notes(gathered, comparisons),
    }


def _of_one_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits per byte of held-out text and estimates from training text do not stand in one column."""
    if {row["bpb_of"] for row in rows} == {"training", "validation"}:
        return [row if row["bpb_of"] == "validation" else {**row, "bpb": None, "bpb_of": None} for row in rows]
    return rows


def _row(model: TrainedModel, comparisons: Comparisons, style: int) -> dict[str, Any]:
    """What the table says about one model."""
    validation, bpb = (model.evaluation(metric, comparisons.set_name, FINAL) for metric in ("loss", "bpb"))
    train_loss = float(comparisons.smoothed(model).loss[-1])
    use_validation = comparisons.primary_curve == "validation" and validation is not None
    pair = next((pair for pair in comparisons.pairs if pair.grown is model), None)
    result = getattr(pair, comparisons.primary_curve) if pair else {}
    return {
        "name": model.name,
        "run": model.run,
        "stage": model.stage,
        "role": model.role,
        "grown_from": model.parent,
        "style": style,
        "n_layer": model.config.n_layer if model.config else None,
        "n_embd": model.config.n_embd if model.config else None,
        "parameters": model.parameters,
        "non_embedding": model.non_embedding,
        "steps": model.end.stage_step,
        "tokens": model.tokens,
        "tokens_cumulative": model.behind.tokens + model.tokens,
        "epochs": model.epochs,
        "flops_total": model.end.flops_total,
        "seconds": model.seconds,
        "seconds_cumulative": model.total_seconds,
        "final_loss": validation.value if use_validation else train_loss,
        "final_train_loss": train_loss,
        "final_validation_loss": validation.value if validation else None,
        "validation_stderr": validation.stderr if validation else None,
        "bpb": model.end.bpb if bpb is None or bpb.value is None else bpb.value,
        "bpb_of": "training" if bpb is None or bpb.value is None else "validation",
        "speedup": result.get("speedup"),
        "speedup_reason": result.get("reason"),
    }


def blocks(layer_map: Sequence[int | None], **marks: Collection[int]) -> list[dict[str, Any]]:
    """Every layer of a grown model with the layer it came from, counted from 1; None for one without in the source."""
    texts = layer_texts(layer_map, **marks)
    return [
        {
            "layer": i + 1,
            "source": None if source is None or i in marks.get("reference_layers", ()) else source + 1,
            "text": texts[i],
            "connected": i > 0 and is_connected(layer_map[i - 1], source),
            "identity": i in marks.get("identity_layers", ()),
        }
        for i, source in enumerate(layer_map)
    ]


def _growth(model: TrainedModel, gathered: Gathered, comparisons: Comparisons) -> dict[str, Any]:
    """How a model came out of a smaller one: layer by layer, and what it did to the loss."""
    by_name = {other.name: other for other in gathered.models}
    parent = by_name.get(model.parent or "")
    before = parent.evaluation("loss", comparisons.set_name, ("before_growth", "end")) if parent else None
    after = model.evaluation("loss", comparisons.set_name, ("after_growth",))
    plan = (model.growth or {}).get("plan") or {}
    layer_map = plan.get("layer_map") or []
    rate = (model.growth or {}).get("connection_rate")
    return {
        "name": model.name,
        "grown_from": model.parent,
        "operator": plan.get("operator"),
        "layer_map": layer_map,
        "layer_map_text": format_layer_map(layer_map) if layer_map else None,
        "n_layer_src": Config.from_dict(plan["src"]).n_layer if plan else None,
        "blocks": blocks(layer_map, **{mark: plan.get(mark, ()) for mark in MARKS}),
        "connection_rate": rate,
        "connection_share": float(Fraction(rate)) if rate else None,
        "optimizer_policy": (model.growth or {}).get("optimizer_policy"),
        "tokens": (model.growth or {}).get("tokens"),
        "loss_before": before.value if before else None,
        "loss_after": after.value if after else None,
    }


def _reproduction(models: Sequence[TrainedModel]) -> list[dict[str, Any]]:
    """What repeats each run."""
    last_of_run = {model.run_dir: model for model in models}
    first_of_run = {model.run_dir: model for model in reversed(models)}
    return [
        {
            "run": model.run,
            "folder": str(run_dir),
            "command": shlex.join(model.state.get("command") or []) or None,
            "seed": model.state.get("seed"),
            "compute": dict(model.state.get("compute") or {}),
            "started": _utc(first_of_run[run_dir].metrics[0].time),
            "ended": _utc(model.end.time),
            "checkpoint": str(model.checkpoint) if model.checkpoint else None,
            "checkpoint_sha256": model.manifest_sha256,
            "versions": dict(model.state.get("versions") or {}),
        }
        for run_dir, model in last_of_run.items()
    ]


def _utc(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _corpora(models: Sequence[TrainedModel]) -> list[dict[str, Any]]:
    """Every training set, once, with what identifies it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for model in models:
        for name, fingerprint in model.data_fingerprints.items():
            manifest = model.corpora[name]
            train = (manifest.get("splits") or {}).get("train") or {}
            found[name, fingerprint] = {
                "name": name,
                "folder": model.train_folders.get(name),
                "source": source_of(manifest),
                "fingerprint": fingerprint,
                "corpus_sha256": manifest.get("corpus_sha256"),
                "tokens": train.get("tokens"),
                "documents": train.get("documents"),
                "text_bytes": train.get("text_bytes"),
                "tokenizer_sha256": model.tokenizer,
                "vocab_size": (model.state.get("tokenizer") or {}).get("vocab_size"),
            }
    return list(found.values())
