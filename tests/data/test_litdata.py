"""LitGPT's LitData: every block once per epoch, chunk by chunk, from a folder and from remote storage."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import distil
from litgpt.data import LitData

from litgpt_akl.data.litdata import LEAST_CACHED, ChunkStore, open_chunks
from litgpt_akl.data.steps import StepBatches, StepSampler, load
from litgpt_akl.messages import UserError

pytest.importorskip("litdata", reason="LitGPT's LitData needs litdata (pip install '.[litdata]')")

BLOCK = 32
OPTIMIZE = """
import sys
import numpy as np
import torch
from litdata import TokensLoader, optimize

def ids(number):
    return np.random.default_rng(number).integers(0, 200, 40 + 7 * number % 60)

kinds = {
    "int64": lambda number: torch.from_numpy(ids(number)),
    "uint16": lambda number: torch.from_numpy(ids(number)).to(torch.uint16),
    "numpy": lambda number: ids(number).astype(np.int32),
    "records": lambda number: {"number": number},
}
for kind, function in kinds.items():
    size = {"chunk_size": 20} if kind == "records" else {"chunk_bytes": 4000, "item_loader": TokensLoader()}
    options = {"num_workers": 1, "start_method": "fork", "verbose": False}
    optimize(function, list(range(60)), f"{sys.argv[1]}/{kind}", **size, **options)
