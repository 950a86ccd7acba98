"""The data files that a user names: which they are, whether they have changed, and what is in them."""

import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import fsspec
import zstandard
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from litgpt_akl.files.reading import COPY_AGAIN
from litgpt_akl.messages import UserError, reason, say, without_credentials

Chunks = Iterator[tuple[bytes, int]]
"""A file's bytes, decompressed, and with each chunk how many of the stored bytes had been read for it."""

CHUNK = 2**18
"""Bytes that are read at a time."""

PACKED_CHUNKS = {"gzip": 2**14, "zstd": 2**10}
"""The same for a compressed file, whose bytes may become a thousand times as many, with zstd 32,768 times."""

LARGEST_WINDOW = 2**27
"""Bytes of what came before that zstd data may refer to, all of which are held in memory: `zstd --long` writes that."""

ROWS, ROWS_BYTES = 64, 2**23
"""Rows of a Parquet file that are Python objects at a time, and their bytes if they are about equally large."""

BEGINS = {
    b"\x1f\x8b": ("gzip", "gzip data", "Give it a name that ends in .gz."),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd data", "Give it a name that ends in .zst."),
    b"PAR1": ("parquet", "Parquet", "Give it a name that ends in .parquet."),
    b"ARROW1": ("", "an Arrow file", "Write it as Parquet."),
    b"PK\x03\x04": ("", "a zip archive", "Unpack it."),
    b"BZh": ("", "bzip2 data", "Unpack it."),
    b"\xfd7zXZ": ("", "xz data", "Unpack it."),
    b"\xff\xfe": ("", "UTF-16 text", "Write it as UTF-8."),
    b"\xfe\xff": ("", "UTF-16 text", "Write it as UTF-8."),
    b"version https://git-lfs": ("", "a pointer of Git LFS and no data", "Fetch the data with `git lfs pull`."),
}
"""What a file is that begins so: as FORMATS says it, for people, and what to do if its name says otherwise."""
OTHER_FORMATS = {
    ".csv": "Write it as Parquet: datasets.load_dataset('csv', data_files={!r}, split='train')"
    ".to_parquet('FILE.parquet').",
    ".tsv": "Write it as Parquet: datasets.load_dataset('csv', data_files={!r}, sep='\\t', split='train')"
    ".to_parquet('FILE.parquet').",
    ".arrow": "Write it as Parquet: datasets.Dataset.from_file({!r}).to_parquet('FILE.parquet').",
    **dict.fromkeys((".bz2", ".xz", ".zip", ".tar", ".tgz", ".tar.gz"), "Unpack it."),
    ".txt": "If it has one record in JSON in each line, give it a name that ends in .jsonl.",
}
"""What to do with data of other formats, by the end of a file's name."""
NO_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files of Hugging Face's datasets that tell of data."""
COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd"}
FORMATS = {
    f".{name}{suffix}": (form, compression)
    for name, form in (("json", "json"), ("jsonl", "jsonl"), ("ndjson", "jsonl"))
    for suffix, compression in COMPRESSIONS.items()
} | {".parquet": ("parquet", None)}
"""Format and compression by suffix."""

DECOMPRESSORS = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj(),
}

VERSIONS = ("ETag", "etag", "Content-MD5", "Digest", "generation", "md5Hash", "blob_id")
VERSIONS += ("Last-Modified", "LastModified", "last_modified")
"""What file systems call the mark by which a file's versions differ, the best first."""


