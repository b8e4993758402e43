"""Rows of parquet and Arrow files, with no more than the columns that are asked for, a few hundred at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from lit_gpt.errors import DataError
from prep.formats import ARROW_FILE, ARROW_STREAM, CHUNK_BYTES, PARQUET, WrongKeyError, damage_named, pyarrow_for

ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
ROWS_PER_BATCH = 256


def column_rows(path: str, kind: str, keys: Sequence[str]) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The names of all columns of a parquet or Arrow file, and its rows with the columns in `keys` alone.

    Text whose bytes are not UTF-8 comes as bytes.

    Raises:
        DataError: the file is damaged or cut short.
        WrongKeyError: no column has such a name.
    """
    pyarrow_for(path)
    with damage_named(path):
        schema = _schema(path, kind)
    names = _column_names(schema)
    paths = {key: where for key in keys if (where := _column_path(schema, key)) is not None}
    missing = [key for key in keys if key not in paths]
    if missing:
        raise WrongKeyError(
            f"{path} has no column {missing[0]!r}; its columns are {', '.join(names) or 'none'}. "
            f"Choose one with --text-key, or mend --drop"
        )
    return names, _rows_of(path, kind, paths)


def _column_names(schema: Any) -> list[str]:
    import pyarrow as pa

    inside = (
        [f"{each.name}.{one.name}" for one in each.type] if pa.types.is_struct(each.type) else [] for each in schema
    )
    return [name for each, names in zip(schema, inside, strict=True) for name in names or [each.name]]


def _schema(path: str, kind: str) -> Any:
    import pyarrow as pa

    if kind == PARQUET:
        import pyarrow.parquet

        with _parquet_file(path) as file:
            return file.schema_arrow
    with pa.memory_map(path) as source:
        return (pa.ipc.open_stream if kind == ARROW_STREAM else pa.ipc.open_file)(source).schema


def _parquet_file(path: str) -> Any:
    import pyarrow.parquet

    # by default whole column chunks, often of gigabytes, are read at once
    return pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False, page_checksum_verification=True)


def _column_path(schema: Any, key: str) -> tuple[str, ...] | None:
    """Where a column is: its name alone, or the names of the structures around it before that."""
    import pyarrow as pa

    if key in schema.names:
        return (key,)
    parts = tuple(key.split("."))
    fields = schema
    for part in parts:
        names = fields.names if isinstance(fields, pa.Schema) else [each.name for each in fields]
        if part not in names:
            return None
        fields = fields.field(part)
        fields = fields.type if pa.types.is_struct(fields.type) else ()
    return parts


def _rows_of(path: str, kind: str, paths: dict[str, tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    read = _parquet_batches if kind == PARQUET else _stream_batches if kind == ARROW_STREAM else _file_batches
    with damage_named(path):
        for batch in read(path, paths):
            columns = [_values(_column(batch, where), checked=kind == PARQUET) for where in paths.values()]
            yield from (dict(zip(paths, values, strict=True)) for values in zip(*columns, strict=True))


def _parquet_batches(path: str, paths: dict[str, tuple[str, ...]]) -> Iterator[Any]:
    with _parquet_file(path) as file:
        n_rows = 0
        columns = [".".join(each) for each in paths.values()]
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=columns, use_threads=False):
            n_rows += batch.num_rows
            yield batch
        if n_rows != file.metadata.num_rows:
            raise DataError(
                f"{path} is damaged: {n_rows} of its {file.metadata.num_rows} rows can be read; get it again"
            )


def _stream_batches(path: str, paths: dict[str, tuple[str, ...]]) -> Iterator[Any]:
    """Batches of an Arrow stream, which must end with its end mark: without it, a lost end is the end."""
    import pyarrow as pa

    with pa.memory_map(path) as source:
        reader = pa.ipc.open_stream(source, options=_only(path, ARROW_STREAM, paths))
        for batch in reader:
            yield from _sliced(batch)
        n_bytes = os.path.getsize(path)
        if source.tell() != n_bytes or source.read_at(len(ARROW_END), n_bytes - len(ARROW_END)) != ARROW_END:
            raise DataError(f"{path} is damaged or cut short: it does not end with the end mark of Arrow; get it again")


def _file_batches(path: str, paths: dict[str, tuple[str, ...]]) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(path) as source:
        reader = pa.ipc.open_file(source, options=_only(path, ARROW_FILE, paths))
        for number in range(reader.num_record_batches):
            yield from _sliced(reader.get_batch(number))


def _only(path: str, kind: str, paths: dict[str, tuple[str, ...]]) -> Any:
    import pyarrow as pa

    names = _schema(path, kind).names
    return pa.ipc.IpcReadOptions(included_fields=sorted({names.index(each[0]) for each in paths.values()}))


def _sliced(batch: Any) -> Iterator[Any]:
    batch.validate()
    for start in range(0, batch.num_rows, ROWS_PER_BATCH):
        yield batch.slice(start, ROWS_PER_BATCH)


def _column(batch: Any, where: tuple[str, ...]) -> Any:
    import pyarrow.compute as pc

    column = batch.column(where[0])
    for part in where[1:]:
        column = pc.struct_field(column, part)
    return column


def _values(column: Any, *, checked: bool) -> list[Any]:
    """The values of a column as Python has them; bytes for all where some text is not UTF-8."""
    import pyarrow as pa

    if not checked:
        _check_offsets(column)
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return [value.as_buffer().to_pybytes() if value.is_valid else None for value in column]


def _check_offsets(column: Any) -> None:
    """Damaged offsets in a mapped file would read outside of it. Text that is not UTF-8 is no damage."""
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    column.validate(full=True)
