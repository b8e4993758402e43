"""Templates over the fields of a document: `Question: {goal}`, `{support|lstrip}`, `{choices.text}`.

A field is a path of names and list numbers, then clean-ups from the table in clean_ups.py. Nothing is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from string import Formatter
from typing import Any

from pretrain.zero_shot.clean_ups import CLEAN_UPS


class FieldError(Exception):
    """A document does not have what a template asks for."""


@dataclass(frozen=True)
class Field:
    """One field of a document and what is done to its text."""

    path: tuple[str, ...]
    clean_ups: tuple[str, ...]

    def value(self, document: Mapping[str, Any]) -> Any:
        """What stands there, a string cleaned up, a list of strings string by string."""
        found: Any = document
        for name in self.path:
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (KeyError, IndexError, TypeError, ValueError):
                raise FieldError(f"there is no field {'.'.join(self.path)}") from None
        if isinstance(found, list):
            return [self._clean(each) for each in found]
        return self._clean(found)

    def _clean(self, found: Any) -> Any:
        if not self.clean_ups:
            return found
        if not isinstance(found, str):
            raise FieldError(f"{'.'.join(self.path)} is {found!r}, not text")
        for name in self.clean_ups:
            try:
                found = CLEAN_UPS[name](found)
            except ValueError as error:
                raise FieldError(f"{'.'.join(self.path)}: {error}") from None
        return found


class Template:
    """Text with fields in it.

    Raises:
        ValueError: it is not a template, or an unknown clean-up.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.parts: list[str | Field] = []
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r} is not a template: {error}; write {{{{ and }}}} for braces") from None
        for literal, name, spec, conversion in parsed:
            if literal:
                self.parts.append(literal)
            if name is not None:
                if spec or conversion:
                    raise ValueError(f"{text!r}: a field is {{name}} or {{name|clean_up}}, without ! and :")
                self.parts.append(_field(name, text))

    def render(self, document: Mapping[str, Any]) -> str:
        """The text for one document. Raises FieldError."""
        return "".join(part if isinstance(part, str) else _as_text(part, document) for part in self.parts)

    def value(self, document: Mapping[str, Any]) -> Any:
        """The value of the field that is all of the template, else the text. Raises FieldError."""
        if len(self.parts) == 1 and isinstance(self.parts[0], Field):
            return self.parts[0].value(document)
        return self.render(document)


def _field(text: str, template: str) -> Field:
    path, *clean_ups = text.split("|")
    if not all(path.split(".")):
        raise ValueError(f"{template!r}: {{{text}}} names no field")
    for name in clean_ups:
        if name not in CLEAN_UPS:
            raise ValueError(f"{template!r}: unknown clean-up {name!r}; {did_you_mean(name, CLEAN_UPS)}")
    return Field(tuple(path.split(".")), tuple(clean_ups))


def _as_text(field: Field, document: Mapping[str, Any]) -> str:
    value = field.value(document)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FieldError(f"{'.'.join(field.path)} is {value!r}, neither text nor a number")
    return str(value)


def did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    """The nearest name if one is near, and all of them."""
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"
