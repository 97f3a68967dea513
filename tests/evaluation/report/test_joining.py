"""Tasks evaluated apart become one evaluation, or are refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from medvlp.evaluation.metrics.bootstrap import Estimate
from medvlp.evaluation.report import joining, results
from medvlp.evaluation.report.joining import join, made_by, store, with_earlier
from medvlp.evaluation.report.results import Evaluation, KeptFile, UnitResult
from medvlp.evaluation.task import EvaluationError, tasks
from shards.errors import DataError


def part(task: str, split: str = "test", **changes: Any) -> Evaluation:
    evaluation = Evaluation(
        {"name": "run", "checkpoint": "step-00000004", "step": 4},
        {"root": "/data", "fingerprint": "x", "splits": {split: {"samples": 3}}},
        {"tasks": [task], "seed": 0},
        {task: {"trained": {"auroc": Estimate(0.7, 0.6, 0.8)}}},
        {task: {"threshold_split": split}},
        {"train": {"steps": 4}},
    )
    for name, value in changes.items():
        getattr(evaluation, name).update(value)
    return evaluation


def test_tasks_notes_and_splits_are_put_together() -> None:
    first, second = part("zero-shot"), part("retrieval", "valid")
    joined = join({Path("a.json"): first, Path("b.json"): second})
    assert joined.results == first.results | second.results
    assert joined.notes == first.notes | second.notes
    assert joined.settings == {"tasks": ["zero-shot", "retrieval"], "seed": 0}
    assert joined.data["splits"] == {"test": {"samples": 3}, "valid": {"samples": 3}}
    assert joined.model == first.model
    assert first.settings["tasks"] == ["zero-shot"]
    elsewhere = part("retrieval", config={"data": {"workers": 0}, "train": {"steps": 4, "threads": 1}})
    assert join({Path("a.json"): first, Path("b.json"): elsewhere}).results == joined.results
    moved = part("retrieval", model={"run": "elsewhere"}, data={"root": "/moved"})
    assert join({Path("a.json"): first, Path("b.json"): moved}).results == joined.results


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (part("retrieval", model={"checkpoint": "step-00000008"}), "another checkpoint than a.json"),
        (part("retrieval", data={"fingerprint": "y"}), r"other data \(fingerprint\) than a.json"),
        (part("retrieval", settings={"seed": 1}), r"other settings \(seed\) than a.json"),
        (part("retrieval", config={"data": {"image_size": 64}}), "another data.image_size than a.json"),
        (part("retrieval", config={"train": {"seed": 1}}), "another train.seed than a.json"),
        (part("fine-tuning", config={"precision": "bf16"}), "another precision than a.json"),
        (part("fine-tuning", config={"deepspeed": {"x": 1}}), "another deepspeed.x than a.json"),
        (part("zero-shot"), "zero-shot is in another file too"),
    ],
)
def test_what_does_not_belong_together_is_refused(other: Evaluation, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        join({Path("a.json"): part("zero-shot"), Path("b.json"): other})


def test_a_task_that_was_left_out_of_one_file_is_that_of_the_other() -> None:
    done, without = part("zero-shot"), part("retrieval")
    without.settings["tasks"].append("zero-shot")
    without.notes["zero-shot"] = {"left_out": "no label can be scored"}
    for files in ((done, without), (without, done)):
        joined = join({Path(str(number)): of for number, of in enumerate(files)})
        assert joined.notes["zero-shot"] == {"threshold_split": "test"}
        assert joined.results["zero-shot"] == done.results["zero-shot"]


def probe(fraction: float, fractions: tuple[float, ...] = (0.1, 1.0)) -> Evaluation:
    """A part with one fraction of the linear probe."""
    found = part("linear-probe")
    found.results, found.notes = {}, {}
    found.settings["options"] = {"linear-probe": {"fractions": list(fractions)}}
    models = {"trained": {f"auroc@{100 * fraction:g}%/macro": Estimate(fraction)}}
    notes = {"fractions": {f"{100 * fraction:g}%": {}}, "not_evaluable": [{"finding": "a", "reason": "few"}]}
    found.units = {"linear-probe": {f"fraction-{fraction:g}": UnitResult(models, notes, "abc", "sum")}}
    return found


def test_units_of_one_task_become_its_result() -> None:
    joined = join({Path("b"): probe(1.0), Path("a"): probe(0.1), Path("c"): part("retrieval")})
    assert list(joined.results["linear-probe"]["trained"]) == ["auroc@10%/macro", "auroc@100%/macro"]
    assert list(joined.notes["linear-probe"]["fractions"]) == ["10%", "100%"]
    assert joined.notes["linear-probe"]["not_evaluable"] == [{"finding": "a", "reason": "few"}]
    assert joined.units == {}
    again = join({Path("d"): joined, Path("e"): part("zero-shot")})
    assert again.scores == joined.scores
    assert set(joined.results) == {"linear-probe", "retrieval"}
    assert joined.scores == {
        "linear-probe": {f"fraction-{of}": KeptFile("abc", "sum") for of in ("0.1", "1")}
    }
    assert joined.settings["options"] == {"linear-probe": {"fractions": [0.1, 1.0]}}


def test_a_missing_a_double_and_a_strange_unit_are_refused() -> None:
    with pytest.raises(EvaluationError, match="linear-probe: without unit fraction-1: evaluate it"):
        join({Path("a"): probe(0.1)})
    with pytest.raises(EvaluationError, match=r"unit fraction-0\.1 is in another file too"):
        join({Path("a"): probe(0.1), Path("b"): probe(0.1)})
    for before in ({}, {Path("0"): part("retrieval")}):
        with pytest.raises(EvaluationError, match="b: has other settings of linear-probe than a file before"):
            join({**before, Path("a"): probe(0.1), Path("b"): probe(1.0, (1.0,))})
    first, second = probe(0.1), probe(1.0)
    first.settings["files"], second.settings["files"] = ({"linear-probe": {"prompts": x}} for x in ("a", "b"))
    with pytest.raises(EvaluationError, match="b: has other contents of the files of the settings of linear"):
        join({Path("a"): first, Path("b"): second})
    second.settings["files"] = first.settings["files"]
    first.settings["by"], second.settings["by"] = ({"linear-probe": {"device": x}} for x in ("cpu", "cuda"))
    with pytest.raises(EvaluationError, match="b: has another version or device of linear-probe than a"):
        join({Path("a"): first, Path("b"): second})
    del second.settings["files"], second.settings["by"], first.settings["by"]
    with pytest.raises(EvaluationError, match="b: has other contents of the files"):
        join({Path("a"): first, Path("b"): second})
    strange = probe(0.1)
    strange.units = {"from-elsewhere": strange.units["linear-probe"]}
    with pytest.raises(EvaluationError, match="from-elsewhere was evaluated by units, and no such task"):
        join({Path("a"): strange})


def stored(file: Path, *parts: Evaluation, **by: object) -> Evaluation:
    """The file of an evaluation with the tasks of all, by this version of the program."""
    whole = join({Path(str(number)): of for number, of in enumerate(parts)})
    names = {"name": "run"}, {"name": "phantom", "split": "test"}, {"uncertain": "exclude", "labels": []}
    for values, of in zip((whole.model, whole.data, whole.settings), names, strict=True):
        values.update(of)
    known = tasks()
    whole.settings["by"] = {task: made_by(known[task]) | {"device": "cpu"} | by for task in whole.results}
    results.write(whole, file)
    return whole


def test_tasks_evaluated_before_stay_beside_the_new_one(tmp_path: Path) -> None:
    file, said = tmp_path / "evaluation.json", list[str]()
    probes = probe(0.1), probe(1.0)
    before = stored(file, part("zero-shot", "valid"), *probes, part("retrieval"))
    new = stored(tmp_path / "new.json", part("retrieval"), device="cuda")
    new.results["retrieval"]["trained"]["auroc"] = Estimate(0.9)
    found = with_earlier(new, file, said.append)
    assert list(found.results) == ["zero-shot", "linear-probe", "retrieval"]
    assert found.results["retrieval"] == new.results["retrieval"]
    for task in ("zero-shot", "linear-probe"):
        assert found.results[task] == before.results[task]
        assert found.notes[task] == before.notes[task]
    assert found.scores == before.scores
    assert found.settings["tasks"] == ["zero-shot", "linear-probe", "retrieval"]
    assert found.settings["options"]["linear-probe"] == {"fractions": [0.1, 1.0]}
    assert {task: of["device"] for task, of in found.settings["by"].items()} == {
        "zero-shot": "cpu", "linear-probe": "cpu", "retrieval": "cuda",
    }  # fmt: skip
    assert set(found.data["splits"]) == {"valid", "test"}
    assert said == [f"{file}: also holds zero-shot, linear-probe, evaluated before"]
    assert list(new.results) == ["retrieval"]
    results.write(found, file)
    assert results.read(file) == found


def test_a_task_that_is_left_out_now_stays_with_the_settings_of_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    before, new = (part("zero-shot"), part("retrieval"))
    before.settings["options"] = {"zero-shot": {"prompts": "a.yaml"}}
    before = stored(file, before)
    new.settings["tasks"].append("zero-shot")
    new.settings["options"] = {"zero-shot": {"prompts": "b.yaml"}}
    new.notes["zero-shot"] = {"left_out": "b.yaml cannot be read"}
    found = with_earlier(stored(tmp_path / "new.json", new), file, lambda line: None)
    assert found.results["zero-shot"] == before.results["zero-shot"]
    assert found.notes["zero-shot"] == before.notes["zero-shot"]
    assert found.settings["options"] == {"zero-shot": {"prompts": "a.yaml"}}
    assert sorted(found.settings["tasks"]) == ["retrieval", "zero-shot"]


@pytest.mark.parametrize(
    ("new", "by", "reason"),
    [
        (part("retrieval", model={"weights": "0123"}), {}, "another checkpoint"),
        (part("retrieval", data={"split": "valid"}), {}, "other data (split)"),
        (part("retrieval", settings={"seed": 1}), {}, "other settings (seed)"),
        (part("retrieval", config={"image": {"name": "x"}}), {}, "another image.name"),
        (part("retrieval"), {"version": 0}, "another version of this program"),
        (part("retrieval"), {"program": "0.0.1"}, "another version of this program"),
    ],
)
def test_a_task_that_would_come_out_otherwise_now_is_left_out_and_named(
    new: Evaluation, by: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    file, said = tmp_path / "evaluation.json", list[str]()
    stored(file, part("zero-shot"), **by)
    changed = stored(tmp_path / "new.json", new)
    if "split" in new.data:
        changed.data["split"] = new.data["split"]
    found = with_earlier(changed, file, said.append)
    assert list(found.results) == ["retrieval"]
    (line,) = said
    assert line.startswith(
        f"{file}: zero-shot, evaluated before with {reason}, is left out; evaluate it again"
    )


def test_only_what_is_trained_depends_on_the_precision_of_the_run(tmp_path: Path) -> None:
    file, said = tmp_path / "evaluation.json", list[str]()
    stored(file, part("zero-shot"), part("fine-tuning"))
    found = with_earlier(
        stored(tmp_path / "new.json", part("retrieval", config={"precision": "bf16"})), file, said.append
    )
    assert set(found.results) == {"zero-shot", "retrieval"}
    assert "fine-tuning, evaluated before with another precision, is left out" in said[0]


def test_a_file_that_is_none_is_replaced_with_a_word(tmp_path: Path) -> None:
    file, said, new = tmp_path / "evaluation.json", list[str](), part("retrieval")
    assert with_earlier(new, file, said.append) == new
    assert said == []
    file.write_text("{")
    assert with_earlier(new, file, said.append) == new
    assert "not an evaluation.json of this program" in said[0]
    assert said[0].endswith("it is replaced")


def test_evaluations_of_a_run_that_end_at_the_same_time_lose_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read, both = tmp_path / "evaluation.json", results.read, threading.Barrier(2)
    stored(file, part("masked-words"))
    ended = [stored(tmp_path / f"{task}.json", part(task)) for task in ("zero-shot", "retrieval")]

    def read_before_either_writes(path: Path) -> Evaluation:
        earlier = read(path)
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        return earlier

    monkeypatch.setattr(results, "read", read_before_either_writes)
    with ThreadPoolExecutor() as pool:
        for evaluation in ended:
            pool.submit(store, evaluation, file, lambda line: None)
    assert read(file).results.keys() == {"masked-words", "zero-shot", "retrieval"}


def test_a_lock_that_is_never_given_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_MERGE_SECONDS", 0.1)
    with (
        FileLock(tmp_path / ".evaluation.json.lock"),
        pytest.raises(DataError, match=r"cannot write .*evaluation\.json: .*lock.* could not be acquired"),
    ):
        store(part("zero-shot"), tmp_path / "evaluation.json", lambda line: None)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write .*evaluation\.json: "):
        store(part("zero-shot"), tmp_path / "file" / "evaluation.json", lambda line: None)
