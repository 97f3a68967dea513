"""One export from beginning to end: build, load, write, compare, describe."""

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from torch import Tensor

from medvlp.data.transforms import evaluation_crop
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text import TextEncoder
from medvlp.export.card import Card, Results, model_card
from medvlp.export.data_facts import facts_of
from medvlp.export.encoders import write_image, write_text
from medvlp.export.folder import ExportError, check_free, new_folder
from medvlp.methods.base import Method
from medvlp.runs import saved_run
from medvlp.runs.identity import STORED_SIDE, WINDOW
from medvlp.runs.manifest import EXPORTED_HEADS
from medvlp.runs.run_folder import CONFIG
from shards.progress import meter

#: Of an export: the checkpoint is loaded, each encoder is written and read back, the rest is written.
STEPS = 4
#: Where the encoders' weights stand in a method's state dict.
_IMAGE, _TEXT = "image_encoder.backbone.", "text_encoder.model."


def export(
    source: saved_run.SavedRun,
    out: Path,
    say: Callable[[str], None],
    data: str | None = None,
    results: Results | None = None,
) -> Path:
    """Write `image/`, `text/`, `heads.safetensors`, `config.yaml` and `README.md` into a new folder.

    Before the folder gets its name, both encoders are read back with plain timm and transformers and
    compared with the trained ones.

    Args:
        source: a run and a verified checkpoint of it (`medvlp.runs.saved_run.locate`).
        out: a folder that does not exist or is empty.
        say: receives one line of progress at a time.
        data: where the training data are now; without it the card says what is stored with the run.
        results: the run's evaluation for the card.

    Returns:
        The folder.

    Raises:
        ExportError: the folder is in use or cannot be written, or the method cannot be exported.
        MedvlpError: run, checkpoint or data are not usable (see `saved_run`, `data_facts`).
    """
    check_free(out)
    reads_data = data is not None or source.stored is None
    config = saved_run.load_config(source, [], data, reads_data)
    tokenizer = saved_run.load_tokenizer(source, config)
    facts = facts_of(source, config.data, given=data is not None)
    with meter(f"exporting {source.checkpoint.name}", STEPS) as advance:
        say(f"loading {source.checkpoint.name}")
        method = saved_run.load_method(source, config, tokenizer)
        image, text = _encoders(method, config.method.name)
        heads = _heads(method, text is not None)
        advance(1)
        with new_folder(out) as folder:
            say(f"image/: {config.image.name} for timm")
            (folder / "image").mkdir()
            stored = saved_run.stored_side(source, config)
            is_cut = evaluation_crop(config.data.transform) == "center"
            seen = min(1.0, config.data.image_size / stored) if is_cut else 1.0
            write_image(image, folder / "image", seen)
            advance(1)
            if text is None:
                say(f"text/ left out: method {config.method.name} has no text encoder of this form")
            else:
                say(f"text/: {text.model.config.model_type} for transformers, with its tokenizer")
                (folder / "text").mkdir()
                write_text(text, tokenizer, config.data.max_tokens, folder / "text")
            advance(1)
            window = saved_run.dicom_window(source)
            header = {STORED_SIDE: str(stored)} | ({} if window is None else {WINDOW: window})
            safetensors.torch.save_file(heads, folder / EXPORTED_HEADS, header)
            (folder / CONFIG).write_bytes((source.run / CONFIG).read_bytes())
            identity = None if source.stored is None else source.stored[0]
            card = Card(
                source.name(config),
                config,
                source.manifest,
                facts,
                image,
                text,
                heads,
                results,
                stored,
                {} if identity is None else identity.origin,
                {} if identity is None else identity.start_origin,
            )
            (folder / "README.md").write_text(model_card(card), encoding="utf-8")
            advance(1)
    return out


def _encoders(method: Method, name: str) -> tuple[ImageEncoder, TextEncoder | None]:
    image, text = getattr(method, "image_encoder", None), getattr(method, "text_encoder", None)
    if not isinstance(image, ImageEncoder):
        raise ExportError(
            f"method {name} keeps no image encoder as `image_encoder`: only its checkpoint "
            "(weights.safetensors) holds its weights"
        )
    return image, text if isinstance(text, TextEncoder) else None


def _heads(method: Method, has_text: bool) -> dict[str, Tensor]:
    """All of the state dict that is not in image/ or text/, under the method's own names."""
    elsewhere = (_IMAGE, _TEXT) if has_text else (_IMAGE,)
    state: dict[str, Tensor] = method.state_dict()
    # Copies, because safetensors refuses tensors that share memory.
    return {name: value.clone() for name, value in state.items() if not name.startswith(elsewhere)}