def find_files(path: str, option: str = "--data.path") -> list[str]:
    """The data files that ``path``, given as ``option``, names, sorted: local ones as absolute paths, others as URLs.

    It is a file, a folder (all data files below it, without hidden ones), a glob, or a URL of any of these for which
    fsspec has a file system. An http folder has no dot in its last part, or ends in "/". Of a folder or a glob it is
    said what is left out: files that are others by another name, and data of other formats.
    Raises UserError if nothing is there, it cannot be read, or no data file is among it.
    """
    with _reporting(path, option):
        file_system, name = _file_system(path)
        magic = re.search(r"[*\[]" if _is_http(path) else r"[*?\[]", name)
        if magic and not file_system.exists(name):
            root = name[: magic.start()].rpartition("/")[0]
            entries = file_system.glob(name, detail=True)
            names = [entry for entry, details in entries.items() if details["type"] != "directory"]
            if not entries:
                raise UserError(f"{option} {path} does not exist: no file matches it.\n{_way_to(path)}")
        elif _is_folder(file_system, name):
            root = name
            names = _walk(name) if isinstance(file_system, LocalFileSystem) else file_system.find(name)
        else:
            file_format(path)
            return [name if isinstance(file_system, LocalFileSystem) else path]
    if any(entry.endswith((".arrow", "/dataset_dict.json")) for entry in names) and any(
        entry.endswith("/dataset_info.json") for entry in names
    ):
        split = "['train']" if any(entry.endswith("/dataset_dict.json") for entry in names) else ""
        raise UserError(
            f"{option} {path} is a dataset by save_to_disk of Hugging Face's datasets, not a folder of records.\n"
            f"Write each of its splits as Parquet: datasets.load_from_disk({path!r}){split}.to_parquet('FILE.parquet')."
        )
    shown = [entry for entry in names if "/." not in "/" + entry[len(root) :].lstrip("/")]
    names = [entry for entry in shown if _suffix(entry) and not entry.endswith(NO_RECORDS)]
    if others := [entry for entry in shown if not _suffix(entry) and _advice(entry)]:
        say(f"{path}: {len(others):,} files of other formats are not read, such as {others[0]}.", file=sys.stderr)
    if not names:
        advice = _advice(others[0]) if others else "Give a file, a folder, a glob or a URL of such files."
        raise UserError(f"{option} {path} has no data file: none ends in {', '.join(FORMATS)}.\n{advice}")
    if not isinstance(file_system, LocalFileSystem):
        return sorted(file_system.unstrip_protocol(entry) for entry in names)
    files: dict[str, str] = {}
    for entry in sorted(names):
        files.setdefault(os.path.realpath(entry), entry)
    if again := sorted(set(names) - set(files.values())):
        told = f"{len(again):,} files are others by another name, and are read once, such as {again[0]}."
        say(f"{path}: {told}", file=sys.stderr)
    return [*files.values()]


