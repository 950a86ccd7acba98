import json
import sys
from pathlib import Path

import materials
import pytest
import torch
from litgpt import Tokenizer
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.model import GPT
from litgpt.prompts import Default


@pytest.fixture(scope="module")
def glassllm() -> tuple:
    """glassllm's own NumPy model and tokenizer."""
    sys.path.insert(0, str(materials.glassllm_package()))
    import glassllm

    return glassllm.load_pretrained("en")


def load_model(checkpoint_dir: Path) -> GPT:
    model = GPT(Config.from_file(checkpoint_dir / "model_config.yaml"))
    model.load_state_dict(torch.load(checkpoint_dir / "lit_model.pth", weights_only=True))
    return model.eval()


@torch.no_grad()
def test_converted_teacher_gives_the_logits_of_the_package(teacher_dir, glassllm):
    reference, tokenizer = glassllm
    ids = torch.tensor(tokenizer.encode(materials.alice_text())[2000:2256]).view(2, 128)
    logits = load_model(teacher_dir)(ids)
    expected = torch.from_numpy(reference(ids.numpy()).data)
    assert expected.abs().max() > 10
    assert (logits - expected).abs().max() < 1e-4


@torch.no_grad()
def test_teacher_knows_the_book_and_continues_it_like_the_package(teacher_dir, glassllm):
    reference, tokenizer = glassllm
    model = load_model(teacher_dir)
    ids = tokenizer.encode("Alice was beginning to get very tired of")
    for _ in range(20):
        logits = model(torch.tensor([ids]))[0, -1]
        assert logits.isfinite().all()
        assert logits.argmax() == reference([ids]).data[0, -1].argmax()
        ids.append(int(logits.argmax()))
    step_batches = torch.tensor(tokenizer.encode(materials.alice_text())[: 128 * 64]).view(64, 128)
    loss = torch.nn.functional.cross_entropy(model(step_batches[:, :-1]).flatten(0, 1), step_batches[:, 1:].flatten())
    assert loss < 4.3


def test_tokenizer_gives_the_ids_of_the_package(teacher_dir, student_dir, glassllm):
    expected = glassllm[1].encode(materials.alice_text())
    for directory in (teacher_dir, student_dir):
        tokenizer = Tokenizer(directory)
        assert tokenizer.encode(materials.alice_text()).tolist() == expected
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.use_bos) == (1024, 2, 3, False)
    sentence = "The Queen of Hearts, she made some tarts,\nAll on a summer day"
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


@torch.no_grad()
def test_students_are_small_seeded_and_tied_only_where_they_should_be(student_dir, untied_student_dir, tmp_path):
    materials.write_student(tmp_path / "again", tied=True)
    again, tied, untied = (
        load_model(path).state_dict() for path in (tmp_path / "again", student_dir, untied_student_dir)
    )
    assert all(torch.equal(tied[name], again[name]) for name in tied)
    assert torch.equal(tied["lm_head.weight"], tied["transformer.wte.weight"])
    assert not torch.equal(untied["lm_head.weight"], untied["transformer.wte.weight"])
    assert json.loads((student_dir / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((untied_student_dir / "config.json").read_text())["tie_word_embeddings"] is False
    assert tied["transformer.wte.weight"].std().sub(0.02).abs() < 1e-3
    assert load_model(student_dir)(torch.arange(128)[None]).shape == (1, 128, 1024)


def test_alice_records_fit_the_context(alice_json, alice_records, teacher_dir):
    data = JSON(alice_json, mask_prompt=True, prompt_style=Default(), num_workers=0)
    data.connect(Tokenizer(teacher_dir), batch_size=4, max_seq_length=-1)
    data.setup()
    assert (len(data.train_dataset), len(data.test_dataset), len(alice_records)) == (200, 40, 240)
    samples = [*data.train_dataset, *data.test_dataset]
    assert max(len(sample["input_ids"]) for sample in samples) <= materials.BLOCK_SIZE
    assert all(sample["input_ids"][-1] == 3 for sample in samples)
    assert min((sample["labels"] != -100).sum() for sample in samples) >= 8
