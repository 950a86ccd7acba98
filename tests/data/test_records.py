"""Data files as a user names them, and their records: each of them once, and every problem with its place."""

import functools
import gzip
import http.server
import importlib.util
import json
import os
import random
import re
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem
from litgpt.prompts import Default

from litgpt_akl.data import StreamingSFT, files, records
from litgpt_akl.data.files import find_files, identify
from litgpt_akl.data.records import place, read
from litgpt_akl.messages import UserError
from litgpt_akl.models.model_files import read_tokenizer

RECORDS = [
    {"instruction": "Say hello.", "input": "", "output": "Hello!"},
    {"instruction": 'Brackets ]}, quotes " and \\ escapes\n', "output": "[{]", "more": [[1, {"a": []}], {"b": {}}]},
    {"instruction": "Grüße 你好 🙂", "output": "C:\\Users\\new", "number": -1.5e-7, "flags": [True, False, None]},
]


def to_lines(values: list, newline: str = "\n") -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + newline for value in values).encode()


GZIP = gzip.compress(b"{}", mtime=0)  # a time in it would be in the test's name
COMPRESS = {".gz": functools.partial(gzip.compress, compresslevel=1), ".zst": zstandard.ZstdCompressor().compress}


def write(path: Path, data: bytes) -> str:
    """Compress the data as the path's suffix says."""
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(data))
    return str(path)


def values_of(path: str) -> list[dict | None]:
    found = list(read(path))
    assert [record.error for record in found] == [None] * len(found)
    return [record.value for record in found]


def outcomes_of(path: str) -> list[tuple[int, dict | str]]:
    """Each record's line, and its value or error."""
    found = list(read(path))
    assert all((record.value is None) != (record.error is None) for record in found)
    return [(record.line, record.error or record.value) for record in found]


def identify_one(path: str) -> None:
    identify([path])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "list.json", "list.jsonl", "A.JSONL"])
def test_formats_and_compressions_give_the_same_records(tmp_path: Path, name: str, suffix: str) -> None:
    data = json.dumps(RECORDS, indent=2).encode() if name.startswith("list.") else to_lines(RECORDS)
    path = tmp_path / (name + suffix)
    # a compressed file may be several that were joined
    path.write_bytes(b"".join(COMPRESS.get(suffix, bytes)(part) for part in (data[:99], data[99:200], data[200:])))
    assert find_files(str(path)) == [str(path)]
    assert values_of(str(path)) == RECORDS