SPLITS = {
    "training": ("train", "training"),
    "validation": ("validation", "validate", "valid", "val", "dev", "heldout", "holdout"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and folders by which Hugging Face's datasets tell splits."""


def group_by_split(files: list[str]) -> dict[str, list[str]]:
    """The files of each split by their names; those without a split's name under ""."""
    common = files[0][: len(os.path.commonprefix(files).rpartition("/")[0])] if len(files) > 1 else ""
    groups: dict[str, list[str]] = {}
    for file in files:
        # trainset, TrainData and held-out are words, too
        name = re.sub("(?<=[a-z])(?=[A-Z])", " ", file[len(common) :]).lower()
        name = re.sub("(held|hold)[^a-z/]out", r"\1out", name)
        words = [re.sub("(set|data|split)s?$", "", word) for word in re.split(r"[^a-z]+", name)]
        split = next((split for split, names in SPLITS.items() if set(names) & set(words)), "")
        groups.setdefault(split, []).append(file)
    return groups


def _walk(folder: str) -> list[str]:
    # fsspec passes over folders that it must not read, a silent loss of data
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error

    names, known = [], {os.path.realpath(folder)}
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders[:]:
            # links may lead in a circle
            if (place := os.path.realpath(f"{parent}/{name}")) in known:
                folders.remove(name)
            known.add(place)
        names += [f"{parent}/{name}".replace(os.sep, "/") for name in files]
    return names


def _is_folder(file_system: fsspec.AbstractFileSystem, name: str) -> bool:
    kind = file_system.info(name)["type"]
    # to http everything is a file, and to ask for the entries of one would download it
    return "." not in name.partition("?")[0].rpartition("/")[2] if _is_http(name) else kind == "directory"


def identify(files: list[str], anew: bool = False) -> list[list]:
    """For each file ``[path, bytes, ...]``: text and numbers that change when the file changes. Nothing is read.

    The bytes are 0 where a server does not tell them. With ``anew``, what file systems know of earlier is forgotten.
    Raises UserError if a file does not exist or cannot be reached.
    """
    if anew:
        for path in {path.partition("://")[0] if "://" in path else "": path for path in files}.values():
            with _reporting(path):
                _file_system(path)[0].invalidate_cache()
    listings: dict[str, dict[str, dict]] | None = {} if len(files) > 1 else None
    return [_identify(path, listings) for path in files]


def _identify(path: str, listings: dict[str, dict[str, dict]] | None) -> list:
    with _reporting(path):
        file_system, name = _file_system(path)
        if isinstance(file_system, LocalFileSystem):
            status = os.stat(name)
            return [name, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        details = file_system.info(name) if listings is None or _is_http(path) else _find(file_system, name, listings)
        marks = (str(details[key]) for key in VERSIONS if details.get(key))
        # to http a file's key is its URL
        mark = next(marks, None) or ("" if _is_http(path) else file_system.ukey(name))
        return [without_credentials(path), details["size"] or 0, mark]


def _find(file_system: fsspec.AbstractFileSystem, name: str, listings: dict[str, dict[str, dict]]) -> dict:
    """What a file system tells of a file; asked for one, most search the whole listing of its folder each time."""
    folder = name.rpartition("/")[0]
    if folder not in listings:
        listings[folder] = {entry["name"]: entry for entry in file_system.ls(folder, detail=True)}
    return listings[folder].get(name) or file_system.info(name)


def file_format(path: str) -> tuple[str, str | None]:
    """``json``, ``jsonl`` or ``parquet``, and the compression; raises UserError for any other suffix."""
    suffix = _suffix(path)
    if suffix is None:
        advice = _advice(path) or "Give a file of one of these formats."
        raise UserError(
            f"{path} is of no format that can be read. Its name must end in {', '.join(FORMATS)}.\n{advice}"
        )
    return FORMATS[suffix]


def _advice(path: str) -> str | None:
    """What to do with data of another format; None if it is not known to be data."""
    advice = next((advice for end, advice in OTHER_FORMATS.items() if path.lower().endswith(end)), None)
    return None if advice is None else advice.format(path)


def _check_begin(path: str, begin: bytes, form: str | None) -> None:
    """Raises UserError if a file begins as one of another format than its name says."""
    found, name, way_out = next((told for start, told in BEGINS.items() if begin.startswith(start)), (form, "", ""))
    if found != form:
        raise UserError(f"{path} is {name}, other than its name says.\n{way_out}")
    if form in ("gzip", "zstd") and begin.lstrip().startswith((b"{", b"[")):
        raise UserError(
            f"{path} is no valid {form} data from line 1 on: it is not compressed.\nGive it a name that ends in .jsonl."
        )


def _suffix(path: str) -> str | None:
    name = path.partition("?")[0] if "://" in path else path
    return next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), None)


def read_chunks(path: str, start: int = 0) -> Chunks:
    """A file's bytes to its end, from byte ``start`` on if it is local and not compressed.

    Raises UserError if it cannot be read, or is not as its suffix says.
    """
    compression = file_format(path)[1]
    with _reporting(path), _open(path, block_size=0 if _is_http(path) else None) as file:
        if start:
            file.seek(start)
        chunks = _stored_chunks(file, PACKED_CHUNKS.get(compression, CHUNK), start, path, compression)
        yield from _decompress(chunks, path, compression) if compression else chunks


def _stored_chunks(file: BinaryIO, size: int, bytes_read: int, path: str, compression: str | None) -> Chunks:
    while chunk := file.read(size):
        if bytes_read == 0:
            _check_begin(path, chunk, compression)
        bytes_read += len(chunk)
        yield chunk, bytes_read


def _decompress(chunks: Chunks, path: str, compression: str) -> Chunks:
    # fsspec's reader for zstd ends without an error where a file was cut off, and after the first of several frames
    stream, line = None, 1
    for packed, bytes_read in chunks:
        while packed:
            stream = stream or DECOMPRESSORS[compression]()
            try:
                chunk = stream.decompress(packed)
            except (zlib.error, zstandard.ZstdError) as error:
                told = f"is no valid {compression} data from line {line} on: {error}.\n{COPY_AGAIN}"
                if "too much memory" in str(error):
                    told = (
                        f"needs a zstd window of more than {LARGEST_WINDOW >> 20} MiB to be read, from line {line} on."
                    )
                    told += "\nCompress it again with `zstd --long=27`, or without --long."
                raise UserError(f"{path} {told}") from error
            line += chunk.count(b"\n")
            for start in range(0, len(chunk), CHUNK):
                yield chunk[start : start + CHUNK], bytes_read
            packed, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None:
        raise UserError(f"{path} ends too early: its {compression} data breaks off in line {line}.\n{COPY_AGAIN}")


def read_rows(path: str, largest: int, group: int | None = None) -> Iterator[tuple[dict | None, int, int]]:
    """A Parquet file's rows, the bytes of each, and about how many of the file's bytes had been read for it.

    They are those of one row ``group``, or all. A row of more than ``largest`` bytes is None. Raises UserError if the
    file does not exist or cannot be read.
    """
    from pyarrow.parquet import ParquetFile  # slow to import, and only some need it

    rows = 0
    # by default pyarrow holds a row group's columns whole; it jumps between them, so that reading ahead would be wasted
    with _reporting(path), _open(path, cache_type="none") as stored:
        _check_begin(path, stored.read(64), "parquet")
        stored_bytes = stored.seek(0, os.SEEK_END)
        file = ParquetFile(stored, pre_buffer=False, buffer_size=2**22)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        mean = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        at_once = max(1, min(ROWS, ROWS_BYTES // max(1, mean)))
        # a pool of threads costs more than the rows of a small file
        chosen = None if group is None else [group]
        for batch in file.iter_batches(batch_size=at_once, row_groups=chosen, use_threads=False):
            bytes_read = stored_bytes * (rows + batch.num_rows) // file.metadata.num_rows
            rows += batch.num_rows
            if batch.nbytes <= ROWS_BYTES:
                size = batch.nbytes // max(1, batch.num_rows)
                for row in batch.to_pylist():
                    yield row, size, bytes_read
                continue
            for number in range(batch.num_rows):
                row = batch.slice(number, 1)
                yield row.to_pylist()[0] if row.nbytes <= largest else None, row.nbytes, bytes_read


def count_rows(path: str) -> list[int]:
    """Of each row group of a Parquet file; raises UserError as :func:`read_rows` does."""
    from pyarrow.parquet import ParquetFile

    with _reporting(path), _open(path, cache_type="none") as stored:
        metadata = ParquetFile(stored).metadata
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def is_local(path: str) -> bool:
    """Whether what ``path`` names lies on a disk of this machine, or what is mounted as one."""
    return "://" not in path or path.startswith(("file://", "local://"))


def _open(path: str, **options) -> BinaryIO:
    file_system, name = _file_system(path)
    return file_system.open(name, "rb", **options)


def _file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if _is_http(path):
        import aiohttp

        # aiohttp would break off any download after five minutes, and unpack a .gz file that is sent as an encoding
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
        unpack = not (_suffix(path) or "").endswith((".gz", ".zst"))
        return url_to_fs(path, client_kwargs={"timeout": timeout, "auto_decompress": unpack, "trust_env": True})
    # without a protocol "::" is a part of a name, and no chain of URLs
    file_system, name = url_to_fs(path) if "://" in path else (LocalFileSystem(), os.path.expanduser(path))
    if isinstance(file_system, LocalFileSystem):
        name = os.path.abspath(name).replace(os.sep, "/")
    return file_system, name


def _is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


@contextmanager
def _reporting(path: str, option: str | None = None) -> Iterator[None]:
    """Turn every error of any file system or of Parquet into a UserError that names the file and the reason.

    A path that a user has given is named with its ``option``.
    """
    named = path if option is None else f"{option} {path}"
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None)
        raise UserError(f"{named} needs a package that is not installed: {error}.\npip install {package}") from error
    except FileNotFoundError as error:
        if error.__cause__ is None or getattr(error.__cause__, "status", None) == 404:
            way_out = "" if option is None else f"\n{_way_to(path)}"
            raise UserError(f"{named} does not exist.{way_out}") from error
        raise UserError(f"{named} does not exist, or cannot be reached: {reason(error.__cause__)}") from error
    except Exception as error:
        raise UserError(f"{named} cannot be read: {reason(error)}") from error


def _way_to(path: str) -> str:
    """What to give in place of a path at which there is nothing."""
    files = "a file or a folder that is there, a glob, or a URL"
    if (pattern := re.sub(r"\{[^{}]*\}", "*", path)) == path:
        return f"Give {files}."
    return f"Braces stand for themselves here: give {files}, such as the glob '{pattern}'."
