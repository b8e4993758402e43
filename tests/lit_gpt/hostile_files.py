"""Files that were made to do harm: run code, crash the reader, or make it allocate what no file backs.

Run as a program on a folder of them, it opens each as a user's command would and prints what came of it, as JSON.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARKER = "executed"
SHELL = f"touch {MARKER}"
CONFIG = {
    **{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 11},
    **{"intermediate_size": 8, "max_position_embeddings": 8},
}
NAMES = (
    *(("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("subprocess", "check_output")),
    *(("builtins", "eval"), ("builtins", "exec"), ("builtins", "__import__"), ("builtins", "getattr")),
    *(("builtins", "open"), ("builtins", "compile"), ("importlib", "import_module"), ("runpy", "run_path")),
    *(("pickle", "loads"), ("torch", "load"), ("torch.hub", "load"), ("numpy", "load"), ("ctypes", "CDLL")),
    *(("shutil", "rmtree"), ("functools", "partial"), ("operator", "attrgetter"), ("codecs", "decode")),
)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def call(module: str, name: str, argument: str = SHELL) -> bytes:
    return named(module, name) + text(argument) + b"\x85R"


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def entry(key: bytes, value: bytes) -> bytes:
    """A dict of one entry."""
    return b"}" + key + value + b"s"


def torch_file(body: bytes, **parts: bytes) -> bytes:
    """A file of torch.save around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", body)
        for name, content in {"byteorder": b"little", "data/0": bytes(16), **parts}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def number(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    *, key: str = "0", elements: int = 4, offset: int = 0, shape: bytes = numbers(4), stride: bytes = numbers(1)
) -> bytes:
    storage = b"(" + text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu") + number(elements)
    storage += b"tQ"
    arguments = b"(" + storage + number(offset) + shape + stride + b"\x89" + named("collections", "OrderedDict")
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + b")R" + b"tR"


def weights(value: bytes) -> bytes:
    return torch_file(whole(entry(text("transformer.wte.weight"), value)))


def compressed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    return buffer.getvalue()


def doubled(times: int = 60) -> bytes:
    """A tuple that holds the one before twice: a few bytes, but what hashes or prints it never ends."""
    return b")" + b"q\x07h\x07\x86" * times


def doubled_path() -> bytes:
    """A path made of the one before, twice: text of 2^50 characters."""
    path = named("pathlib", "PosixPath")
    return text("a" * 1000) + (b"q\x070" + path + b"h\x07h\x07\x86R") * 40


def number_pairs(count: int) -> bytes:
    """Entries of a dict, between its mark and its end."""
    return b"".join(b"J" + struct.pack("<i", key) + b"N" for key in range(count))


def alike(count: int) -> bytes:
    """Entries of a dict under numbers that all have one hash."""
    return b"".join(number(key * ((1 << 61) - 1)) + b"N" for key in range(count))


def called_again(function: bytes, argument: bytes, times: int) -> bytes:
    """Calls with the same large argument, taken from the memo."""
    return argument + b"q\x07(" + (function + b"h\x07R") * times + b"t"