@pytest.mark.parametrize(
    ("name", "begin", "told"),
    [
        ("a.jsonl", GZIP, r"is gzip data, other than its name says.\nGive it a name that ends in .gz"),
        ("a.json", b"PAR1..", r"is Parquet, other than .*\nGive it a name that ends in .parquet"),
        ("a.jsonl", "{}".encode("utf-16"), r"is UTF-16 text, other than .*\nWrite it as UTF-8"),
        ("a.jsonl.gz", b'{"a": 1}', r"from line 1 on: it is not compressed.\nGive it a name that ends in"),
        ("a.jsonl.gz", b"PK\x03\x04..", r"is a zip archive, other than .*\nUnpack it"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1", r"is a pointer of Git LFS .*\nFetch the data"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1", r"is a pointer of Git LFS .*\nFetch the data"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, begin, told):
    (tmp_path / name).write_bytes(begin)
    with pytest.raises(UserError, match=told):
        values_of(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.csv", lambda path: datasets.load_dataset("csv", data_files=path, split="train")),
        ("a.tsv", lambda path: datasets.load_dataset("csv", data_files=path, sep="\t", split="train")),
        ("a.arrow", datasets.Dataset.from_file),
        ("a.txt", None),
        ("a.jsonl.xz", None),
    ],
)
def test_data_of_another_format_can_be_made_fit(tmp_path, name, advice):
    rows, path = [{"a": "x, y", "b": 'z "q"'}, {"a": "1 2", "b": "line\nline"}], tmp_path / name
    if name == "a.arrow":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        path = next((tmp_path / "saved").glob("*.arrow"))
    else:
        datasets.Dataset.from_list(rows).to_csv(path, sep="," if name == "a.csv" else "\t", index=False)
    way_out = "to_parquet" if advice else "Unpack it" if name.endswith("xz") else "JSON in each"
    with pytest.raises(UserError, match=rf"is of no format .*\n.*{way_out}"):
        find_files(str(path))
    if advice is not None:
        advice(str(path)).to_parquet(str(tmp_path / "FILE.parquet"))
        assert values_of(str(tmp_path / "FILE.parquet")) == rows


def test_a_field_that_an_object_has_twice_is_no_record(tmp_path):
    twice, deep = '{"a": 1, "b": 2, "a": 3}', '{"m": [{"r": 1, "r": 1}]}'
    for name, text in (("a.jsonl", f'{twice}\n{{"a": 1}}\n{deep}\n'), ("a.json", f'[{twice},\n{{"a": 1}},\n{deep}]')):
        found = outcomes_of(str(write(tmp_path / name, text.encode())))
        assert [line for line, _ in found] == [1, 2, 3] and found[1][1] == {"a": 1}
        assert found[0][1] == "has the field 'a' twice in one object"
        assert found[2][1] == "has the field 'r' twice in one object"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data files b.jsonl, c.json.gz, deep/er/a.parquet, and others that are none."""
    data = tmp_path / "data"
    for name in ("deep/er", ".git", ".cache/deep"):
        (data / name).mkdir(parents=True)
    write(data / "b.jsonl", to_lines(RECORDS[:1]))
    write(data / "c.json.gz", json.dumps(RECORDS[1:2]).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]), data / "deep/er/a.parquet")
    for name in (".git/a.jsonl", ".cache/deep/a.jsonl", ".hidden.jsonl", "README.md", "deep/weights.bin", "jsonl"):
        write(data / name, b"this is no data")
    return data


def test_files_folders_and_globs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(path: Path | str) -> list[str]:
        return [os.path.relpath(name, folder) for name in find_files(str(path))]

    everything = ["b.jsonl", "c.json.gz", "deep/er/a.parquet"]
    assert found(folder) == found(f"{folder}/") == found(folder.as_uri()) == found(folder / "**") == everything
    assert found(folder / "b.jsonl") == found(folder.as_uri() + "/b.jsonl") == ["b.jsonl"]
    assert found(folder / "*") == ["b.jsonl", "c.json.gz"]
    assert found(folder / "[bx].json?") == ["b.jsonl"]
    assert found(folder / ".hidden.jsonl") == [".hidden.jsonl"]
    assert found(folder / ".git") == [".git/a.jsonl"]
    monkeypatch.chdir(folder / "deep")
    assert found(".") == found("er") == found("./er/../er") == found("*/*") == ["deep/er/a.parquet"]
    assert found("../b.jsonl") == found("../*.jsonl") == ["b.jsonl"]
    monkeypatch.setenv("HOME", str(folder))
    assert found("~/b.jsonl") == ["b.jsonl"]


def test_links_to_files_and_names_with_glob_characters(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]"
    folder.mkdir()
    write(tmp_path / "blob", to_lines(RECORDS))
    link = folder / "a?.jsonl"
    link.symlink_to(tmp_path / "blob")
    other = write(folder / "ab.jsonl", to_lines(RECORDS))
    assert find_files(str(folder)) == [str(link), other]
    assert find_files(str(link)) == find_files(f"{tmp_path}/*/*[?].jsonl") == [str(link)]
    assert values_of(str(link)) == RECORDS


@pytest.mark.parametrize(
    "name, uses, match",
    [
        ("missing.jsonl", [find_files, identify_one, values_of], r"does not exist\."),
        ("missing/", [find_files], r"does not exist\."),
        ("*.ndjson", [find_files], "does not exist: no file matches it"),
        ("missing/*.jsonl", [find_files], "does not exist"),
        ("README.md", [find_files, values_of], r"is of no format .* \.json, \.json\.gz, .*\.parquet"),
        ("*.md", [find_files], r"has no data file: none ends in \.json, "),
        ("deep/*.bin", [find_files], "has no data file"),
        ("empty", [find_files], "has no data file"),
        ("loop.jsonl", [find_files], "cannot be read: Too many levels of symbolic links"),
        ("folder.jsonl", [values_of], "cannot be read: Is a directory"),
    ],
)
def test_what_is_not_there_or_cannot_be_read_is_named(folder: Path, name: str, uses: list, match: str) -> None:
    (folder / "empty").mkdir()
    (folder / "folder.jsonl").mkdir()
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    for use in uses:
        given = "(--data.path )?" if use is find_files else ""
        with pytest.raises(UserError, match=f"^{given}{re.escape(f'{folder}/{name}')} {match}"):
            use(f"{folder}/{name}")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_named(folder: Path) -> None:
    (folder / "b.jsonl").chmod(0)
    with pytest.raises(UserError, match=r"b\.jsonl cannot be read: Permission denied"):
        values_of(str(folder / "b.jsonl"))
    (folder / "deep").chmod(0)
    try:
        with pytest.raises(UserError, match=r"/deep cannot be read: Permission denied"):
            find_files(str(folder))
    finally:
        (folder / "deep").chmod(0o755)


@pytest.mark.parametrize("url, package", [("s3://b/a.jsonl", "s3fs"), ("gs://b/a.jsonl", "gcsfs")])
def test_a_missing_package_is_named(url: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    for use in (find_files, identify_one, values_of):
        with pytest.raises(UserError, match=rf"{url} needs a package .*\npip install {package}$"):
            use(url)


class Bucket(MemoryFileSystem):
    """Tells of a file by looking through the listing of its folder, as object stores' file systems do."""

    protocol = "bucket"
    looked_at = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("bucket://", "memory://"))

    def ls(self, path: str, detail: bool = True, **options) -> list:
        entries = super().ls(path, detail=True, **options)
        Bucket.looked_at += len(entries)
        entries = [entry | {"ETag": f"tag of {entry['name']}"} for entry in entries]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **options) -> dict:
        path = self._strip_protocol(path)
        return next(entry for entry in self.ls(path.rpartition("/")[0]) if entry["name"] == path)


