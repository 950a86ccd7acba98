"""What gives access is used and nowhere left behind; what data and names hold is shown, and never obeyed."""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from helpers.commands import complete
from helpers.encoding_cases import talk
from litgpt.args import LogArgs
from litgpt.prompts import Default

from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.report_akl import report_akl
from litgpt_akl.config.args import GenerationArgs
from litgpt_akl.config.recipe import check_masked, recipe_as_yaml
from litgpt_akl.data.files import identify
from litgpt_akl.data.records import place
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.messages import MASK, UserError, is_masked, masked, quoted, shown, without_credentials
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.training.logging import Progress, SpeakingFabric

pytestmark = pytest.mark.page

SECRET = "Pl4nted-s3cret"
URLS = [
    "https://alice:{}@host/data.jsonl",
    "https://{}@host/data.jsonl",
    "simplecache::ftp://alice:{}@host:21/data.jsonl",
    "s3://alice:{}@bucket/data.jsonl",
    "https://host/data.jsonl?X-Amz-Algorithm=A&X-Amz-Signature={}",
    "https://host/data.jsonl?X-Amz-Credential={}%2F20261127&X-Amz-Date=1&X-Amz-Expires=9",
    "https://host/data.jsonl?x-amz-security-token={}",
    "https://account.blob/data.jsonl?sv=2024&se=2026-11-27T16%3A00Z&sr=b&sp=r&sig={}%3D",
    "https://storage/data.jsonl?GoogleAccessId={}&Expires=17&Signature={}%2B%2F",
    "https://storage/data.jsonl?X-Goog-Credential={}&X-Goog-Signature={}",
    *(f"https://host/data.jsonl?{name}={{}}" for name in ("token", "access_token", "api_key", "password", "secret")),
    *(f"https://host/data.jsonl?{name}={{}}" for name in ("apikey", "auth", "client_secret", "jwt", "refreshToken")),
    "https://cdn/data.jsonl?Policy={}&Signature={}&Key-Pair-Id={}",
]


@pytest.mark.parametrize("url", URLS)
def test_every_kind_of_credential_is_masked_wherever_it_stands(url):
    url, other = url.replace("{}", SECRET), url.replace("{}", "another").replace("2026-11-27T16", "2026-11-28T09")
    for value in (
        url,
        f"{url}, line 3: it is bad ('{url}').",
        [url, {"path": [url]}],
        yaml.safe_dump({"data": {"path": url}}, width=10_000),
        str(OSError(0, "gone", url)),
    ):
        found = masked(value)
        assert SECRET not in str(found) and MASK in str(found) and "data.jsonl" in str(found)
        assert masked(found) == found and is_masked(masked(url)) and not is_masked(url)
    assert SECRET not in without_credentials(url)
    # a signature ends with its day, and the file stays the same
    assert without_credentials(url) == without_credentials(other)
    for error in (UserError(f"{url} is bad"), UserError(f"It is\nat {url}.")):
        assert SECRET not in str(error) and SECRET not in repr(error)
    assert SECRET not in place(url, 3)


@pytest.mark.parametrize(
    "url",
    [
        "abfs://container@account.dfs.core.windows.net/data.jsonl",
        "hf://datasets/org/name@refs%2Fconvert/data.jsonl?download=true",
        "https://host:8080/a@b/data.jsonl?part=1&author=me",
        "https://host/data.jsonl?se=1&st=2",
        "/data/hf_datasets/token=5/a.jsonl",
        "the token: 5 of pad_token: <pad>",
    ],
)
def test_what_is_no_credential_stays(url):
    assert masked(url) == without_credentials(url) == url


def test_options_are_masked_by_their_names():
    names = {"api_key", "hf_token", "password", "client_secret", "storage_options"}
    options = {name: SECRET for name in names} | {"storage_options": {"key": SECRET, "secret": SECRET, "anon": False}}
    found = masked(options | {"eos_token": "</s>", "max_tokens": 5, "token": None})
    assert SECRET not in str(found) and found["storage_options"]["anon"] is False
    assert (found["eos_token"], found["max_tokens"], found["token"]) == ("</s>", 5, None)
    for text in (
        f"key='A', secret='{SECRET}'",
        f"Authorization: Bearer {SECRET}",
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    ):
        assert SECRET not in masked(text) and "hf_A" not in masked(text)


