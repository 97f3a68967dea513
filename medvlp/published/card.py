"""The model card of an imported run: what it is, where it comes from, what of the file is not in it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medvlp.config import Config
from medvlp.published.recipe import Origin
from medvlp.runs.identity import STORED_SIDE, WINDOW


@dataclass(frozen=True)
class Card:
    """Everything the card tells of.

    Attributes:
        origin: of the weights.
        file: name of the file or model they were read from; sha256: of the file, "" for a model by name.
        tokenizer: as it was named; tokenizer_hash: of its content.
        unused: keys of the file that are not in the run -> why. unknown: keys left out on the user's word.
        others: what else was in the file.
        more: other sources, by what they are.
    """

    origin: Origin
    file: str
    sha256: str = ""
    tokenizer: str = ""
    tokenizer_hash: str = ""
    unused: Mapping[str, str] = field(default_factory=dict)
    unknown: Sequence[str] = ()
    others: Sequence[str] = ()
    more: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, str]:
        """What `identity.json` keeps of it."""
        return {
            "title": self.origin.title,
            "file": self.file,
            "sha256": self.sha256,
            "licence": self.origin.licence,
            **({} if self.origin.stored_side is None else {STORED_SIDE: str(self.origin.stored_side)}),
            **({} if self.origin.window is None else {WINDOW: self.origin.window}),
            **self.more,
        }


def model_card(card: Card, config: Config, values: int) -> str:
    """The Markdown text; `values`: number of weights in the run."""
    sections = {
        "Source": _source(card),
        "Licence": f"{card.origin.licence}\n",
        "Intended use and limits": _INTENDED_USE,
        "Preprocessing": _preprocessing(card, config),
        "What of the file is here": _account(card, values),
        "How to use": _USE.format(method=config.method.name) if config.method.trains else _USE_PROBE,
    }
    body = "\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"# {card.origin.title}\n\nImported by `medvlp import`; not trained here.\n\n{body}"


_INTENDED_USE = (
    "For research. **Not for clinical use**: this is no medical device. Which studies these weights have "
    "seen is not stored here: a test set that overlaps with their training data gives numbers "
    "that are too high.\n"
)
_USE = """```
medvlp evaluate RUN --data SHARDS
medvlp export RUN --out FOLDER
medvlp pretrain RUN/config.yaml data.root=SHARDS run.dir=NEW train.start=RUN
```

In an evaluation "untrained" is the same network ({method}) with random weights: what published training
itself began with is not in the file.
"""
_USE_PROBE = """```
medvlp evaluate RUN --data SHARDS --task linear-probe
medvlp pretrain CONFIG data.root=SHARDS run.dir=NEW train.start=RUN
```

An encoder alone shares no space with texts, so there is no retrieval, no zero-shot and no grounding.
"""


def _source(card: Card) -> str:
    origin = card.origin
    facts = {
        "paper": origin.paper,
        "code": origin.code,
        "weights": origin.weights,
        "read from": card.file + (f", sha256 `{card.sha256}`" if card.sha256 else ""),
        "trained on": origin.data,
        **card.more,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    return "\n".join([*lines, *(f"- {remark}" for remark in origin.remarks)]) + "\n"


def _preprocessing(card: Card, config: Config) -> str:
    lines = []
    if getattr(config.method, "side", "image") == "image":
        side, image = config.data.image_size, config.image
        stored = card.origin.stored_side
        cut = f"fitted into {stored} x {stored}, of which evaluation sees the middle, " if stored else ""
        lines.append(
            f"- Images: {cut}{side} x {side}, scaled to [0, 1], minus {image.mean}, divided by {image.std}, "
            f"{image.in_channels} channel(s)"
            + (f", then enlarged to {image.resize_to}" if image.resize_to is not None else "")
        )
    lines.append(f"- Texts: {card.origin.text}")
    if card.tokenizer:
        lines.append(f"- Tokenizer: {card.tokenizer}, `{card.tokenizer_hash}`; stored with the run")
    return "\n".join(lines) + "\n"


def _account(card: Card, values: int) -> str:
    lines = [f"{values:,} values in `checkpoints/step-00000000/weights.safetensors`, in float32."]
    for why, count in Counter(card.unused.values()).items():
        keys = [key for key, reason in card.unused.items() if reason == why]
        lines.append(f"\nNot here, {count} keys ({why}):\n")
        lines += [f"- `{key}`" for key in keys]
    if card.unknown:
        lines.append("\nLeft out on the word of who imported it, unknown keys:\n")
        lines += [f"- `{_plain(key)}`" for key in card.unknown]
    if card.others:
        lines.append("\nBeside the weights in the file, and not read: " + ", ".join(map(_plain, card.others)))
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """A stranger's word inside Markdown."""
    return "".join(letter if letter.isalnum() or letter in "._- " else "?" for letter in text[:100])