def test_files_are_identified_by_one_look_at_their_folder() -> None:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    paths = [f"bucket:///records/{number % 3}/{number:03}.jsonl" for number in range(90)]
    bucket = fsspec.filesystem("bucket")
    bucket.pipe({path: b"{}\n" * number for number, path in enumerate(paths)})
    try:
        alone = [identify([path])[0] for path in paths]
        assert Bucket.looked_at == 30 * 90
        Bucket.looked_at = 0
        assert identify(paths) == alone
        assert Bucket.looked_at == 90
        assert [size for _, size, _ in alone] == [3 * number for number in range(90)]
    finally:
        bucket.rm("/records", recursive=True)


def test_other_file_systems(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/test_records/a.jsonl": to_lines(RECORDS), "/test_records/b/c.json.zst": COMPRESS[".zst"](b"{}")})
    try:
        found = find_files("memory://test_records")
        assert found == ["memory:///test_records/a.jsonl", "memory:///test_records/b/c.json.zst"]
        assert find_files("memory://test_records/*.jsonl") == found[:1]
        assert [values_of(path) for path in found] == [RECORDS, [{}]]
        before = identify(found)
        assert json.loads(json.dumps(identify(found))) == before
        memory.pipe("/test_records/a.jsonl", to_lines(RECORDS))
        assert [old == new for old, new in zip(before, identify(found), strict=True)] == [False, True]
    finally:
        memory.rm("/test_records", recursive=True)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", to_lines(RECORDS))
    with pytest.raises(UserError, match=r"a\.zip is of no format"):
        find_files(f"zip://a.jsonl::{tmp_path}/a.zip")
    with pytest.raises(UserError, match=r"^--data.path nothing://a\.jsonl cannot be read: Protocol not known: nothing"):
        find_files("nothing://a.jsonl")


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The URL of an HTTP server that serves ``folder``."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def end_headers(self) -> None:
            if "encoding=gzip" in getattr(self, "path", ""):
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_http(server: str, folder: Path) -> None:
    write(folder / "big.jsonl", to_lines(RECORDS * 20_000))
    write(folder / "packed.json", (folder / "c.json.gz").read_bytes())
    write(folder / "a b.jsonl.gz", to_lines(RECORDS))
    for name, expected in {
        "b.jsonl": RECORDS[:1],
        "b.jsonl?download=true": RECORDS[:1],
        "c.json.gz": RECORDS[1:2],
        "c.json.gz?encoding=gzip": RECORDS[1:2],
        "packed.json?encoding=gzip": RECORDS[1:2],
        "a%20b.jsonl.gz": RECORDS,
        "big.jsonl": RECORDS * 20_000,
    }.items():
        url = f"{server}/{name}"
        assert find_files(url) == [url]
        found = list(read(url))
        assert [record.value for record in found] == expected
    assert found[-1].bytes_read == identify([url])[0][1] == len(to_lines(RECORDS * 20_000))
    names = ["a%20b.jsonl.gz", "b.jsonl", "big.jsonl", "c.json.gz", "packed.json"]
    assert find_files(f"{server}/*.json*") == [f"{server}/{name}" for name in names]
    assert find_files(f"{server}/deep") == find_files(f"{server}/deep/") == [f"{server}/deep/er/a.parquet"]


def test_http_problems(server: str, folder: Path) -> None:
    for name in ("missing.jsonl", "missing/", "missing-*.jsonl"):
        with pytest.raises(UserError, match="does not exist"):
            find_files(f"{server}/{name}")
    with pytest.raises(UserError, match=r"README.md is of no format"):
        find_files(f"{server}/README.md")
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(to_lines(RECORDS))[:-9])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz ends too early"):
        values_of(f"{server}/cut.jsonl.gz")
    for use in (find_files, identify_one, values_of):
        with pytest.raises(UserError, match=r"/a\.jsonl does not exist, or cannot be reached: .*SSL"):
            use(f"{server}/a.jsonl".replace("http:", "https:"))