PICKLES: dict[str, bytes] = {
    **{f"calls {module}.{name}": torch_file(whole(call(module, name))) for module, name in NAMES},
    "calls from the stack": torch_file(whole(text("os") + text("system") + b"\x93" + text(SHELL) + b"\x85R")),
    "calls inside a call": torch_file(whole(named("collections", "OrderedDict") + call("os", "system") + b"\x85R")),
    "calls as a parameter": torch_file(
        whole(named("torch._utils", "_rebuild_parameter") + b"(" + call("os", "system") + b"\x89}tR")
    ),
    "calls in an old opcode": torch_file(whole(b"(" + text(SHELL) + b"ios\nsystem\n")),
    "calls by an extension code": torch_file(whole(b"\x82\x01" + text(SHELL) + b"\x85R")),
    "calls an attribute": torch_file(whole(call("torch", "Size.__class__"))),
    "calls a module's attribute": torch_file(whole(call("torch.serialization", "os.system"))),
    "builds an object": torch_file(whole(tensor() + entry(text("__class__"), named("os", "system")) + b"b")),
    "no zip": whole(call("os", "system")),
    "not a pickle": torch_file(b"\xff\xfe\xfd"),
    "no end": torch_file(b"\x80\x02}"),
    "nothing on the stack": torch_file(whole(b"0000")),
    "a memo of 2^31": torch_file(b"\x80\x02}r\xff\xff\xff\x7f."),
    "bytes of a terabyte": torch_file(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."),
    "text of a terabyte": torch_file(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"."),
    "a number of 2 GB": torch_file(b"\x80\x02\x8b\xff\xff\xff\x7f1."),
    "nested a hundred thousand deep": torch_file(whole(b"(" * 100_000 + b"l" * 100_000)),
    "a key that hashes for ever": torch_file(whole(b"}" + doubled() + b"Ns")),
    "a path that doubles": torch_file(whole(doubled_path())),
    "a path of what never ends": torch_file(whole(named("pathlib", "PosixPath") + doubled() + b"\x85R")),
    "a name that never ends": torch_file(whole(doubled() + text("system") + b"\x93")),
    "a kind of storage that never ends": torch_file(whole(b"(" + doubled() + b"NNNNtQ")),
    "a storage's name that never ends": torch_file(
        whole(b"(" + text("storage") + named("torch", "FloatStorage") + doubled() + b"NK\x01tQ")
    ),
    "a shape that never ends": weights(tensor(shape=doubled(), stride=doubled())),
    "a shape of a hundred thousand dimensions": weights(
        tensor(shape=numbers(*[(1 << 2000) - 1] * 100_000, 0), stride=numbers(*[1] * 100_001))
    ),
    "a dict copied ten thousand times": torch_file(
        whole(called_again(named("collections", "OrderedDict"), b"}(" + number_pairs(20_000) + b"u\x85", 10_000))
    ),
    "a tuple copied ten thousand times": torch_file(
        whole(called_again(named("torch", "device"), b"(" + b"N" * 100_000 + b"t", 10_000))
    ),
    "numbers that hash alike": torch_file(whole(b"}(" + alike(60_000) + b"u")),
    "ten million dicts": torch_file(whole(b"(" + b"}" * 10_000_000 + b"t")),
    "a storage from outside": weights(tensor(key="../../../etc/passwd")),
    "a storage of a terabyte": weights(tensor(elements=1 << 38, shape=numbers(1 << 38))),
    "a tensor past its storage": weights(tensor(offset=3)),
    "a tensor before its storage": weights(tensor(offset=-1)),
    "a tensor of negative size": weights(tensor(shape=numbers(-4), stride=numbers(-1))),
    "a tensor expanded to a terabyte": weights(tensor(shape=numbers(1 << 38), stride=numbers(0))),
    "a tensor without strides": weights(tensor(stride=b")")),
    "a compressed bomb": compressed(),
    "cut off": torch_file(whole(entry(text("a"), tensor())))[:-30],
    "big-endian": torch_file(whole(entry(text("a"), tensor())), byteorder=b"big"),
}


def safetensors(header: bytes | dict[str, Any], data: bytes = bytes(352), length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def one(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"model.embed_tokens.weight": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


SAFETENSORS: dict[str, bytes] = {
    "header of 2^63 bytes": safetensors({}, length=1 << 63),
    "header longer than the file": safetensors({}, length=10_000),
    "header that is no JSON": safetensors(b"{" * 100),
    "header nested deep": safetensors(b'{"a":' * 50_000),
    "offsets past the end": safetensors(one([11, 8], 0, 1 << 40)),
    "offsets backwards": safetensors(one([11, 8], 352, 0)),
    "offsets that overlap": safetensors(
        one([11, 8], 0, 352) | {"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}
    ),
    "a shape of a terabyte": safetensors(one([1 << 20, 1 << 20], 0, 352)),
    "a shape that overflows": safetensors(one([1 << 62, 4], 0, 352)),
    "a dtype of another size": safetensors(one([11, 8], 0, 352, "F64")),
    "a dtype nobody knows": safetensors(one([11, 8], 0, 352, "F3")),
    "an empty file": b"",
}
FOLDERS: dict[str, dict[str, bytes]] = {
    "an index that leaves the folder": {
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../secret.safetensors"}}).encode()
    },
    "an index with an absolute path": {
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode()
    },
    "an index of pickles": {
        "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": "part.bin"}}).encode(),
        "part.bin": torch_file(whole(call("os", "system"))),
    },
    "an index that is a list": {"model.safetensors.index.json": b'{"weight_map": [1, 2]}'},
    "layers beyond counting": {
        "config.json": json.dumps({**CONFIG, "num_hidden_layers": 10**12}).encode(),
        "model.safetensors": safetensors(one([11, 8], 0, 352)),
    },
    "a family with a list of layers beyond counting": {
        "config.json": json.dumps({**CONFIG, "model_type": "smollm3", "num_hidden_layers": 10**12}).encode(),
        "model.safetensors": safetensors(one([11, 8], 0, 352)),
    },
    "a width beyond counting": {
        "config.json": json.dumps({**CONFIG, "hidden_size": 10**15}).encode(),
        "model.safetensors": safetensors(one([11, 8], 0, 352)),
    },
    "a config nested deep": {"config.json": b'{"a":' * 50_000, "model.safetensors": safetensors({})},
}
DCP = "torch.distributed.checkpoint.metadata"


def filled(kind: str, **fields: bytes) -> bytes:
    """An object of one of torch's classes for metadata, with these fields."""
    entries = b"".join(text(name) + value for name, value in fields.items())
    return named(DCP, kind) + b")\x81}(" + entries + b"ub"


def metadata(
    state: bytes = b"}", storage: bytes = b"}", planner: bytes = b"}", before: bytes = b"", after: bytes = b""
) -> bytes:
    parts = {"state_dict_metadata": state, "storage_data": storage, "planner_data": planner, "storage_meta": b"N"}
    return whole(before + filled("Metadata", **parts) + after)


def size_of(*dimensions: int) -> bytes:
    return named("torch", "Size") + numbers(*dimensions) + b"\x85R"


PROPERTIES = (
    named(DCP, "TensorProperties") + b")\x81(" + named("torch", "float32")
    + named("torch.serialization", "_get_layout") + text("torch.strided") + b"\x85R"
    + b"\x89" + named(DCP, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R" + b"\x89tb"
)  # fmt: skip


def stored(size: bytes, chunks: bytes, properties: bytes = PROPERTIES) -> bytes:
    return filled("TensorStorageMetadata", properties=properties, size=size, chunks=chunks)


METADATA: dict[str, bytes] = {
    "nothing in it": metadata(),
    "a key that hashes for ever": metadata(state=b"}" + doubled() + b"Ns"),
    "an index that hashes for ever": metadata(
        storage=b"}" + filled("MetadataIndex", fqn=text("a"), offset=doubled()) + b"Ns"
    ),
    "an index that changes": metadata(
        storage=b"}" + filled("MetadataIndex", fqn=text("a")) + b"}" + text("fqn") + text("b") + b"sb" + b"Ns"
    ),
    "an index without a name": metadata(storage=b"}" + named(DCP, "MetadataIndex") + b")\x81Ns"),
    "a shape that never ends": metadata(state=entry(text("a"), stored(doubled(), b"]"))),
    "a shape of a hundred thousand dimensions": metadata(
        state=entry(text("a"), stored(size_of(*[(1 << 62) - 1] * 100_000), b"]"))
    ),
    "a shape of a terabyte": metadata(
        state=entry(
            text("model.lm_head.weight"),
            stored(
                size_of(1 << 40),
                b"]" + filled("ChunkStorageMetadata", offsets=size_of(0), sizes=size_of(1 << 40)) + b"a",
            ),
        )
    ),
    "parts that are none": metadata(state=entry(text("a"), stored(size_of(4), b"]" + doubled() + b"a"))),
    "properties that never end": metadata(state=entry(text("a"), stored(size_of(4), b"]", properties=doubled()))),
    "a name in memory that never ends": metadata(planner=entry(text("a"), doubled())),
    "ten million dicts": metadata(before=b"(" + b"}" * 10_000_000 + b"t0"),
    "ten million objects": metadata(before=named(DCP, "Metadata") + b"q\x070(" + b"h\x07)\x81" * 3_000_000 + b"t0"),
    "a hundred thousand parts under twenty thousand names": metadata(
        before=filled("ChunkStorageMetadata", offsets=size_of(0), sizes=size_of(0))
        + b"q\x070"
        + stored(size_of(0), b"](" + b"h\x07" * 100_000 + b"e")
        + b"q\x080",
        state=b"}(" + b"".join(text(str(key)) + b"h\x08" for key in range(20_000)) + b"u",
    ),
    "a hundred thousand parts of a thousand tensors": metadata(
        before=filled("ChunkStorageMetadata", offsets=size_of(0), sizes=size_of(0))
        + b"q\x070]("
        + b"h\x07" * 100_000
        + b"eq\x080"
        + PROPERTIES
        + b"q\x090",
        state=b"}(" + b"".join(text(str(key)) + stored(size_of(0), b"h\x08", b"h\x09") for key in range(1000)) + b"u",
    ),
    "numbers that hash alike": metadata(state=b"}(" + alike(60_000) + b"u"),
    "a name of forty thousand bits": metadata(
        state=b"}\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000 + stored(size_of(4), b"]") + b"s"
    ),
    "calls os.system": whole(call("os", "system")),
    "calls builtins.eval": whole(call("builtins", "eval", "__import__('os').system('" + SHELL + "')")),
    "calls inside a call": whole(named("torch", "Size") + call("os", "system") + b"\x85R"),
    "a memo of 2^31": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes of a terabyte": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "text of a terabyte": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
}


def write_all(folder: Path, sign: Callable[[Path], None], training: Path) -> dict[str, Path]:
    """Every hostile file, each where a reader would meet it; name -> what to open.

    sign: gives a changed training form a manifest that fits. training: a training form to damage.
    """
    found: dict[str, Path] = {}
    for number_, (name, content) in enumerate(PICKLES.items()):
        path = folder / "pickles" / str(number_) / "iter-000010-ckpt.pth"
        found[f"pickle: {name}"] = path
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    shells = {name: {"model.safetensors": content} for name, content in SAFETENSORS.items()} | FOLDERS
    for number_, (name, files) in enumerate(shells.items()):
        path = folder / "folders" / str(number_)
        found[f"folder: {name}"] = path
        path.mkdir(parents=True)
        for file, content in {"config.json": json.dumps(CONFIG).encode(), **files}.items():
            (path / file).write_bytes(content)
    for number_, (name, content) in enumerate(METADATA.items()):
        path = folder / "training" / str(number_)
        found[f"metadata: {name}"] = path
        path.mkdir(parents=True)
        for file in training.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        (path / ".metadata").write_bytes(content)
        sign(path)
    return found


# The reader's side


EVENTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")


def open_and_tell(path: Path, allowed_bytes: int) -> dict[str, Any]:
    """Open a checkpoint and read all of it, with little more memory than its files have bytes."""
    import resource

    from lit_gpt.checkpoint import read_config, read_weights

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + allowed_bytes, resource.RLIM_INFINITY))
    try:
        config = read_config(path)
        for name, weight in read_weights(path).items():
            assert weight.shape is not None, name
        return {"error": None, "message": str(config)}
    except BaseException as error:
        return {"error": type(error).__name__, "message": str(error)[:2000]}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    from lit_gpt import checkpoint, sharded

    assert checkpoint and sharded and torch, "loaded before anything is measured"
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event) if event in EVENTS else None)
    slack = 64 << 20  # what the interpreter, its modules and the allocator's arenas take
    results = {}
    for line in sys.stdin:
        name, path = json.loads(line)
        files = [Path(path)] if Path(path).is_file() else [each for each in Path(path).iterdir() if each.is_file()]
        size = sum(each.stat().st_size for each in files)
        results[name] = {**open_and_tell(Path(path), slack + 2 * size), "events": events.copy()}
        events.clear()
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
