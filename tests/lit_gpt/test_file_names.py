"""Compact file names: nothing lost, natural order, and the last file of every writer."""

from __future__ import annotations

import re
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.file_names import FileNames, split_number

PARTS = st.lists(
    st.sampled_from(["train", "slim", "_", "-", "é", "/", ".bin", "0", "07", "7", "12", "0" * 9, "1" * 20])
)
PATHS = st.lists(PARTS.map("".join).filter(bool), max_size=12)


def natural_key(name):
    return [(int(part) if part.isdigit() else -1, part) for part in re.split("([0-9]+)", name)]


@given(PATHS)
def test_names_come_back_as_they_were(paths):
    names = FileNames.of(paths)
    assert list(names) == paths == [names[i] for i in range(len(names))]
    assert list(names[1:5]) == paths[1:5]
    assert list(names.without_folders()) == [path.rpartition("/")[2] for path in paths]


@given(PARTS.map("".join))
def test_a_name_is_cut_around_its_last_number(path):
    before, digits, after = split_number(path)
    assert before + digits + after == path
    assert not re.search("[0-9/]", after) and digits.isdigit() == bool(digits) and len(digits) <= 18
    if not digits:
        assert not re.search("[0-9]", path.rpartition("/")[2])


LINEAGE = st.tuples(
    st.sampled_from(["train_slim", "train_star", "validation"]), st.integers(0, 12), st.integers(0, 120)
)


@given(st.lists(LINEAGE, unique=True, max_size=30), st.sampled_from([1, 10]))
def test_files_of_the_lineage_are_grouped_by_process_and_ordered_by_counter(files, digits):
    paths = [f"x/{prefix}_{process}_{counter:0{digits}d}.bin" for prefix, process, counter in files]
    names = FileNames.of(paths)
    assert list(names.take(names.natural_order())) == sorted(paths, key=natural_key)
    assert len(names.groups) == len({(prefix, process) for prefix, process, _ in files})
    last = {(prefix, process): counter for prefix, process, counter in sorted(files)}
    assert {files[i] for i in names.last_of_each_group()} == {(*group, counter) for group, counter in last.items()}


def test_equal_numbers_of_other_widths_have_one_order():
    for paths in (["x_7.bin", "x_007.bin", "x_07.bin"], ["x_007.bin", "x_07.bin", "x_7.bin"]):
        names = FileNames.of(paths)
        assert list(names.take(names.natural_order())) == ["x_007.bin", "x_07.bin", "x_7.bin"]


def test_a_name_costs_less_than_twenty_bytes():
    tracemalloc.start()
    names = FileNames.of(f"a/long/folder/train_slim_{i // 1000}_{i % 1000:010d}.bin" for i in range(20_000))
    kept_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names) == 20_000 and kept_bytes < 20 * 20_000
