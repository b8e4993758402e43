"""The layer-map language: which source layer every layer of a grown model starts from, and its connection rate.

    123456*4         the digit form of arXiv 2405.15319: every digit is a layer, `*4` repeats its part
    12-3456*5-56     parts are joined by `-`
    1..2-3..6*5-5,6  as soon as `..` or `,` occurs anywhere, numbers are decimal: ranges and lists
    123-new*3        `new` is a layer without a source: it gets the initial weights of the grown model

`*k` repeats the whole part it ends, in both forms: `125*3` and `1,2,5*3` are both 1 2 5 1 2 5 1 2 5.
Layers count from 1 in these strings, as in the paper, and from 0 in every Python tuple and every JSON list, where a
new layer is None (null).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from itertools import groupby

LayerMap = tuple[int | None, ...]
"""LayerMap[i] is the source layer of layer i of the grown model, counted from 0; None for a layer without a source."""

MAX_LAYERS = 1024  # the deepest Transformer published has 1000 (arXiv 2203.00555); a slip like *1000000 stops here

NEW = "new"
DIGITS = "0123456789"
KNOWN = DIGITS + "-*.,"
EMPTY_PART = "a layer is missing here; an empty part is not allowed, leave its '-' out"


class _Reader:
    """A place in the text of a layer map; every error it makes points at a character."""

    def __init__(self, text: str, n_layer_src: int | None) -> None:
        self.text = text
        self.n_layer_src = n_layer_src
        self.at = 0
        self.decimal = ".." in text or "," in text

    def error(self, message: str, at: int | None = None) -> ValueError:
        shown = "".join(char if char.isprintable() else "?" for char in self.text)
        caret = " " * (self.at if at is None else at) + "^"
        return ValueError(f"layer map: {message}\n  {shown}\n  {caret}")

    def stray(self, expected: str) -> ValueError:
        """The error for the character that stands where something else was expected."""
        char = self.text[self.at : self.at + 1]
        if char and char not in KNOWN:
            return self.error(
                f"{char!r} is not part of a layer map; known: digits, '-' between parts, '*repeats', '..', ',' and "
                f"'{NEW}'"
            )
        return self.error(expected)

    def take(self, token: str) -> bool:
        found = self.text.startswith(token, self.at)
        self.at += len(token) if found else 0
        return found

    def digits(self, expected: str) -> str:
        start = self.at
        while self.at < len(self.text) and self.text[self.at] in DIGITS:
            self.at += 1
        if self.at == start:
            raise self.stray(expected)
        return self.text[start : self.at]

    def number(self, expected: str) -> tuple[int, int]:
        """A decimal number and where it began."""
        start = self.at
        self.digits(expected)
        if self.at - start > len(str(MAX_LAYERS)):
            raise self.error(f"the number is too large; a map has at most {MAX_LAYERS} layers", start)
        return int(self.text[start : self.at]), start

    def layer(self, number: int, at: int) -> int:
        """The 0-based layer behind a 1-based number."""
        if number == 0:
            raise self.error("layers count from 1 here; the first layer is 1", at)
        if self.n_layer_src is not None and number > self.n_layer_src:
            raise self.error(f"there is no layer {number}; the source has layers 1 to {self.n_layer_src}", at)
        return number - 1

    def block(self) -> list[int | None]:
        if self.take(NEW):
            return [None]
        return self.decimal_block() if self.decimal else self.digit_block()

    def digit_block(self) -> list[int | None]:
        start = self.at
        return [self.layer(int(digit), start + i) for i, digit in enumerate(self.digits(EMPTY_PART))]

    def decimal_block(self) -> list[int | None]:
        layers = self._range()
        while self.take(","):
            layers += self._range()
        return layers

    def _range(self) -> list[int | None]:
        first, first_at = self.number(EMPTY_PART)
        first_layer = self.layer(first, first_at)
        if not self.take(".."):
            return [first_layer]
        last, last_at = self.number("the last layer of the range is missing here")
        last_layer = self.layer(last, last_at)
        if last < first:
            raise self.error(f"a range goes up, {first}..{last} does not; list the layers instead", first_at)
        return list(range(first_layer, last_layer + 1))

    def repeats(self) -> int:
        if not self.take("*"):
            return 1
        count, start = self.number("the number of repeats is missing after '*'")
        if count < 1:
            raise self.error("a part is repeated at least once; leave it out instead", start)
        return count


def parse_layer_map(text: str, *, n_layer_src: int | None = None, n_layer: int | None = None) -> LayerMap:
    """The source layer of every layer, counted from 0; None for a new one.

    Args:
        text: the map, with layers counted from 1; the language is at the top of this file.
        n_layer_src: layers of the source, if known: higher ones are refused.
        n_layer: layers that the map must have, if known.

    Raises:
        ValueError: the text is not a layer map (the message points at the character), or its length is wrong.
    """
    if not isinstance(text, str):
        raise ValueError(f"layer map {text!r} must be a string; write it in quotes, e.g. '123456*4'")
    reader = _Reader(text, n_layer_src)
    layers: list[int | None] = []
    while True:
        start = reader.at
        block = reader.block()
        repeats = reader.repeats()
        if len(layers) + len(block) * repeats > MAX_LAYERS:
            raise reader.error(f"the map grows past {MAX_LAYERS} layers in this part", start)
        layers += block * repeats
        if reader.at == len(text):
            break
        if not reader.take("-"):
            found = f"{text[reader.at]!r} cannot stand here"
            raise reader.stray(f"{found}; a part ends with its '*repeats', and '-' joins it to the next")
    if n_layer is not None and len(layers) != n_layer:
        raise ValueError(
            f"layer map {text!r} has {len(layers)} layers, but n_layer={n_layer}; change one of the two to match"
        )
    return tuple(layers)


def format_layer_map(layer_map: Sequence[int | None]) -> str:
    """A short text for a 0-based map; `parse_layer_map` gives the same map back."""
    digits = max((layer for layer in layer_map if layer is not None), default=0) < 9
    parts: list[str] = []
    for is_new, run in groupby(layer_map, key=lambda layer: layer is None):
        layers = list(run)
        if is_new:
            parts.append(NEW if len(layers) == 1 else f"{NEW}*{len(layers)}")
        else:
            parts += _format_run(layers, digits)
    if not digits and not any(".." in part or "," in part for part in parts):
        at = next(i for i, part in enumerate(parts) if not part.startswith(NEW))
        # a range of one layer: without it the text would be read digit by digit
        parts[at] = f"{parts[at].partition('*')[0]}..{parts[at]}"
    return "-".join(parts)


def _format_run(layers: Sequence[int], digits: bool) -> list[str]:
    """The parts for consecutive layers that all have a source."""
    parts: list[str] = []
    plain: list[int] = []
    at = 0
    while at < len(layers):
        length, repeats = _best_repeat(layers, at, digits)
        if repeats == 1:
            plain.append(layers[at])
            at += 1
            continue
        if plain:
            parts.append(_format_block(plain, digits))
            plain = []
        parts.append(f"{_format_block(layers[at : at + length], digits)}*{repeats}")
        at += length * repeats
    if plain:
        parts.append(_format_block(plain, digits))
    return parts


def _best_repeat(layer_map: Sequence[int], at: int, digits: bool) -> tuple[int, int]:
    """Length and count of the repetition starting at `at` that saves the most text; count 1 if none saves any."""
    best, best_saving = (1, 1), 0
    for length, repeats in _repeats_at(layer_map, at):
        block = _format_block(layer_map[at : at + length], digits)
        written_out = _format_block(layer_map[at : at + length * repeats], digits)
        saving = len(written_out) - len(f"{block}*{repeats}")
        if saving > best_saving:
            best, best_saving = (length, repeats), saving
    return best


def _repeats_at(layer_map: Sequence[int], at: int) -> Iterator[tuple[int, int]]:
    for length in range(1, (len(layer_map) - at) // 2 + 1):
        block = layer_map[at : at + length]
        repeats = 1
        while layer_map[at + length * repeats : at + length * (repeats + 1)] == block:
            repeats += 1
        if repeats > 1:
            yield length, repeats


def _format_block(layers: Sequence[int], digits: bool) -> str:
    if digits:
        return "".join(str(layer + 1) for layer in layers)
    items: list[str] = []
    start = 0
    for end in range(1, len(layers) + 1):
        if end < len(layers) and layers[end] == layers[end - 1] + 1:
            continue
        first, last = layers[start] + 1, layers[end - 1] + 1
        items += [f"{first}..{last}"] if end - start > 2 else [str(layer + 1) for layer in layers[start:end]]
        start = end
    return ",".join(items)


def is_connected(before: int | None, after: int | None) -> bool:
    """Whether two neighbours of the grown model were neighbours, in this order, in the source."""
    return before is not None and after == before + 1


def count_connections(layer_map: Sequence[int | None]) -> int:
    """Adjacent pairs of the grown model that were adjacent, in this order, in the source."""
    return sum(is_connected(before, after) for before, after in zip(layer_map, layer_map[1:], strict=False))


def connection_rate(layer_map: Sequence[int | None]) -> Fraction | None:
    """R_c of arXiv 2405.15319: the share of adjacent pairs that keep their neighbour. None for a single layer."""
    if len(layer_map) < 2:
        return None
    return Fraction(count_connections(layer_map), len(layer_map) - 1)


def connection_rate_text(layer_map: Sequence[int | None]) -> str | None:
    """R_c unreduced, "k/(n-1)" with both numbers written out, e.g. "20/23". None for a single layer."""
    if len(layer_map) < 2:
        return None
    return f"{count_connections(layer_map)}/{len(layer_map) - 1}"


def further_copies(layer_map: Sequence[int | None]) -> tuple[int, ...]:
    """Layers of the grown model, from 0, whose source another layer below them starts from already."""
    return tuple(i for i, layer in enumerate(layer_map) if layer is not None and layer in layer_map[:i])


def check_layer_map(layer_map: Sequence[int | None], n_layer_src: int, n_layer_dst: int) -> None:
    """Refuse a 0-based map that does not fit the two depths.

    Raises:
        ValueError: wrong length, or a layer that the source does not have.
    """
    if len(layer_map) != n_layer_dst:
        raise ValueError(
            f"layer map has {len(layer_map)} layers, but n_layer={n_layer_dst}; change one of the two to match"
        )
    copied = [layer for layer in layer_map if layer is not None]
    foreign = [layer for layer in copied if not isinstance(layer, int) or not 0 <= layer < n_layer_src]
    if foreign:
        raise ValueError(
            f"layer map names layer {foreign[0]!r} (counted from 0); the source has layers 0 to {n_layer_src - 1}"
        )


def unused_layers(layer_map: Sequence[int | None], n_layer_src: int) -> list[int]:
    """Source layers (from 0) that no layer of the grown model starts from."""
    return sorted(set(range(n_layer_src)) - set(layer_map))


def layer_texts(
    layer_map: Sequence[int | None],
    identity_layers: Collection[int] = (),
    fused_layers: Collection[int] = (),
    reference_layers: Collection[int] = (),
) -> list[str]:
    """One word for every layer of a grown model: the layer that it starts from, counted from 1, or `new`.

    Layers of the grown model, counted from 0, stand out: identity layers as (3), those made from two layers as 3+4,
    those of a reference as [3].
    """
    texts = []
    for i, layer in enumerate(layer_map):
        text = NEW if layer is None else str(layer + 1)
        text = f"{text}+{layer + 2}" if layer is not None and i in fused_layers else text
        text = f"[{text}]" if i in reference_layers else text
        texts.append(f"({text})" if i in identity_layers else text)
    return texts


def draw_layer_map(
    layer_map: Sequence[int | None], identity_layers: Collection[int] = (), width: int = 100, **marks: Collection[int]
) -> list[str]:
    """Lines of source layers, counted from 1, with a bar wherever two neighbours were none in the source.

    For the words, and how layers of the grown model are marked, see `layer_texts`; a layer made from two counts as the
    lower one, and one of a reference as the source's.
    """
    texts = layer_texts(layer_map, identity_layers, **marks)
    cells = [
        text if i == 0 or is_connected(layer_map[i - 1], layer) else f"| {text}"
        for i, (text, layer) in enumerate(zip(texts, layer_map, strict=True))
    ]
    lines = [""]
    for cell in cells:
        if lines[-1] and len(lines[-1]) + 1 + len(cell) > width:
            lines.append("")
        lines[-1] += f" {cell}" if lines[-1] else cell
    return lines