def test_identity_changes_with_the_file(server: str, folder: Path) -> None:
    path = folder / "b.jsonl"
    for name in (str(path), f"{server}/b.jsonl"):
        before = identify([name])
        assert before[0][:2] == [name, len(to_lines(RECORDS[:1]))]
        values_of(name)
        assert json.loads(json.dumps(before)) == before == identify([name])
        time.sleep(0.02)
        status = path.stat()
        write(path, path.read_bytes()[::-1])
        # a local file's time of modification may be the same, as after `cp --preserve`
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - (0 if name == str(path) else 10**10)))
        assert identify([name]) != before
        write(path, path.read_bytes()[::-1])


def test_parquet_gives_back_what_json_says(tmp_path: Path) -> None:
    """Objects of one column share their fields in a Parquet file: what an object lacks is null there, and no more."""

    def tool(name: str, *arguments: str) -> dict:
        return {"name": name, "parameters": {"needs": {argument: {"type": "text"} for argument in arguments}}}

    def call(name: str, **arguments: object) -> dict:
        message = {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}
        return {"messages": [{"role": "user", "content": "Who?"}, message], "tools": [tool(name, *arguments)]}

    values = [call("look", place="garden"), call("add", a=1, b=[2, None]), call("wait", a=0, flag=False, text="")]
    values.append({"messages": [{"role": "user", "content": "Who?"}], "tools": []})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    found = values_of(str(tmp_path / "a.parquet"))
    assert found == values_of(str(tmp_path / "a.jsonl")) == values


def test_parquet(tmp_path: Path) -> None:
    def dataset(column: pyarrow.Array) -> str:
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=10)
        return str(tmp_path / "a.parquet")

    values = [{"text": [{"role": "user", "number": number}, None]} for number in range(95)]
    path = dataset(pyarrow.array([value["text"] for value in values]))
    assert outcomes_of(path) == list(enumerate(values, start=1))
    assert place(path, 67) == f"{path}, row 67"
    assert values_of(dataset(pyarrow.array([], pyarrow.string()))) == []
    whole = Path(dataset(pyarrow.array([os.urandom(50).hex() for _ in range(2000)]))).read_bytes()
    middle = len(whole) // 2
    for data in (b"", b"text", whole[:-100], whole[:middle] + bytes(1000) + whole[middle + 1000 :]):
        with pytest.raises(UserError, match=r"a\.parquet cannot be read: \w+"):
            values_of(write(tmp_path / "a.parquet", data))