def test_a_recipe_with_masks_is_asked_for_what_they_hide():
    data = StreamingSFT(f"https://alice:{SECRET}@host/data.jsonl")
    log = LogArgs(metadata={"api_key": SECRET})
    text = recipe_as_yaml({"data": data, "log": log})
    assert SECRET not in text and yaml.safe_load(text)["data"]["init_args"]["path"] == "https://***@host/data.jsonl"
    check_masked({"data": data, "log": log})
    for arguments, option in (
        ({"data": StreamingSFT("https://***@host/data.jsonl")}, "--data.path https://[*]{3}@host"),
        ({"log": LogArgs(metadata={"api_key": MASK})}, "--log.metadata.api_key [*]{3}:"),
    ):
        with pytest.raises(UserError, match=rf"(?s){option}.*\nGive {option.split()[0]} again"):
            check_masked(arguments)


HOSTILE = "a\x1b[2J\x07\x9b31m\u202e\u2066\u200e\ud800b"


def test_what_controls_a_terminal_is_shown(capsys):
    for text in (shown(HOSTILE), quoted(HOSTILE), str(UserError(HOSTILE)), place(f"{HOSTILE}.jsonl", 1)):
        assert text.startswith(r"a\x1b[2J\x07\x9b31m\u202e\u2066\u200e\ud800b") and text.isprintable()
    assert shown("a\r\n\tb") == "a\n\tb" and quoted("a\n\tb") == r"a\n\tb"
    assert len(quoted("x" * 5000)) == 300 and shown("👩‍👩‍👧 é \u0301") == "👩‍👩‍👧 é \u0301"
    fabric = SpeakingFabric(devices=1, accelerator="cpu")
    fabric.print(f"In {HOSTILE}")
    progress = Progress(fabric, 1, 0)
    progress.write(f"An answer\n{HOSTILE}")
    progress.close()
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and out.count(r"\x1b[2J") == 2 and "An answer\n" in out


class Handler(BaseHTTPRequestHandler):
    """Gives a file to those that know the password and the token."""

    content, asked = b"", []

    def do_GET(self) -> None:
        password = base64.b64encode(f"alice:{SECRET}".encode()).decode()
        allowed = self.headers.get("Authorization") == f"Basic {password}" and f"token={SECRET}" in self.path
        is_there = self.path.startswith("/chats.jsonl")
        self.send_response(200 if allowed and is_there else 404 if allowed else 403)
        self.send_header("Content-Length", str(len(self.content) if allowed and is_there else 0))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if allowed and is_there and self.command == "GET":
            self.asked.append(self.path)
            self.wfile.write(self.content)

    do_HEAD = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server(alice_records) -> Iterator[str]:
    chats = [{"messages": talk(record["instruction"], record["output"][:60])} for record in alice_records[:16]]
    Handler.content = "".join(json.dumps(chat) + "\n" for chat in chats).encode()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://alice:{SECRET}@127.0.0.1:{server.server_port}/chats.jsonl?token={SECRET}&X-Amz-Signature={SECRET}"
        server.shutdown()


def litgpt(*words: object) -> subprocess.CompletedProcess:
    return complete(words, COLUMNS="200")


def read_everything(*places: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}


