"""The tables of docs/performance.md, from what is in results/. `python -m benchmarks` renews them.

Every function here makes one table, of a record as its benchmark writes it; a table of what was not measured says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.result_files import RESULTS, read_result
from benchmarks.tables import markdown
from benchmarks.variants import targets
from grow.planning.devices import peak_flops_per_sec

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
NOTHING = "Not measured yet."
MISSING = "–"

Record = Mapping[str, Any]


# By machine: records of several in one file


def by_machine(result: Record, table: Callable[[Record], str]) -> str:
    """A table for each machine, under a line that says which it is."""
    found = [f"{on(record, key)}\n\n{table(record)}" for key, record in result.items()]
    return "\n\n".join(found) or NOTHING


def on(record: Record, key: str) -> str:
    """What it was measured on."""
    machine = record["machine"]
    if record["clock"] == "secs":
        return f"{key}, torch {machine['torch']}:"
    flags = [flag for flag in machine["flags"] if flag.startswith(("amx", "avx512"))]
    return (
        f"{machine['cpu']} ({', '.join(flags) or 'no AVX-512'}), {record['threads']} thread(s), torch "
        f"{machine['torch']}, load {machine['load_average'][0]:.1f} on {machine['cores']} cores:"
    )


def per_second(record: Record) -> str:
    """Which rate is compared."""
    return "tokens_per_cpu_sec" if record["clock"] == "cpu_secs" else "tokens_per_sec"


def quartiles(spread: Mapping[str, float], form: str) -> str:
    return f"{spread['q1']:{form}} to {spread['q3']:{form}}"


def training(record: Record) -> str:
    """Every variant, and its speed relative to transformers eager of its policy."""
    rate, is_gpu = per_second(record), record["clock"] == "secs"
    medians = {each["name"]: each[rate]["median"] for each in record["variants"]}
    ratios = {(each["ours"], each["against"]): each for each in record[f"ratios_{record['clock']}"]}
    head = ["variant", f"tokens per {'second' if is_gpu else 'CPU-second'}", "quartiles", "of transformers eager"]
    head += ["MFLOP per token", "share of the floor's speed", *(["MFU", "MiB beyond weights"] if is_gpu else [])]
    rows = []
    for each in record["variants"]:
        name, precision = each["name"], each["name"].split()[1]
        eager = f"transformers {precision} eager"
        ratio = ratios.get((name, eager), {}).get("median") or _quotient(medians, name, eager)
        flops = each["model_flops_per_token"]
        share = record["floors"][precision]["share_reached"].get(name)
        cells = [name, f"{medians[name]:,.0f}", quartiles(each[rate], ",.0f"), _number(ratio, ".2f")]
        cells += [f"{flops / 1e6:.1f}", _number(share and 100 * share["median"], ".0f", " %")]
        rows.append([*cells, *([mfu(each, record), f"{each['peak_bytes'] / 2**20:,.0f}"] if is_gpu else [])])
    for precision, floor in record["floors"].items():
        spread = floor["tokens_per_sec"]
        cells = [f"floor {precision}", f"{spread['median']:,.0f}", quartiles(spread, ",.0f"), MISSING]
        rows.append([*cells, MISSING, "100 %", *([MISSING, MISSING] if is_gpu else [])])
    absent = [f"{family}: {why}." for family, why in record["absent"].items()]
    notes = [f"`{record['auto']['variant']}` is what `auto` gives here: {record['auto']['why']}.", *absent]
    return markdown(head, rows) + "\n\n" + " ".join(notes)


def mfu(variant: Record, record: Record) -> str:
    """Share of the GPU's peak by the convention of PaLM (lit_gpt/flops.py)."""
    peak = peak_flops_per_sec(record["gpu"])
    return _number(peak and 100 * variant["palm_flops_per_sec"] / peak, ".1f", " %")


def _quotient(medians: Mapping[str, float], name: str, other: str) -> float | None:
    return medians[name] / medians[other] if other in medians else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    return MISSING if value is None else f"{value:{form}}{unit}"


