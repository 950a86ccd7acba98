"""What the report shows, by its numbers: of files, of runs, of one process and of two."""

import json
import math
import shutil
import subprocess
from functools import partial
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import complete
from helpers.pages import log, made_up, made_up_examples, of_an_earlier_version, text_of
from helpers.ranks import in_processes
from helpers.runs import alice, distil, gpt, metrics
from litgpt.args import LogArgs
from litgpt.tokenizer import Tokenizer

import litgpt_akl.report.page
import litgpt_akl.training.examples
import litgpt_akl.training.reporting
from litgpt_akl.commands.report_akl import report_akl
from litgpt_akl.config.args import TeacherArgs
from litgpt_akl.files.examples import read_examples, take_examples, write_examples
from litgpt_akl.messages import UserError
from litgpt_akl.report.comparison import comparison, difference
from litgpt_akl.report.figures import COLOURS, NOISY, draw_panels
from litgpt_akl.report.history import POINTS, History, read_history, running_mean, thin, unique_names
from litgpt_akl.report.page import BARS, Shown, distributions, make_page, one_line, printable
from litgpt_akl.report.runs import read_run
from litgpt_akl.report.summary import cards, verdict
from litgpt_akl.training.examples import ALTERNATIVES, COMPARED, TOKENS
from litgpt_akl.training.logging import make_loggers

pytestmark = pytest.mark.page

OPTIONS = {"train": {"max_steps": 6}, "eval": {"interval": 3, "max_new_tokens": 6}}


@pytest.fixture(scope="module")
def run(teacher_dir, student_dir, alice_json, tmp_path_factory) -> Path:
    """A short run's directory."""
    out_dir = tmp_path_factory.mktemp("report") / "run"
    distil(student_dir, teacher_dir, alice_json, out_dir, **OPTIONS)
    return out_dir


def test_thinning_keeps_the_ends_and_what_stands_out():
    generator = np.random.default_rng(0)
    y = generator.normal(size=34_567)
    y[[20_000, 20_001]] = -50, 70
    x = np.arange(len(y)) * 3
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= POINTS and (np.diff(thin_x) > 0).all()
    assert np.array_equal(thin_y, y[thin_x // 3])
    assert (thin_x[0], thin_x[-1], thin_y.min(), thin_y.max()) == (0, x[-1], -50, 70)
    assert thin(x[:POINTS], y[:POINTS])[0] is not thin_x and len(thin(x[:POINTS], y[:POINTS])[0]) == POINTS


def test_the_running_mean_is_that_of_its_window():
    line = np.linspace(3.0, 5.0, 1000)
    np.testing.assert_allclose(running_mean(line), line)
    values = np.random.default_rng(1).normal(size=1000)
    found = running_mean(values)
    assert found[0] == values[0] and found[500] == pytest.approx(values[490:511].mean())
    assert found[3] == pytest.approx(values[:7].mean())


def test_the_log_is_read_whatever_is_in_it(tmp_path):
    log(tmp_path, "step,loss,val_loss\n7,1,\n", version=2)
    log(tmp_path, "step,loss,val_loss,val_ppl\n0,,2.5,12\n1,2.25,,\n2,nan,,\n2,,inf,9\n3,1.5", version=10)
    history = read_history(tmp_path)
    assert history.training["step"].tolist() == [1, 2] and history.training["loss"][0] == 2.25
    assert math.isnan(history.training["loss"][1])
    assert history.validation["step"].tolist() == [0, 2] and history.validation["ppl"].tolist() == [12, 9]
    page = make_page([Shown(history)])
    assert "step 2" in page and "Cross-entropy" not in page


def test_a_run_shows_what_it_has_logged(run):
    rows = metrics(run)
    history = read_history(run)
    for name, columns, prefix in (("training", history.training, ""), ("validation", history.validation, "val_")):
        own = [row for row in rows if f"{prefix}loss" in row]
        assert len(own) == {"training": 6, "validation": 3}[name]
        for column in ("loss", "cross_entropy", "agreement", "step"):
            key = column if column == "step" else prefix + column
            assert columns[column].tolist() == [row[key] for row in own]
    drawings = {drawing.panel.title: drawing for drawing in draw_panels([history])}
    assert len(drawings) == 12
    lines = {r.name: r.data_source.data for r in drawings["Cross-entropy"].figure.renderers if r.name}
    training = [row for row in rows if "loss" in row]
    assert lines["teacher"]["x"].tolist() == [row["step"] for row in training]
    np.testing.assert_allclose(lines["student"]["y"], [row["cross_entropy"] for row in training], rtol=1e-6)
    validated = [row["val_cross_entropy"] for row in rows if "val_loss" in row]
    np.testing.assert_allclose(lines["student, validation"]["y"], validated, rtol=1e-6)
    band = next(r for r in drawings["Weight of forward KL, h"].figure.renderers if not r.name).data_source.data
    spread = [math.sqrt(row["h_squared"] - row["h"] ** 2) for row in training]
    np.testing.assert_allclose(band["high"] - band["low"], 2 * np.array(spread), rtol=1e-4)
    assert [key.label for key in drawings["Gradient norm"].keys] == ["gradient norm"]
    assert drawings["Gradient norm"].figure.y_scale.__class__.__name__ == "LogScale"


@pytest.mark.parametrize(("low", "high", "expected"), [(4.0, 130.0, [5, 10, 20, 50, 100]), (0.9, 8.0, [1, 2, 5])])
def test_a_narrow_logarithmic_axis_has_labels_from_end_to_end(tmp_path, low, high, expected):
    log(tmp_path, f"step,gradient_norm\n1,{high}\n2,{low}\n")
    (drawing,) = draw_panels([read_history(tmp_path)])
    assert [tick for tick in drawing.figure.yaxis.ticker.ticks if low <= tick <= high] == expected


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "rkl"), (0.0, "cross-entropy"), (0.3, "0.3 rkl + 0.7 cross-entropy")]
)
def test_the_page_says_what_is_minimised(tmp_path, share, text):
    log(tmp_path, "step,loss\n1,2.5\n")
    recipe = {"distill": {"divergence": "rkl", "kd_ratio": share}}
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump(recipe))
    page = make_page([Shown(read_history(tmp_path))])
    assert f"<span>{text}</span>" in page and f"<dt>kd_ratio</dt><dd>{share}</dd>" in page


