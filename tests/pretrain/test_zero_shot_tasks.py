"""Tasks: what their YAML files may say, the requests that they make of documents, and what is wrong with files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from grow.scores import AVERAGED, METRICS
from lit_gpt.errors import DataError
from pretrain.zero_shot.clean_ups import CLEAN_UPS
from pretrain.zero_shot.documents import read_documents
from pretrain.zero_shot.examples import Examples, read_examples
from pretrain.zero_shot.task import built_in_tasks, data_file, find_tasks, read_task
from pretrain.zero_shot.templates import FieldError, Template
from tests.zero_shot import DOCUMENTS, NAMES, WIKITEXT, documents, write_data

COLOURS = {
    "kind": "choices",
    "files": ["colours.jsonl"],
    "prompt": "What colour is {thing}?",
    "choices": ["{one}", "{two}"],
    "answer": "{right}",
    "metrics": ["acc"],
}
GRASS = {"thing": "grass", "one": "green", "two": "blue", "right": 0}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "evals")


def write_task(folder: Path, name: str = "colours", **fields: object) -> Path:
    """A task's file; a field that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in {**COLOURS, **fields}.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder / f"{name}.yaml"


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def examples_of(name: str, data: Path, limit: int | None = None) -> Examples:
    (task,) = find_tasks([name])
    return read_examples(task, data_file(task, data), limit)


# The nine tasks


def test_the_nine_tasks_are_there_and_the_papers_seven_among_them():
    assert sorted(built_in_tasks()) == NAMES
    assert set(AVERAGED) < set(NAMES)
    assert {name: task.metrics[0] for name, task in built_in_tasks().items()} == {name: METRICS[name] for name in NAMES}
    assert {name for name, metric in AVERAGED.items() if metric == "acc"} == {"lambada_openai", "winogrande"}


@pytest.mark.parametrize(
    ("name", "requests", "answer"),
    [
        ("lambada_openai", [("The cat saw the 1 dogs and the dogs saw the", " cat")], None),
        ("piqa", [("Question: open 1 doors\nAnswer:", end) for end in (" turn the handle", " eat it")], 1),
        ("winogrande", [(f"Ann beat Eve 1 times because {who}", " was fast.") for who in ("Ann", "Eve")], 1),
        (
            "sciq",
            [
                ("They are sour.\nQuestion: What are 1 acids?\nAnswer:", f" {word}")
                for word in ("sweet", "dry", "blue", "sour")
            ],
            3,
        ),
        (
            "arc_easy",
            [
                ("Question: Which of 1 colours?\nAnswer:", f" {word}")
                for word in ("red 1", "blue", "a dark green", "grey")
            ],
            1,
        ),
        (
            "logiqa",
            [
                (
                    "Passage: All cats sleep. Tom is a cat.\nQuestion: What follows?\nChoices:\nA. Tom sleeps.\n"
                    "B. Tom runs.\nC. Cats run.\nD. Tom is no cat.\nAnswer:",
                    f" {option}",
                )
                for option in ("Tom sleeps.", "Tom runs.", "Cats run.", "Tom is no cat.")
            ],
            0,
        ),
    ],
)
def test_a_document_becomes_the_requests_of_its_task(name, requests, answer, data):
    example = examples_of(name, data).examples[1]

    assert list(example.requests) == requests
    assert example.answer == answer
    if name not in ("lambada_openai", "winogrande"):
        assert list(example.n_chars) == [len(end) - 1 for _, end in requests], "characters without the delimiter"


def test_an_article_is_cleaned_up_for_the_model_and_counted_as_it_was(data):
    example = examples_of("wikitext", data).examples[0]

    ((context, text),) = example.requests
    assert context == ""
    assert text == " = Moon =\n\nThe moon is far-away (and cold).\n\n== Light ==\n\nIt shines.\n\n"
    page = WIKITEXT.removeprefix(" \n") + "\n "  # with the empty lines before the next heading
    assert example.n_bytes == len(page)
    assert example.n_words == 22 + 2, "as re.split counts them: an empty one at both ends"


def test_a_limit_takes_the_first_documents_and_is_noted_only_if_it_left_some_out(data):
    whole, part = examples_of("piqa", data), examples_of("piqa", data, DOCUMENTS - 1)

    assert part.examples == whole.examples[:-1] and part.limit == DOCUMENTS - 1
    assert examples_of("piqa", data, DOCUMENTS).limit is None and whole.limit is None


