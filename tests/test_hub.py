"""Names on the model hub when there is no network."""

from __future__ import annotations

import logging

import pytest

from medvlp.config import ImageConfig, TextConfig
from medvlp.config_files import ConfigError
from medvlp.data.text import Tokenizer
from medvlp.encoders.backbones import EncoderError
from medvlp.encoders.image import ImageEncoder
from medvlp.encoders.text_model import create_text_model
from medvlp.hub import hub_reason, quiet_hub


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A hub that refuses at once, and an empty cache."""
    from huggingface_hub import constants
    from transformers.utils import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_is_offline_mode", True, raising=False)


@pytest.mark.usefixtures("offline")
def test_each_name_says_which_key_and_how_to_go_on() -> None:
    attempts = {
        "data.tokenizer": (lambda: Tokenizer.load("nobody/nothing", "."), ConfigError),
        "text.name=nobody/nothing": (
            lambda: create_text_model(TextConfig(name="nobody/nothing"), 100),
            EncoderError,
        ),
        "image.name=test_vit.r160_in1k": (
            lambda: ImageEncoder(ImageConfig("test_vit.r160_in1k", pretrained=True), 32),
            EncoderError,
        ),
    }
    for key, (attempt, kind) in attempts.items():
        with pytest.raises(kind) as caught:
            attempt()
        text = str(caught.value)
        assert key in text
        assert "the hub cannot be reached" in text
        assert "give a local folder" in text
        assert "\n" not in text
        assert caught.value.exit_code == 2


def test_other_reasons_stay_and_are_one_line() -> None:
    assert hub_reason(ValueError("wrong\n  option")) == "wrong option"


def test_retries_are_quiet_only_inside(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("huggingface_hub.utils._http")
    level = logging.getLogger("huggingface_hub").level
    with quiet_hub():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logging.getLogger("huggingface_hub").level == level