"""


@pytest.fixture(scope="module")
def chunks(tmp_path_factory) -> Path:
    """Folders of chunks by kind; made by a process of their own, because litdata changes how processes are started."""
    directory = tmp_path_factory.mktemp("chunks")
    subprocess.run([sys.executable, "-c", OPTIMIZE, str(directory)], check=True, capture_output=True)
    return directory


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("litdata.utilities.dataset_utilities._LITDATA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(folder: Path, block_size: int) -> list[list[list[int]]]:
    """The blocks of each chunk, by what was given to litdata."""
    numbers, blocks = iter(range(60)), []
    for chunk in json.loads((folder / "index.json").read_text())["chunks"]:
        items = [next(numbers) for _ in range(chunk["chunk_size"])]
        ids = [np.random.default_rng(number).integers(0, 200, 40 + 7 * number % 60) for number in items]
        ids = np.concatenate(ids)
        blocks.append(ids[: len(ids) // block_size * block_size].reshape(-1, block_size).tolist())
    assert next(numbers, None) is None
    return blocks


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("block_size", [BLOCK, 450])
@pytest.mark.parametrize("kind", ["int64", "uint16", "numpy"])
def test_every_token_is_that_of_the_source(chunks, kind, block_size, remote):
    place = f"local:{chunks / kind}" if remote else chunks / kind
    dataset, validation = open_chunks(LitData(place), block_size)
    assert validation is dataset
    expected = source(chunks / kind, block_size)
    counts = [len(blocks) for blocks in expected]
    assert len(set(counts)) > 1 and (0 in counts) == (block_size == 450)
    assert dataset.chunk_ends.tolist() == np.cumsum(counts).tolist() and len(dataset) == sum(counts)
    assert dataset.tokens == len(dataset) * block_size and dataset.longest == block_size
    numbers = np.random.default_rng(1).permutation(len(dataset))
    assert dataset.lengths(numbers).tolist() == [block_size] * len(dataset)
    assert dataset.response_tokens(numbers).tolist() == [block_size - 1] * len(dataset)
    blocks = sum(expected, [])
    for number, sample in zip(numbers, dataset.read(numbers), strict=True):
        assert sample["input_ids"].tolist() == sample["labels"].tolist() == blocks[number]
        assert sample["input_ids"].dtype == torch.int64


def test_equal_fingerprints_are_of_equal_samples(chunks, tmp_path):
    copy = shutil.copytree(chunks / "int64", tmp_path / "copy")
    fingerprints = [ChunkStore(str(place), BLOCK).fingerprint for place in (chunks / "int64", copy, f"local:{copy}")]
    assert len(set(fingerprints)) == 1
    others = {ChunkStore(str(chunks / "int64"), 31).fingerprint, ChunkStore(str(chunks / "uint16"), BLOCK).fingerprint}
    assert len(others | set(fingerprints)) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("room", ["1GB", "1B"])
def test_every_block_once_per_epoch_and_chunk_by_chunk(chunks, monkeypatch, cache_dir, room, remote, ranks, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr("litgpt_akl.data.steps.POOL", 12)
    monkeypatch.setenv("MAX_CACHE_SIZE", room)
    dataset = open_chunks(LitData(f"local:{chunks / 'int64'}" if remote else chunks / "int64"), BLOCK)[0]
    # what validation reads in the main process must not keep its workers from reading
    dataset.read([0, len(dataset) - 1])
    plan = StepSampler(len(dataset), 12, 3, dataset.lengths, dataset.chunk_ends)
    seen, turns = {0: [], 1: []}, {0: [], 1: []}
    for rank in range(ranks):
        for step_batch in load(
            StepBatches(dataset, plan, 4, rank=rank, world_size=ranks), range(2 * plan.steps_per_epoch), workers
        ):
            batches = [batch for batch in step_batch.micro_batches if len(batch.labels) > 0]
            seen[step_batch.epoch] += [row.tolist() for batch in batches for row in batch.input_ids]
            if rank == 0:
                turns[step_batch.epoch].append(
                    set(np.searchsorted(dataset.chunk_ends, step_batch.numbers, side="right"))
                )
    expected = sorted(sum(source(chunks / "int64", BLOCK), []))
    assert sorted(seen[0]) == sorted(seen[1]) == expected and seen[0] != seen[1]
    for steps in turns.values():
        for chunk in range(len(dataset.chunk_ends)):
            used = [number for number, chunks_used in enumerate(steps) if chunk in chunks_used]
            assert used == list(range(used[0], used[-1] + 1)) and len(used) <= 3
    if remote:
        kept = list(cache_dir.rglob("*.bin"))
        assert len(kept) == len(dataset.chunk_ends) if room == "1GB" else len(kept) <= LEAST_CACHED + 1


def test_the_folders_of_a_split(chunks, tmp_path):
    shutil.copytree(chunks / "int64", tmp_path / "train")
    shutil.copytree(chunks / "numpy", tmp_path / "val")
    for place in (tmp_path, f"local:{tmp_path}"):
        train, validation = open_chunks(LitData(place, split_names=("train", "val")), BLOCK)
        for dataset, kind in ((train, "int64"), (validation, "numpy")):
            blocks = [sample["input_ids"].tolist() for sample in dataset.read(range(len(dataset)))]
            assert blocks == sum(source(chunks / kind, BLOCK), [])
    assert train.place(3) == f"local:{tmp_path}/train, block 3"


def test_processes_that_want_a_chunk_at_once_fetch_it_once(chunks, tmp_path, monkeypatch):
    from litdata.streaming.downloader import LocalDownloaderWithCache

    download, log = LocalDownloaderWithCache.download_file, tmp_path / "log"

    def slow(self, remote_path: str, local_path: str) -> None:
        with log.open("a") as file:
            file.write(f"{Path(remote_path).name}\n")
        time.sleep(0.2)
        download(self, remote_path, local_path)

    dataset = ChunkStore(f"local:{chunks / 'int64'}", BLOCK)
    monkeypatch.setattr(LocalDownloaderWithCache, "download_file", slow)
    expected = source(chunks / "int64", BLOCK)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(dataset.read, [[0, len(dataset) - 1]] * 4, chunksize=1)
    for samples in found:
        assert [sample["input_ids"].tolist() for sample in samples] == [expected[0][0], sum(expected, [])[-1]]
    assert sorted(log.read_text().split()) == ["chunk-0-0.bin", f"chunk-0-{len(expected) - 1}.bin"]


def test_a_process_killed_while_it_fetches_leaves_nothing_behind(chunks, monkeypatch, cache_dir):
    from litdata.streaming.downloader import LocalDownloaderWithCache

    def stuck(self, remote_path: str, local_path: str) -> None:
        Path(f"{local_path}.tmp").write_bytes(Path(remote_path.removeprefix("local:")).read_bytes()[:100])
        time.sleep(60)

    dataset = ChunkStore(f"local:{chunks / 'int64'}", BLOCK)
    with monkeypatch.context() as patched:
        patched.setattr(LocalDownloaderWithCache, "download_file", stuck)
        process = multiprocessing.get_context("fork").Process(target=dataset.read, args=([0],))
        process.start()
    deadline = time.monotonic() + 20
    while not list(cache_dir.rglob("*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for again in (dataset, ChunkStore(f"local:{chunks / 'int64'}", BLOCK)):
        assert again.read([0])[0]["input_ids"].tolist() == source(chunks / "int64", BLOCK)[0][0]
    left = {path.name for path in cache_dir.rglob("*") if path.is_file()}
    assert left == {"chunk-0-0.bin", "fetch.lock", "index.json"}


def test_a_run_is_the_same_again_and_after_an_interruption(chunks, teacher_dir, student_dir, tmp_path, capfd):
    def run(name: str, data: LitData, **changes) -> dict[str, torch.Tensor]:
        train = {"max_seq_length": BLOCK, "epochs": 2, "max_steps": None, "global_batch_size": 20, "save_interval": 3}
        return distil(student_dir, teacher_dir, data, tmp_path / name, train=train, **changes)

    whole = run("whole", LitData(chunks / "int64", num_workers=0))
    capfd.readouterr()
    remote = f"local:{chunks / 'int64'}"
    ends = {
        "again": run("again", LitData(remote, num_workers=2)),
        "resumed": run("resumed", LitData(remote, num_workers=2), resume=tmp_path / "whole" / "step-000006"),
    }
    for weights in ends.values():
        assert all(torch.equal(weights[name], weight) for name, weight in whole.items())
    noise = ("warn", "litdata", "lightning.ai", "traceback")
    told = "".join(capfd.readouterr()).replace(remote, "")
    assert not [line for line in told.splitlines() if any(word in line.lower() for word in noise)]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewrite_index(folder: Path, **changes) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["config"].update(changes)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("change", "block_size", "message"),
    [
        (shutil.rmtree, BLOCK, r"cannot be read: .*(does not|doesn't) exist"),
        (lambda folder: (folder / "index.json").unlink(), BLOCK, "no index.json|index.json$"),
        (lambda folder: (folder / "index.json").write_text("{"), BLOCK, "cannot be read( as an index of .*)?: "),
        (lambda folder: rewrite_index(folder, compression="zstd"), BLOCK, "neither compressed nor encrypted"),
        (lambda folder: rewrite_index(folder, encryption={"a": 1}), BLOCK, "neither compressed nor encrypted"),
        (None, 1000, r"no chunk of 1000 tokens. Lower --train.max_seq_length"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line_or_two(chunks, tmp_path, change, block_size, message, remote):
    folder = shutil.copytree(chunks / "int64", tmp_path / "data")
    if change is not None:
        change(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_chunks(LitData(f"local:{folder}" if remote else folder), block_size)
    assert str(folder) in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_other_items_than_tokens(chunks):
    with pytest.raises(UserError, match=r"records has other chunks than plain ones of tokens.\nMake them with litdata"):
        open_chunks(LitData(chunks / "records"), BLOCK)


@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_a_chunk_that_is_not_whole(chunks, tmp_path, damage):
    folder = shutil.copytree(chunks / "int64", tmp_path / "data")
    splits = [ChunkStore(str(place), BLOCK) for place in (folder, f"local:{folder}")]
    damage(folder / "chunk-0-1.bin")
    for dataset in splits:
        assert len(dataset.read([0])) == 1
        with pytest.raises(UserError, match="chunk-0-1.bin (is missing or breaks off|is gone, or the cache)"):
            dataset.read(range(len(dataset)))
    with pytest.raises(UserError, match=f"{folder}/chunk-0-1.bin is missing or breaks off. Copy it again"):
        open_chunks(LitData(folder), BLOCK)
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".json"}


FOREIGN = [
    "../../victim.bin",
    "..",
    ".",
    "",
    "/{base}/victim.bin",
    "a/b.bin",
    "a\\b.bin",
    "C:a.bin",
    "a\0.bin",
    5,
    None,
]


@pytest.mark.parametrize("name", [*FOREIGN, "index.json", "fetch.lock", "chunk-0-0.bin"])
@pytest.mark.parametrize("remote", [False, True])
def test_an_index_names_nothing_but_its_own_chunks(chunks, tmp_path, monkeypatch, cache_dir, name, remote):
    monkeypatch.setenv("MAX_CACHE_SIZE", "1B")
    folder = shutil.copytree(chunks / "int64", tmp_path / "data")
    if isinstance(name, str):
        name = name.format(base=str(tmp_path).lstrip("/"))
    index = json.loads((folder / "index.json").read_text())
    index["chunks"][1]["filename"] = name
    (folder / "index.json").write_text(json.dumps(index))
    victims = [tmp_path / "victim.bin", cache_dir / "victim.bin"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_bytes(bytes(5000))
    with pytest.raises(UserError, match=r"index.json (names|cannot be read as an index of LitData's chunks)") as caught:
        dataset = open_chunks(LitData(f"local:{folder}" if remote else folder), BLOCK)[0]
        dataset.read(range(len(dataset)))
    assert len(str(caught.value).splitlines()) == 2
    assert all(victim.read_bytes() == bytes(5000) for victim in victims)
    # nothing was fetched
    assert not list(cache_dir.rglob("chunk*"))


@pytest.mark.parametrize("remote", [False, True])
def test_ids_that_the_tokenizer_does_not_have(chunks, remote):
    place = f"local:{chunks / 'int64'}" if remote else chunks / "int64"
    everything = range(len(open_chunks(LitData(place), BLOCK)[0]))
    assert len(open_chunks(LitData(place), BLOCK, vocab_size=200)[0].read(everything)) == len(everything)
    with pytest.raises(UserError, match=r"chunk-0-.*.bin holds the id 19\d, and the tokenizer has 190 ids"):
        open_chunks(LitData(place), BLOCK, vocab_size=190)[0].read(everything)


def test_a_chunk_that_breaks_off_while_it_is_fetched_is_fetched_again(chunks, monkeypatch, cache_dir):
    from litdata.streaming.downloader import LocalDownloaderWithCache

    download = LocalDownloaderWithCache.download_file

    def cut(self, remote_path: str, local_path: str) -> None:
        download(self, remote_path, local_path)
        truncate(Path(local_path))

    dataset = ChunkStore(f"local:{chunks / 'int64'}", BLOCK)
    with monkeypatch.context() as patched:
        patched.setattr(LocalDownloaderWithCache, "download_file", cut)
        with pytest.raises(UserError, match="chunk-0-0.bin.* breaks off"):
            dataset.read([0])
    assert dataset.read([0])[0]["input_ids"].tolist() == source(chunks / "int64", BLOCK)[0][0]


def test_without_litdata(chunks, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "litdata"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"litdata.*\npip install litdata"):
        open_chunks(LitData(chunks / "int64"), BLOCK)