# Tasks of the user's


def test_a_task_is_added_by_a_file_alone(tmp_path):
    write_task(tmp_path / "mine")
    write_lines(tmp_path / "mine" / "colours.jsonl", GRASS, {**GRASS, "thing": "the sea", "right": 1})

    (task,) = find_tasks(["colours"], tmp_path / "mine")
    examples = read_examples(task, data_file(task, None)).examples

    assert examples[1].requests == (("What colour is the sea?", " green"), ("What colour is the sea?", " blue"))
    assert [example.answer for example in examples] == [0, 1]
    assert len(find_tasks(more=tmp_path / "mine")) == len(NAMES) + 1


def test_nested_fields_and_labels_read_arc_as_hugging_face_has_it(tmp_path):
    fields = {"prompt": "{question}", "choices": "{choices.text}", "answer": "{answerKey}", "labels": "{choices.label}"}
    task = read_task(write_task(tmp_path, **fields))
    line = {"question": "Why?", "choices": {"text": ["so", "not so"], "label": ["3", "4"]}, "answerKey": "4"}

    (example,) = read_examples(task, write_lines(tmp_path / "colours.jsonl", line)).examples

    assert example.requests == (("Why?", " so"), ("Why?", " not so")) and example.answer == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "guess"}, "kind is 'guess'; it must be one of choices, contexts, continuation, text"),
        ({"kind": None}, "kind is None"),
        ({"promt": "x", "prompt": None}, "unknown key 'promt'; did you mean 'prompt'"),
        ({"answer": None}, "answer is missing"),
        ({"files": "colours.jsonl"}, "files is 'colours.jsonl'; it must be a list of names"),
        ({"metrics": ["perplexity"]}, "metric 'perplexity' is not one of a task of kind choices: acc, acc_norm"),
        ({"format": "csv"}, "format is 'csv'; it must be one of jsonl, blocks, articles"),
        ({"format": "blocks"}, "format blocks needs lines"),
        ({"delimiter": 1}, "delimiter is 1; it must be text"),
        ({"prompt": "{thing|trim}"}, "unknown clean-up 'trim'"),
        ({"prompt": "{thing|lstri}"}, "did you mean 'lstrip'"),
        ({"prompt": "{thing"}, "is not a template"),
        ({"prompt": "{thing!r}"}, "without ! and :"),
        ({"prompt": "{}"}, "names no field"),
        ({"prompt": 3}, "prompt: 3 must be a template"),
        ({"answer": -1}, "answer: -1 must be a template"),
    ],
)
def test_a_task_that_is_none_says_what_is_wrong(fields, message, tmp_path):
    with pytest.raises(ValueError, match="colours.yaml: ") as error:
        read_task(write_task(tmp_path, **fields))
    assert message in str(error.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        read_task(write_task(tmp_path, prompt="{", choices="{one|cut}", format="csv"))
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["[1, 2]", "kind: [", "a: !!python/object/apply:os.getcwd []"])
def test_a_file_that_is_not_the_yaml_of_a_task_is_refused(text, tmp_path):
    (tmp_path / "colours.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"colours\.yaml"):
        read_task(tmp_path / "colours.yaml")


def test_an_unknown_name_gets_the_nearest_and_a_taken_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'arc_eazy'; did you mean 'arc_easy'"):
        find_tasks(["arc_eazy"])
    write_task(tmp_path, name="piqa")
    with pytest.raises(ValueError, match=r"piqa\.yaml has a name that is taken already"):
        find_tasks(more=tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_tasks(more=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .yaml file of a task"):
        find_tasks(more=tmp_path / "empty")


def test_groups_of_tasks_have_names_that_no_task_may_have(tmp_path):
    assert [task.name for task in find_tasks(["paper"])] == list(AVERAGED)
    assert [task.name for task in find_tasks(["wikitext", "paper", "piqa"])] == ["wikitext", *AVERAGED]
    assert [task.name for task in find_tasks(["all", "piqa"])] == NAMES
    write_task(tmp_path, name="paper")
    with pytest.raises(ValueError, match=r"paper\.yaml has a name that is taken already"):
        find_tasks(more=tmp_path)


def test_another_prompt_is_another_version_of_a_task_and_other_remarks_are_not(tmp_path):
    versions = [
        read_task(write_task(tmp_path, **fields)).version
        for fields in ({}, {"about": "of grass"}, {"prompt": "Which colour is {thing}?"}, {"answer": 1})
    ]
    assert versions[0] == versions[1] and len(set(versions)) == 3
    assert len({task.version for task in built_in_tasks().values()}) == len(NAMES)


# Files of data


def test_a_missing_file_is_named(tmp_path):
    (task,) = find_tasks(["hellaswag"])
    with pytest.raises(FileNotFoundError, match=r"has no hellaswag/validation.jsonl nor hellaswag/val_1000.jsonl"):
        data_file(task, tmp_path)
    with pytest.raises(ValueError, match="give --data DIR"):
        data_file(task, None)


def test_a_missing_file_of_the_users_task_is_named_with_both_places(tmp_path):
    (tmp_path / "evals").mkdir()
    with pytest.raises(FileNotFoundError, match=r"evals has no colours\.jsonl, nor has .*mine; see"):
        data_file(read_task(write_task(tmp_path / "mine")), tmp_path / "evals")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'thing': 1}", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ({"thing": "grass"}, "line 2: there is no field one"),
        ({**GRASS, "thing": ["grass"]}, r"line 2: thing is \['grass'\], neither text nor a number"),
        ({**GRASS, "two": ""}, "line 2: its choices are"),
        ({**GRASS, "right": 2}, "line 2: its answer is 2, not a number from 0 to 1"),
        ({**GRASS, "right": None}, "line 2: its answer is None"),
        ({**GRASS, "right": True}, "line 2: its answer is True"),
        ({**GRASS, "right": "-1"}, "line 2: its answer is '-1'"),
    ],
)
def test_a_line_that_is_no_document_is_named(line, message, tmp_path):
    task = read_task(write_task(tmp_path))
    path = write_lines(tmp_path / "colours.jsonl", GRASS, line)
    with pytest.raises(DataError, match=message):
        read_examples(task, path)


