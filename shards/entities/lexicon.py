"""Words of chest-radiograph reports: observations with the class they mean, and anatomies.

Ours, made on the reports of the development half (see `tests/benchmarks/entity_extraction.py`). A phrase that
is a synonym of a named class gets that class ("enlarged heart" is cardiomegaly), other findings keep their
own name and so fall into the bucket of rare ones.
"""

import re
from dataclasses import dataclass
from typing import Literal

#: What kind of word an observation is. A finding is a noun and may imply its site; a quality is said of an
#: anatomy ("normal", "enlarged"); a vague word is a finding only where it is denied ("no acute findings").
Kind = Literal["finding", "quality", "vague"]


@dataclass(frozen=True)
class Term:
    """A phrase and the observations it states.

    Attributes:
        pattern: regular expression of the phrase in lower case, without word boundaries.
        observations: classes or names of rare findings.
        site: anatomy the phrase implies where the sentence names none; "" for none.
        kind: how it finds its anatomy.
        both_sides: without a side both lungs are meant, unless it is absent.
    """

    pattern: str
    observations: tuple[str, ...]
    site: str = ""
    kind: Kind = "finding"
    both_sides: bool = False

    @property
    def is_device(self) -> bool:
        """Whether it is a device whose place is known from its name."""
        return self.site in _DEVICE_SITES and bool(
            {"tube", "catheter", "picc", "pacemaker"} & {*self.observations}
        )


#: Site of a device in general words ("device", "line"), and the sites of those named precisely.
GENERAL_DEVICE_SITE = "chest"
_DEVICE_SITES = frozenset(("trachea", "pleural space", "stomach", "superior vena cava", "right ventricle"))


def _findings(site: str, **phrases: str) -> list[Term]:
    return [Term(pattern, (name,), site) for name, pattern in phrases.items()]


def _qualities(site: str, **phrases: str) -> list[Term]:
    return [Term(pattern, (name,), site, "quality") for name, pattern in phrases.items()]


_LINEAR = r"(?:plate-?like|discoid|linear|band-?like|subsegmental)"
_HYPER = r"hyper-?\s?(?:inflat(?:ed|ion)|expan(?:ded|sion)|aerat(?:ed|ion)|disten(?:ded|tion))"
_LOW = r"(?:low|decreased|diminished|reduced|shallow|small|poor)"
_AMOUNT = r"(?:are|is|remain|remains|appear|appears)(?: \w+){0,2}?"

