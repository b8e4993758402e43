"""The `grow` command: plans, growing a checkpoint, looking at checkpoints, comparisons, reports and fits of runs."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from grow.data_command import add_data_arguments, open_data
from grow.layer_map import connection_rate_text, parse_layer_map
from grow.operator_list import operator_list, operator_tables
from grow.operators import plan_growth
from grow.plan import OPTIMIZER_POLICIES
from grow.plan_text import WIDTHS, history_lines, layer_map_lines, plan_lines, receipt_lines
from grow.registry import LEARNING, OPERATORS
from grow.width_plan import RULES, SHARES
from lit_gpt.errors import EXIT_USAGE, run_command


def add_map_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layer_map", metavar="MAP", help="e.g. '12-3456*5-56' or '1..2-3..6*5-5..6'; quote the *")
    parser.add_argument("--n-layer-src", type=int, metavar="N", help="layers of the source; higher ones are refused")
    parser.add_argument("--n-layer", type=int, metavar="N", help="layers that the map must have")


def run_map(args: argparse.Namespace) -> None:
    layers = parse_layer_map(args.layer_map, n_layer_src=args.n_layer_src, n_layer=args.n_layer)
    if args.json:
        rate = connection_rate_text(layers)
        print_json({"layers": list(layers), "n_layer": len(layers), "connection_rate": rate})
        return
    print(f"{args.layer_map}: {len(layers)} layers")
    highest = max((layer for layer in layers if layer is not None), default=-1)
    print_lines(layer_map_lines(layers, args.n_layer_src or highest + 1))


def add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="a checkpoint, or a run folder (its latest checkpoint)")
    parser.add_argument("dst", metavar="DST", help="the checkpoint to make; must not exist")
    parser.add_argument(
        "--operator", "--method", required=True, metavar="NAME", help="see `grow operators`; prts's names do too"
    )
    parser.add_argument("--n-layer", type=int, metavar="N", help="layers of the grown model")
    for size, what in WIDTHS.items():
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, metavar="N", help=f"{what} of the grown model")
    parser.add_argument(
        "--factor", type=float, metavar="K", help="sizes after growth over sizes before: layers in depth, else widths"
    )
    parser.add_argument("--layer-map", metavar="MAP", help="use this map instead of the operator's; see `grow map`")
    parser.add_argument("--reference", metavar="CKPT", help="the larger model whose next layers inheritune appends")
    parser.add_argument("--seed", type=int, default=0, help="of whatever the operator draws; default 0")
    parser.add_argument("--residual", choices=RULES, help="rule for residual channels; default M, exact for any width")
    parser.add_argument("--shares", choices=list(SHARES), help="how copies share what is read from them")
    parser.add_argument("--order", choices=["cyclic", "random"], help="which channels, heads and neurons are copied")
    parser.add_argument(
        "--adjust-eps", action="store_true", default=None, help="change norm_eps, so that rules E and Z are exact"
    )
    parser.add_argument("--twin-noise", type=float, metavar="A", help="noise that parts copies and cancels out")
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="A", help="replace this share of every matrix by noise; default 0"
    )
    parser.add_argument(
        "--dtype", choices=["keep", "float32"], default="keep", help="of the grown weights; default that of the source"
    )
    parser.add_argument(
        "--optimizer-policy",
        choices=list(OPTIMIZER_POLICIES),
        default="reset",
        help="what becomes of AdamW's moments; default reset, as in the paper",
    )
    add_allow_non_finite(parser, "grow")
    add_data_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and stop")


def add_allow_non_finite(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument(
        "--allow-nonfinite",
        "--allow-non-finite",
        dest="allow_non_finite",
        action="store_true",
        help=f"{verb} weights that hold NaN or infinity too",
    )


PLAN_ARGUMENTS = (
    *("n_layer", *WIDTHS, "factor", "layer_map", "seed", "noise"),
    *("residual", "shares", "order", "adjust_eps", "twin_noise"),
    *LEARNING,
)
"""Options of `grow apply` that are arguments of `plan_growth` by the same name."""


def run_apply(args: argparse.Namespace) -> None:
    import torch

    from grow.apply import grow_checkpoint, read_reference
    from grow.grown import check_optimizer, check_policy
    from grow.record import summary
    from lit_gpt.checkpoint import EXCHANGE, detect_form, find_checkpoint, read_config

    src = find_checkpoint(args.src)
    reference = find_checkpoint(args.reference) if args.reference else None
    plan = plan_growth(
        args.operator,
        read_config(src),
        reference=read_reference(reference) if reference else None,
        **{name: getattr(args, name) for name in PLAN_ARGUMENTS},
    )
    check_policy(plan, args.optimizer_policy)
    if detect_form(src) == EXCHANGE:
        check_optimizer(plan, {}, args.optimizer_policy)  # before the plan is printed
    samples = open_data(args, plan, src)
    if not args.json:
        print_lines(plan_lines(plan, args.optimizer_policy))
    if args.dry_run:
        report = {"dry_run": True, **summary(plan, args.optimizer_policy)}
    else:
        report = grow_checkpoint(
            src,
            args.dst,
            plan,
            args.optimizer_policy,
            allow_non_finite=args.allow_non_finite,
            dtype=torch.float32 if args.dtype == "float32" else None,
            reference_path=reference,
            samples=samples,
        )
    if args.json:
        print_json(report)
    elif args.dry_run:
        print("dry run: nothing was written")
    else:
        print_lines(receipt_lines(report))


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run folder (its latest checkpoint)")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare the checksums")


def run_inspect(args: argparse.Namespace) -> None:
    from grow.check import inspect_checkpoint
    from lit_gpt.checkpoint import find_checkpoint

    found = inspect_checkpoint(find_checkpoint(args.checkpoint), verify=args.verify)
    if args.json:
        print_json(found)
        return
    print(f"{found['path']} ({found['form']} form)")
    for key, value in found["config"].items():
        if value == "":
            continue
        print(f"  {key:20}{value}")
    print(f"  {'parameters':20}{found['parameters']:,} ({found['non_embedding']:,} without embeddings)")
    for key, value in found["progress"].items():
        print(f"  {key:20}{value:,}")
    print_lines(history_lines(found["history"]))
    print(VERIFIED[found["verified"]])


VERIFIED = {
    True: "every checksum is right",
    False: "no checksums to compare: a Hugging Face folder not written here; its tensors have the shapes "
    "of its config.json",
    None: "checksums not compared; use --verify",
}


def add_operators_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/operators.md")


def run_operators(args: argparse.Namespace) -> None:
    if args.json:
        print_json([op.to_dict() for op in OPERATORS.values()])
        return
    if args.markdown:
        print_lines(operator_tables())
        return
    print_lines(operator_list())


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint before growth, or a run folder")
    parser.add_argument("dst", metavar="DST", help="checkpoint after growth, or a run folder")
    parser.add_argument("--tokens", metavar="FILE", help="a token file (.bin) of prepared data; default: random tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens; default 0")
    add_allow_non_finite(parser, "compare")


def run_check(args: argparse.Namespace) -> None:
    from grow.check import compare, load_model, random_tokens, tokens_from_file
    from grow.verdict import promise, verdict
    from lit_gpt.checkpoint import find_checkpoint

    paths = [find_checkpoint(path) for path in (args.src, args.dst)]
    src, dst = (load_model(path, allow_non_finite=args.allow_non_finite) for path in paths)
    tokens = tokens_from_file(args.tokens, src.config) if args.tokens else random_tokens(src.config, seed=args.seed)
    found = compare(src, dst, tokens)
    promised = promise(*paths)
    if args.json:
        print_json({**found.to_dict(), "promised": promised.function, "verdict": verdict(found, promised)})
        return
    print(f"largest logit gap   {found.max_abs_logit_gap:.3g} (largest logit {found.max_abs_logit:.3g})")
    print(f"measured on         {found.n_tokens:,} tokens of {args.tokens or 'a random sequence'}")
    print(f"the function        {verdict(found, promised)}")
    print(f"without gradient    {len(found.zero_gradient)} tensors")
    for name in found.zero_gradient:
        print(f"  {name}{' (after the first step)' if name in found.waiting else ''}")
    if found.waiting:
        print("  (after the first step): attn.proj or mlp.swiglu.w3, which pass it on, are zero and are trained first")


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    from grow.compare.command import add_arguments

    add_arguments(parser)


def run_compare(args: argparse.Namespace) -> int | None:
    from grow.compare.command import run

    return run(args)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    from grow.report.command import add_arguments

    add_arguments(parser)


def run_report(args: argparse.Namespace) -> int:
    from grow.report.command import run

    return run(args)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    from grow.planning.command import add_arguments

    add_arguments(parser)


def run_plan(args: argparse.Namespace) -> None:
    from grow.planning.command import run

    found = run(args)
    if args.json:
        print_json(found)
    else:
        print_lines(found)


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    from grow.fit_command import add_arguments

    add_arguments(parser)


def run_fit(args: argparse.Namespace) -> int:
    from grow.fit_command import run

    return run(args)


@dataclass(frozen=True)
class Command:
    """One word after `grow`."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


