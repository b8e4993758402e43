"""Continue a prompt with the model of any checkpoint: ours, a Hugging Face folder, or a file of TinyLlama or prts.

generate.py CKPT --prompt "Once upon a time" --max-new-tokens 200 --temperature 0.8 --top-p 0.95
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion_command import dashed
from loading import find_device, find_first_id, find_tokenizer, own_words

from lit_gpt.errors import run_command

if TYPE_CHECKING:
    from lit_gpt.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CKPT", help="a folder, or a .pth or .bin file")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="CKPT, as TinyLlama and litgpt call it")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue (default: nothing)")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts, each of the next seed (1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--greedy", action="store_true", help="temperature 0")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest that make up P (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first text (%(default)s)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of weights and products (fp32)")
    parser.add_argument("--tokenizer", metavar="PATH", help="a file, a folder, or `bytes` (default: the checkpoint's)")
    parser.add_argument(
        "--first-id",
        metavar="ID",
        help="token before the prompt, `bos` or `none` (default: the one that separated documents)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end and nothing else")
    return parser.parse_args([dashed(argument) for argument in argv])


def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    checkpoint = args.checkpoint or args.checkpoint_dir
    if checkpoint is None:
        raise ValueError("give CKPT, the checkpoint to continue with")
    if args.num_samples < 1:
        raise ValueError(f"--num-samples {args.num_samples} must be at least 1")

    import torch

    from lit_gpt.generate import load_for_inference, stream

    state, special_ids = own_words(checkpoint)
    tokenizer = find_tokenizer(args.tokenizer, checkpoint, state)
    first_id = find_first_id(args.first_id, tokenizer, state)
    device = find_device(args.device, torch.cuda.device_count())
    model = load_for_inference(checkpoint, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision], device)
    ids = [*([] if first_id is None else [first_id]), *(int(each) for each in tokenizer.encode(args.prompt))]
    room = max(0, model.config.block_size - len(ids))
    if args.max_new_tokens > room:
        sys.stderr.write(f"block_size={model.config.block_size} leaves room for {room} tokens after the prompt\n")
    texts, count, began = [], 0, time.perf_counter()
    for number in range(args.num_samples):
        new_ids = stream(
            model,
            ids,
            min(args.max_new_tokens, room),
            temperature=0.0 if args.greedy else args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed + number,
            eos_ids=find_eos_ids(tokenizer, special_ids),
        )
        text = args.prompt
        show(text, args.json)
        for piece, n_tokens in pieces(tokenizer, ids, new_ids):
            text, count = text + piece, count + n_tokens
            show(piece, args.json)
        show("\n", args.json)
        texts.append(text)
    secs = time.perf_counter() - began
    if args.json:
        print(json.dumps({"texts": texts, "new_tokens": count, "secs": secs, "first_id": first_id}))
    else:
        sys.stderr.write(f"{count} tokens in {secs:.2f} s, {count / secs:.1f} a second, {args.precision} on {device}\n")
    return 0


def show(text: str, silent: bool) -> None:
    if not silent:
        print(text, end="", flush=True)


def pieces(tokenizer: Tokenizer, ids: list[int], new_ids: Iterator[int]) -> Iterator[tuple[str, int]]:
    """Text as soon as it is whole, and how many tokens it took: a token may be a part of a character."""
    so_far, shown, waiting = list(ids), tokenizer.decode(ids), 0
    for new_id in new_ids:
        so_far.append(new_id)
        waiting += 1
        text = tokenizer.decode(so_far)
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :], waiting
            shown, waiting = text, 0
    if waiting:
        yield tokenizer.decode(so_far)[len(shown) :], waiting


def find_eos_ids(tokenizer: Tokenizer, special_ids: Mapping[str, Any]) -> set[int]:
    """Tokens after which a text ends: the tokenizer's and those of generation_config.json; Llama 3 has three."""
    named = special_ids.get("eos_token_id", [])
    return {*([] if tokenizer.eos_id is None else [tokenizer.eos_id]), *(named if isinstance(named, list) else [named])}


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
