"""Where LAMMPS inputs are cut: nothing lost, nothing run twice, and what cannot be cut is refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carryall.engines.lammps.script import Cut, Text, leaps, logical_lines, split_script, split_words
from carryall.errors import InputError

PLAIN = """units metal
pair_style carryall model.pt2   # the potential
neighbor 1.0 bin
pair_coeff * * Cu Au
run 10
"""
HEAD = "units metal\nread_data ${file}\n"
PAIR = "pair_style carryall m.pt2\npair_coeff * * Cu\n"


def split(text: str, files: dict[str, str] | None = None, attach: bool = False) -> list[Text | Cut]:
    return split_script("in.lmp", text, (files or {}).get, attach=attach)


def shown(steps: list[Text | Cut]) -> list[str]:
    """Texts as they are, cuts as `kind: arguments`."""
    return [step.text if isinstance(step, Text) else f"{step.kind}: {step.arguments}" for step in steps]


def refused(text: str, files: dict[str, str] | None = None, attach: bool = False) -> str:
    with pytest.raises(InputError) as error:
        split(text, files, attach)
    return str(error.value)


def test_a_script_is_cut_at_style_and_coefficients():
    assert shown(split(PLAIN)) == [
        "units metal\n",
        "style: model.pt2",
        "neighbor 1.0 bin\n",
        "coeff: * * Cu Au",
        "run 10\n",
    ]
    assert [step.where for step in split(PLAIN)] == [f"in.lmp, line {number}" for number in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("pair_style carryall", ""),
        ("  pair_style\tcarryall   ${model}  # a ' b", "${model}"),
        ("pair_style carryall 'my # model.pt2'", "'my # model.pt2'"),
        ("pair_style carryall &\n  model.pt2", "model.pt2"),
        ("pair_style &  \ncarryall \\\n", "\\"),
        ('pair_style carryall """a b"""', '"""a b"""'),
    ],
)
def test_arguments_are_what_lammps_would_pass(line, arguments):
    steps = split(f"{line}\npair_coeff * * Cu\n")
    assert shown(steps)[:1] == [f"style: {arguments}"]


def test_continuation_quotes_and_comments_are_those_of_lammps():
    text = (
        "print 'pair_style carryall x'\n"
        '# pair_style carryall y &\npair_style carryall z\nprint """one\npair_style carryall two\n# three"""\n'
        "pair_style carryall m.pt2\npair_coeff * * Cu &\n   Au # last"
    )
    steps = split(text)
    assert [one.arguments for one in steps if isinstance(one, Cut)] == ["m.pt2", "* *" + " Cu    Au"]
    assert "".join(step.text for step in steps) == text


def test_loops_that_no_cut_divides_stay_whole():
    loop = 'variable i loop 3\nlabel again\nif "$i > 1" then "jump SELF skip"\nrun 5\nlabel skip\nnext i\njump SELF again\n'
    before = loop.replace("run 5", "print x").replace("again", "first").replace("skip", "past")
    assert shown(split(before + PAIR + loop)) == [before, "style: m.pt2", "coeff: * * Cu", loop]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"variable i loop 2\nlabel a\nclear\n{HEAD}{PAIR}run 1\nnext i\njump SELF a\n", 10),
        (f'{HEAD}if "$x == 1" then "jump SELF end"\n{PAIR}run 1\nlabel end\n', 3),
        (f"{HEAD}{PAIR}label ${{where}}\njump SELF ${{where}}\n", 6),
        (f"{HEAD}{PAIR}run 1\nnext i\njump SELF\n", 7),
        (f'{HEAD}run 0 every 1 "jump SELF b"\n{PAIR}label b\n', 3),
    ],
)
def test_a_jump_across_a_cut_is_refused(text, line):
    message = refused(text)
    assert message.startswith(f"in.lmp, line {line}: this jump leads across")
    assert "carryall build-lammps" in message