def test_the_page_names_the_run_and_its_validations(run, student_dir, teacher_dir, alice_json):
    page, validations = (run / "report.html").read_text(), [row for row in metrics(run) if "val_loss" in row]
    assert f"<title>{student_dir.name} from {teacher_dir.name} - distillation report</title>" in page
    for text in (student_dir, teacher_dir, alice_json, "0.5 akl + 0.5 cross-entropy", "step 6 of 6", "torch version"):
        assert str(text) in page
    first, last = validations[0], validations[-1]
    for name, written in (("val_forward_kl", "{:.3f}"), ("val_reverse_kl", "{:.3f}"), ("val_agreement", "{:.1%}")):
        before, now = (written.format(row[name]) for row in (first, last))
        assert f"before <b>{before}</b>" in page and f'<p class="now">{now}</p>' in page
    assert f'<p class="now">{last["val_gap_closed"]:.1%}</p>' in page
    assert f"{first['val_cross_entropy']:.3f} to {last['val_cross_entropy']:.3f}, teacher" in page
    assert "In 6 steps the student came closer to its teacher: forward KL went from" in page


def told(**columns: list[float]) -> History:
    """A run that has validated so."""
    validation = {name: np.array(values, dtype=float) for name, values in columns.items()}
    return History("run", validation=validation, training={"step": np.empty(0)})


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"step": []}, "This run has not validated its student yet."),
        ({"step": [0], "forward_kl": [2], "agreement": [0.25]}, "At step 0, the only one that was validated, forward"),
        ({"step": [0, 9], "forward_kl": [2, 1], "agreement": [0.25, 0.5]}, "from 2 to 1 nats per token, and agreement"),
        ({"step": [0, 9], "forward_kl": [2, 3], "agreement": [0.25, 0.2]}, "did not come closer to its teacher"),
        (
            {"step": [0, 9], "forward_kl": [2, 1], "agreement": [0.5, 0.3]},
            "but the two agree on fewer of the tokens, 30%",
        ),
        (
            {"step": [0, 4, 9], "forward_kl": [3, 1, 2], "agreement": [0, 0, 0]},
            "closest at step 4, with 1, and final/ is",
        ),
        ({"step": [0, 9], "forward_kl": [2, math.nan], "agreement": [0, 0]}, "are no numbers any more"),
        ({"step": [0, 9], "loss": [2, 1]}, "are no numbers any more"),
    ],
)
def test_one_sentence_says_how_it_went(columns, text):
    assert text in verdict(told(**columns)) and verdict(told(**columns)).endswith(".")
    assert text in make_page([Shown(told(**columns))]).replace("&#39;", "'")


