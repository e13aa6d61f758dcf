"""`carryall status`: where every input is, from the ledger alone, while another process has it open and when none has."""

import json
import sqlite3
import time

import pytest
from command_line import argon, dimer, refused, write

from carryall.cli import status
from carryall.cli.main import main
from carryall.dynamics.blobs import batch_to_bytes
from carryall.dynamics.folder_status import folder_status
from carryall.dynamics.inflight import moving_batch
from carryall.dynamics.ledger import InFlight, Ledger
from carryall.dynamics.pipeline.books import Books, State, TakenUp
from carryall.dynamics.pipeline.report import StageCount, live_facts
from carryall.dynamics.results import RelaxResult

STAGES = [{"name": "relax"}, {"name": "md"}]


def taken_up(index: int) -> TakenUp:
    data = argon(1, seed=index)
    return TakenUp(State(index, data.n_atoms, batch_to_bytes(moving_batch([data], [index]), {})), data, b"0" * 16)


def failed(index: int, reason: str) -> RelaxResult:
    return RelaxResult(index, "failed", reason, 3, None, None, argon(1))


def in_the_middle(books: Books) -> None:
    """Of 20 inputs 8 are taken up: 1 refused, 2 failed, 1 finished, 2 in md, 2 in relax."""
    books.take_up([taken_up(index) for index in range(7)])
    books.refuse(RelaxResult(7, "failed", "absent.cif: no such file", 0, None, None, None), None)
    books.move([taken_up(index).state for index in (0, 1, 2, 3)], 0, 1)
    reasons = {0: "largest force 1.2e+05 eV/Å exceeds the limit", 4: "largest force 3 eV/Å exceeds the limit"}
    books.finish([failed(index, reason) for index, reason in reasons.items()], [1, 0], {})
    books.finish([RelaxResult(1, "step_budget", None, 9, -1.0, 0.1, argon(1))], [2], {})
    counts = [StageCount("relax", 12, 2, 4, 2, 4), StageCount("md", 1, 1, 1, 1, 1)]
    books.ledger.set_fact("live", live_facts(counts, 10.0))


@pytest.fixture
def run(tmp_path):
    with Ledger(tmp_path / "run", {"stages": STAGES}) as ledger:
        in_the_middle(Books(ledger, 2))
        yield tmp_path / "run", ledger


def test_while_it_runs(run, capsys):
    folder, _ = run
    found = folder_status(folder)
    assert (found.kind, found.state, found.inputs, found.finished, found.failed) == ("pipeline", "running", 20, 1, 3)
    # relax: 20 less 4 passed, 2 failed, 2 in flight; md: 2 of which one is in flight
    assert [dict(one) for one in found.stages] == [
        {"name": "relax", "waiting": 12, "in_flight": 2, "done": 4, "failed": 2, "rate": 0.4},
        {"name": "md", "waiting": 1, "in_flight": 1, "done": 1, "failed": 1, "rate": 0.1},
    ]
    # 16 systems have md before them, one passes it in 10 s
    assert found.seconds_left == 160.0
    assert [(one.count, one.index) for one in found.failures] == [(2, 0), (1, 7)]
    assert main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "running, 4 of 20 inputs done" in text
    assert "0:02:40 left" in text
    assert "2 × largest force 1.2e+05 eV/Å exceeds the limit (input 0)" in text
    assert "no process" not in text


