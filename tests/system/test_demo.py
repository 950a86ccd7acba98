"""What the demo shows at its end, without the models that it downloads."""

from show_demo import EXPECTED, PICKED, WIDTH, answer, side_by_side


def test_answers_stand_side_by_side_in_80_columns():
    text = side_by_side({"Before": "x" * 60, "After": "To clean\n\n\x1b[2Jit, wash it. " * 4, "Teacher": ""})
    head, line, *rows = text.splitlines()
    assert head.split() == ["Before", "After", "Teacher"] and line.split() == ["------", "-----", "-------"]
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    assert [row[:WIDTH].strip() for row in rows if row[:WIDTH].strip()] == ["x" * 25, "x" * 25, "x" * 10]
    assert (
        rows[0].endswith("(nothing)")
        and [len(line) < 80 for line in EXPECTED.splitlines()] == [True] * 2
        and len(set(PICKED)) == 3
    )


def test_a_model_is_asked_greedily(teacher_dir):
    (one,), (again,) = (answer(teacher_dir, ("Alice was beginning to",), 8) for _ in range(2))
    assert one == again and one.strip()
