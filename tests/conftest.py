import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import materials
import pytest
import torch
from helpers import drawing, fresh
from helpers.runs import short_data
from litgpt.data import JSON

# the models here are so small that handing work to a second thread costs more than it saves
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

LONG = {"training", "system", "teacher", "cli", "memory"}
"""Folders whose files take most of the time."""
LEFT_OUT = pytest.StashKey[int]()
"""Tests that this session leaves for ``--all``."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = 0
    drawing.each = config.option.all


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # with the longest files at the end one of two processes would wait for the other
    items.sort(key=lambda item: not LONG & set(item.path.parts))
    if config.option.all:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.stash[LEFT_OUT] = len(slow)
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection_finish() -> None:
    # what is imported by now stays: in each copy of this process a search for garbage in it would copy its memory
    gc.collect()
    gc.freeze()
    fresh.keep()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # before fixtures of any scope, whose runs belong to the tests that first ask for them
    drawing.draw_pages(item.get_closest_marker("page") is not None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    fresh.end()
    # a process of pytest-xdist has found the same tests as the others, and tells the process that reports
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[LEFT_OUT]:
        terminalreporter.write_line(
            f"{config.stash[LEFT_OUT]} slow tests were left out: scripts/test.sh --all has them"
        )


@pytest.fixture(scope="session", autouse=True)
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where data is prepared, in this process and in those that it starts: no session finds an earlier one's."""
    directory = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(directory))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory)
        yield directory


@pytest.fixture(scope="session", autouse=True)
def compiled_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A fresh cache for torch.compile, also in the processes that tests start: no earlier session decides a test."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LitGPT checkpoint of glassllm's English model (4 layers, n_embd 128, context 128, tied). Do not change it."""
    directory = tmp_path_factory.mktemp("materials") / "glassllm-en"
    materials.write_teacher(directory)
    return directory


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LitGPT checkpoint of a random 2-layer model (n_embd 64, tied), the teacher's tokenizer. Do not change it."""
    directory = tmp_path_factory.mktemp("materials") / "student"
    materials.write_student(directory, tied=True)
    return directory


@pytest.fixture(scope="session")
def untied_student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``student_dir``, with a head of its own. Do not change it."""
    directory = tmp_path_factory.mktemp("materials") / "untied-student"
    materials.write_student(directory, tied=False)
    return directory


@pytest.fixture(scope="session")
def alice_records() -> list[dict[str, str]]:
    """Records of Alice in Wonderland that fit into 128 tokens with litgpt.prompts.Default."""
    return materials.alice_records()


@pytest.fixture(scope="session")
def alice_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for ``litgpt.data.JSON`` with the records of ``alice_records`` in train.json and val.json."""
    directory = tmp_path_factory.mktemp("materials") / "alice"
    materials.write_alice_json(directory)
    return directory


@pytest.fixture
def short(alice_json: Path, tmp_path: Path) -> JSON:
    """Forty records, of which few are of one length."""
    return short_data(alice_json, tmp_path / "short")


@pytest.fixture
def lone(teacher_dir: Path, tmp_path: Path) -> Path:
    """A teacher without weights."""
    directory = shutil.copytree(teacher_dir, tmp_path / "lone" / teacher_dir.name)
    (directory / "lit_model.pth").unlink()
    return directory