def test_a_gap_that_is_none_is_said_to_be_none():
    columns = {"step": [0, 9], "gap_closed": [math.nan] * 2, "cross_entropy": [2, 1], "teacher_cross_entropy": [3, 3]}
    assert [card["title"] for card in cards(told(**columns))] == ["Forward KL", "Reverse KL", "Agreement", "Gap closed"]
    assert cards(told(**columns))[-1]["about"].endswith("2.000 to 1.000, teacher 3.000. There is no gap to close")
    columns["step"] = [3, 9]
    assert cards(told(**columns))[-1]["about"].endswith("Step 0 was not validated")


def test_examples_are_the_models_own(run, teacher_dir, student_dir, alice_json):
    """Against plain forwards of LitGPT's GPT: the student is the trained one, and at first the one it was."""
    examples, tokenizer, data = read_examples(run), Tokenizer(student_dir), alice(alice_json)
    data.connect(tokenizer=tokenizer, batch_size=1)
    data.setup()
    expected = {}
    models = {"p": gpt(teacher_dir), "latest": gpt(run / "final"), "first": gpt(student_dir)}
    for sample in [data.test_dataset[number] for number in range(3)]:
        ids = sample["input_ids"]
        with torch.no_grad():
            dense = {name: torch.softmax(model(ids[None])[0].double(), dim=-1) for name, model in models.items()}
        for place in range(len(ids) - 1):
            expected[dense["p"][place].max().item()] = {name: rows[place] for name, rows in dense.items()}
    assert (examples["first"]["step"], examples["latest"]["step"]) == (0, 6)
    assert [len(examples[name]["positions"]) for name in ("first", "latest")] == [6, 6]
    for name in ("first", "latest"):
        for position in examples[name]["positions"]:
            dense = expected[min(expected, key=lambda highest: abs(highest - position["p"][0]))]
            p, order = dense["p"].sort(descending=True)
            q = dense[name][order]
            np.testing.assert_allclose(position["p"], p[:TOKENS], atol=1e-6)
            np.testing.assert_allclose(position["q"], q[:TOKENS], atol=1e-6)
            assert position["p_others"] == pytest.approx(1 - sum(position["p"]))
            assert position["q_others"] == pytest.approx(1 - sum(position["q"]))
            head = int((p.cumsum(0) < 0.5).sum()) + 1
            assert position["head"] == head and position["head_mass"] == pytest.approx(float(p[:head].sum()), abs=1e-6)
            assert position["head_gap"] == pytest.approx(float((p - q)[:head].abs().sum()), abs=1e-5)
            assert position["tail_gap"] == pytest.approx(float((p - q)[head:].abs().sum()), abs=1e-5)
            assert position["others"] == 1024 - TOKENS


def test_the_first_sample_is_shown_with_its_labels_marked(run, student_dir, alice_json):
    tokenizer, data = Tokenizer(student_dir), alice(alice_json)
    data.connect(tokenizer=tokenizer, batch_size=1)
    data.setup()
    first, page = data.train_dataset[0], (run / "report.html").read_text()
    sample = read_examples(run)["latest"]["sample"]
    learnt = first["input_ids"][first["labels"] != -100]
    response = tokenizer.processor.decode(learnt.tolist(), skip_special_tokens=False)
    assert [text for counts, text in sample["parts"] if counts] == [response]
    for shown in (f"<mark>{escape(response)}</mark>", escape(sample["place"]), escape(sample["labels"])):
        assert shown in page


