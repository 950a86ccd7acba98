import os
from pathlib import Path

import materials
import pytest
import torch

# the models here are so small that handing work to a second thread costs more than it saves
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


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
