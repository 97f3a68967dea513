"""The keys of one encoder alone."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medvlp.config import MethodConfig, key


@dataclass
class BackboneConfig(MethodConfig):
    name: str = key("backbone", "registered method; its own keys stand beside this one")
    side: Literal["image", "text"] = key("image", "which encoder there is")

    embeds_reports: ClassVar[bool] = False
    trains: ClassVar[bool] = False
