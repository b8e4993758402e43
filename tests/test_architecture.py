"""The house rules: who may import whom, what importing may do, what a `--help` may cost, what files may say."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lit_gpt", "grow", "pretrain")
ALL = {*PACKAGES, "scripts", "benchmarks", "tests"}
MAY_IMPORT = {
    "lit_gpt": set(),
    "grow": {"lit_gpt"},
    "pretrain": {"lit_gpt", "grow"},
    "scripts": {*PACKAGES},
    "benchmarks": {*PACKAGES, "scripts"},
}
FABRIC = {"lightning_fabric", "lightning"}

# Optional at run time and absent on a plain install: no module may need one just to be imported.
OPTIONAL = [
    *("flash_attn", "xformers", "triton", "torchao"),
    *("pyarrow", "orjson", "zstandard", "tokenizers", "matplotlib", "jinja2", "scipy"),
    *("transformers", "lm_eval", "datasets", "wandb"),
]

# Plans, maps, settings and orders are data: reading them must not cost the seconds that torch takes.
WITHOUT_TORCH = [
    *("lit_gpt.errors", "lit_gpt.config", "lit_gpt.flops", "lit_gpt.memory", "lit_gpt.axes", "lit_gpt.tokenizer"),
    *("lit_gpt.data_order", "lit_gpt.packed_data", "lit_gpt.packed_dataset", "lit_gpt.token_files"),
    *("lit_gpt.token_source", "lit_gpt.legacy_order", "lit_gpt.prefetch", "lit_gpt.inspect_data"),
    *("grow.layer_map", "grow.plan", "grow.depth", "grow.operators", "grow.curves", "grow.__main__"),
    *("grow.planning.guideline", "grow.planning.command", "grow.planning.plot", "grow.planning.devices"),
    *("grow.runs.gather", "lit_gpt.counts", "lit_gpt.kernels.settings"),
    *("grow.fit", "grow.fit_command", "grow.scores", "grow.report.command", "grow.report.tables"),
    *("grow.compare.command", "grow.compare.settings", "grow.compare.text"),
    *("pretrain.config", "pretrain.command_line", "pretrain.data_command", "pretrain.__main__"),
    *("pretrain.status", "pretrain.heartbeat", "pretrain.time_limit", "pretrain.world"),
    *("pretrain.zero_shot.task", "pretrain.zero_shot.examples", "pretrain.zero_shot.encoding"),
]


def modules() -> list[str]:
    """Every module of the three packages, by its dotted name."""
    paths = (path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, at any depth in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; this project writes the full name"
            yield node.module or ""


def run_python(code: str, **environment: str) -> str:
    """stdout of a fresh interpreter in the checkout; fails with its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_packages_import_only_what_they_may(folder: str):
    for path in sources(folder):
        imported = {name.split(".")[0] for name in imports_of(path)}
        forbidden = imported & ALL - MAY_IMPORT[folder] - {folder}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


@pytest.mark.parametrize("folder", ["lit_gpt", "grow"])
def test_fabric_stays_in_the_training_program(folder: str):
    for path in sources(folder):
        assert not FABRIC & {name.split(".")[0] for name in imports_of(path)}, path.relative_to(ROOT)


# Runs first in a fresh interpreter: from here on optional packages are missing, and asking for a GPU is an error.
POISON = """
import importlib.machinery, sys, threading

find_installed = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in OPTIONAL else find_installed(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)

def forbidden(what):
    def refuse(*arguments, **keywords):
        raise AssertionError(f"importing a module must not {what}: {arguments}")
    return refuse

import torch
for name in ("is_available", "device_count", "init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, forbidden(f"ask for torch.cuda.{name}"))
torch.set_num_threads = forbidden("change the number of threads")
"""

