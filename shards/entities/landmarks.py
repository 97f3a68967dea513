"""Where an anatomy lies: the rules from anatomy words to the 51 landmarks.

Source: the published rules of MeDSLIP's preprocessing (first written for AGXNet), checked on golden pairs.
They read RadGraph's strings, the head noun and its modifiers joined by bars ("lobe|left|lower"). That the
same rules also take plain words ("left lower lobe") is ours.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from shards.entities.vocabulary import ANATOMIES, OTHER, UNSPECIFIED


@dataclass(frozen=True)
class Rule:
    """A landmark and the anatomies that belong to it: those that name it, and some whole strings.

    An anatomy names the landmark if its words hold one of `names`, one of every group of `needs`, and none of
    `excludes`. `strings` are whole RadGraph strings that count whatever their words.
    """

    landmark: str
    names: frozenset[str]
    needs: tuple[frozenset[str], ...] = ()
    excludes: frozenset[str] = frozenset()
    strings: tuple[str, ...] = ()

    def matches(self, words: frozenset[str]) -> bool:
        """Whether anatomy words name the landmark."""
        return (
            bool(words & self.names)
            and all(words & group for group in self.needs)
            and not words & self.excludes
        )


def _rule(landmark: str, names: str, *needs: str, excludes: str = "", strings: str = "") -> Rule:
    """A rule from words separated by spaces; `strings` are separated by commas."""
    groups = tuple(frozenset(group.split()) for group in needs)
    whole = tuple(string.strip() for string in strings.split(",") if string)
    return Rule(landmark, frozenset(names.split()), groups, frozenset(excludes.split()), whole)


_HILAR = "hilar hilum perihilar infrahilar"
_DIAPHRAGM = "diaphragm hemidiaphragm"
_BASE = "lower base basilar basal basis"
_ZONES = "lower base bases basilar basal basis middle mid upper apex apical"


def _sides(side: str, other: str) -> dict[str, Rule]:
    """The rules of one side of the body by landmark."""
    rules = (
        _rule(f"{side}_hilar", _HILAR, side, excludes=other),
        _rule(f"{side}_pleural", "pleural", side, excludes=other),
        _rule(f"{side}_diaphragm", _DIAPHRAGM, side, excludes=other),
        _rule(f"lower_{side}_lobe", "lobe", side, "lower"),
        _rule(
            f"upper_{side}_lobe", "lobe", side, "upper", strings="lingula,lingular" if side == "left" else ""
        ),
        _rule(
            f"{side}_lower_lung",
            "lung",
            side,
            _BASE,
            strings=f"base|{side},basilar|{side},basal|{side},lung|{side}|bases",
        ),
        _rule(
            f"{side}_mid_lung", "lung", side, "middle mid", strings="midlung|left" if side == "left" else ""
        ),
        _rule(f"{side}_upper_lung", "lung", side, "upper"),
        _rule(f"{side}_apical_lung", "apex apical apicolateral", side, excludes=other),
        _rule(
            f"{side}_lung_unspec",
            "lung hemithorax",
            f"{side} {side}-sided",
            excludes=f"volume volumes {other} {_ZONES} perihilar",
            strings=f"{side},{side} side,thorax|{side}|hemi",
        ),
        _rule(f"{side}_costophrenic", "costophrenic", side, excludes=other),
    )
    return {rule.landmark: rule for rule in rules}


_EITHER = "left right"
_UNSIDED = {
    rule.landmark: rule
    for rule in (
        _rule("trachea", "trachea tracheal"),
        _rule(
            "hilar_unspec", _HILAR, excludes=_EITHER, strings="hila,perihilar|right|left,perihilar|left|right"
        ),
        _rule(
            "pleural_unspec",
            "pleural",
            excludes=_EITHER,
            strings="pleural|left|right,pleural|right|left,"
            "pleural|bilateral|right|left,pleural|bilateral|left|right",
        ),
        _rule("heart_size", "heart cardiac", excludes="border borders"),
        _rule("heart_border", "heart cardiac", "border borders"),
        _rule(
            "diaphragm_unspec",
            "diaphragm diaphragms hemidiaphragm hemidiaphragms",
            excludes=_EITHER,
            strings="hemidiaphragm|left|right,hemidiaphragm|right|left",
        ),
        _rule("retrocardiac", "retrocardiac"),
        _rule("middle_right_lobe", "lobe", "right", "middle"),
        _rule("lung_apices", "apices apical", excludes=_EITHER, strings="biapical,lungs|upper"),
        _rule(
            "lung_bases",
            "lung lungs",
            "bibasilar basilar base bases bibasal basal",
            excludes=_EITHER,
            strings="lung|lower,lungs|lower,bibasilar,basilar,bases,bibasal,basal,basal|bilateral,lobe|lower,"
            "lobes|lower,lobe|bilateral|lower,bases|both,bibasilar|left|right,bibasilar|right|left",
        ),
        _rule("costophrenic_unspec", "costophrenic", excludes=_EITHER),
        _rule("cardiophrenic_sulcus", "cardiophrenic"),
        _rule("mediastinal", "mediastinal cardiomediastinal mediastinum cardiomediastinum"),
        _rule("spine", "spine spinal"),
        _rule("clavicle", "clavicle clavicles"),
        _rule("rib", "rib ribs"),
        _rule("stomach", "stomach abdomen abdominal"),
        _rule("right_atrium", "atrium atrial", "right", excludes="left"),
        _rule("right_ventricle", "ventricle ventricular", "right", excludes="left"),
        _rule("aorta", "aorta aortic"),
        _rule("svc", "svc"),
        _rule("interstitium", "interstitium interstitial"),
        _rule("parenchymal", "parenchymal"),
        Rule("cavoatrial_junction", frozenset(("cavoatrial junction",))),
        _rule("cardiopulmonary", "cardiopulmonary"),
        _rule("pulmonary", "pulmonary"),
        _rule("lung_volumes", "lungs lung volume volumes", excludes=f"{_EITHER} {_ZONES}"),
        _rule(UNSPECIFIED, "", strings=UNSPECIFIED),
        _rule(OTHER, ""),
    )
}
_BY_LANDMARK = _sides("left", "right") | _sides("right", "left") | _UNSIDED
#: In the order in which they are tried, which is that of the vocabulary; the first match counts.
RULES: tuple[Rule, ...] = tuple(_BY_LANDMARK[name] for name in ANATOMIES)

# Plain words the published rules do not know -> RadGraph's words for them, tried in this order (ours).
_PLAIN_WORDS = (
    (r"superior vena cava", "svc"),
    (r"(?:cavo-?atrial|cavo atrial|svc[/ ]ra|atrio-?caval) junction", "cavoatrial_junction"),
    (r"pleurae?", "pleural"),
    (r"(?<!cardiophrenic )sulc(?:us|i)", "costophrenic"),
    (r"mid-?(?:lung|zone)s?|mid lungs?", "mid lung"),
    (r"(?:lung )?zones?", "lung"),
    (r"lung fields?", "lung"),
    (r"hemithoraces", "hemithorax"),
    (r"lobes", "lobe"),
    (r"vertebrae?|vertebral bod(?:y|ies)|thoracolumbar", "spine"),
)
_PLAIN = [(re.compile(rf"\b(?:{pattern})\b"), word) for pattern, word in _PLAIN_WORDS]
_WORD = re.compile(r"[a-z_]+(?:-sided)?")


@lru_cache(maxsize=65536)
def landmark(anatomy: str) -> str:
    """Landmark of an anatomy, a RadGraph string ("lung|left|lower") or plain words ("left lower lung").

    A RadGraph string follows the published rules and nothing else. Without a bar, a string those rules do
    not know is read word by word; "other" where that finds nothing either.
    """
    anatomy = " ".join(anatomy.lower().split())
    for rule in RULES:
        if anatomy in rule.strings or rule.matches(frozenset(anatomy.split("|"))):
            return rule.landmark
    return OTHER if "|" in anatomy else _plain_landmark(anatomy)


def _plain_landmark(anatomy: str) -> str:
    for pattern, word in _PLAIN:
        anatomy = pattern.sub(word, anatomy)
    words = frozenset(word.replace("cavoatrial_", "cavoatrial ") for word in _WORD.findall(anatomy))
    for rule in RULES:
        # The order of plain words is not that of RadGraph's strings.
        if rule.matches(words) or any(words == frozenset(string.split("|")) for string in rule.strings):
            return rule.landmark
    return OTHER


#: Anatomy -> row of the matrix.
ANATOMY_ROW: dict[str, int] = {name: row for row, name in enumerate(ANATOMIES)}


def _mirrored(name: str) -> str | None:
    """The landmark a horizontal flip turns `name` into; None where the other side has no such place."""
    swapped = {"left": "right", "right": "left"}
    twin = "_".join(swapped.get(part, part) for part in name.split("_"))
    return twin if twin in ANATOMY_ROW else None


#: Row each row of a mirrored image's matrix comes from; -1 for the middle lobe, right atrium and right
#: ventricle, which a mirrored chest would have on the left, where the vocabulary has no name for them.
MIRRORED_ROWS: tuple[int, ...] = tuple(
    -1 if (twin := _mirrored(name)) is None else ANATOMY_ROW[twin] for name in ANATOMIES
)
