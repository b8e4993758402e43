"""What was recorded of a prepared folder when it was written, in receipts and manifest, against what its files hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_gpt.errors import DataError, explain
from lit_gpt.packed_dataset import MANIFEST, TokenFile, read_header
from lit_gpt.token_scan import IdCounts, Scan
from lit_gpt.tokenizer import Tokenizer

AGAIN = "copy it again, or prepare it again: scripts/prepare.py writes what is missing"
SUMMED = ("documents", "tokens", "text_bytes")


class RecordedSplit:
    """One split of a prepared folder as its manifest and its receipts describe it."""

    def __init__(self, folder: Path, split: str, manifest: Mapping[str, Any]) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.entry: Mapping[str, Any] = manifest["splits"][split]
        self.compared = 0
        """Files whose checksum was found to be the recorded one."""
        self.is_whole = True
        """Whether every file could be read and has its checksum: if not, sums say nothing more."""
        self._receipts: dict[str, dict[str, Any]] = {}

    def open_files(self, problems: list[str]) -> list[TokenFile]:
        """The files of the split that can be opened; the others go to `problems`."""
        files = []
        for name in self.entry["files"]:
            try:
                files.append(read_header(self.folder / name))
            except FileNotFoundError:
                problems.append(f"{self.folder / name} is missing, {MANIFEST} lists it; {AGAIN}")
            except (DataError, OSError) as error:
                problems.append(explain(error))
        self.is_whole = len(files) == len(self.entry["files"])
        return files

    def file_problems(self, scan: Scan) -> list[str]:
        """Where a file differs from its receipt and from the manifest."""
        path = Path(scan.file.path)
        problems: list[str] = []
        receipt = self._receipt(path, problems)
        records = {path.with_suffix(".json").name: receipt.get("crc32"), MANIFEST: self._listed("crc32", path.name)}
        known = {where: crc32 for where, crc32 in records.items() if isinstance(crc32, int)}
        differing = [f"{where} has {crc32:08x}" for where, crc32 in known.items() if crc32 != scan.crc32]
        if differing:
            self.is_whole = False
            problems.append(
                f"{path} is damaged or was exchanged: the crc32 of its tokens is {scan.crc32:08x}, "
                f"{' and '.join(differing)}; {AGAIN}"
            )
        elif known:
            self.compared += 1
        for where, tokens in (
            ("its receipt", receipt.get("tokens")),
            (MANIFEST, self._listed("file_tokens", path.name)),
        ):
            if isinstance(tokens, int) and tokens != scan.file.n_tokens:
                self.is_whole = False
                problems.append(f"{path} holds {scan.file.n_tokens} tokens, {where} says {tokens}; {AGAIN}")
        return problems

    def _receipt(self, path: Path, problems: list[str]) -> dict[str, Any]:
        """The receipt beside a file; empty if there is none, as in a folder that was copied without."""
        receipt_path = path.with_suffix(".json")
        try:
            receipt = json.loads(receipt_path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            problems.append(
                f"{receipt_path} is damaged ({error}); delete it together with {path.name} and prepare again"
            )
            return {}
        if not isinstance(receipt, dict):
            problems.append(f"{receipt_path} holds no receipt; delete it together with {path.name} and prepare again")
            return {}
        self._receipts[path.name] = receipt
        return receipt

    def _listed(self, key: str, name: str) -> Any:
        """What the manifest says of one file; manifests of earlier versions say nothing of single files."""
        listed = self.entry.get(key)
        return listed.get(name) if isinstance(listed, Mapping) else None

    def total_problems(self, counts: IdCounts, tokenizer: Tokenizer | None) -> list[str]:
        """Where the sums over all files differ from the manifest's. Says nothing more of a split with bad files."""
        problems = self._plan_problems()
        if not self.is_whole:
            return problems
        problems += self._receipt_sums()
        where = f"{self.folder / MANIFEST}, {self.split}:"
        if counts.n_tokens != self.entry["tokens"]:
            problems.append(f"{where} announces {self.entry['tokens']} tokens, the files hold {counts.n_tokens}")
        separator_id, documents = self.manifest.get("separator_id"), self.entry.get("documents")
        if separator_id is not None and documents is not None and counts.of(separator_id) != documents:
            problems.append(
                f"{where} announces {documents} documents, but the files hold {counts.of(separator_id)} separators "
                f"(id {separator_id}); documents run into each other or are cut in two, so prepare the data again"
            )
        return problems + self._byte_problems(counts, tokenizer, where)

    def notes(self) -> list[str]:
        """What was known to be imperfect when the files were written."""
        text_bytes, table_bytes = self.entry.get("text_bytes"), self.entry.get("table_bytes")
        if table_bytes is None or table_bytes == text_bytes:
            return []
        return [
            f"{self.split}: the tokens stand for {table_bytes} bytes of text, the documents had {text_bytes}: the "
            f"tokenizer changes text or does not know some of it; bits per byte are off by that much"
        ]

    def _plan_problems(self) -> list[str]:
        plan_id = self.manifest.get("plan_id")
        others = [name for name, receipt in self._receipts.items() if receipt.get("plan_id") != plan_id]
        if plan_id is None or not others:
            return []
        return [
            f"{self.folder}: {len(others)} of {len(self._receipts)} {self.split} receipts, e.g. that of {others[0]}, "
            f"belong to another plan than {MANIFEST}: manifest or files come from elsewhere; prepare the data again"
        ]

    def _receipt_sums(self) -> list[str]:
        if set(self._receipts) != set(self.entry["files"]):
            return []
        problems = []
        for key in SUMMED:
            counted = [receipt.get(key) for receipt in self._receipts.values()]
            found = sum(count for count in counted if isinstance(count, int))
            if key in self.entry and found != self.entry[key]:
                problems.append(
                    f"{self.folder / MANIFEST}, {self.split}: announces {self.entry[key]} {key}, the receipts add up "
                    f"to {found}; one of them was changed, so prepare the data again"
                )
        return problems

    def _byte_problems(self, counts: IdCounts, tokenizer: Tokenizer | None, where: str) -> list[str]:
        """The text bytes that the tokens stand for must be those that were counted when they were made."""
        recorded, documents = self.entry.get("table_bytes"), self.entry.get("documents")
        if (
            tokenizer is None
            or None in (recorded, documents)
            or tokenizer.fingerprint != self.manifest["tokenizer"]["sha256"]
        ):
            return []
        lengths = tokenizer.byte_lengths()
        separator_id = self.manifest.get("separator_id")
        found = counts.sum_of(lengths) - documents * tokenizer.bytes_added_per_text
        if separator_id is not None:
            found -= int(lengths[separator_id]) * documents
        if found == recorded:
            return []
        return [
            f"{where} announces tokens for {recorded} bytes of text, those in the files stand for {found}; "
            f"they are not the ones that were written, so prepare the data again"
        ]


def unlisted_notes(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """A sentence on token files in the folder that the manifest does not list."""
    listed = {name for entry in manifest["splits"].values() for name in entry["files"]}
    others = sorted(path.name for path in folder.glob("*.bin") if path.name not in listed)
    if not others:
        return []
    return [f"{len(others)} files of {folder} are not in its {MANIFEST} and are never read, e.g. {others[0]}"]