def test_a_jump_to_another_file_may_only_be_the_end():
    assert len(split(f"{HEAD}{PAIR}jump rest.in\n")) == 4
    assert "line 1: `jump` to another file" in refused(f'if "$x" then "jump rest.in"\n{PAIR}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pair_style hybrid/overlay carryall zbl 1 2\n", "`pair_style hybrid/overlay` mixes carryall"),
        ("pair_style hybrid lj/cut 3.0 carryall m.pt2\n", "`pair_style hybrid` mixes carryall"),
        ('if "$x == 1" then "pair_style carryall m.pt2"\n', "`pair_style` inside `if`"),
        ('if "$x == 1" then "print x" &\n else "if 1 then \'pair_style carryall m\'"\n', "`pair_style` inside `if`"),
        ('pair_style carryall m\nif "$x" then "pair_coeff * * Cu"\n', "`pair_coeff` inside `if`"),
        ("pair_style carryall m\nrun 3\npair_coeff * * Cu\n", "has no `pair_coeff * * Cu ...` after it"),
        ("pair_style carryall m\n", "line 1: `pair_style carryall` has no `pair_coeff"),
        ("pair_style carryall m\npair_style carryall n\n", "line 2: `pair_style carryall` has no `pair_coeff"),
        ("run 1\n", "in.lmp has no line `pair_style carryall FILE`"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(text, expected):
    assert expected in refused(text)


def test_several_potentials_after_clear_and_other_styles():
    first = f"{HEAD}{PAIR}run 1\nclear\n{HEAD}pair_style lj/cut 3.0\npair_coeff 1 1 1 1\n"
    text = f"{first}{PAIR}pair_style zbl 1 2 # x\npair_coeff * * 1\n"
    assert shown(split(text)) == [
        HEAD,
        "style: m.pt2",
        "coeff: * * Cu",
        f"run 1\nclear\n{HEAD}pair_style lj/cut 3.0\npair_coeff 1 1 1 1\n",
        "style: m.pt2",
        "coeff: * * Cu",
        "other style: pair_style zbl 1 2",
        "pair_coeff * * 1\n",
    ]


def test_included_files_with_the_potential_are_followed():
    files = {"outer.in": "include inner.in\nprint b\n", "inner.in": f"print a\n{PAIR}", "other.in": "print c\nlabel x\n"}
    steps = split("include other.in\ninclude outer.in # here\nrun 1\n", files)
    assert shown(steps) == ["include other.in\n", "print a\n", "style: m.pt2", "coeff: * * Cu", "print b\n", "run 1\n"]
    assert [step.where for step in steps][1:5] == [
        "inner.in, line 1",
        "inner.in, line 2",
        "inner.in, line 3",
        "outer.in, line 2",
    ]


def test_a_loop_around_an_included_potential_is_refused():
    text = "label a\ninclude pot.in\nrun 1\njump SELF a\n"
    assert refused(text, {"pot.in": PAIR}).startswith("in.lmp, line 4: this jump")
    assert len(split("label a\ninclude none.in\njump SELF a\n" + PAIR, {"none.in": "run 1\n"})) == 3


def test_a_file_that_includes_itself_is_refused():
    assert "includes itself" in refused("include a.in\n", {"a.in": "include b.in\n", "b.in": f"{PAIR}include a.in\n"})


def test_attached_before_the_first_run_and_again_after_clear():
    text = f"{HEAD}velocity all create 300 1\nrun 5\nminimize 0 1e-3 1 1\nclear\n{HEAD}rerun dump.x\n"
    assert shown(split(text, attach=True)) == [
        f"{HEAD}velocity all create 300 1\n",
        "attach: ",
        f"run 5\nminimize 0 1e-3 1 1\nclear\n{HEAD}",
        "attach: ",
        "rerun dump.x\n",
    ]


def test_attached_outside_of_loops():
    head = f"{HEAD}variable i loop 3\n"
    text = f'{head}label a\nprint "$i"\nif "$i > 2" then "jump SELF end"\nrun 5\nnext i\njump SELF a\nlabel end\n'
    assert shown(split(text, attach=True)) == [head, "attach: ", text[len(head) :]]


@pytest.mark.parametrize(
    "line", ["include runs.in", "include ${x}.in", "include absent.in", "${command} 5", "jump runs.in", 'if "$x" then "run 5"']
)
def test_attached_before_whatever_may_run(line):
    text = f'pair_style zero 6.0\nif "${{a}} == run" then "print x"\n{line}\nrun 7\n'
    steps = split(text, {"runs.in": "run 5\n"}, attach=True)
    assert [step.text for step in steps if isinstance(step, Cut)] == [""]
    assert steps[1].where == "in.lmp, line 3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pair_style lj/cut 5\nrun 1\n", "line 1: the script has a pair style of its own"),
        ('if "$x" then "pair_style ${y}"\nrun 1\n', "line 1: the script has a pair style of its own"),
        ("include lj.in\nrun 1\n", "line 1: the script has a pair style of its own"),
        ("run 1\npair_style zero 5\nrun 1\n", "line 2: `pair_style` after a run would drop"),
        (
            "variable i loop 2\nlabel a\nclear\nrun 1\nnext i\njump SELF a\n",
            "line 4: the potential would have to be attached inside",
        ),
        ('run 1\nif "$x" then clear\nrun 1\n', "line 2: `clear` where it cannot be followed"),
        ("print x\n", "none of the commands that need a potential"),
        ("label a\nrun 1\nclear\nread_data x\nrun 1\njump SELF a\n", "line 5: the potential would have to be attached inside"),
        ("run 1\njump SELF ${a}\n", "line 2: this jump leads across"),
    ],
)
def test_what_cannot_be_attached_is_refused_by_name(text, expected):
    assert expected in refused(text, {"lj.in": "pair_style lj/cut 5\n"}, attach=True)


