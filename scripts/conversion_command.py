"""What convert_hf_checkpoint.py and convert_lit_checkpoint.py share: arguments and the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_DIFFERENT = 3  # as for a damaged file: what was written is not what was read


def parser_for(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", type=Path, metavar="SRC", help="a folder, or a .pth or .bin file")
    parser.add_argument("destination", nargs="?", type=Path, metavar="DST", help="what to make; must not exist")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16, float16, float64 (default: as they are)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="to go along (default: the one beside the source)"
    )
    parser.add_argument(
        "--parity",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare logits before and after; auto: where two models in fp32 fit in memory",
    )
    parser.add_argument("--no-sha256", action="store_true", help="leave the sha256 of what was read out of the receipt")
    sizes = parser.add_argument_group("what a .pth or .bin file does not tell")
    sizes.add_argument("--model-name", metavar="NAME", help="a size by its name, e.g. tiny_LLaMA_1b or 24L1024H")
    sizes.add_argument("--n-head", type=int, metavar="N", help="query heads")
    sizes.add_argument("--block-size", type=int, metavar="N", help="tokens of context (default: by the name, or 2048)")
    sizes.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the tokenizer, if fewer than rows")
    parser.add_argument("--json", action="store_true", help="print the receipt as JSON and nothing else")
    return parser


def dashed(argument: str) -> str:
    """`--out_dir=a_b` as `--out-dir=a_b`."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    return parser.parse_args([dashed(argument) for argument in argv])


def run(args: argparse.Namespace, to: str) -> int:
    """Convert as `args` say, print the receipt; 3 if the logits before and after differ."""
    from lit_gpt.conversion import DTYPES, convert, receipt_path
    from lit_gpt.legacy_sizes import Sizes

    if args.source is None or args.destination is None:
        raise ValueError("give SRC and DST: the checkpoint to convert, and what to make")
    dtype = None if args.dtype is None else args.dtype.removeprefix("torch.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype} is unknown; known: {', '.join(DTYPES)}")
    receipt = convert(
        args.source,
        args.destination,
        to=to,
        dtype=None if dtype is None else DTYPES[dtype],
        sizes=Sizes(args.model_name, args.n_head, args.block_size, args.vocab_size),
        tokenizer_dir=args.tokenizer,
        parity=args.parity,
        hash_inputs=not args.no_sha256,
    )
    if args.json:
        print(json.dumps(receipt))
    else:
        print("\n".join(lines(receipt)))
        print(f"receipt    {receipt_path(Path(receipt['destination']))}")
        if receipt["wrong"]:
            batches = " and ".join(receipt["wrong"])
            print(f"WRONG      the logits of the {batches} batch differ; do not use {receipt['destination']}")
    return EXIT_DIFFERENT if receipt["wrong"] else 0


def compared(receipt: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Batch -> what it showed."""
    return {name: batch for name, batch in receipt["parity"].items() if isinstance(batch, dict)}


def lines(receipt: dict[str, Any]) -> list[str]:
    """A receipt for a reader."""
    skipped = receipt["tensors"]["left_out"]
    found = [
        f"converted  {receipt['source']} ({receipt['source_kind']}) -> {receipt['destination']} "
        f"({receipt['destination_kind']}), {receipt['family']}, {receipt['parameters']:,} parameters, "
        f"{receipt['dtype']}, {receipt['secs']:.1f} s",
        f"tensors    {receipt['tensors']['mapped']} mapped, {receipt['tensors']['unmapped']} unmapped, "
        f"{len(skipped)} left out" + "".join(f"\n             {each}" for each in skipped[:5]),
    ]
    if receipt["destination_kind"] == "exchange" and not receipt["tokenizer"]:
        found.append("tokenizer  none was found, the folder has none; --tokenizer PATH brings one")
    found += [
        f"parity     {name}: max |logit gap| {batch['max_abs_logit_gap']:.3g} of {batch['max_abs_logit']:.3g}, top-1 "
        f"agreement {batch['top1_agreement']:.2%} of {batch['tokens']} tokens, against {receipt['parity']['against']}"
        for name, batch in compared(receipt).items()
    ]
    if "skipped" in receipt["parity"]:
        found.append(f"parity     not measured: {receipt['parity']['skipped']}")
    found += [
        f"input      {each['sha256'] or '(not hashed)'}  {each['file']}, {each['bytes']:,} bytes"
        for each in receipt["inputs"]
    ]
    return found