def training_targets(record: Record) -> str:
    """What was to be reached, and whether it was."""
    rows = []
    for ours, other, wanted, found in targets(record):
        cells = [f"{ours} against {other}", f"{wanted:.2f}"]
        if found is None:
            rows.append([*cells, MISSING, MISSING, "not measured"])
        else:
            kept = "reached" if found["median"] >= wanted else "**missed**"
            rows.append([*cells, f"{found['median']:.2f}", quartiles(found, ".2f"), kept])
    return markdown(["times as fast", "wanted", "measured", "quartiles", ""], rows)


def training_floor(record: Record) -> str:
    """What the floor is made of."""
    head = ["floor", "GFLOP a step", "products in", "GFLOP/s", "MB a step", "GB/s", "ms a step", "of that products"]
    rows = []
    for precision, floor in record["floors"].items():
        tokens = record["batch_size"] * record["shape"]["block_size"]
        secs = tokens / floor["tokens_per_sec"]["median"]
        cells = [precision, f"{floor['flops'] / 1e9:.1f}", floor["product_dtype"]]
        cells += [f"{floor['flops_per_sec']['median'] / 1e9:,.0f}", f"{floor['bytes'] / 1e6:,.0f}"]
        cells += [f"{floor['bytes_per_sec']['median'] / 1e9:.1f}", f"{1e3 * secs:,.1f}"]
        rows.append([*cells, f"{100 * floor['products_secs']['median'] / secs:.0f} %"])
    return markdown(head, rows)


def kernels(record: Record) -> str:
    """Every operation by backend at every shape."""
    parts = []
    for each in record["shapes"]:
        shape, peaks = each["shape"], each["loss_peak_bytes"]
        rows = []
        for row in each["results"]:
            ratio = row["times_as_fast_as_plainest"]
            peak = f"{peaks[row['backend']] / 2**20:,.0f}" if row["operation"] == "loss" else ""
            name = f"{row['backend']}{' (auto)' if row['is_auto'] else ''}"
            cells = [row["operation"], name, f"{1e3 * row['secs']['median']:.2f}", f"{ratio['median']:.2f}"]
            rows.append([*cells, quartiles(ratio, ".2f"), f"{row['error']:.1e}", peak])
        sizes = ", ".join(f"{key} {value:,}" for key, value in shape.items())
        head = ["operation", "backend", "ms", "times as fast as the plainest", "quartiles", "error", "MiB at most"]
        parts.append(f"{record['dtype']}, {sizes}:\n\n{markdown(head, rows)}")
    return "\n\n".join(parts)


def evaluation(record: Record) -> str:
    unit = "CPU-second" if record["clock"] == "cpu_secs" else "second"
    rows = []
    for name, rate in record["tokens_per_sec"].items():
        over = record["ours_over"].get(name)
        cells = [name, f"{rate['median']:,.0f}", quartiles(rate, ",.0f")]
        rows.append([*cells, MISSING if over is None else f"{over['median']:.2f} ({quartiles(over, '.2f')})"])
    rows += [[name, "left out", why, MISSING] for name, why in record["absent"].items()]
    head = ["way", f"tokens per {unit}", "quartiles", "ours is so many times as fast"]
    return f"{record['what']}.\n\n{markdown(head, rows)}"


# One record in a file


def data_loader(record: Record) -> str:
    rate, over = "million_tokens_per_cpu_sec", record["over_tinyllama_by_micro_batch"]
    rows = []
    for name, each in record["results"].items():
        size = name.rpartition(" ")[2]
        ratio = over.get(size) if name == f"ours, micro-batch {size}" else None
        spread = f"{each[f'{rate}_slowest']:.0f} to {each[f'{rate}_fastest']:.0f}"
        rows.append([name, f"{each[rate]:.0f}", spread, _number(ratio, ".2f")])
    head = ["loader", "M tokens per CPU-second", "slowest to fastest", "over TinyLlama"]
    return markdown(head, rows)


def data_index(record: Record) -> str:
    rows = []
    for name, each in record["results"].items():
        cells = [name, f"{each['files']:,}", f"{1e3 * each['build_secs_median']:.1f}"]
        rows.append([*cells, f"{each['memory_peak_bytes'] / 1e6:.1f}", f"{1e3 * each['jump_secs_median']:.1f}"])
    return markdown(["files", "their number", "ms to build", "MB at most", "ms of a jump"], rows)