def test_answers_are_greedy_and_the_teachers_are_asked_once(run, student_dir, teacher_dir):
    examples, tokenizer = read_examples(run), Tokenizer(student_dir)
    first, latest = (examples[name]["answers"] for name in ("first", "latest"))
    assert [answer["teacher"]["ids"] for answer in first] == [answer["teacher"]["ids"] for answer in latest]
    for role, model in (("teacher", gpt(teacher_dir)), ("student", gpt(run / "final"))):
        for answer in latest:
            start = ids = tokenizer.encode(answer["prompt"])
            with torch.no_grad():
                for _ in range(6):
                    ids = torch.cat((ids, model(ids[None])[0, -1].argmax()[None]))
            text = text_of(answer[role])
            assert tokenizer.decode(ids[len(start) :]).startswith(text) and text


def test_each_token_is_as_both_models_see_it(run, teacher_dir, student_dir):
    """Against plain forwards over prompt and text; the teacher's text is seen by the student of each snapshot."""
    examples, tokenizer, teacher = read_examples(run), Tokenizer(student_dir), gpt(teacher_dir)
    for moment, student in (("first", gpt(student_dir)), ("latest", gpt(run / "final"))):
        for answer in examples[moment]["answers"]:
            prompt = tokenizer.encode(answer["prompt"])
            for role in ("teacher", "student"):
                text = answer[role]
                ids = torch.cat((prompt, torch.tensor(text["ids"])))
                with torch.no_grad():
                    p, q = (torch.log_softmax(model(ids[None])[0].double(), -1) for model in (teacher, student))
                assert len(text["tokens"]) == len(text["ids"])
                for place, (_, kl, *likely) in enumerate(text["tokens"], start=len(prompt) - 1):
                    assert kl == pytest.approx(float((p[place].exp() * (p[place] - q[place])).sum()), abs=1e-4)
                    for of_model, kept in ((p, likely[0]), (q, likely[1])):
                        highest = of_model[place].exp().topk(ALTERNATIVES).values
                        np.testing.assert_allclose([share for _, share in kept], highest, atol=1e-4)


def test_long_texts_are_compared_in_part(run, teacher_dir, student_dir, alice_json, tmp_path, monkeypatch):
    monkeypatch.setattr(litgpt_akl.training.examples, "COMPARED", 3)
    distil(student_dir, teacher_dir, alice_json, tmp_path, **OPTIONS)
    for short, whole in zip(*(read_examples(of)["first"]["answers"] for of in (tmp_path, run)), strict=True):
        for role in ("recorded", "teacher", "student"):
            tokens = [[token[:2] for token in of[role]["tokens"][:3]] for of in (short, whole)]
            assert [text for text, _ in tokens[0]] == [text for text, _ in tokens[1]] and len(short[role]["tokens"]) < 4
            np.testing.assert_allclose(*([kl for _, kl in of] for of in tokens), atol=1e-3)
            assert text_of(short[role]) == text_of(whole[role]) != ""
    assert COMPARED > 3 and (run / "examples.json").stat().st_size < 400_000


def test_two_processes_keep_what_one_does(run, teacher_dir, student_dir, alice_json, tmp_path):
    work = partial(distil, student_dir, teacher_dir, alice_json, tmp_path / "two", devices=2, **OPTIONS)
    in_processes(2, work)
    one, two = read_examples(run)["latest"], read_examples(tmp_path / "two")["latest"]
    for mine, other in zip(one["positions"], two["positions"], strict=True):
        assert mine["context"] == other["context"] and mine["next"] == other["next"]
        np.testing.assert_allclose(mine["q"], other["q"], atol=1e-4)
    for mine, other in zip(one["answers"], two["answers"], strict=True):
        assert (mine["prompt"], mine["teacher"]["ids"]) == (other["prompt"], other["teacher"]["ids"])
        for role in ("recorded", "teacher"):
            kl = [[token[1] for token in of[role]["tokens"]] for of in (mine, other)]
            np.testing.assert_allclose(*kl, atol=1e-3)
    assert (tmp_path / "two" / "report.html").is_file()


