"""Write a checkpoint of ours for other tools: exchange form for Hugging Face, or one file for TinyLlama and prts.

  convert_lit_checkpoint.py SRC DST                exchange form, from training form or a file of the lineage
  convert_lit_checkpoint.py SRC DST.pth            {"model": ...} under TinyLlama's names, from any checkpoint
  convert_lit_checkpoint.py --out_dir DIR --checkpoint_name FILE --model_name NAME
                                                   as TinyLlama has it: DIR/FILE into the folder DIR/FILE-hf

A receipt, DST.receipt.json, says what was mapped and how far the logits of the two agree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conversion_command import parse, parser_for, run

from lit_gpt.errors import run_command


def main(argv: Sequence[str]) -> int:
    parser = parser_for("convert_lit_checkpoint.py", __doc__ or "")
    parser.add_argument("--to", choices=("exchange", "legacy"), help="legacy: for TinyLlama and prts (DST.pth says so)")
    lineage = parser.add_argument_group("as TinyLlama and litgpt call them")
    lineage.add_argument("--out-dir", type=Path, metavar="DIR", help="the folder of the checkpoint, and of the output")
    lineage.add_argument("--checkpoint-name", metavar="FILE", help="the checkpoint's name there")
    lineage.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="SRC")
    lineage.add_argument("--output-dir", type=Path, metavar="DIR", help="DST")
    lineage.add_argument("--model-only", nargs="?", const="true", metavar="BOOL", help="no effect: never anything else")
    args = parse(parser, argv)
    args.source, args.destination = args.source or args.checkpoint_dir, args.destination or args.output_dir
    if args.source is None and args.out_dir is not None and args.checkpoint_name is not None:
        args.source = args.out_dir / args.checkpoint_name
        args.destination = args.destination or args.out_dir / f"{Path(args.checkpoint_name).stem}-hf"
    as_file = args.destination is not None and args.destination.suffix == ".pth"
    return run(args, args.to or ("legacy" if as_file else "exchange"))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