# What importing may not do either, once torch and Fabric are loaded: write, start a process or a thread, connect.
IMPORT_ALL = """
import importlib
before = set(threading.enumerate())
sys.addaudithook(audit)
for module in MODULES:
    try:
        importlib.import_module(module)
    except Exception as error:
        raise AssertionError(f"{module} cannot be imported on a plain install: {error!r}") from error
assert set(threading.enumerate()) == before, "importing started a thread"
"""

AUDIT = """
import os
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def audit(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & WRITES and ".pyc" not in arguments[0]:
        raise AssertionError(f"importing a module must not open {arguments[0]} for writing")
    if event in ("subprocess.Popen", "os.system", "socket.connect", "os.mkdir", "os.rename", "os.remove"):
        if "__pycache__" not in str(arguments[0]):
            raise AssertionError(f"importing a module must not do {event}: {arguments}")
"""


def test_every_module_imports_without_extras_and_without_doing_anything():
    preload = "import lightning_fabric\n"  # what other packages do on import is not this project's
    out = run_python(
        f"OPTIONAL = {OPTIONAL!r}\nMODULES = {modules()!r}\n{POISON}{preload}{AUDIT}{IMPORT_ALL}",
        PYTHONDONTWRITEBYTECODE="1",
        CUDA_VISIBLE_DEVICES="",
    )

    assert out == "", f"importing printed {out!r}"


def test_what_is_data_imports_without_torch():
    names = [name for name in WITHOUT_TORCH if name in modules()]
    code = f"""
import importlib, json, sys
culprits = []
for module in {names!r}:
    importlib.import_module(module)
    if "torch" in sys.modules:
        culprits.append(module)
        break
print(json.dumps(culprits))
"""
    assert json.loads(run_python(code)) == []
    assert set(WITHOUT_TORCH) <= set(modules()), "a module in this list was renamed"


@pytest.mark.parametrize(
    "command",
    [
        *("grow --help", "grow map --help", "grow apply --help", "grow inspect --help", "grow operators --help"),
        *("grow plan --help", "grow plan --params 7e9 --tokens 300e9 --gpus 8 --mfu 0.4 --device h100"),
        *("grow operators", "grow map 12-3456*5-56", "grow report --help", "pretrain --help", "pretrain data --help"),
        "grow fit --help",
        *("pretrain status --help", "pretrain validate --help"),
    ],
)
def test_commands_that_need_no_tensor_do_not_import_torch(command: str):
    package, *arguments = command.split()
    code = f"""
import runpy, sys
sys.argv = {[package, *arguments]!r}
try:
    runpy.run_module("{package}", run_name="__main__", alter_sys=False)
except SystemExit as leaving:
    assert not leaving.code, leaving.code
slow = {{"torch", "lightning_fabric", "matplotlib", "scipy", "tensorboard", "transformers"}} & set(sys.modules)
assert not slow, f"imported {{sorted(slow)}}"
"""
    assert run_python(code).strip(), "the command printed nothing"


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_folder_of_somebodys_machine():
    machine_path = re.compile(r"(?<![\w.$}~-])/(?:work|home|root|Users|opt|mnt|data\d*)/")
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path == Path(__file__).resolve():
            continue
        found = machine_path.search(text)
        assert not found, f"{path.relative_to(ROOT)} names {text[found.start() : found.start() + 60]!r}"


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "tests"])
def test_every_file_says_what_it_is(folder: str):
    for path in sources(folder):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.relative_to(ROOT)}: no docstring"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_signatures_are_annotated(folder: str):
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                assert node.returns is not None, f"{where} does not say what it returns"
                plain = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [one.arg for one in plain if one.annotation is None and one.arg not in ("self", "cls")]
                assert not bare, f"{where} does not annotate {bare}"


def test_nothing_is_done_through_star_imports_globals_or_bare_excepts():
    for folder in MAY_IMPORT:
        for path in sources(folder):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
                assert not isinstance(node, ast.Global), f"{where} uses global"
                assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where} has a bare except"
                star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
                assert not star, f"{where} has a star import"
                path_edit = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
                assert not path_edit, f"{where} edits sys.path; install with `pip install -e .`"