#: In the order in which they are tried at each place: a phrase stands before the words it is made of.
TERMS: tuple[Term, ...] = (
    # Phrases whose words mean something else alone.
    Term(r"pericardial (?:effusions?|fluid)", ("effusion",), "pericardium"),
    Term(r"subcutaneous (?:emphysema|air|gas)", ("emphysema",), "soft tissue"),
    Term(
        r"pneumoperitoneum|free (?:\w+ )?(?:sub-?diaphragmatic |intra-?\s?peritoneal |abdominal )?air",
        ("free", "air"),
        "abdomen",
    ),
    Term(rf"{_LINEAR} (?:collapse|volume loss)", ("atelectasis",), "lung"),
    Term(r"pleural air collections?", ("pneumothorax",), "pleural space"),
    Term(r"(?:pleural )?fluid collections?|pleural fluid", ("effusion",), "pleural space"),
    Term(r"coin lesions?|round(?:ed)? opacit(?:y|ies)", ("nodule",), "lung"),
    Term(r"mass lesions?", ("mass",), "lung"),
    Term(r"cortical (?:break|disruption)s?|bony disruptions?", ("fracture",), "bone"),
    Term(r"pleural (?:plaques?|capping|caps?)", ("thicken",), "pleura"),
    Term(r"pleural scarring", ("thicken", "scar"), "pleura"),
    Term(
        r"air-?\s?space (?:disease|process|opacit(?:y|ies)|opacification)s?|alveolar (?:disease|process)",
        ("opacity",),
        "lung",
    ),
    Term(
        r"bullous (?:disease|changes?|emphysema)|emphysema(?:tous)?(?: (?:disease|changes?))?",
        ("emphysema",),
        "lung",
        both_sides=True,
    ),
    Term(
        _HYPER + r"|air trapping|increased lung volumes|lungs? (?:are|is)? ?large",
        ("hyperinflate",),
        "lung",
        both_sides=True,
    ),
    Term(
        rf"{_LOW} (?:lung |inspiratory )(?:volumes?|effort)|(?:lung |inspiratory )volumes? {_AMOUNT} {_LOW}|"
        r"hypo-?\s?(?:inflat(?:ed|ion)|aerat(?:ed|ion)|ventilat(?:ed|ion)|expan(?:ded|sion))|"
        r"(?:under|poorly) ?inflated|(?:poor|low|shallow) (?:inspiration|inflation)",
        ("low",),
        "lung volumes",
    ),
    Term(
        r"degenerative (?:\w+ ){0,2}?(?:diseases?|changes?|spurring)|degenerat(?:ive|ion)|spurring",
        ("degenerative",),
        "spine",
    ),
    Term(
        r"(?:old |prior |chronic |calcified )*granulomatous (?:disease|changes?|process)|granuloma(?:s|ta)?",
        ("granuloma",),
        "lung",
    ),
    Term(r"(?:congestive )?(?:heart|cardiac) failure|chf", ("chf",), "heart"),
    Term(
        r"(?:vascular |upper zone )?redistribution|cephali[sz]ation", ("redistribution",), "pulmonary vessels"
    ),
    Term(r"(?:pulmonary |cardiac )?(?:vascular |venous )?congestion", ("congestion",), "pulmonary vessels"),
    Term(r"(?:vascular |venous )?engorge(?:ment|d)", ("engorgement",), "pulmonary vessels"),
    Term(r"(?:pulmonary |interstitial |alveolar )*o?edema", ("edema",), "lung", both_sides=True),
    Term(r"venous (?:pressure|hypertension)", ("pressure",), "pulmonary vessels"),
    Term(r"(?:lung )?volume loss|loss of (?:\w+ )?(?:lung )?volume", ("loss",), "lung"),
    Term(r"air bronchograms?|air[- ]fluid levels?|air-?\s?spaces?|bowel gas", (), ""),
    Term(
        r"(?:upper|top) ?(?:limits?|limit)? ?(?:of|-)? ?normal(?: limits)?",
        ("borderline",),
        "heart",
        "quality",
    ),
    # Devices and the places they belong to.
    Term(r"(?:endotracheal|et|tracheostomy) tubes?|ett|tracheostomy", ("tube",), "trachea"),
    Term(r"(?:chest|thoracostomy|pleural) tubes?|pigtail catheters?", ("tube",), "pleural space"),
    Term(r"(?:ng|og|nasogastric|orogastric|enteric|feeding|dobb?hoff) tubes?", ("tube",), "stomach"),
    Term(
        r"picc(?: lines?| catheters?)?|peripherally inserted central catheters?",
        ("picc",),
        "superior vena cava",
    ),
    Term(
        r"(?:central (?:venous )?|jugular |subclavian |ij |dialysis |venous access )+"
        r"(?:catheters?|lines?|ports?)|"
        r"(?:chest |infusion |porta?-?a?-?)(?:port|cath(?:eter)?)s?|port-?a-?cath(?:eter)?s?|mediports?",
        ("catheter",),
        "superior vena cava",
    ),
    Term(r"(?:cardiac )?(?:pace-?\s?makers?|pacers?)", ("pacemaker",), "right ventricle"),
    Term(
        r"(?:support|medical|electronic|implanted|cardiac|pacing)(?: cardiac)? devices?|devices?|"
        r"(?:aicd|icd|defibrillators?)",
        ("device",),
        GENERAL_DEVICE_SITE,
    ),
    *_findings(
        GENERAL_DEVICE_SITE,
        tube=r"tubes?|tubing",
        catheter="catheters?",
        line="(?<!fissure )(?<!skin )lines?",
        clip="clips?",
        wire="(?:sternal |sternotomy |cerclage )?wires?|cerclages?",
        stent="stents?",
        hardware="hardware|orthopedic (?:plate|screw)s?",
        lead="leads?(?! to)",
        tip="tips?",
        drainage="drains?|drainage",
    ),
    # Findings of the pleura, lungs, heart, bones and vessels.
    *_findings(
        "pleural space", effusion="effusions?", pneumothorax=r"(?:hydro)?pneumothora(?:x|ces|xes)|ptx"
    ),
    *_findings("pleura", thicken="thicken(?:ing|ed)"),
    *_findings("heart", cardiomegaly="(?:borderline )?cardiomegaly"),
    *_findings(
        "lung",
        consolidation="consolidations?|consolidative",
        atelectasis="atelecta(?:sis|tic|ses)",
        opacity="opacit(?:y|ies)|opacification|opacified",
        pneumonia="(?:broncho)?pneumonias?|infections?|infectious (?:process|etiology|disease)|infectious",
        infiltrate="infiltrat(?:es?|ions?)",
        collapse="collapsed?",
        nodule="nodul(?:es?|ar|arity)|nodular densit(?:y|ies)",
        mass="mass(?:es)?(?:-?like)?|tumou?rs?|neoplasms?",
        lesion="(?<!skin )lesions?",
        density="densit(?:y|ies)",
        scar="scars?|scarring|scarred",
        aspiration="aspiration",
        fibrosis="fibrosis|fibrotic",
        bronchiectasis="bronchiecta(?:sis|tic)",
        cavity="cavit(?:y|ies|ation|ary)",
        bulla="bullae?|blebs?",
        copd="copd|(?:chronic )?obstructive (?:pulmonary |lung )?disease",
        lucency="lucenc(?:y|ies)|lucent",
        marking="markings?",
        crowd="crowd(?:ing|ed)",
        fluid="fluid",
    ),
    *_findings(
        "bone", fracture="fractures?|fractured", deformity="deformit(?:y|ies)", osteopenia="osteopeni[ac]"
    ),
    *_findings(
        "spine",
        scoliosis="(?:dextro|levo)?scolio(?:sis|tic)|curvature",
        kyphosis="kypho(?:sis|tic)",
        osteophyte="osteophytes?|osteophytosis",
        spondylosis="spondylosis",
    ),
    *_findings(
        "",
        hernia="hernias?|herniation",
        shift="shift(?:ed)?",
        atherosclerosis="atherosclero(?:sis|tic)",
        adenopathy="(?:lymph)?adenopathy",
        eventration="eventration",
        aneurysm="aneurysms?",
    ),
    # Qualities of an anatomy.
    *_qualities(
        "",
        normal="(?:within )?(?:the )?(?:upper )?normal(?: limits)?|wnl",
        unremarkable="unremarkable",
        clear="clear(?! of)",
        stable="stable",
        enlarge="enlarge(?:d|ment)",
        prominence="prominen(?:t|ce)",
        calcification="calcif(?:ied|ications?|ic)|calcinosis",
        dilation="dilat(?:ed|ion|ation)|ecta(?:sia|tic)",
        distention="disten(?:ded|tion|sion)",
        obscure="obscur(?:ed|es|ing|ation)",
        abnormality="abnormal",
    ),
    *_qualities("bone", intact="intact"),
    *_qualities("heart", borderline="borderline"),
    *_qualities(
        "lung",
        expand="(?:well|normally|fully|adequately|symmetrically)[- ](?:\\w+ )?(?:expanded|inflated)|expanded",
        aerate="(?:well )?aerat(?:ed|ion)",
    ),
    *_qualities("costophrenic angle", blunt="blunt(?:ing|ed)", sharp="sharp", sharply="sharply"),
    *_qualities("hemidiaphragm", elevation="elevat(?:ed|ion)"),
    *_qualities("mediastinum", widen="widen(?:ing|ed)"),
    *_qualities("aorta", tortuous="tortuous|tortuosity|unfold(?:ed|ing)|uncoil(?:ed|ing)"),
    *[
        Term(pattern, (name,), "", "vague")
        for name, pattern in (
            ("abnormality", "abnormalit(?:y|ies)"),
            ("process", "process(?:es)?"),
            ("disease", "diseases?"),
            ("finding", "findings?"),
        )
    ],
)

