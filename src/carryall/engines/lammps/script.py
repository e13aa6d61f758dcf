"""LAMMPS inputs for the driver: where to cut them, so that the same text runs here and with the compiled pair style.

LAMMPS does not know `pair_style carryall` unless the plugin is loaded. The driver lets LAMMPS read the text up to that line as
a file, does what the line says, and goes on with the rest. LAMMPS itself still reads loops, conditions, variables and included
files; what reaches across a cut is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from carryall.errors import InputError

STYLE = "carryall"
RUNS = frozenset(
    (
        "run",
        "minimize",
        "rerun",
        "dynamical_matrix",
        "third_order",
        "neb",
        "neb/spin",
        "tad",
        "prd",
        "temper",
    )
)
"""Commands of LAMMPS that need forces."""
UNKNOWN = "?"
"""Stands for commands that only LAMMPS can know: of a file that cannot be read, or named by a variable."""
PLUGIN = "the compiled pair style reads any input: carryall build-lammps, then carryall lammps --engine plugin"

Read = Callable[[str], str | None]
"""Text of a file by the name in the script, None where there is none."""
CutKind = Literal["style", "coeff", "other style", "attach"]


@dataclass(frozen=True)
class Line:
    """A command with its continuation lines."""

    text: str
    """As it stands, with every newline."""
    code: str
    """Joined as LAMMPS does, without the comment."""
    file: str
    number: int
    """Of its first line in the file, from 1."""

    @property
    def words(self) -> list[str]:
        """Arguments, without quotes."""
        return split_words(self.code)

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.file}, line {self.number}"


@dataclass(frozen=True)
class Text:
    """What LAMMPS reads as a file of its own."""

    text: str
    where: str


@dataclass(frozen=True)
class Cut:
    """What the driver does itself: choose a model ("style"), attach it ("coeff", "attach"), detach it ("other style")."""

    kind: CutKind
    text: str
    """The lines that were cut out; none for "attach"."""
    arguments: str
    """What follows the command (and the style's name), variables not replaced; of "other style", the whole command."""
    where: str


Step = Text | Cut


@dataclass(frozen=True)
class Place:
    """A line in the order of the run; lines of one copy of a file have one `copy` number."""

    line: Line
    copy: int
    cut: CutKind | None = None


def split_script(name: str, text: str, read: Read, *, attach: bool = False) -> list[Step]:
    """Steps whose texts, one after the other, are the script, with included files that choose the pair style in place.

    A script without `pair_style carryall` is cut before its first run (and the first after each `clear`) when `attach` says
    that there is a potential to attach. InputError for what cannot run in pieces.
    """
    places = _inlined(name, text, read, (name,), [0])
    if any(_is_style(command) for place in places for command in commands(place.line)):
        return _steps(_checked(list(_cut_at_styles(places))))
    if not attach:
        raise InputError(
            f"{name} has no line `pair_style {STYLE} FILE`: write one, with `pair_coeff * * Cu ...` below, or give a potential"
        )
    lines = [Place(line, 0) for line in logical_lines(text, name)]
    return _attached(name, lines, read)


def logical_lines(text: str, file: str) -> list[Line]:
    """Commands of a file; their texts, one after the other, are the file's."""
    found: list[Line] = []
    raw, code, first = "", "", 1
    # LAMMPS ends lines at \n only, which str.splitlines does not
    for number, piece in enumerate(re.findall(r"[^\n]*\n|[^\n]+", text), 1):
        raw, code = raw + piece, (code + piece).rstrip(" \t\n\r\v\f")
        if code.endswith("&"):
            code = code[:-1]
        elif code.count('"""') % 2:
            code += "\n"
        else:
            found.append(Line(raw, _without_comment(code), file, first))
            raw, code, first = "", "", number + 1
    return [*found, Line(raw, _without_comment(code), file, first)] if raw else found


def _without_comment(code: str) -> str:
    place = 0
    while place < len(code):
        if code[place] == "#":
            return code[:place]
        quote = next((one for one in ('"""', '"', "'") if code.startswith(one, place)), None)
        if quote is None:
            place += 1
            continue
        end = code.find(quote, place + len(quote))
        if end < 0:  # LAMMPS refuses it
            return code
        place = end + len(quote)
    return code


def split_words(code: str) -> list[str]:
    """Words as LAMMPS takes them: quotes hold words together and are dropped."""
    found = re.findall(r'"""(.*?)"""|"([^"]*)"|\'([^\']*)\'|(\S+)', code, re.DOTALL)
    return ["".join(groups) for groups in found]


def commands(line: Line) -> list[list[str]]:
    """The words of the line's command and of those that it may run: `if ... then "..."`, `run N every M "..."`."""
    return list(_commands(line.words))


def _commands(words: list[str]) -> Iterator[list[str]]:
    if not words:
        return
    yield words
    if words[0] == "if":
        starts = [k for k, word in enumerate(words) if word in ("then", "else")]
        conditions = [k + 1 for k, word in enumerate(words) if word == "elif"]
        inner = [word for k, word in enumerate(words) if starts and k > starts[0] and k not in conditions]
    elif words[0] == "run" and "every" in words:
        inner = words[words.index("every") + 2 :]
    else:
        return
    for word in inner:
        yield from _commands(split_words(word))


def _is_style(words: Sequence[str]) -> bool:
    return words[0] == "pair_style" and STYLE in words[1:]


def _inlined(name: str, text: str, read: Read, within: tuple[str, ...], copies: list[int]) -> list[Place]:
    """Lines with those of included files that choose or set a pair style."""
    copy = copies[0]
    copies[0] += 1
    found: list[Place] = []
    for line in logical_lines(text, name):
        words = line.words
        held = _commands_within(words, read, within) if words[:1] == ["include"] else frozenset()
        if not held & {"pair_style", "pair_coeff"}:
            found.append(Place(line, copy))
            continue
        inner = read(words[1]) or ""
        found += _inlined(words[1], inner, read, (*within, words[1]), copies)
    return found


def _commands_within(words: Sequence[str], read: Read, within: tuple[str, ...]) -> frozenset[str]:
    """Names of all commands that `include FILE` may run."""
    file = words[1] if len(words) > 1 else ""
    text = None if "$" in file or not file else read(file)
    if text is None:
        return frozenset({UNKNOWN})
    if file in within:
        raise InputError(f"{file} includes itself, through {' and '.join(within)}")
    found: set[str] = set()
    for line in logical_lines(text, file):
        for command in commands(line):
            found.add(_named(command))
            if command[0] == "include":
                found |= _commands_within(command, read, (*within, file))
    return frozenset(found)


def _named(words: Sequence[str]) -> str:
    leaves = words[0] == "jump" and words[1:2] != ["SELF"]
    return UNKNOWN if "$" in words[0] or leaves else words[0]


def _cut_at_styles(places: Sequence[Place]) -> Iterator[Place]:
    """Each line, with what the driver has to do there."""
    styled, waiting = False, ""
    for place in places:
        line = place.line
        cut: CutKind | None = None
        for inner in commands(line)[1:]:
            if _is_style(inner) or (styled and inner[0] in ("pair_style", "pair_coeff")):
                _refuse(
                    line,
                    f"`{inner[0]}` inside `{line.words[0]}` cannot be followed: write it as a line of its own",
                )
        if waiting and any(command[0] in RUNS for command in commands(line)):
            break
        words = line.words or [""]
        if words[0] == "pair_style":
            if words[1:2] == [STYLE]:
                styled, cut, waiting = True, "style", line.where
            elif _is_style(words):
                _refuse(
                    line,
                    f"`pair_style {words[1]}` mixes {STYLE} with other styles, which only the compiled one can",
                )
            elif styled:
                styled, cut, waiting = False, "other style", ""
        elif words[0] == "pair_coeff" and styled:
            cut, waiting = "coeff", ""
        elif words[0] == "clear":
            styled, waiting = False, ""
        yield replace(place, cut=cut)
    if waiting:
        raise InputError(f"{waiting}: `pair_style {STYLE}` has no `pair_coeff * * Cu ...` after it that names the elements")


def _refuse(line: Line, why: str) -> NoReturn:
    raise InputError(f"{line.where}: {why}; {PLUGIN}")


@dataclass(frozen=True)
class Leap:
    """A jump within a file: from and to which line of it, by index; to None where only LAMMPS knows."""

    line: Line
    start: int
    target: int | None
    leaves: bool = False
    """For another file."""

    def crosses(self, index: int) -> bool:
        """Whether it leads over a cut at, or before, the line of that index."""
        if self.target is None:
            return self.start < index or not self.leaves
        return min(self.start, self.target) < index <= max(self.start, self.target)


def leaps(lines: Sequence[Line]) -> list[Leap]:
    """All jumps of a file. One to a label that is not there is left out: LAMMPS refuses it."""
    labels: dict[str, int] = {}
    for index, line in enumerate(lines):
        if line.words[:1] == ["label"]:
            labels.setdefault("".join(line.words[1:2]), index)
    found = []
    for index, line in enumerate(lines):
        for command in (one for one in commands(line) if one[0] == "jump"):
            file, label = (*command[1:3], "", "")[:2]
            if file != "SELF":
                found.append(Leap(line, index, None, leaves=True))
            elif "$" in label:
                found.append(Leap(line, index, None))
            elif not label or label in labels:
                found.append(Leap(line, index, labels[label] if label else 0))
    return found


def _checked(places: list[Place]) -> list[Place]:
    """The same places; InputError for a jump across a cut."""
    for copy in sorted({place.copy for place in places}):
        inside = [(index, place) for index, place in enumerate(places) if place.copy == copy]
        # a file included there is a cut in the text around it, too
        cuts = [k for k, (index, place) in enumerate(inside) if place.cut or (k and inside[k - 1][0] != index - 1)]
        for leap in leaps([place.line for _, place in inside]):
            if not any(leap.crosses(k) for k in cuts):
                continue
            if leap.leaves:
                _refuse(
                    leap.line,
                    f"`jump` to another file before a line that chooses or sets `pair_style {STYLE}`",
                )
            _refuse(
                leap.line,
                f"this jump leads across a line that chooses or sets `pair_style {STYLE}`, as in a loop around it",
            )
    return places


def _attached(name: str, places: list[Place], read: Read) -> list[Step]:
    """A script that names no potential, with an "attach" before each run that needs one."""
    jumps = leaps([place.line for place in places])
    cuts: list[int] = []
    attached, cleared = False, -1
    for index, place in enumerate(places):
        held = _all_commands(place.line, read, (name,))
        if place.line.words[:1] == ["clear"]:
            attached, cleared = False, index
        elif "clear" in held:
            _refuse(
                place.line,
                "`clear` where it cannot be followed: write it as a line of its own",
            )
        if "pair_style" in held:
            _check_no_other_style(place.line, attached)
        if held & (RUNS | {UNKNOWN}) and not attached:
            cut = _before_jumps(index, jumps)
            if cut <= cleared:
                _refuse(
                    place.line,
                    "the potential would have to be attached inside a loop, after its `clear`",
                )
            cuts.append(cut)
            attached = True
    if not cuts:
        raise InputError(f"{name} has none of the commands that need a potential, such as run and minimize")
    for leap in jumps:  # of a later part into an earlier one
        if any(leap.crosses(cut) for cut in cuts):
            _refuse(
                leap.line,
                "this jump leads across the place where the potential is attached",
            )
    steps: list[Step] = []
    for begin, end in zip([0, *cuts], [*cuts, len(places)], strict=True):
        if begin in cuts:
            steps.append(Cut("attach", "", "", places[begin].line.where))
        steps += _steps(places[begin:end])
    return steps


def _all_commands(line: Line, read: Read, within: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = set()
    for command in commands(line):
        found.add(_named(command))
        if command[0] == "include":
            found |= _commands_within(command, read, within)
    return frozenset(found)


def _before_jumps(index: int, jumps: Sequence[Leap]) -> int:
    """The last place at or before the line that no jump leads over."""
    while crossing := [min(leap.start, leap.target) for leap in jumps if leap.target is not None and leap.crosses(index)]:
        index = min(crossing)
    return index


def _check_no_other_style(line: Line, attached: bool) -> None:
    styles = [command[1:2] for command in commands(line) if command[0] == "pair_style"]
    if not styles or any(style not in (["none"], ["zero"]) for style in styles):
        raise InputError(
            f"{line.where}: the script has a pair style of its own, so no other potential is attached: write "
            f"`pair_style {STYLE} FILE` and `pair_coeff * * Cu ...` in its place"
        )
    if attached:
        raise InputError(f"{line.where}: `pair_style` after a run would drop the potential that was attached: leave it out")


def _steps(places: Sequence[Place]) -> list[Step]:
    found: list[Step] = []
    last: Place | None = None
    for place in places:
        line = place.line
        if place.cut:
            n_words = 2 if place.cut == "style" else 1
            rest = line.code.strip() if place.cut == "other style" else _after(line.code, n_words)
            found.append(Cut(place.cut, line.text, rest, line.where))
        elif found and last and not last.cut and last.copy == place.copy and isinstance(found[-1], Text):
            found[-1] = replace(found[-1], text=found[-1].text + line.text)
        else:
            found.append(Text(line.text, line.where))
        last = place
    return found


def _after(code: str, n_words: int) -> str:
    """What follows the first words, which have no quotes."""
    parts = code.split(None, n_words)
    return parts[n_words].strip() if len(parts) > n_words else ""