def test_a_cached_teacher_writes_no_responses(teacher_dir, student_dir, alice_json, tmp_path):
    cached = OPTIONS | {"teacher": TeacherArgs(cache_dir=str(tmp_path / "cache"))}
    for name in ("fills", "reads"):
        distil(student_dir, teacher_dir, alice_json, tmp_path / name, **cached)
    filled, read = (read_examples(tmp_path / name)["latest"] for name in ("fills", "reads"))
    assert "only its LM head is loaded" in (tmp_path / "reads" / "report.html").read_text(encoding="utf-8")
    assert read["positions"] == filled["positions"]
    for mine, other in zip(read["answers"], filled["answers"], strict=True):
        assert mine["recorded"] == other["recorded"] and "teacher" not in mine and other["teacher"]["ids"]
        assert mine["student"]["ids"] == other["student"]["ids"] and mine["student"]["tokens"] == []
        assert text_of(mine["student"]) == text_of(other["student"])


def test_a_run_of_an_earlier_version_is_shown_and_goes_on(run, tmp_path):
    """Its texts are there, and the page says what is not; a snapshot of today beside it is shown in full."""
    examples = read_examples(run)
    shutil.copytree(run / "logs", tmp_path / "logs")
    write_examples(tmp_path, *(of_an_earlier_version(examples[name]) for name in ("first", "latest")))
    found = take_examples(tmp_path, True, pytest.fail)
    page = make_page([read_run(tmp_path, pytest.fail)])
    for mine, other in zip(found["latest"]["answers"], examples["latest"]["answers"], strict=True):
        assert "recorded" not in mine and mine["prompt"] == other["prompt"] and escape(mine["prompt"]) in page
        for role in ("teacher", "student"):
            assert mine[role] == {"tokens": [], "rest": text_of(other[role])}
            assert escape(text_of(other[role]).strip()) in page
    write_examples(tmp_path, found["first"], examples["latest"])
    assert read_examples(tmp_path) == {"first": found["first"], "latest": examples["latest"]}


def test_what_cannot_be_written_does_not_end_the_run(
    teacher_dir, student_dir, alice_json, tmp_path, monkeypatch, capsys
):
    """In its middle; after the last step it is an error (test_last_step.py)."""
    validate, taken = litgpt_akl.training.reporting.validate, [tmp_path / "report.html"]

    def validate_where_names_are_taken(fabric, run, state, *arguments):
        for path in taken:
            if state["step_count"] == 1:
                (path / "something").mkdir(parents=True)
            else:
                shutil.rmtree(path)
        return validate(fabric, run, state, *arguments)

    monkeypatch.setattr(litgpt_akl.training.reporting, "validate", validate_where_names_are_taken)
    monkeypatch.setattr(litgpt_akl.training.reporting, "PAGE_SECONDS", 0.0)
    options = {"train": {"max_steps": 2}, "eval": {"initial_validation": False, "interval": 1}}
    distil(student_dir, teacher_dir, alice_json, tmp_path, **options)
    told = capsys.readouterr().out
    assert told.count("report.html was not refreshed (IsADirectoryError") == 1
    assert (tmp_path / "final" / "lit_model.pth").is_file() and all(path.is_file() for path in taken)


@pytest.mark.parametrize(("seconds", "drawn"), [(0.0, 4), (600.0, 1)])
def test_a_page_that_is_new_is_drawn_again_at_the_end_only(
    teacher_dir, student_dir, alice_json, tmp_path, monkeypatch, seconds, drawn
):
    steps, live, write_page = [], [], litgpt_akl.report.page.write_page

    def write_and_count(path, shown, goes_on, stopped):
        steps.append(shown[0].history.validation["step"][-1])
        live.append(goes_on)
        write_page(path, shown, goes_on, stopped)

    monkeypatch.setattr(litgpt_akl.report.page, "write_page", write_and_count)
    monkeypatch.setattr(litgpt_akl.training.reporting, "PAGE_SECONDS", seconds)
    distil(student_dir, teacher_dir, alice_json, tmp_path, train={"max_steps": 3}, eval={"interval": 1})
    assert len(steps) == drawn and steps[-1] == 3
    # the last one reloads itself no more
    assert live == [True] * (drawn - 1) + [False]