_SIDE = r"(?:(?:left|right|bilateral|both|[lr]t)(?:[- ]sided)?)"
_ZONE = r"(?:upper|mid-?|middle|lower|apical|basal|basilar)"
_LUNG = r"(?:lobes?|lungs?(?: (?:zones?|fields?|bases?|apex|apices))?|zones?|lung)"
_AND = r"(?:\s?/\s?|,? and (?:the )?|,? or |, )"
#: How large or new a finding is.
SIZE = (
    r"(?:trace|tiny|small|minimal|mild|moderate|large|severe|new|increased|decreased|residual|stable|"
    r"unchanged|persistent)"
)
#: Behind "on the" a side stands alone: "effusion on the right and left lower lobe opacity".
_NO_NOUN = r"(?<!\bon the )"
#: The first of two sides: "right and ", "left greater than ".
_FIRST_SIDE = rf"{_NO_NOUN}{_SIDE}(?:{_AND}| (?:greater|larger|more|worse) than (?:the )?)"
#: Two sides of one finding, each with its size: the beginning of "right and moderate left pleural effusions".
SIZED_SIDES = rf"{_NO_NOUN}{_SIDE},? (?:and|or) (?:a )?(?:{SIZE}(?:[- ](?:sized|to|{SIZE}))* )?(?={_SIDE} )"
_PART = (
    r"(?: (?:size|silhouettes?|contours?|shadow|structures?|outline|configuration|region|angles?|"
    r"sulc(?:us|i)|spaces?|surfaces?|arch|knob))"
)
# Alternatives that exclude each other: they are repeated below, where ambiguity costs exponential time.
_ORDINAL = (
    r"(?:\d+(?:st|nd|rd|th)|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|"
    r"posterior|anterior|lateral)"
)