COMMANDS = {
    "map": Command("expand a layer map, show its connection rate", add_map_arguments, run_map),
    "apply": Command("grow a checkpoint into a larger one", add_apply_arguments, run_apply),
    "plan": Command("when to grow, by how much, and what it costs", add_plan_arguments, run_plan),
    "inspect": Command("sizes, growth history and health of a checkpoint", add_inspect_arguments, run_inspect),
    "operators": Command("the growth operators", add_operators_arguments, run_operators),
    "check": Command("what a growth did to the function and to the gradients", add_check_arguments, run_check),
    "compare": Command(
        "probe several operators on your data, ranked with error bars", add_compare_arguments, run_compare
    ),
    "report": Command("figures and a page that compare finished runs", add_report_arguments, run_report),
    "fit": Command("power laws of the loss, predictions, predicted speed-ups", add_fit_arguments, run_fit),
}


def build_parser(chosen: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of all commands and that of the chosen one, the only one to get its arguments and their imports."""
    style = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="grow", description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    subparsers = {
        name: commands.add_parser(name, help=command.help, description=_description(name), **style)
        for name, command in COMMANDS.items()
    }
    if chosen not in COMMANDS:
        return parser, parser
    COMMANDS[chosen].add_arguments(subparsers[chosen])
    if "--json" not in subparsers[chosen].format_usage():
        subparsers[chosen].add_argument("--json", action="store_true", help="print one JSON value and nothing else")
    return parser, subparsers[chosen]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """As argparse does it; an option that does not exist is an error that names the nearest one that does."""
    parser, command_parser = build_parser(next((word for word in arguments if not word.startswith("-")), ""))
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = re.findall(r"--[a-z-]+", command_parser.format_help())
        near = get_close_matches(unknown[0].partition("=")[0], known, n=1)
        command_parser.error(
            f"unknown argument {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help")
        )
    return args


def _description(name: str) -> str:
    import grow.layer_map

    text = f"{COMMANDS[name].help.capitalize()}."
    return f"{text}\n\n{grow.layer_map.__doc__}" if name == "map" else text


def normalise(argv: Sequence[str]) -> list[str]:
    """`-` and `_` are equal in option names; a value like -5B is joined to its name, or argparse takes it for one."""
    joined: list[str] = []
    for argument in argv:
        if re.match(r"-\d", argument) and joined and re.fullmatch(r"--[a-z][\w-]*", joined[-1]):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    parts = [argument.partition("=") for argument in joined]
    return [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in parts
    ]


def print_lines(lines: Iterable[str]) -> None:
    print("\n".join(lines))


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = normalise(sys.argv[1:] if argv is None else argv)
    if not arguments:
        build_parser("")[0].print_help(sys.stderr)
        return EXIT_USAGE

    def run() -> int | None:
        args = parse_arguments(arguments)
        return COMMANDS[args.command].run(args)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