def test_a_new_run_forgets_the_one_before(teacher_dir, student_dir, alice_json, tmp_path):
    (tmp_path / "examples.json").write_text(json.dumps({"first": {"step": 3}, "latest": {"step": 3}}))
    options = {"train": {"max_steps": 1}, "eval": {"initial_validation": False, "final_validation": True}}
    distil(student_dir, teacher_dir, alice_json, tmp_path, **options)
    examples = read_examples(tmp_path)
    assert examples["first"]["step"] == 1 and all(
        {*answer} == {"prompt", "recorded"} for answer in examples["latest"]["answers"]
    )
    assert "max_new_tokens is null" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_logger_has_a_csv_file_beside_it(tmp_path):
    options = {"name": "x", "resume": False, "log_interval": 1, "log": LogArgs()}
    assert [logger.__class__.__name__ for logger in make_loggers("csv", tmp_path, **options)] == ["MetricsLogger"]
    pytest.importorskip("tensorboard")
    names = [logger.__class__.__name__ for logger in make_loggers("tensorboard", tmp_path, **options)]
    assert names == ["TensorBoardLogger", "MetricsLogger"]


def test_several_runs_have_a_colour_each(run):
    other = History("other", training={name: column + 1 for name, column in read_history(run).training.items()})
    other.validation = {"step": np.empty(0)}
    drawing = next(of for of in draw_panels([read_history(run), other]) if of.panel.title == "Cross-entropy")
    lines = {of.name: (of.glyph.line_color, of.glyph.line_dash, of.tags) for of in drawing.figure.renderers if of.name}
    assert lines["run: student"] == (COLOURS[0], [], [0]) and lines["run: teacher"] == (COLOURS[0], [6], [0])
    assert lines["other: student"] == (COLOURS[1], [], [1]) and "other: student, validation" not in lines
    assert [(key.label, key.dash) for key in drawing.keys] == [("student", "solid"), ("teacher", "dashed")]
    assert unique_names([Path("/a/x/run"), Path("/a/y/run"), Path("/a/y/last")]) == ["x/run", "y/run", "y/last"]


def test_runs_keep_their_colours_in_distributions():
    first, second = (Shown(made_up(name, 20), made_up_examples()) for name in ("a", "b"))
    alone, both = distributions([first])[0], distributions([first, second])[0]
    assert [key[:2] for key in alone["keys"]] == [
        ["teacher", COLOURS[1]],  # as in the figure of the cross-entropies
        ["student before, step 0", COLOURS[2]],
        ["student now, step 9", COLOURS[0]],
    ]
    once = made_up_examples()["latest"]
    assert (
        distributions([Shown(made_up("a", 20), {"first": once, "latest": once})])[0]["keys"][1][0] == "student, step 9"
    )
    assert [key[0] for key in both["keys"]] == ["teacher", "a", "b"]
    assert [key[1] for key in both["keys"][1:]] == [*COLOURS[:2]]


def test_the_recorded_token_is_marked_wherever_it_is():
    shown = distributions([Shown(made_up("a", 20), made_up_examples())])
    for number, position in enumerate(shown):
        rank = 7 * number
        rows = [row for row in position["rows"] if row["is_recorded"]]
        assert [row["rank"] for row in rows] == [rank + 1]
        assert len(position["rows"]) == BARS + (rank >= BARS)
        if rank >= TOKENS:
            assert rows[0]["values"] == [0.01, 0.02, 0.02]
    old = made_up_examples()
    for moment in old.values():
        for position in moment["positions"]:
            position.pop("next_rank", None)
    # EVIL is both the recorded token and the first of them
    assert [row["is_recorded"] for row in distributions([Shown(made_up("a", 20), old)])[0]["rows"]][:2] == [True, False]


def test_the_kl_of_an_answer_is_the_mean_over_its_tokens(run):
    examples = read_examples(run)
    mean = {
        moment: [np.mean([token[1] for token in answer["teacher"]["tokens"]]) for answer in examples[moment]["answers"]]
        for moment in ("first", "latest")
    }
    page = (run / "report.html").read_text()
    other = Shown(History("other", training={"step": np.empty(0)}, validation={"step": np.empty(0)}), examples)
    both = make_page([read_run(run, pytest.fail), other])
    for first, latest in zip(mean["first"], mean["latest"], strict=True):
        assert f'teacher <span class="faint">KL {first:.2f} &#8594; {latest:.2f}</span>' in page
        # of several runs one text has several
        assert f'teacher <span class="faint">KL {latest:.2f}, {latest:.2f}</span>' in both