#: Anatomy name -> its forms, with sides, zones and parts; tried in this order.
ANATOMY_PATTERNS: dict[str, str] = {
    "zonal": rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?{_ZONE}(?:{_AND}(?:{_SIDE} )?{_ZONE})* {_LUNG}|"
    rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?mid-?(?:lungs?|zones?)",
    "lobe": r"r[uml]l|l[ul]l",
    "lung volumes": r"lung volumes?|pulmonary volumes?",
    "cavoatrial junction": r"(?:cavo-?\s?atrial|svc[/ -]ra|atrio-?caval|cavo-?atrial) junction",
    "superior vena cava": r"superior vena cava|svc",
    "heart border": r"(?:heart|cardiac) borders?",
    "retrocardiac": r"retro-?cardiac",
    "cardiopulmonary": r"cardio-?\s?pulmonary",
    "cardiomediastinum": rf"cardio-?\s?mediastin(?:al|um){_PART}*",
    "mediastinum": rf"mediastin(?:al|um){_PART}*",
    "right atrium": r"right (?:atrium|atrial)(?: appendage)?",
    "right ventricle": r"right ventric(?:le|ular)",
    "pericardium": r"pericardi(?:al|um)",
    "heart": rf"(?:heart|cardiac)(?! failure){_PART}*(?: and {_PART[3:-1]})?",
    "hilum": rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?(?:peri|infra|supra|para)?-?(?:hil(?:um|ar|a)){_PART}*",
    "costophrenic angle": rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?(?:\w+ )?costophrenic{_PART}*",
    "cardiophrenic angle": rf"(?:{_SIDE} )?cardiophrenic{_PART}*",
    "hemidiaphragm": rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?(?:hemi-?)?diaphragm(?:s|atic)?",
    "rib": rf"(?:{_SIDE} )?(?:{_ORDINAL}(?:, and |, | and | through | ))*ribs?(?: cage)?",
    "clavicle": rf"(?:{_SIDE} )?(?:\w+ )?clavic(?:les?|ular)",
    "lingula": r"lingula|lingular",
    "bibasilar": r"bi-?basilar|bibasal",
    "biapical": r"bi-?apical",
    "lung base": rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?(?:lung )?(?:bases?|basilar|basal)",
    "lung apex": rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?(?:lung )?(?:apex|apices|apical)",
    "pleural space": rf"(?:{SIZED_SIDES}|{_FIRST_SIDE})?(?:{_SIDE} )?(?:{_ZONE} )?pleura(?:l|e)?{_PART}*",
    "hemithorax": rf"(?:{_SIDE} )?hemi-?thora(?:x|ces)",
    "lung": rf"(?:{_FIRST_SIDE})?(?:{_SIDE} )?lungs?(?: (?:zones?|fields?))?",
    "trachea": r"tracheal?",
    "spine": r"(?:(?:thoracic|cervical|lumbar|thoracolumbar|mid|lower|upper) )*"
    r"(?:spine|spinal|vertebrae?l?|t-spine)(?: bod(?:y|ies))?",
    "aorta": rf"(?:thoracic |descending |ascending )*aort(?:a|ic){_PART}*",
    "interstitium": r"interstiti(?:al|um)",
    "parenchyma": r"parenchyma(?:l)?",
    "pulmonary": rf"pulmonary(?: (?:vascularity|vasculature|vessels|vascular|arter(?:y|ies))){{0,2}}{_PART}*|"
    r"(?:central )?vascular(?:ity| markings)?|vasculature",
    "abdomen": r"(?:upper )?abdom(?:en|inal)|stomach|gastric",
    "bone": rf"(?:bones?|bony|osseous|osseus|skelet(?:on|al)|sternum){_PART}*(?: thorax)?",
    "soft tissue": r"soft tissues?",
    "shoulder": rf"(?:{_SIDE} )?(?:shoulders?|humer(?:us|al))",
    "chest": r"(?:\w+ )?chest wall|chest(?! x-?ray| radiograph)|thorax|thoracic|intrathoracic",
}

#: What the landmark rules are told for an anatomy, where its name alone would mislead them.
CANONICAL = {
    "cardiomediastinum": "mediastinum",
    "cardiophrenic angle": "cardiophrenic sulcus",
    "parenchyma": "parenchymal",
    "bibasilar": "bibasilar",
    "pulmonary": "pulmonary vessels",
}


def _compile(patterns: dict[str, str]) -> re.Pattern[str]:
    return re.compile(
        "|".join(rf"(?P<{name}>(?<!\w)(?:{pattern})(?!\w))" for name, pattern in patterns.items())
    )


#: Finds the next term; the group `t<number>` is its number in `TERMS`.
TERM_PATTERN = _compile({f"t{number}": term.pattern for number, term in enumerate(TERMS)})
ANATOMY_NAMES = tuple(ANATOMY_PATTERNS)
#: Finds the next anatomy; the group `a<number>` is its number in `ANATOMY_NAMES`.
ANATOMY_PATTERN = _compile({f"a{i}": ANATOMY_PATTERNS[name] for i, name in enumerate(ANATOMY_NAMES)})