def data_prep(record: Record) -> str:
    rows = []
    for name, rate in record["megabytes_per_cpu_sec"].items():
        ratio, floor = record["ours_over"].get(name), record["floors"].get(name)
        rows.append([name, f"{rate:.2f}", _number(ratio, ".2f"), _number(floor if ratio else None, ".1f")])
    return markdown(["", "MB of text per CPU-second", "ours over it", "wanted"], rows)


def grow(record: Record) -> str:
    rows = []
    for name, each in record["medians"].items():
        ratio = 1.0 if name == "cp and fsync" else record["over_cp"].get(name)
        cells = [name, f"{each['secs']:.3g}", _number(ratio, ".2f"), f"{each['cpu_secs']:.3g}"]
        cells += [f"{each[key] / 1e6:,.0f}" for key in ("peak_rss_bytes", "import_rss_bytes")]
        rows.append([*cells, f"{each['load']:.0f}"])
    head = ["", "seconds", "over cp, same repeat", "CPU seconds", "peak MB", "of that the imports", "load"]
    return f"{_sentence(record['what'])}\n\n{markdown(head, rows)}\n\n{_goals(record)}"


def convert(record: Record) -> str:
    rows = []
    for name, each in record["medians"].items():
        ratio = 1.0 if name == "cp and fsync" else record["over_cp"].get(name)
        rows.append([name, f"{each['secs']:.1f}", _number(ratio, ".2f"), f"{each['peak_rss_bytes'] / 1e6:,.0f}"])
    table = markdown(["conversion", "seconds", "over cp, same repeat", "peak MB"], rows)
    return f"{_sentence(record['what'])}\n\n{table}\n\n{_goals(record)}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _goals(record: Record) -> str:
    kept = [goal for goal, is_kept in record["kept"].items() if is_kept]
    missed = [goal for goal, is_kept in record["kept"].items() if not is_kept]
    return f"Goals kept: {'; '.join(kept) or 'none'}. Missed: {'; '.join(missed) or 'none'}."


def operators(record: Record) -> str:
    """Losses before growth, right after it, and while the grown model trains."""
    first, middle, last = "0", str(record["training"]["steps"][0]), str(record["training"]["steps"][-1])
    rows = []
    for each in record["results"]:
        losses = each["loss_after"]
        cells = [each["growth"], f"{each['parameters']:,}", f"{each['loss_before']:.3f}"]
        cells += [f"{mean(losses[step]):.3f}" for step in (first, middle, last)]
        rows.append([*cells, f"{stdev(losses[last]):.3f}" if len(losses[last]) > 1 else MISSING])
    return markdown(["growth", "parameters", "before", "right after", f"{middle} steps", f"{last} steps", "±"], rows)


TABLES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "training": ("training", lambda result: by_machine(result, training)),
    "training-targets": ("training", lambda result: by_machine(result, training_targets)),
    "training-floor": ("training", lambda result: by_machine(result, training_floor)),
    "kernels": ("kernels", lambda result: by_machine(result, kernels)),
    "evaluation": ("evaluation", lambda result: by_machine(result, evaluation)),
    "data-loader": ("data_loader", data_loader),
    "data-index": ("data_index", data_index),
    "data-prep": ("data_prep", data_prep),
    "grow": ("grow_speed", grow),
    "convert": ("convert_speed", convert),
    "operators": ("operators_after_growth", operators),
}
"""Name of a table on the page -> the file of results and what makes the table of it."""


def table_of(results: Path = RESULTS) -> Callable[[str], str]:
    """Name -> the table, from the files in a folder.

    Raises:
        ValueError: the page wants a table that nobody makes.
    """

    def table(name: str) -> str:
        if name not in TABLES:
            raise ValueError(f"{PAGE.name} wants the table {name!r}; known: {', '.join(TABLES)}")
        file, make = TABLES[name]
        result = read_result(results / f"{file}.json")
        return make(result) if result else NOTHING

    return table