EXTRA_COLUMNS = {
    "timestamp": datetime(2024, 1, 2, tzinfo=timezone.utc),
    "date": date(2024, 1, 2),
    "time": time_of_day(12, 30),
    "duration": timedelta(days=1),
    "bytes": b"\x89PNG",
    "decimal": Decimal("1.5"),
    "nested": {"a": [{"when": datetime(2024, 1, 2), "image": {"bytes": b"\xff"}}]},
    "not a number": float("nan"),
}


@pytest.mark.parametrize("name", EXTRA_COLUMNS)
def test_a_parquet_column_that_nobody_reads_does_not_matter(tmp_path: Path, teacher_dir: Path, name: str) -> None:
    rows = [{"instruction": f"Join {word}", "output": word} for word in ("river", "lamp", "stone")]
    plain, extra = tmp_path / "plain.parquet", tmp_path / "extra.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, name: EXTRA_COLUMNS[name]} for row in rows]), extra)
    read_samples = []
    for path in (plain, extra):
        options = {"num_workers": 0, "num_proc": 1, "val_split_fraction": 0.0, "cache_dir": tmp_path / "cache"}
        data = StreamingSFT(str(path), prompt_style=Default(), **options)
        data.connect(read_tokenizer(teacher_dir))
        dataset = data.prepare(teacher_dir, 128)[0]
        read_samples.append([sample["input_ids"].tolist() for sample in dataset.read(range(3))])
    assert read_samples[0] == read_samples[1]


NESTED = {"text": '[1, {"a": "]"}, ', "deep": [[[{}, []], {"": [{"x": [None, True, -0.5, 1e300, "\\"]}]}]]}
ESCAPES = {"escapes": '\\" \n \t \u2028 \x7f \\u0041 \\', "back\\slash": "C:\\Users"}
MIXED = [NESTED, {}, ESCAPES, *RECORDS, {"long": "word " * 300, "numbers": list(range(300))}, {"last": 2**70}]
TEXTS = {
    "list.json": json.dumps(MIXED),
    "unicode list.json": json.dumps(MIXED, ensure_ascii=False),
    "indented list.json": json.dumps(MIXED, indent=2),
    "indented unicode list.json": json.dumps(MIXED, indent=1, ensure_ascii=False),
    "lines.json": to_lines(MIXED).decode(),
    "lines.jsonl": to_lines(MIXED).decode(),
    "windows lines.jsonl": to_lines(MIXED, "\r\n").decode(),
    "blank lines.jsonl": to_lines(MIXED, "\n\n \n").decode(),
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 13, 64, 1000, 2**18])
@pytest.mark.parametrize("name", TEXTS)
def test_records_are_read_and_their_lines_counted_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, name: str
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    for text in (TEXTS[name], TEXTS[name].rstrip(), f"\ufeff \r\n\t{TEXTS[name]}\r\n \n"):
        lines, position = [], 0
        for _ in MIXED:
            position = text.index("{", position)
            lines.append(1 + text.count("\n", 0, position))
            position = json.JSONDecoder().raw_decode(text, position)[1]
        assert outcomes_of(write(tmp_path / name, text.encode())) == list(zip(lines, MIXED, strict=True))


DEEP = '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}"


@pytest.mark.parametrize("chunk", [1, 3, 20, 2**18])
@pytest.mark.parametrize(
    "text, line, error",
    [
        ('[{"a": 1}\n {"a": 2}]', 2, "is not valid JSON: Expecting ',' delimiter at column 2"),
        ('[\n{"a": 1},\n  {"a" 2}, {"a": 3}]', 3, "is not valid JSON: Expecting ':' delimiter at column 8"),
        ('[{"a": 1}', 1, "is not valid JSON: Expecting ',' delimiter at column 10"),
        ('[{"a": 1},\n', 2, "is not valid JSON: Expecting value at column 1"),
        ('[{"a": 1}, ]', 1, "is not valid JSON: Expecting value at column 12"),
        ('[{"a": 1}, {"a": "b]', 1, "is not valid JSON: Unterminated string starting at column 18"),
        ('[{"a": 1}, {"a": tru]', 1, "is not valid JSON: Expecting value at column 18"),
        ('[{"a": 1}]\n\n]', 3, "is not valid JSON: Extra data at column 1"),
        ('[{"a": 1}, {"a": "\t"}]', 1, "is not valid JSON: Invalid control character at column 19"),
        ('[{"a": 1}, {"b": "\\q"}]', 1, "is not valid JSON: Invalid \\escape at column 19"),
        (f'[{{"a": 1}},\n{DEEP}, {{}}]', 2, "is nested too deeply: in more than 256 levels"),
    ],
)
def test_a_broken_list_ends_with_one_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: str, line: int, error: str
) -> None:
    monkeypatch.setattr(files, "CHUNK", chunk)
    first = 2 if text.startswith("[\n") else 1
    assert outcomes_of(write(tmp_path / "a.json", text.encode())) == [(first, {"a": 1}), (line, error)]


