"""Building: the same bytes however it is divided, interrupted or repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from shards.build import BuildOptions, build_shards
from shards.errors import DataError, UsageError
from shards.format import Index
from shards.merge import merge
from shards.plan import Part, plan_shards
from shards.reader import ShardReader
from shards.sample import StoredImage
from shards.sources.base import RejectedRecord
from shards.sources.phantom import PhantomSource
from shards.splits import parse_fractions, split_of
from shards.study import Study
from shards.tokenizer import SPECIAL_TOKENS
from tests.shards.toy_data import build, folder_bytes

SOURCE = PhantomSource(40, 64, 0)
OPTIONS = BuildOptions(image=StoredImage(size=64), records_per_shard=10)
COMMAND = "from launcher.commands.shards import app; app()"


class Picky(PhantomSource):
    """Phantoms of which some records are rejected and some break."""

    def __init__(self, rejected: set[int], broken: int | None = None) -> None:
        super().__init__(40, 64, 0)
        self.rejected, self.broken = rejected, broken

    def load(self, i: int) -> list[Study]:
        if i in self.rejected:
            raise RejectedRecord("no good")
        if i == self.broken:
            raise ZeroDivisionError
        return super().load(i)


def test_two_workers_give_the_bytes_of_one(phantom_dataset: Path, tmp_path: Path) -> None:
    build(SOURCE, tmp_path / "two", OPTIONS, workers=2)
    assert folder_bytes(tmp_path / "two") == folder_bytes(phantom_dataset)


def test_merged_parts_give_the_bytes_of_a_single_build(phantom_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    for number in (3, 1, 2):
        with pytest.raises(DataError, match=r"not built yet|no unfinished build"):
            merge(out)
        build_shards(SOURCE, out, OPTIONS, 1, Part(number, 3))
    merge(out)
    assert folder_bytes(out) == folder_bytes(phantom_dataset)


def test_a_build_of_which_nothing_is_left_says_why(tmp_path: Path) -> None:
    class Hopeless(Picky):
        def load(self, i: int) -> list[Study]:
            raise RejectedRecord("no image" if i == 3 else "no good", i, 2 + i)

    with pytest.raises(
        DataError, match=r"the 40 records could be used: 39 x no good \(first in line 2\); .*rej"
    ):
        build(Hopeless(set()), tmp_path, OPTIONS)
    with pytest.raises(DataError, match=r"40 x no good \(first in record 0\)"):
        build(Picky(set(range(40))), tmp_path / "without lines", OPTIONS)


@pytest.mark.parametrize(
    ("split", "is_told"),
    [("train=0.999999,valid=0.000001", True), ("train=1", False), ("train=0.5,valid=0.5", False)],
)
def test_a_dataset_with_nothing_but_train_is_told(tmp_path: Path, split: str, is_told: bool) -> None:
    source = PhantomSource(4, 64, 0)
    summary = build(source, tmp_path, replace(OPTIONS, fractions=parse_fractions(split)))
    assert (set(summary.splits) == {"train"}) is (split != "train=0.5,valid=0.5")
    told = [line for line in summary.remarks if "every patient is in train" in line]
    assert len(told) == is_told


def test_merge_refuses_a_shard_whose_file_is_gone(tmp_path: Path) -> None:
    build_shards(SOURCE, tmp_path, OPTIONS, 1, Part(0, 1))
    tar = tmp_path / "train-000001.tar"
    data = tar.read_bytes()
    for damage in (tar.unlink, lambda: tar.write_bytes(data[:-512])):
        damage()
        with pytest.raises(DataError, match=r"the first is train-000001\.tar"):
            merge(tmp_path)
    tar.write_bytes(data)
    merge(tmp_path)


def test_killed_build_goes_on_and_gives_the_same_bytes(
    phantom_dataset: Path, tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "killed"
    arguments = ["--studies", "40", "--image-size", "64", "--samples-per-shard", "10", "--workers", "2"]
    command = [sys.executable, "-c", COMMAND, "build", "phantom", "--out", str(out), *arguments]
    process = subprocess.Popen(command, cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 250
    while not (finished := sorted((out / ".build").glob("*-*.json"))):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(workers, timeout=100)[1], "workers outlive their killed parent"
    assert not (out / "index.json").exists()
    kept = out / f"{finished[0].stem}.tar"
    before = kept.stat().st_mtime_ns
    unfinished = "train-000001" if kept.stem == "train-000000" else "train-000000"
    (out / ".build" / f"{unfinished}.json").unlink(missing_ok=True)
    for name in (f"{unfinished}.tar", f"{unfinished}.idx", "index.json"):
        left = out / f".{name}.node-1.tmp"
        left.write_bytes(b"left by a killed writer")
        os.utime(left, (0, 0))

    build(SOURCE, out, OPTIONS)
    assert folder_bytes(out) == folder_bytes(phantom_dataset)
    assert kept.stat().st_mtime_ns == before, "a finished shard was built again"


def test_repeating_a_finished_build_repairs_it(tmp_path: Path) -> None:
    source = Picky({3, 4})
    out = tmp_path / "out"
    build(source, out, OPTIONS)
    expected = folder_bytes(out)
    tar, idx, whole = out / "train-000000.tar", out / "train-000001.idx", out / "train-000002.tar"
    before = whole.stat().st_mtime_ns
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    idx.unlink()
    build(source, out, OPTIONS)
    assert folder_bytes(out) == expected
    assert whole.stat().st_mtime_ns == before


@pytest.mark.parametrize("merged", [True, False])
def test_records_whose_files_are_back_come_in_at_the_next_build(
    phantom_dataset: Path, tmp_path: Path, merged: bool
) -> None:
    plan = plan_shards(SOURCE, OPTIONS.fractions, "medvlp", 10)
    away = Picky({plan[0].records[2], *plan[1].records})
    build_shards(away, tmp_path, OPTIONS, 1, Part(0, 1))
    if merged:
        merge(tmp_path)
    whole = tmp_path / plan[2].file
    before = whole.stat().st_mtime_ns
    build(SOURCE, tmp_path, OPTIONS)
    assert folder_bytes(tmp_path) == folder_bytes(phantom_dataset)
    assert whole.stat().st_mtime_ns == before


def test_a_shard_is_kept_where_its_records_are_rejected_again_and_others_would_be(tmp_path: Path) -> None:
    build(Picky({3, 4}), tmp_path, OPTIONS)
    before = folder_bytes(tmp_path)
    build(Picky(set(range(40))), tmp_path, OPTIONS)
    assert folder_bytes(tmp_path) == before


def test_other_arguments_are_refused_and_named(phantom_dataset: Path) -> None:
    before = folder_bytes(phantom_dataset)
    with pytest.raises(DataError, match=r"source\.seed: 0 then, 1 now"):
        build(PhantomSource(40, 64, 1), phantom_dataset, OPTIONS)
    with pytest.raises(DataError, match="records_per_shard: 10 then, 11 now"):
        build(SOURCE, phantom_dataset, BuildOptions(image=StoredImage(size=64), records_per_shard=11))
    assert folder_bytes(phantom_dataset) == before


def test_the_same_shares_in_another_order_are_other_arguments(tmp_path: Path) -> None:
    """They give patients other splits: parts of both made a dataset whose patients are in two."""
    one, other = (replace(OPTIONS, fractions=parse_fractions(f"{a}=0.5,{b}=0.5")) for a, b in (
        ("train", "test"), ("test", "train"),
    ))  # fmt: skip
    build_shards(SOURCE, tmp_path, one, 1, Part(0, 2))
    with pytest.raises(DataError, match=r"other arguments \(split: in another order\)"):
        build_shards(SOURCE, tmp_path, other, 1, Part(1, 2))


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("phantom", ["mass", "no\u00a0dule"], r"label 2 of 2 holds U\+00A0, which cannot be printed"),
        ("phantom", ["x" * 201], "label 1 of 1 is longer than 200 characters"),
        ("a\nname", [], r"the name of the dataset holds U\+000A"),
    ],
)
def test_names_that_no_reader_would_take_are_refused_before_building(
    name: str, labels: list[str], message: str, tmp_path: Path
) -> None:
    source = PhantomSource(40, 64, 0)
    source.label_names = labels
    with pytest.raises(DataError, match=message):
        build_shards(source, tmp_path / "out", replace(OPTIONS, name=name), 1, Part(0, 1))
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_disk_names_no_path(tmp_path: Path) -> None:
    class Lost(PhantomSource):
        def load(self, i: int) -> list[Study]:
            raise OSError(5, "Input/output error", "/data/DOE^JANE/1.png")

    with pytest.raises(DataError, match=r"cannot read record 0 of source 'phantom': Input/output error$"):
        build(Lost(40, 64, 0), tmp_path / "out", OPTIONS)


def test_rejected_records_are_listed_and_leave_their_shard_shorter(tmp_path: Path) -> None:
    plan = plan_shards(SOURCE, OPTIONS.fractions, OPTIONS.split_seed, 10)
    (tmp_path / plan[1].file).write_bytes(b"left by an older build")
    rejected = {plan[0].records[2], *plan[1].records}
    summary = build(Picky(rejected), tmp_path, OPTIONS)
    assert summary.rejected == {"no good": len(rejected)}
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines == [{"record": i, "source": "phantom", "reason": "no good"} for i in sorted(rejected)]
    shards = {shard.file: shard.samples for shard in Index.load(tmp_path).shards}
    assert shards[plan[0].file] == 9
    assert plan[1].file not in shards
    assert not (tmp_path / plan[1].file).exists()
    assert len(ShardReader(tmp_path).index.shards) == len(plan) - 1


def test_all_rejected_is_an_error_with_reasons_on_disk(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 40 records"):
        build(Picky(set(range(40))), tmp_path, OPTIONS)
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 40
    assert not (tmp_path / "index.json").exists()


def test_a_label_that_the_index_will_not_name_fails_at_once(tmp_path: Path) -> None:
    source = PhantomSource(1, 64, 0)
    source.label_names = source.label_names[1:]
    with pytest.raises(ValueError, match="a label or mask of a finding that is not among its label names"):
        build(source, tmp_path / "out")


def test_failing_source_says_at_which_record(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        build(Picky(set(), broken=7), tmp_path, OPTIONS)
    assert "record 7 of source 'phantom'" in "".join(caught.value.__notes__)


def test_given_tokenizer_is_stored_and_a_wrong_one_fails_before_building(tmp_path: Path) -> None:
    folder = tmp_path / "wordpiece"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "clear", "lungs"]))
    build(SOURCE, tmp_path / "out", replace(OPTIONS, tokenizer=str(folder)))
    stored = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert stored.encode("Clear lungs").tokens == ["[CLS]", "clear", "lungs", "[SEP]"]
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()
    with pytest.raises(DataError, match="has neither"):
        build(SOURCE, tmp_path / "other", replace(OPTIONS, tokenizer=str(tmp_path / "out" / "..")))
    assert not (tmp_path / "other").exists()


def test_boxes_and_masks_follow_the_image_into_the_stored_square(tmp_path: Path) -> None:
    build(SOURCE, tmp_path, BuildOptions(image=StoredImage(size=32, format="png"), records_per_shard=40))
    reader = ShardReader(tmp_path)
    boxed = 0
    for i in range(reader.sample_count("train")):
        key, _, metadata = reader.read("train", i)
        (study,) = SOURCE.load(int(key[:8]))
        assert [box["x"] for box in metadata["boxes"]] == [box.x / 2 for box in study.boxes]
        assert [box["height"] for box in metadata["boxes"]] == [box.height / 2 for box in study.boxes]
        boxed += len(study.boxes)
    assert boxed


def test_full_disk_is_one_clear_error_and_no_partial_shard(tmp_path: Path, repository: Path) -> None:
    # The size limit fails writes as a full disk does; no file system has to be mounted.
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); {COMMAND}"
    out = tmp_path / "out"
    arguments = ["build", "phantom", "--out", str(out), "--studies", "20", "--image-size", "64"]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "DataError: cannot write" in result.stderr
    assert "File too large" in result.stderr
    assert not [name for name in folder_bytes(out) if name.endswith((".tar", ".idx", ".tmp", "index.json"))]


def test_unwritable_output_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot create .*file/out"):
        build(SOURCE, tmp_path / "file" / "out", OPTIONS)
    with pytest.raises(DataError, match="cannot create /proc/out"):
        build(SOURCE, Path("/proc/out"), OPTIONS)


def test_nothing_of_this_machine_is_stored(phantom_dataset: Path) -> None:
    assert str(phantom_dataset.parent).encode() not in b"".join(folder_bytes(phantom_dataset).values())
    with tarfile.open(phantom_dataset / "train-000000.tar") as archive:
        for member in archive:
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            assert (member.mtime, member.mode) == (0, 0o644)


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 7), st.text(min_size=1, max_size=8))
def test_plan_holds_each_record_once_and_no_patient_twice(
    studies: int, per_shard: int, parts: int, seed: str
) -> None:
    source = PhantomSource(studies, 64, 0)
    plan = plan_shards(source, parse_fractions("train=0.5,test=0.5"), seed, per_shard)
    assert sorted(i for shard in plan for i in shard.records) == list(range(studies))
    assert all(0 < len(shard.records) <= per_shard for shard in plan)
    split = {source.split_key(i): shard.split for shard in plan for i in shard.records}
    assert all(split[source.split_key(i)] == shard.split for shard in plan for i in shard.records)
    for first in (0, 1):
        dealt = [
            shard.file for number in range(first, first + parts) for shard in Part(number, parts).of(plan)
        ]
        assert sorted(dealt) == sorted(shard.file for shard in plan)


def test_split_shares_are_kept_and_adding_patients_moves_none() -> None:
    fractions = parse_fractions("train=0.8, val=0.1, test=0.1")
    splits = [split_of(f"patient {i}", fractions, "medvlp") for i in range(20_000)]
    assert list(fractions) == ["train", "valid", "test"]
    for name, share in fractions.items():
        assert splits.count(name) / len(splits) == pytest.approx(share, abs=0.01)
    assert split_of("patient 7", fractions, "medvlp") == splits[7]
    assert [split_of(f"patient {i}", fractions, "other") for i in range(200)] != splits[:200]


@pytest.mark.parametrize("text", ["train=0.8", "train", "train=a", "train=1.5,test=-0.5", "a/b=1", ""])
def test_wrong_split_shares_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        parse_fractions(text)