def test_text_that_is_not_utf8_and_a_file_without_documents_are_refused(tmp_path):
    path = tmp_path / "colours.jsonl"
    path.write_bytes(b'{"thing": "grass"}\n{"thing": "\xff"}\n')
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        read_documents(path, "jsonl")
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match="holds no document"):
        read_documents(path, "jsonl")


def test_a_block_of_too_few_lines_is_named(tmp_path):
    path = write_lines(tmp_path / "blocks.txt", "", "one", "two", "", "one", "", "")
    with pytest.raises(DataError, match=r"line 5: 1 lines where 2 \(a, b\) make a document"):
        read_documents(path, "blocks", ("a", "b"))


def test_an_answer_without_its_label_is_named(tmp_path):
    task = read_task(write_task(tmp_path, labels=["A", "B"]))
    path = write_lines(tmp_path / "colours.jsonl", {**GRASS, "right": "C"})
    with pytest.raises(DataError, match="its answer is 'C', not one of A, B"):
        read_examples(task, path)


# Templates


def test_a_template_takes_fields_by_path_cleans_them_up_and_leaves_braces():
    template = Template("{{{a.b.1|strip|lstrip}}} {n}")
    assert template.render({"a": {"b": ["x", " y "]}, "n": 3}) == "{y} 3"
    assert Template("{a}").value({"a": [1, 2]}) == [1, 2]
    assert Template("{a|strip}").value({"a": [" x", "y "]}) == ["x", "y"]


@pytest.mark.parametrize(
    ("template", "document"), [("{a.b}", {"a": "text"}), ("{a.2}", {"a": [1]}), ("{a|strip}", {"a": 1}), ("{a}", {})]
)
def test_a_field_that_is_not_there_is_an_error_of_the_document(template, document):
    with pytest.raises(FieldError):
        Template(template).render(document)


def test_a_sentence_without_a_blank_is_an_error_of_the_document():
    with pytest.raises(FieldError, match="has no blank"):
        Template("{a|before_blank}").render({"a": "no blank"})


def test_python_in_a_template_is_the_name_of_a_field_and_nothing_else():
    document = documents("piqa", 0)
    for text in ("{__class__}", "{goal.__class__}", "{goal.upper()}", "{goal[0]}"):
        with pytest.raises(FieldError, match="there is no field"):
            Template(text).render(document)
    assert "eval" not in CLEAN_UPS