@pytest.mark.parametrize(
    "line, error",
    [
        (b"hello", "is not valid JSON: Expecting value at column 1"),
        (b'{"a": 1,, "b": 2}', "is not valid JSON: Expecting property name enclosed in double quotes at column 9"),
        ('{"é": "🙂" 1}'.encode(), "is not valid JSON: Expecting ',' delimiter at column 11"),
        (b'{"a": "b\t', "is not valid JSON: Invalid control character at column 9"),
        (b'{"a": 1} {"a": 2}', "is not valid JSON: Extra data at column 10"),
        (b'{"path": "C:\\Users"}', "is not valid JSON: Invalid \\escape at column 13"),
        ('{"é": "'.encode() + b'\xff"}', "is not valid UTF-8 at byte 9"),
        (b'{"a": "b\xe4', "is not valid UTF-8 at byte 9"),
        ('{"a": "b"}'.encode("utf-16"), "is not valid UTF-8 at byte 1"),
        (DEEP.encode(), "is nested too deeply: in more than 256 levels"),
    ],
)
def test_broken_lines_are_told_and_left_behind(tmp_path: Path, line: bytes, error: str) -> None:
    for newline in (b"\n", b"\r\n"):
        path = write(tmp_path / "a.jsonl", newline.join([b'{"a": 1}', b"", line, b'{"a": 2}']))
        assert outcomes_of(path) == [(1, {"a": 1}), (3, error), (4, {"a": 2})]
        assert place(path, 3) == f"{path}, line 3"


