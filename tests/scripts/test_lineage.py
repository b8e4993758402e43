"""The prepare scripts under their old names: what they hand to prepare.py, and what comes out of the real layouts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import yaml

from lit_gpt.errors import EXIT_DATA, EXIT_USAGE, run_command
from lit_gpt.packed_dataset import load_manifest
from lit_gpt.token_files import find_token_files
from lit_gpt.tokenizer import Tokenizer

SCRIPTS = {"slimpajama": "SLIMPAJAMA", "starcoder": "STARCODER", "redpajama": "REDPAJAMA"}


@pytest.fixture(scope="module")
def scripts(root):
    """Import a module of scripts/ by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "scripts"))
        yield importlib.import_module


@pytest.fixture
def run(scripts, capsys):
    """Run one of the scripts in this process; gives (exit code, stdout, stderr)."""

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        script, lineage = scripts(f"prepare_{name}"), scripts("prep.lineage")
        corpus = getattr(script, SCRIPTS[name])
        capsys.readouterr()
        code = run_command(lambda: lineage.main(corpus, script.__doc__, [str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def calls(scripts, monkeypatch) -> list[list[str]]:
    """Instead of running, prepare.py notes here what it was called with, and succeeds."""
    noted: list[list[str]] = []
    monkeypatch.setattr(scripts("prep.lineage").prepare, "main", lambda argv: noted.append(list(argv)) or 0)
    return noted


def option(call: list[str], name: str) -> list[str]:
    """The values of the last option of that name, up to the next option."""
    first = len(call) - call[::-1].index(name)
    end = next((number for number in range(first, len(call)) if call[number].startswith("--")), len(call))
    return call[first:end]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.fixture
def slimpajama(tmp_path: Path) -> Path:
    names = (f"{split}/chunk{n}/example_{n}.jsonl.zst" for split in ("train", "validation", "test") for n in (1, 10))
    return touch(tmp_path / "SlimPajama", *names)


@pytest.fixture
def starcoder(tmp_path: Path) -> Path:
    languages = ("python", "java", "javascript", "c", "cpp", "git-commits-cleaned")
    return touch(tmp_path / "starcoderdata", *(f"{each}/train-00000-of-00002.parquet" for each in languages))


def common(source: Path, out: Path) -> list[object]:
    return ["--source_path", source, "--tokenizer_path", "bytes", "--destination_path", out]


def test_slimpajama_becomes_one_call_of_prepare(run, calls, slimpajama: Path, tmp_path: Path):
    status, _, err = run("slimpajama", *common(slimpajama, tmp_path / "out"), "--split", "train")

    assert status == 0, err
    (call,) = calls
    assert option(call, "--input") == [f"{slimpajama}/train/chunk*/*"]
    assert option(call, "--split") == ["train"]
    assert option(call, "--drop") == ["meta.redpajama_set_name=RedPajamaGithub"]
    assert option(call, "--tokenizer") == ["bytes"]
    assert option(call, "--out") == [str(tmp_path / "out" / "train_slimpajama")]
    assert int(*option(call, "--workers")) >= 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_what_is_not_for_training_becomes_held_out_data(run, calls, slimpajama: Path, tmp_path: Path, split: str):
    run("slimpajama", *common(slimpajama, tmp_path / "out"), "--split", split)

    (call,) = calls
    assert option(call, "--input") == [f"{slimpajama}/{split}/chunk*/*"]
    assert option(call, "--split") == ["validation"]
    assert option(call, "--out") == [str(tmp_path / "out" / f"{split}_slimpajama")]


def test_dashes_may_be_underscores_and_equals_signs(run, calls, slimpajama: Path, tmp_path: Path):
    run("slimpajama", *common(slimpajama, tmp_path / "out"), "--percentage", "0.5")
    run(
        "slimpajama",
        f"--source-path={slimpajama}",
        "--tokenizer-path=bytes",
        f"--destination-path={tmp_path / 'out'}",
        "--percentage=0.5",
    )

    assert calls[0] == calls[1]
    assert option(calls[0], "--percentage") == ["0.5"]


def test_what_the_lineage_does_not_know_goes_to_prepare_and_overrules(run, calls, slimpajama: Path, tmp_path: Path):
    run("slimpajama", *common(slimpajama, tmp_path / "out"), "--workers", 3, "--on_bad_file", "skip", "--task=1/4")

    (call,) = calls
    assert option(call, "--workers") == ["3"]
    assert call[-3:] == ["--on_bad_file", "skip", "--task=1/4"]


def test_a_chunk_size_is_accepted_and_said_to_have_no_effect(run, calls, slimpajama: Path, tmp_path: Path):
    status, _, err = run("slimpajama", *common(slimpajama, tmp_path / "out"), "--chunk_size", 4194816)

    assert status == 0
    assert "--chunk_size 4194816 has no effect" in err
    assert f"prepare.py export {tmp_path}/out/train_slimpajama " in err and "--chunk 4194816" in err
    assert not any(argument.startswith("--chunk") for argument in calls[0])


def test_starcoder_reads_the_content_of_parquet(run, calls, starcoder: Path, tmp_path: Path):
    run("starcoder", *common(starcoder, tmp_path / "out"))

    (call,) = calls
    assert option(call, "--input") == [f"{starcoder}/*/*.parquet"]
    assert option(call, "--text-key") == ["content"]
    assert option(call, "--out") == [str(tmp_path / "out" / "train_starcoder")]


@pytest.mark.parametrize("given", [["python,java"], ['["python","java"]'], ["[python,java]"], ["python", "java"]])
def test_a_subset_is_what_holds_one_of_the_names(run, calls, starcoder: Path, tmp_path: Path, given: list[str]):
    status, _, err = run("starcoder", *common(starcoder, tmp_path / "out"), "--filenames_subset", *given)

    assert status == 0, err
    assert option(calls[0], "--input") == [f"{starcoder}/*python*/*.parquet", f"{starcoder}/*java*/*.parquet"]
    assert "java: java, javascript" in err


def test_a_subset_that_no_file_has_is_refused(run, calls, starcoder: Path, tmp_path: Path):
    status, _, err = run("starcoder", *common(starcoder, tmp_path / "out"), "--filenames_subset", "python", "cobol")

    assert status == EXIT_USAGE
    assert "--filenames_subset cobol: no file" in err
    assert calls == []


def test_starcoder_has_no_validation_split(run, starcoder: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as leaving:
        run("starcoder", *common(starcoder, tmp_path / "out"), "--split", "validation")

    assert leaving.value.code == EXIT_USAGE
    assert "'train'" in capsys.readouterr().err


def redpajama_arguments(source: Path, out: Path) -> list[object]:
    return ["--source_path", source, "--checkpoint_dir", "bytes", "--destination_path", out]


FULL = {
    "arxiv": "arxiv/arxiv_0.jsonl",
    "book": "book/book.jsonl",
    "c4": "c4/c4-train.00000-of-01024.jsonl",
    "common_crawl": "common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst",
    "github": "github/filtered_0.jsonl",
    "stackexchange": "stackexchange/stackexchange.jsonl",
    "wikipedia": "wikipedia/wiki.jsonl",
}


def test_every_set_of_redpajama_gets_a_folder(run, calls, tmp_path: Path):
    source = touch(tmp_path / "RedPajama", *FULL.values())

    status, _, err = run("redpajama", *redpajama_arguments(source, tmp_path / "out"), "--sample", "false")

    assert status == 0, err
    assert [Path(*option(call, "--out")).name for call in calls] == [f"train_redpajama_{name}" for name in FULL]
    for call, file in zip(calls, FULL.values(), strict=True):
        (pattern,) = option(call, "--input")
        assert source / file in set(source.glob(str(Path(pattern).relative_to(source))))


def test_redpajamas_sample_is_the_default_and_match_picks_from_it(run, calls, scripts, tmp_path: Path):
    sample = scripts("prepare_redpajama").REDPAJAMA.sample_sets
    source = touch(tmp_path / "sample", *(file for files in sample.values() for file in files))
    arguments = redpajama_arguments(source, tmp_path / "out")

    run("redpajama", *arguments)
    run("redpajama", *arguments, "--match", "cc_2019")

    assert len(calls) == len(sample) + 1
    assert [len(option(call, "--input")) for call in calls[:-1]] == [len(files) for files in sample.values()]
    assert option(calls[-1], "--input") == [f"{source}/cc_2019-30_sample.jsonl"]


def test_a_set_that_is_not_there_is_said_before_any_is_prepared(run, calls, tmp_path: Path):
    source = touch(tmp_path / "Red [Pajama]", *(file for name, file in FULL.items() if name != "wikipedia"))
    arguments = [*redpajama_arguments(source, tmp_path / "out"), "--sample=false"]

    status, _, err = run("redpajama", *arguments)

    assert status == EXIT_DATA
    assert f"holds no wikipedia: there is no {source}/wikipedia/wiki*;" in err and len(err.splitlines()) == 1
    assert calls == []
    assert run("redpajama", *arguments, "--match", "book")[0] == 0
    assert run("redpajama", *arguments, "--match", "novels")[0] == EXIT_USAGE


@pytest.mark.parametrize(("given", "name"), [("--out", "--destination_path"), ("--input=x", "--source_path")])
def test_an_option_of_prepare_that_has_another_name_here_is_refused(
    run, calls, slimpajama: Path, tmp_path: Path, given: str, name: str
):
    status, _, err = run("slimpajama", *common(slimpajama, tmp_path / "out"), given, "x")

    assert status == EXIT_USAGE
    assert f"is called {name} here" in err
    assert calls == []


def test_a_source_that_is_not_there_is_refused(run, calls, tmp_path: Path):
    status, _, err = run("slimpajama", *common(tmp_path / "nowhere", tmp_path / "out"))

    assert status == EXIT_USAGE
    assert "nowhere is not a folder" in err
    assert calls == []


def test_the_first_failure_ends_the_script_with_its_status(run, scripts, monkeypatch, tmp_path: Path):
    source = touch(tmp_path / "RedPajama", *FULL.values())
    statuses = iter([0, 75, 0])
    monkeypatch.setattr(scripts("prep.lineage").prepare, "main", lambda argv: next(statuses))

    status, out, _ = run("redpajama", *redpajama_arguments(source, tmp_path / "out"), "--sample", "false")

    assert status == 75
    assert len(list(statuses)) == 1
    assert "data:" not in out


# --- without a stand-in


def write_zst(path: Path, rows: Iterable[dict[str, object]]) -> None:
    zstandard = pytest.importorskip("zstandard")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


def write_parquet(path: Path, texts: list[str]) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"content": texts, "max_stars_repo_path": [f"{number}.py" for number in range(len(texts))]}
    parquet.write_table(pyarrow.table(table), path)


def documents_in(folder: Path, split: str) -> list[str]:
    """What lies between the separators."""
    tokenizer, separator = Tokenizer.load(folder), load_manifest(folder)["separator_id"]
    texts = []
    for file in find_token_files(folder, split):
        tokens = np.fromfile(file.path, file.dtype, offset=file.byte_offset).astype(np.int64)
        pieces = np.split(tokens, np.flatnonzero(tokens == separator) + 1)
        assert not pieces.pop().size, "the last document has no end"
        texts += [tokenizer.decode(piece[:-1]) for piece in pieces]
    return texts


def write_slimpajama(folder: Path, texts: list[str], split: str) -> list[str]:
    """The texts in the layout of the dataset, every third of them said to come from GitHub; returns the others."""
    sources = ("RedPajamaCommonCrawl", "RedPajamaC4", "RedPajamaGithub")
    rows = [{"text": text, "meta": {"redpajama_set_name": sources[i % 3]}} for i, text in enumerate(texts)]
    half = len(rows) // 2
    write_zst(folder / split / "chunk1" / f"example_{split}_0.jsonl.zst", rows[:half])
    write_zst(folder / split / "chunk2" / f"example_{split}_1.jsonl.zst", rows[half:])
    return [text for number, text in enumerate(texts) if number % 3 != 2]


def words(n: int, prefix: str) -> list[str]:
    return [f"{prefix} {number} " * 5 for number in range(n)]


def test_the_scripts_of_tinyllama_fill_one_destination_that_pretrain_can_read(run, tmp_path: Path):
    slim, star, out = tmp_path / "SlimPajama", tmp_path / "starcoderdata", tmp_path / "slim, star: é"
    wanted = {split: write_slimpajama(slim, words(20, split), split) for split in ("train", "validation")}
    write_parquet(star / "python" / "train-00000-of-00001.parquet", words(5, "python"))
    write_parquet(star / "java" / "train-00000-of-00001.parquet", words(5, "java"))

    results = [
        run("starcoder", *common(star, out), "--split", "train", "--percentage", "1.0"),
        run("slimpajama", *common(slim, out), "--split", "validation", "--percentage", "1.0"),
        run("slimpajama", *common(slim, out), "--split", "train", "--percentage", "1.0"),
    ]

    assert [status for status, _, _ in results] == [0, 0, 0], results
    assert documents_in(out / "train_slimpajama", "train") == wanted["train"]
    assert documents_in(out / "validation_slimpajama", "validation") == wanted["validation"]
    assert documents_in(out / "train_starcoder", "train") == words(5, "java") + words(5, "python")
    assert load_manifest(out / "train_slimpajama")["splits"]["validation"]["tokens"] == 0
    _, _, settings = results[-1][1].partition("in the configuration of pretrain:\n")
    assert yaml.safe_load(settings)["data"] == {
        "train": {name: str(out / f"train_{name}") for name in ("slimpajama", "starcoder")},
        "validation": {"slimpajama": str(out / "validation_slimpajama")},
    }


def test_a_percentage_takes_the_first_files_by_name(run, tmp_path: Path):
    write_slimpajama(tmp_path / "source", words(20, "train"), "train")

    status, _, err = run("slimpajama", *common(tmp_path / "source", tmp_path / "out"), "--percentage", 0.5)

    assert status == 0, err
    expected = [text for number, text in enumerate(words(20, "train")[:10]) if number % 3 != 2]
    assert documents_in(tmp_path / "out" / "train_slimpajama", "train") == expected


def test_redpajamas_sample_becomes_a_folder_for_each_set(run, scripts, tmp_path: Path):
    source, out = tmp_path / "sample", tmp_path / "out"
    source.mkdir()
    for files in scripts("prepare_redpajama").REDPAJAMA.sample_sets.values():
        for file in files:
            lines = (json.dumps({"text": text, "meta": {}}) + "\n" for text in words(4, file))
            (source / file).write_text("".join(lines))

    status, _, err = run("redpajama", *redpajama_arguments(source, out), "--match", "cc")

    assert status == 0, err
    assert [path.name for path in out.iterdir()] == ["train_redpajama_common_crawl"]
    assert len(documents_in(out / "train_redpajama_common_crawl", "train")) == 5 * 4


def test_the_script_runs_as_a_file_with_several_workers(root: Path, tmp_path: Path):
    wanted = write_slimpajama(tmp_path / "source", words(60, "train"), "train")

    command = [
        sys.executable,
        root / "scripts" / "prepare_slimpajama.py",
        *common(tmp_path / "source", tmp_path / "out"),
    ]
    done = subprocess.run(
        [*map(str, command), "--workers", "2", "--unit-bytes", "1"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert documents_in(tmp_path / "out" / "train_slimpajama", "train") == wanted
    assert len(list(find_token_files(tmp_path / "out" / "train_slimpajama"))) == 2


def test_real_web_pages_come_back_out_of_the_tokens(run, data_dir: Callable[[str], Path], tmp_path: Path):
    lines = (data_dir("web_samples") / "cc_en_head-0091.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    wanted = write_slimpajama(tmp_path / "source", texts, "train")
    arguments = common(tmp_path / "source", tmp_path / "out")
    arguments[3] = data_dir("tokenizers/llama2") / "tokenizer.model"

    status, _, err = run("slimpajama", *arguments)

    assert status == 0, err
    assert len(wanted) > 3
    assert documents_in(tmp_path / "out" / "train_slimpajama", "train") == wanted
    manifest = load_manifest(tmp_path / "out" / "train_slimpajama")
    assert manifest["dtype"] == "uint16" and manifest["separator_id"] == 2


def test_rows_that_do_not_say_where_they_come_from_are_refused_with_the_reason(run, tmp_path: Path):
    source = tmp_path / "SlimPajama"
    write_zst(source / "train" / "chunk1" / "a.jsonl.zst", [{"text": text} for text in words(20, "page")])
    code, _, stderr = run("slimpajama", *common(source, tmp_path / "out"))
    assert code == EXIT_DATA
    assert "prepare_slimpajama.py itself gives --drop meta.redpajama_set_name=RedPajamaGithub" in stderr
    assert "Mend" not in stderr
