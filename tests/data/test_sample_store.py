"""The sample store: equal to direct tokenisation, built once, mapped, repaired."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from medvlp.config import Config
from medvlp.config_files import ConfigError
from medvlp.data.report import mgca_sentences, report_sentences
from medvlp.data.sample_store import SampleStore, checksum
from medvlp.data.text import Tokenizer
from shards.errors import DataError
from shards.reader import ShardReader
from shards.text.sentences import split_sentences

ConfigFactory = Callable[..., Config]
Arrays = dict[str, NDArray[Any]]


def open_store(root: Path, config: Config, tokenizer: Tokenizer, split: str = "train") -> SampleStore:
    return SampleStore.open_or_build(ShardReader(root), split, config.data, tokenizer)


@pytest.mark.parametrize("cleaning", ["none", "mgca"])
def test_store_equals_direct_tokenisation(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, cleaning: str
) -> None:
    config = make_config(sections=["impression", "findings"], cleaning=cleaning)
    reader = ShardReader(dataset)
    store = open_store(dataset, config, tokenizer)
    samples = [reader.metadata("train", i) for i in range(reader.sample_count("train"))]
    if cleaning == "none":
        reports = [
            split_sentences(sample["sections"].get("impression", ""))
            + split_sentences(sample["sections"].get("findings", ""))
            for sample in samples
        ]
    else:
        reports = [
            mgca_sentences(sample["sections"].get("impression", ""), sample["sections"].get("findings", ""))
            or []
            for sample in samples
        ]
    direct = tokenizer.tokenize(reports, 40)
    stored = tokenizer.assemble(store.rows, np.arange(len(samples)), 40)
    for name in ("input_ids", "attention_mask", "word_index", "sentence_index"):
        assert torch.equal(getattr(direct, name), getattr(stored, name))
    assert store.keys(np.arange(len(samples))) == [reader.key("train", i) for i in range(len(samples))]
    names = reader.index.label_names
    for i, sample in enumerate(samples):
        values = [sample["labels"].get(name) for name in names]
        expected = np.array([np.nan if value is None else value for value in values], dtype=np.float32)
        np.testing.assert_array_equal(store.labels[i], expected)


def test_store_lies_beside_the_shards_and_is_used_again(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    config = make_config(root=str(own_dataset))
    store = open_store(own_dataset, config, tokenizer)
    assert store.path.parent == own_dataset / "tokens"
    written = store.path.stat().st_mtime_ns
    assert open_store(own_dataset, config, tokenizer).path.stat().st_mtime_ns == written
    paths = {
        open_store(own_dataset, make_config(root=str(own_dataset), **change), tokenizer).path
        for change in ({"sections": ["impression"]}, {"cleaning": "mgca"}, {})
    }
    paths.add(open_store(own_dataset, config, tokenizer, "valid").path)
    assert len(paths) == 4


def test_store_goes_to_the_cache_where_the_dataset_cannot_be_written(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    # A file in place of the folder also stops root, whom permissions do not.
    (own_dataset / "tokens").write_text("")
    store = open_store(own_dataset, make_config(root=str(own_dataset)), tokenizer)
    assert store.path.parent == tmp_path / "cache" / "tokens"
    (tmp_path / "blocked").write_text("")
    blocked = make_config(root=str(own_dataset), cache_dir=str(tmp_path / "blocked"))
    with pytest.raises(DataError, match=r"set data\.cache_dir"):
        open_store(own_dataset, blocked, tokenizer)


def _open_in_process(root: Path, config: Config, start: object, answers: object) -> None:
    tokenizer = Tokenizer.load(None, root)
    start.wait()  # type: ignore[attr-defined]
    store = open_store(root, config, tokenizer)
    answers.put((str(store.path), store.path.stat().st_ino))  # type: ignore[attr-defined]


def test_processes_of_a_node_build_one_store(own_dataset: Path, make_config: ConfigFactory) -> None:
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(3), context.Queue()
    arguments = (own_dataset, make_config(root=str(own_dataset)), start, answers)
    processes = [context.Process(target=_open_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    # One inode: nobody replaced the file another had written.
    assert len(found) == 1


def test_a_pickled_store_maps_the_same_file(
    dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    store = open_store(dataset, make_config(), tokenizer)
    data = pickle.dumps(store)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).rows.ids, store.rows.ids)
    maps = Path("/proc/self/maps").read_text()
    assert str(store.path) in maps


def test_a_damaged_store_is_computed_again(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(root=str(own_dataset))
    store = open_store(own_dataset, config, tokenizer)
    expected = store.rows.ids.copy()
    store.path.write_bytes(store.path.read_bytes()[:200])
    np.testing.assert_array_equal(open_store(own_dataset, config, tokenizer).rows.ids, expected)
    assert "damaged sample store" in caplog.text


def same_arrays(first: bytes, second: bytes) -> bool:
    """Whether two stores hold the same; the library writes the entries of the header in any order."""
    one, other = load(first), load(second)
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in one
    )


@pytest.mark.parametrize("name", ["ids", "sentences", "offsets", "labels", "entity_cells", "keys"])
def test_a_flipped_byte_anywhere_in_a_store_is_found(
    own_dataset: Path,
    make_config: ConfigFactory,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    config = make_config(root=str(own_dataset))
    path = open_store(own_dataset, config, tokenizer).path
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    start, end = json.loads(whole[8 : 8 + length])[name]["data_offsets"]
    damaged = bytearray(whole)
    damaged[8 + length + (start + end) // 2] ^= 1
    path.write_bytes(damaged)
    store = open_store(own_dataset, config, tokenizer)
    assert "its checksum differs" in caplog.text
    assert same_arrays(store.path.read_bytes(), whole)


def _change_ids(arrays: Arrays) -> None:
    arrays["ids"][3] = 10**6


def _change_offsets(arrays: Arrays) -> None:
    arrays["offsets"][2] = 10**9


def _change_labels(arrays: Arrays) -> None:
    arrays["labels"] = arrays["labels"] / 2


def _drop_labels(arrays: Arrays) -> None:
    arrays["labels"] = arrays["labels"][: len(arrays["labels"]) // 2]


def _change_cells(arrays: Arrays) -> None:
    arrays["entity_cells"][0] = -1


def _change_kind(arrays: Arrays) -> None:
    arrays["ids"] = arrays["ids"].astype(np.int64)


@pytest.mark.parametrize(
    "change", [_change_ids, _change_offsets, _change_labels, _drop_labels, _change_cells, _change_kind]
)
def test_a_store_with_a_true_checksum_and_impossible_values_is_found(
    own_dataset: Path,
    make_config: ConfigFactory,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Arrays], None],
) -> None:
    config = make_config(root=str(own_dataset))
    path = open_store(own_dataset, config, tokenizer).path
    whole = path.read_bytes()
    arrays = {name: array.copy() for name, array in load(whole).items()}
    change(arrays)
    path.write_bytes(save(arrays, metadata={"checksum": checksum(arrays)}))
    open_store(own_dataset, config, tokenizer)
    assert "damaged sample store" in caplog.text
    assert same_arrays(path.read_bytes(), whole)


def test_a_store_of_another_split_is_found(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(root=str(own_dataset))
    train = open_store(own_dataset, config, tokenizer).path
    test = open_store(own_dataset, config, tokenizer, "test").path
    test.write_bytes(train.read_bytes())
    store = open_store(own_dataset, config, tokenizer, "test")
    assert len(store) == ShardReader(own_dataset).sample_count("test")
    assert "damaged sample store" in caplog.text


def test_a_tokenizer_that_contradicts_the_index_is_refused(own_dataset: Path) -> None:
    file = own_dataset / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"lowercase": true', '"lowercase": false'))
    assert file.read_text() != text
    with pytest.raises(DataError, match=r"differs from its hash in index\.json"):
        Tokenizer.load(None, own_dataset)


def test_a_vocabulary_of_absurd_ids_is_refused_before_memory_is_taken() -> None:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 2**32 - 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match="ids up to 4294967294"):
        Tokenizer(backend)


def test_unreadable_metadata_is_counted_and_forgotten_after_repair(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    tar = own_dataset / ShardReader(own_dataset).locate("train", 20)[0].file
    whole = tar.read_bytes()
    tar.write_bytes(whole[:15000])
    tolerant = make_config(root=str(own_dataset), max_bad_fraction=0.5)
    store = open_store(own_dataset, tolerant, tokenizer)
    assert len(store.unreadable) > 1
    assert store.trainable()[store.unreadable].all()
    with pytest.raises(DataError, match=rf"samples of split 'train' cannot be read .*{tar.name}"):
        open_store(own_dataset, make_config(root=str(own_dataset)), tokenizer)
    tar.write_bytes(whole)
    assert len(open_store(own_dataset, tolerant, tokenizer).unreadable) == 0


def test_a_store_is_computed_again_when_any_of_its_samples_is_repaired(
    own_dataset: Path, make_config: ConfigFactory, tokenizer: Tokenizer
) -> None:
    """The first one may be damaged for good."""
    reader = ShardReader(own_dataset)
    whole = {}
    for position in (3, 20):
        tar = own_dataset / reader.locate("train", position)[0].file
        offset, size = reader._members("train", position)[2]["json"]
        content = whole.setdefault(tar, tar.read_bytes()) if position == 20 else tar.read_bytes()
        tar.write_bytes(content[:offset] + b"@" * size + content[offset + size :])
    tolerant = make_config(root=str(own_dataset), max_bad_fraction=0.5)
    assert open_store(own_dataset, tolerant, tokenizer).unreadable.tolist() == [3, 20]
    for tar, content in whole.items():
        tar.write_bytes(content)
    assert open_store(own_dataset, tolerant, tokenizer).unreadable.tolist() == [3]


def test_report_sentences_follow_the_config() -> None:
    sections = {
        "findings": "Lungs clear. Heart normal.",
        "impression": "No acute disease.",
        "history": "Cough.",
    }
    assert report_sentences(sections, ["impression", "findings"], "none") == [
        "No acute disease.", "Lungs clear.", "Heart normal.",
    ]  # fmt: skip
    assert report_sentences(sections, ["comparison"], "none") == []
    assert report_sentences(sections, ["findings", "impression"], "mgca") == [
        "no acute disease", "lungs clear", "heart normal",
    ]  # fmt: skip
    assert report_sentences(sections, ["findings"], "mgca") == ["lungs clear", "heart normal"]
    assert report_sentences({"findings": "Normal."}, ["findings"], "mgca") == []
    with pytest.raises(ConfigError, match="not history"):
        report_sentences(sections, ["history"], "mgca")


def test_mgca_captions_are_the_published_ones(shared: Path) -> None:
    files = sorted((shared / "golden").glob("mgca_text_cleaning*.json"))
    assert files
    for golden in (json.loads(file.read_text()) for file in files):
        for number, sections in enumerate(golden["reports"]):
            sentences = report_sentences(sections, ["findings", "impression"], "mgca")
            assert sentences == golden["kept"].get(str(number), [])
            assert " ".join(sentences) == golden["caption"].get(str(number), "")