@pytest.mark.parametrize(
    "value, error",
    [
        (b"[1, 2]", "is a list, not an object"),
        (b'"text"', "is a text, not an object"),
        (b"NaN", "is a number, not an object"),
        (b"3", "is a number, not an object"),
        (b"false", "is a truth value, not an object"),
        (b"null", "is null, not an object"),
        (b'{"a": ["\\uD83D"]}', "has \\ud83d, half of a surrogate pair, which is no character"),
        (b'{"a\\udc00": 1}', "has \\udc00, half of a surrogate pair, which is no character"),
        (b'{"a": "\xff"}', "is not valid UTF-8 at byte 8"),
    ],
)
def test_values_that_are_no_records_are_told_and_left_behind(tmp_path: Path, value: bytes, error: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n%b\n{"a": 2}' % value)
    assert outcomes_of(path) == [(1, {"a": 1}), (3, error), (4, {"a": 2})]
    path = write(tmp_path / "a.json", b'[{"a":\n1},\n%b, {"a":\n"\\ud83d\\ude42"}]' % value)
    assert outcomes_of(path) == [(1, {"a": 1}), (3, error.replace("byte", "column")), (3, {"a": "🙂"})]


def test_good_oddities(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"a": "C:\\\\Users", "b": Infinity}\r\n\r\n'
    data += b'  {"a": "\\\\ud83d \\ud83d\\ude42 \\u00e9"}  \r\n\x0c\n{"c": -Infinity}'
    assert outcomes_of(write(tmp_path / "a.jsonl", data)) == [
        (1, {"a": "C:\\Users", "b": float("inf")}),
        (3, {"a": "\\ud83d 🙂 é"}),
        (5, {"c": -float("inf")}),
    ]
    assert outcomes_of(write(tmp_path / "a.json", b" [ \n] \n")) == []


@pytest.mark.skipif(not hasattr(sys, "get_int_max_str_digits"), reason="this Python reads numbers of any length")
def test_a_number_that_is_too_long(tmp_path: Path) -> None:
    number = b'{"a": ' + b"1" * 5000 + b"}"
    for name, data in {"a.jsonl": number + b"\n{}", "a.json": b"[" + number + b", {}]"}.items():
        (line, error), *others = outcomes_of(write(tmp_path / name, data))
        assert line == 1
        assert error.startswith("is not valid JSON: Exceeds the limit (4300 digits)")
        assert others == ([(2, {})] if name == "a.jsonl" else [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    for data in (b"", b" \n\r\n\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
        assert outcomes_of(write(tmp_path / name, data)) == [(1, "the file is empty")]
    (tmp_path / name).write_bytes(b"")
    assert outcomes_of(str(tmp_path / name)) == [(1, "the file is empty")]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_is_cut_off_or_broken(tmp_path: Path, suffix: str) -> None:
    values = [{"number": number, "text": os.urandom(500).hex()} for number in range(1000)]
    path = tmp_path / f"a.jsonl{suffix}"
    whole = Path(write(path, to_lines(values))).read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle])
    got = []
    with pytest.raises(UserError, match="ends too early: its .* data breaks off in line ") as caught:
        got.extend(record.value for record in read(str(path)))
    assert 300 < len(got) < 700
    assert got == values[: len(got)]
    assert f"breaks off in line {len(got) + 1}." in str(caught.value)
    for data, match in [
        *((whole[:end], "ends too early") for end in (3, -1, -4)),
        (whole[:middle] + bytes(2000) + whole[middle + 2000 :], r"is no valid \w+ data from line [1-9]\d* on: "),
        (to_lines(values), r"is no valid \w+ data from line 1 on: "),
    ]:
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"a\.jsonl{suffix} {match}"):
            values_of(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_of_ten_megabytes_takes_no_long(tmp_path: Path, name: str) -> None:
    values = [{"a": 1}, {"text": "é" * 2_000_000, "lists": [[number, "x" * 20] for number in range(200_000)]}, {"b": 2}]
    data = to_lines(values) if name == "a.jsonl" else json.dumps(values, indent=1, ensure_ascii=False).encode()
    assert len(data) > 10 * 10**6
    path = write(tmp_path / name, data)
    start = time.perf_counter()
    assert values_of(path) == values
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.zst", "a.parquet", "broken.json"])
def test_the_bytes_read_grow_to_the_size_of_the_file_and_memory_does_not(tmp_path: Path, name: str) -> None:
    words = random.Random(0).choices([f"word{number}" for number in range(1000)], k=300_000)
    values = [{"text": " ".join(words[start : start + 300])} for start in range(0, len(words), 300) for _ in range(12)]
    lines = [json.dumps(value).encode() for value in values]
    data = b"\n".join(lines) if ".jsonl" in name else b"[" + b",\n".join(lines) + b"]"
    assert len(data) > 28 * 10**6
    path = write(tmp_path / name, data.replace(b'":', b'"', 1) if name == "broken.json" else data)
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=1000)
    del values, lines, data
    tracemalloc.start()
    try:
        found = [record.bytes_read for record in read(path)]
        assert tracemalloc.get_traced_memory()[1] < 20 * 10**6
    finally:
        tracemalloc.stop()
    ((_, size, *_),) = identify([path])
    if name == "broken.json":
        assert len(found) == 1
    else:
        assert len(found) == 12_000
        assert found == sorted(found)
        assert [found[row] / size for row in (0, 3000, 6000)] == pytest.approx([0, 0.25, 0.5], abs=0.1)
        assert size - 20 <= found[-1] <= size


def test_a_record_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LARGEST", 2 * 2**20)
    long = b'{"a": "' + b"x" * (5 * 2**20)
    path = write(tmp_path / "a.jsonl", b'{"b": 1}\n' + long + b'"}\n{"b": 2}\n' + long)
    error = "is longer than 2 MiB"
    assert outcomes_of(path) == [(1, {"b": 1}), (2, error), (3, {"b": 2}), (4, error)]
    path = write(tmp_path / "a.json", b'[{"b": 1},\n ' + long + b'"}]')
    error = "is not valid JSON: no record ends within 2 MiB at column 2"
    assert outcomes_of(path) == [(1, {"b": 1}), (2, error)]