def test_answers_to_one_prompt_are_not_mixed_up():
    examples = made_up_examples()
    for snapshot in examples.values():
        for number, answer in enumerate(snapshot["answers"]):
            answer["prompt"], answer["student"] = "the same", {"tokens": [], "rest": f"answer {number}"}
    page = make_page([Shown(made_up("a", 20), examples)])
    assert [page.count(f"answer {number}<") for number in range(3)] == [2, 2, 2]


def test_no_credential_is_seen_in_the_tokens_of_a_text():
    examples, secret = made_up_examples(), "hf_AbCdEfGhIjKlMnOpQrStUvWx"
    pieces = [[piece, 1.0, [[" a", 0.5]] * 5, [[" b", 0.5]] * 5] for piece in ("Token ", secret[:9], secret[9:])]
    examples["latest"]["answers"][0]["student"] = {"tokens": pieces, "rest": " it is"}
    page = make_page([Shown(made_up("a", 20), examples)])
    assert "Token *** it is" in page and secret[9:] not in page


def test_what_is_the_same_is_drawn_once(tmp_path):
    rows = "".join(f"{step},{1 / step},{1 / step},{2 / step},{1 / step},0.5\n" for step in range(1, 9))
    for name, recipe, titles in (
        ("fkl", {"divergence": "fkl"}, ["Forward and reverse KL"]),
        ("akl", {"divergence": "akl"}, ["Forward and reverse KL", "Weight of forward KL, h"]),
    ):
        log(tmp_path / name, f"step,loss,forward_kl,reverse_kl,divergence,h\n{rows}")
        (tmp_path / name / "hyperparameters.yaml").write_text(yaml.safe_dump({"distill": {**recipe, "kd_ratio": 1.0}}))
        drawings = draw_panels([read_history(tmp_path / name)])
        assert [drawing.panel.title for drawing in drawings] == titles
        assert "Loss is the same as forward. Divergence is the same as forward." in drawings[0].about
    both = draw_panels([read_history(tmp_path / name) for name in ("fkl", "akl")])
    assert {tag for of in both[-1].figure.renderers for tag in of.tags} == {1} and len(both) == 2


def test_the_step_before_training_stands_alone():
    steps = np.array([0.0, 5, 10])
    run = History("a", validation={"step": steps, "loss": np.array([9.0, 2, 1])}, training={"step": np.empty(0)})
    line, dots = draw_panels([run])[0].figure.renderers
    assert line.data_source.data["x"].tolist() == [5, 10] and dots.data_source.data["x"].tolist() == [0, 5, 10]


def repeated(scale: float = 1.0) -> list[Shown]:
    """Two objectives with three seeds each."""
    runs, random = [], np.random.default_rng(0)
    for name, seed in ((name, seed) for name in ("akl", "fkl") for seed in (1, 2, 3)):
        history = told(step=[0, 9], forward_kl=[5, 1 + (name == "fkl") * scale + random.normal(0, 0.1)])
        history.validation["teacher_cross_entropy"] = np.array([2.0, 2.0])
        history.name, history.recipe = (
            f"{name}-{seed}",
            {"distill": {"divergence": name}, "seed": seed, "out_dir": name},
        )
        runs.append(Shown(history))
    return runs


def test_runs_are_compared_by_what_differs():
    runs = repeated()
    found = comparison([run.history for run in runs])
    assert [head for head, _ in found["heads"]] == ["distill.divergence", "seed", "Forward KL"]
    assert [row["cells"][:2] for row in found["rows"]][3] == [("fkl", False), ("1", False)]
    values = [run.history.validation["forward_kl"][-1] for run in runs]
    assert [row["cells"][2][1] for row in found["rows"]] == [value == min(values) for value in values]
    assert found["warnings"] == [] and found["verdict"].startswith("Closest to the teacher by forward KL")
    runs[1].history.validation["teacher_cross_entropy"] += 0.1
    runs[2].history.recipe["teacher_checkpoint_dir"] = "another"
    runs[3].history.training["step"] = np.array([12.0])
    warnings = comparison([run.history for run in runs])["warnings"]
    assert ["other data" in warnings[0], "other teachers" in warnings[1], "different steps" in warnings[2]] == [
        True
    ] * 3
    page = make_page(runs)
    assert page.count('<input type="checkbox" class="run"') == 6 and page.count('class="warning"') == len(warnings) == 3