def test_after_it_was_killed(run, capsys):
    folder, ledger = run
    ledger.close()
    found = folder_status(folder)
    assert (found.state, found.inputs, found.seconds_left) == ("stopped", 20, None)
    assert [(one["waiting"], one["in_flight"], one["rate"]) for one in found.stages] == [(14, 0, 0.0), (2, 0, 0.0)]
    assert main(["status", str(folder)]) == 0
    assert "no process works on it: resume it" in capsys.readouterr().out
    assert main(["status", str(folder), "--json", "--watch"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads(json.dumps(found.facts))
    assert facts["failures"][1] == {"reason": "absent.cif: no such file", "count": 1, "index": 7}


def test_nothing_is_written_and_nobody_is_kept_out(run):
    folder, ledger = run
    before = (folder / "ledger.lock").stat()
    for _ in range(20):
        folder_status(folder)
    assert (folder / "ledger.lock").stat() == before
    ledger.close()
    content = (folder / "ledger.sqlite").read_bytes()
    folder_status(folder)
    assert (folder / "ledger.sqlite").read_bytes() == content
    # a look right before does not stand in the way of a run
    with Ledger(folder, {"stages": STAGES}, resume=True):
        assert folder_status(folder).state == "running"


def test_an_ended_run_and_one_that_got_more_inputs(run):
    folder, ledger = run
    books = Books(ledger, 2)
    books.finish([RelaxResult(i, "step_budget", None, 9, -1.0, 0.1, argon(1)) for i in (2, 3, 5, 6)], [2] * 4, {})
    books.close(8)
    # the last live numbers are older than the end
    assert folder_status(folder).inputs == 8
    ledger.close()
    assert folder_status(folder).state == "finished"
    with Ledger(folder, {"stages": STAGES}, resume=True) as again:
        time.sleep(0.01)
        again.set_fact("live", live_facts([StageCount("relax", 3, 0, 6, 2, 0), StageCount("md", 0, 0, 5, 1, 0)], 1.0))
    found = folder_status(folder)
    assert (found.state, found.inputs) == ("stopped", 11)
    assert found.stages[0]["waiting"] == 3
    with Ledger(folder, {"stages": STAGES}, resume=True) as again:
        # a sampler that does not know how many there are
        again.set_fact("live", live_facts([StageCount("relax", None, 0, 6, 2, 0), StageCount("md", 0, 0, 5, 1, 0)], 1.0))
        found = folder_status(folder)
        assert (found.inputs, found.stages[0]["waiting"]) == (None, None)


def test_watch_ends_with_the_run(run, capsys, monkeypatch):
    folder, ledger = run
    slept, opened = [], [ledger]

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) % 3 == 0:
            opened[-1].close()

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert main(["status", str(folder), "--watch", "--json", "--interval", "0.1"]) == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["running", "running", "running", "stopped"]
    assert slept == [0.1] * 3
    opened.append(Ledger(folder, {"stages": STAGES}, resume=True))
    assert main(["status", str(folder), "--watch"]) == 0
    assert "stopped, 4 of 20 inputs done" in capsys.readouterr().out


def test_a_folder_of_relax(tmp_path, capsys):
    source = write(tmp_path / "a.extxyz", [argon(1, seed=seed) for seed in range(3)])
    with source.open("a") as file:
        file.write(dimer("Cu"))
    out = tmp_path / "out"
    assert main(["relax", str(source), "--model", "lj-argon", "-o", str(out)]) == 0
    found = folder_status(out)
    assert (found.kind, found.state, found.inputs, found.finished, found.failed) == ("relax", "finished", 4, 3, 1)
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert "finished, 4 of 4 inputs done" in text
    assert "1 × atom 0 is Cu" in text
    with Ledger(out, settings_of(out), resume=True) as ledger:
        ledger.set_fact("n_inputs", None)
        data = argon(1)
        batch = moving_batch([data] * 3, [2, 4, 5])
        ledger.save_in_flight(InFlight(batch, 0, False, dict.fromkeys((2, 4, 5), b""), dict.fromkeys((2, 4, 5), b"0")))
        found = folder_status(out)
        # 2 is done since it was saved
        assert (found.state, found.inputs, found.stages[0]["in_flight"]) == ("running", None, 2)
    assert folder_status(out).state == "stopped"


def settings_of(folder) -> dict[str, object]:
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        return json.loads(database.execute("SELECT value FROM run WHERE key = 'settings'").fetchone()[0])


def test_what_is_no_run(tmp_path, capsys):
    assert "holds no run: there is no ledger.sqlite" in refused(["status", tmp_path], capsys)
    (tmp_path / "ledger.sqlite").write_text("no database, but long enough to be looked at as one" * 50)
    assert "is not a ledger of carryall" in refused(["status", tmp_path], capsys)
    (tmp_path / "ledger.sqlite").unlink()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as database:
        database.execute("CREATE TABLE run (key TEXT, value TEXT)")
    database.close()
    assert "is not a ledger of carryall, or its run has not begun" in refused(["status", tmp_path], capsys)
    assert "interval must be more than 0 s" in refused(["status", tmp_path, "--interval", "0"], capsys)
