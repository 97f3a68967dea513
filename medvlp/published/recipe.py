"""What a recipe says of one published model, and facts about models for the model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medvlp.published.renaming import Rule

#: The text model, and tokenizer, that all three published methods use.
CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"


@dataclass(frozen=True)
class Origin:
    """Where published weights come from, as the model card says it.

    Attributes:
        title: of the model. paper, code: references. weights: where the file is published.
        licence: what is known of the terms. data: what the weights were trained on.
        text: how reports and prompts have to be written. remarks: more lines.
        stored_side: side of the square that images are fitted into before the published evaluation cuts its
            view; None: it cuts none.
        window: how DICOM films get the grey levels of what the weights were trained on
            (`shards.dicom_windows.Window`); None: it is not known.
    """

    title: str
    paper: str
    code: str
    weights: str
    licence: str
    data: str
    text: str
    remarks: Sequence[str] = ()
    stored_side: int | None = None
    window: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How one published file becomes a method of ours.

    Attributes:
        values: the config's sections, where they differ from the defaults.
        rules: how our tensors are made; unused: published keys that nothing reads -> why.
        own: regular expression of our tensors that the file does not hold.
        origin: for the card.
    """

    values: Mapping[str, Any]
    rules: Sequence[Rule]
    origin: Origin
    unused: Mapping[str, str] = field(default_factory=dict)
    own: str = ""


#: `Origin.window` of weights trained on MIMIC-CXR-JPG, whose images were equalised.
MIMIC_WINDOW = "equalize"

#: Sizes of BERT base in Bio_ClinicalBERT, whose vocabulary is that of cased BERT.
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