def test_nothing_that_a_run_leaves_behind_gives_access(
    server, student_dir, teacher_dir, prepared_data, tmp_path, capfd
):
    # a folder whose name would clear the screen
    out_dir, cache = tmp_path / "out\x1b[2J", tmp_path / "cache"
    data = ["--data", "StreamingSFT", "--data.path", server, "--data.mask_prompt", "true", "--data.num_proc", "1"]
    data += ["--data.val_split_fraction", "0.3", "--data.num_workers", "0"]
    data += ["--data.prompt_style.class_path", "litgpt.prompts.Default"]
    options = {"train.max_steps": 2, "train.global_batch_size": 2, "train.save_interval": 1, "export_hf": "true"}
    options |= {"eval.interval": 1, "eval.max_new_tokens": 4, "teacher.cache_dir": cache, "distill.compile": "false"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    models = [student_dir, "--teacher_checkpoint_dir", teacher_dir]
    trained = litgpt("finetune_akl", *models, "--out_dir", out_dir, *data, *words)
    assert trained.returncode == 0, trained.stderr

    final = out_dir / "final"
    stream = StreamingSFT(server, mask_prompt=True, num_proc=1, val_split_fraction=0.3, prompt_style=Default())
    evaluate_akl(
        final,
        teacher_checkpoint_dir=teacher_dir,
        data=stream,
        out_dir=out_dir / "e",
        generation=GenerationArgs(seeds=[]),
    )
    report_akl([out_dir], out=tmp_path / "report.html")
    said = capfd.readouterr()

    # what is missing, refused, or not reached is quoted with its URL
    unreachable = server.replace("127.0.0.1:", "127.0.0.1:1")
    for url in (server.replace("chats", "missing"), server.replace("alice", "bob"), unreachable):
        with pytest.raises(UserError, match="is|cannot") as refused:
            prepare(url, student_dir)
        assert SECRET not in repr(refused.value) and MASK in str(refused.value)

    recipe = final / "hyperparameters.yaml"
    again = litgpt("finetune_akl", "--config", recipe, "--out_dir", tmp_path / "again")
    assert again.returncode == 1 and "Traceback" not in again.stderr
    assert again.stderr.strip().splitlines()[-2].startswith("error: --data.path http://***@127.0.0.1")
    assert again.stderr.strip().splitlines()[-1].startswith("Give --data.path again")
    finished = litgpt("finetune_akl", "--config", recipe, "--data.path", server, "--resume", "auto")
    assert finished.returncode == 0 and "is already finished" in finished.stdout, finished.stderr

    written = read_everything(out_dir, cache, tmp_path / "report.html", prepared_data)
    written["report"] = (tmp_path / "report.html").read_bytes()
    assert {Path(name).name for name in written} >= {
        "hyperparameters.yaml",
        "report.html",
        "examples.json",
        "cache.json",
    }
    assert [name for name, content in written.items() if SECRET.encode() in content] == []
    texts = {name: content for name, content in written.items() if Path(name).suffix in TEXTS or name == "report"}
    assert [name for name, content in texts.items() if b"\x1b" in content] == []
    for said_of in (trained, again, finished, subprocess.CompletedProcess([], 0, said.out, said.err)):
        for text in (said_of.stdout, said_of.stderr):
            assert SECRET not in text and "\x1b[2J" not in text


TEXTS = {".yaml", ".json", ".jsonl", ".html", ".csv", ".txt"}


def prepare(url: str, student_dir: Path) -> StreamingSFT:
    data = StreamingSFT(url, num_proc=1, prompt_style=Default())
    data.connect(read_tokenizer(student_dir), 1, None)
    return data.prepare(student_dir, 128)


def test_a_new_signature_is_not_other_data(server, student_dir):
    first, _ = prepare(server, student_dir)
    signed_anew = server.replace(f"Signature={SECRET}", "Signature=another")
    assert identify([signed_anew]) == identify([server])
    Handler.asked.clear()
    second, _ = prepare(signed_anew, student_dir)
    assert second.fingerprint == first.fingerprint
    # found again, not read again
    assert Handler.asked == []


def test_a_refused_record_cannot_rule_the_terminal(student_dir, tmp_path):
    for role in (HOSTILE.replace("\ud800", ""), "x" * 9000, "a\nb"):
        path = tmp_path / "chats\x1b[2J.jsonl"
        path.write_text(json.dumps({"messages": [{"role": role, "content": "a"}, *talk("b", "c")]}) + "\n")
        with pytest.raises(UserError) as refused:
            prepare(str(path), student_dir)
        assert str(refused.value).replace("\n", "").isprintable() and len(str(refused.value)) < 800
        assert str(refused.value).count("\n") == 1


def test_what_a_template_says_cannot_rule_the_terminal(student_dir, tmp_path):
    directory = shutil.copytree(student_dir, tmp_path / "student")
    (directory / "chat_template.jinja").write_text("{{ raise_exception(messages[0].content) }}")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": talk("\x1b[2J\n" * 500, "c")}) + "\n")
    with pytest.raises(UserError, match=r"refuses it: \\x1b\[2J") as refused:
        prepare(str(path), directory)
    assert str(refused.value).count("\n") == 1 and len(str(refused.value)) < 800
