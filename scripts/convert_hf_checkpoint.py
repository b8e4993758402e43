"""Read a checkpoint of any kind and write it in exchange form, the folder that Hugging Face and lit-grow load.

  convert_hf_checkpoint.py SRC DST                 a Hugging Face folder (safetensors or .bin), released weights, or a
                                                   file of TinyLlama, prts, lit-gpt or llama2.c
  convert_hf_checkpoint.py --checkpoint_dir DIR    as TinyLlama has it: DIR/lit_model.pth, for its tools

A receipt, DST.receipt.json, says what was mapped and how far the logits of the two agree.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conversion_command import parse, parser_for, run

from lit_gpt.errors import run_command


def main(argv: Sequence[str]) -> int:
    parser = parser_for("convert_hf_checkpoint.py", __doc__ or "")
    lineage = parser.add_argument_group("as TinyLlama and litgpt call them")
    lineage.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="SRC")
    lineage.add_argument("--output-dir", type=Path, metavar="DIR", help="DST")
    args = parse(parser, argv)
    args.source = args.source or args.checkpoint_dir
    args.destination = args.destination or args.output_dir
    if args.source is not None and args.destination is None and args.checkpoint_dir is not None:
        args.destination = args.checkpoint_dir / "lit_model.pth"
        return run(args, "legacy")
    return run(args, "exchange")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