@pytest.mark.parametrize(("scale", "verdict"), [(1.0, ""), (0.0, "not told apart")])
def test_differences_between_repeats_have_an_interval(scale, verdict):
    from scipy import stats

    runs = [run.history for run in repeated(scale)]
    (row,) = comparison(runs)["repeats"]
    last = np.array([run.validation["forward_kl"][-1] for run in runs]).reshape(2, 3)
    low, high = stats.ttest_rel(*last).confidence_interval(0.95)
    assert row[:2] == ["Forward KL", "divergence akl (3), divergence fkl (3)"] and row[-1] == verdict
    assert row[3:5] == [f"{(last[0] - last[1]).mean():.3f}", f"{low:.3f} to {high:.3f}"]
    one, other = dict(zip("abc", last[0], strict=True)), dict(zip("defg", [*last[1], 3.0], strict=True))
    welch = stats.ttest_ind([*one.values()], [*other.values()], equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(difference(one, other)[::2], [welch.low, welch.high], rtol=1e-3)


def test_noise_stands_behind_its_mean():
    steps = np.arange(1.0, 5001)
    noisy = History("noisy", training={"step": steps, "loss": np.sin(steps)}, validation={"step": np.empty(0)})
    behind, mean = draw_panels([noisy])[0].figure.renderers[:2]
    assert len(behind.data_source.data["x"]) <= POINTS and behind.data_source.data["y"].max() > 0.999
    assert len(mean.data_source.data["x"]) == POINTS // 2 and abs(mean.data_source.data["y"][250]) < 0.05
    few = {name: column[: NOISY - 1] for name, column in noisy.training.items()}
    (line,) = draw_panels([History("few", training=few, validation={"step": np.empty(0)})])[0].figure.renderers
    assert len(line.data_source.data["x"]) == NOISY - 1


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_are_seen_on_light_and_on_dark():
    assert min(contrast(colour, ground) for colour in COLOURS for ground in ("#ffffff", "#171b21")) >= 3


def test_any_text_can_be_shown():
    assert printable("a\x1b[31m\x00\u202eb\r\n\tc\ud800") == "a\ufffd[31m\ufffd\ufffdb\n\tc\ufffd"
    assert one_line(" a b\n", 10) == "\u2423a\u2423b\u21b5" and one_line("abcdef", 4) == "abc\u2026"


def command(*words, cwd) -> subprocess.CompletedProcess:
    return complete(["report_akl", *words], directory=cwd)


def test_the_command_lays_runs_over_each_other(run, tmp_path):
    done = command(run, run.parent / "run" / ".." / "run", run / "..", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {run.parent} holds no metrics")
    log(tmp_path / "other", "step,loss\n1,2\n2,1\n")
    done = command(run, tmp_path / "other", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'report.html'}: run, other\n"
    assert "other: loss" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_command_says_what_is_wrong(tmp_path):
    log(tmp_path / "broken", "a,b\nx,y\n")
    log(tmp_path / "fine", "step,loss\n1,2\n")
    (tmp_path / "out").mkdir()
    for runs, out, message in (
        ([tmp_path / "no"], "x.html", "The run .*no is not a directory. Give the --out_dir of a run"),
        ([tmp_path], "x.html", "holds no metrics"),
        ([tmp_path / "broken"], "x.html", r"metrics.csv \(.* bytes\) cannot be read"),
        ([tmp_path / "fine"], "out", "out is a directory. Give the name of a file"),
        ([tmp_path / "fine"], "none/x.html", "--out .*none/x.html: .*none does not exist.\nMake that folder"),
    ):
        with pytest.raises(UserError, match=message):
            report_akl(runs, out=tmp_path / out)