def test_words_are_those_of_lammps():
    assert split_words('a \'b c\' "d \'e\'" """f "g" h""" i\'j') == ["a", "b c", "d 'e'", 'f "g" h', "i'j"]


LINES = st.sampled_from(
    ("run 1", "label a", "label b", "jump SELF a", "jump SELF b", "clear", "# x &", "print 'a", 'print """x', '"""', "", " &")
)
OTHERS = st.sampled_from(
    (
        "pair_style carryall m.pt2",
        "pair_coeff * * Cu",
        "pair_style zero 3",
        "include two.in",
        "\x0bform",
        "\x1e",
        "p # c \r",
        "&",
    )
)
TEXTS = st.builds(lambda lines, end: "\n".join(lines) + end, st.lists(LINES | OTHERS, max_size=12), st.sampled_from(["", "\n"]))


@given(TEXTS)
def test_lines_are_the_file(text):
    assert "".join(line.text for line in logical_lines(text, "x")) == text


@given(TEXTS, TEXTS.filter(lambda text: "include" not in text), st.booleans())
def test_steps_are_the_script_and_no_jump_leaves_its_part(text, included, attach):
    files = {"two.in": included}
    try:
        steps = split(text, files, attach)
    except InputError:
        return
    whole = "".join(step.text for step in steps)
    lines = logical_lines(text, "in.lmp")
    if whole != text:  # the included file stands in place of its line
        assert whole == "".join(included if line.words[:1] == ["include"] else line.text for line in lines)
    for step in steps:
        if isinstance(step, Text):
            assert step.text
            lines = logical_lines(step.text, "part")
            assert not any(line.words[:2] == ["pair_style", "carryall"] for line in lines)
    assert {step.kind for step in steps if isinstance(step, Cut)} <= {"style", "coeff", "other style", "attach"}


@given(st.lists(LINES | OTHERS, max_size=12))
def test_a_jump_finds_the_same_line_in_its_part(lines):
    text = "".join(f"{line}\n" for line in lines if "include" not in line)
    try:
        steps = split(text)
    except InputError:
        return
    whole = logical_lines(text, "in.lmp")
    expected = [(whole[leap.start].number, whole[leap.target].number) for leap in leaps(whole) if leap.target is not None]
    found = []
    for step in (one for one in steps if isinstance(one, Text)):
        begin = int(step.where.split()[-1]) - 1
        part = logical_lines(step.text, "part")
        found += [
            (part[leap.start].number + begin, part[leap.target].number + begin)
            for leap in leaps(part)
            if leap.target is not None
        ]
    assert found == expected
