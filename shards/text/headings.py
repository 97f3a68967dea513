"""Headings of radiology reports by language, and the sections they open."""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

#: Language -> section -> its headings in lower case with single spaces; accents are optional in reports.
_HEADINGS: dict[str, dict[str, str]] = {
    "en": {
        "addendum": "addendum",
        "comparison": "comparison, comparisons, comparison films, comparison study",
        "examination": "exam, examination, study",
        "findings": "finding, findings, findings and impression, findings/impression, report",
        "history": "history, clinical history",
        "impression": "impression, impressions, impression and plan, conclusion, conclusions",
        "indication": "indication, indications, clinical data, clinical indication, clinical information, "
        "reason for exam, reason for examination, reason for study",
        "preliminary": "wet read",
        "recommendation": "recommendation, recommendations, recommendation(s)",
        "technique": "technique, procedure, view, views",
    },
    "de": {
        "addendum": "nachtrag, addendum, ergänzung",
        "comparison": "vergleich, vergleiche, voraufnahme, voraufnahmen, vergleichsaufnahme, "
        "voruntersuchung, voruntersuchungen",
        "examination": "untersuchung, untersuchungsart",
        "findings": "befund, befunde, befund und beurteilung",
        "history": "anamnese, vorgeschichte",
        "impression": "beurteilung, zusammenfassung, ergebnis, diagnose, zusammenfassende beurteilung",
        "indication": "indikation, rechtfertigende indikation, fragestellung, klinik, klinische angaben, "
        "klinische fragestellung, klinische information",
        "preliminary": "vorläufiger befund, kurzbefund",
        "recommendation": "empfehlung, empfehlungen",
        "technique": "technik, methode, untersuchungstechnik",
    },
    "es": {
        "addendum": "adenda, addendum, adendum",
        "comparison": "comparación, comparaciones, estudios previos, estudio previo, estudio comparativo",
        "examination": "examen, estudio, exploración",
        "findings": "hallazgos, hallazgo, descripción, informe, informe radiológico, hallazgos e impresión",
        "history": "antecedentes, historia, historia clínica, antecedentes clínicos",
        "impression": "impresión, impresión diagnóstica, impresión radiológica, conclusión, conclusiones, "
        "diagnóstico, opinión, juicio diagnóstico",
        "indication": "indicación, indicaciones, datos clínicos, información clínica, motivo, "
        "motivo de consulta, motivo del estudio, motivo de la exploración, indicación clínica",
        "preliminary": "informe preliminar, lectura preliminar",
        "recommendation": "recomendación, recomendaciones, sugerencia, sugerencias",
        "technique": "técnica, procedimiento, proyecciones",
    },
    "fr": {
        "addendum": "addendum, complément",
        "comparison": "comparaison, comparaisons, comparatif, examens antérieurs, examen antérieur",
        "examination": "examen, étude",
        "findings": "résultat, résultats, constatations, description, compte rendu, compte-rendu, "
        "observations",
        "history": "antécédents, histoire, histoire de la maladie",
        "impression": "impression, conclusion, conclusions, synthèse, au total, opinion",
        "indication": "indication, indications, renseignements cliniques, contexte, contexte clinique, "
        "motif, motif de l'examen, indication clinique",
        "preliminary": "lecture préliminaire, résultat provisoire",
        "recommendation": "recommandation, recommandations, conduite à tenir",
        "technique": "technique, protocole, incidences, procédure",
    },
    "pt": {
        "addendum": "adendo, adenda, addendum",
        "comparison": "comparação, comparações, exames anteriores, exame anterior, estudo comparativo",
        "examination": "exame, estudo",
        "findings": "achados, achado, análise, descrição, relatório, laudo, resultado, resultados, "
        "achados e impressão",
        "history": "história, história clínica, antecedentes, histórico",
        "impression": "impressão, impressão diagnóstica, conclusão, conclusões, opinião, "
        "hipótese diagnóstica, diagnóstico",
        "indication": "indicação, indicações, dados clínicos, informação clínica, informações clínicas, "
        "indicação clínica, motivo, motivo do exame",
        "preliminary": "laudo preliminar, relatório preliminar",
        "recommendation": "recomendação, recomendações, sugestão, sugestões",
        "technique": "técnica, procedimento, incidências, método",
    },
    "ja": {
        "addendum": "追記, 補足",
        "comparison": "比較, 前回, 前回検査, 比較検査",
        "examination": "検査, 検査名, 検査項目",
        "findings": "所見, 画像所見, 読影所見",
        "history": "既往歴, 病歴, 現病歴",
        "impression": "診断, 印象, 結論, 画像診断, 読影診断, まとめ, インプレッション",
        "indication": "依頼内容, 検査目的, 臨床情報, 臨床診断, 目的",
        "preliminary": "一次読影, 暫定報告",
        "recommendation": "推奨, コメント",
        "technique": "撮影法, 撮影方法, 検査方法, 撮影条件",
    },
    "zh": {
        "addendum": "补充报告, 补充, 補充",
        "comparison": "对比, 比较, 对照, 對比, 比較, 既往检查",
        "examination": "检查, 检查部位, 检查项目, 檢查, 檢查項目",
        "findings": "所见, 影像所见, 检查所见, 影像学表现, 影像学所见, 影像表现, 放射学表现, X线所见, "
        "所見, 影像所見, 檢查所見",
        "history": "病史, 既往史, 现病史",
        "impression": "印象, 诊断, 诊断意见, 诊断印象, 影像诊断, 影像学诊断, 放射学诊断, 检查结论, 结论, "
        "意见, 診斷, 診斷意見, 影像診斷, 結論",
        "indication": "临床诊断, 临床资料, 临床信息, 临床表现, 检查目的, 主诉, 臨床資料, 臨床診斷",
        "preliminary": "初步报告, 初步報告",
        "recommendation": "建议, 建議",
        "technique": "检查方法, 检查技术, 扫描方法, 檢查方法, 摄影体位",
    },
}
# Headings that are also the last word of a longer label in capitals, which then belongs to the text of its
# section: "LATERAL VIEW:", "2 VIEWS:", "PRIOR STUDY:".
_COMMON = (
    *("exam", "examination", "procedure", "study", "view", "views", "untersuchung"),
    *("estudio", "examen", "exploración", "procedimiento", "proyecciones"),
    *("incidences", "procédure", "étude", "estudo", "exame", "incidências", "procedimento"),
)
#: Languages a map may name.
LANGUAGES = tuple(_HEADINGS)
#: Section of what stands before the first heading.
PREAMBLE = "preamble"
#: Every name a section can have.
SECTION_NAMES = tuple(sorted({*(name for table in _HEADINGS.values() for name in table), PREAMBLE}))

_COLON = r"[ \t\u3000]*(?:[:：﹕]-?)"
_MARKS = r"[\u0300-\u036f]"


@lru_cache
def headings(language: str) -> dict[str, str]:
    """Heading as `plain` writes it -> name of its section."""
    table = _HEADINGS[language]
    return {plain(heading): name for name, listed in table.items() for heading in listed.split(", ")}


def plain(heading: str) -> str:
    """A heading in lower case, without accents, with single spaces.

    Every letter that `re.IGNORECASE` takes for one of a heading becomes that letter: the long s, and the
    dotless i of a "FINDINGS" that was put into lower case in Turkish.
    """
    decomposed = unicodedata.normalize("NFD", heading)
    letters = "".join(letter for letter in decomposed if not re.match(_MARKS, letter))
    folded = unicodedata.normalize("NFC", letters).casefold().replace("\u0131", "i")
    return " ".join(folded.split())


@lru_cache
def heading_pattern(language: str) -> re.Pattern[str]:
    """Finds the next heading; the one named group that matched holds it as it was written.

    A heading opens a line in any case with a colon, or fills a line in capitals or capitalised without one
    (in any case behind Markdown's "#"), or stands in brackets. Where line breaks were lost it stands inside a
    line: in capitals with a colon, or capitalised with a colon after a sentence. Any other "Word:" ("LUNGS:",
    "Heart:") stays in its section, and so does a common word behind another one in capitals or a number
    ("LATERAL VIEW:").
    """
    listed = [heading for names in _HEADINGS[language].values() for heading in names.split(", ")]
    any_case = _alternatives(listed)
    capitals = _alternatives(heading.upper() for heading in listed if heading not in _COMMON)
    common = _alternatives(heading.upper() for heading in listed if heading in _COMMON)
    capitalised = _alternatives(heading.capitalize() for heading in listed)
    alone = _alternatives(form for h in listed for form in (h.upper(), h.capitalize(), h.title()))
    begin = r"^[ \t\u3000]*"
    return re.compile(
        rf"{begin}(?:\#{{1,6}}[ \t]*)?(?P<opens>(?i:{any_case})){_COLON}"
        rf"|{begin}\#{{1,6}}[ \t]*(?P<marked>(?i:{any_case}))[ \t]*$"
        rf"|{begin}(?P<fills>{alone})[ \t\u3000]*$"
        rf"|{begin}[\[【](?P<boxed>(?i:{any_case}))[\]】](?:{_COLON})?"
        rf"|(?<=[。！？])\s*[\[【]?(?P<behind>(?i:{any_case}))(?:[\]】](?:{_COLON})?|{_COLON})"
        rf"|(?<=\s)(?P<inside>{capitals}){_COLON}"
        rf"|(?<=\s)(?<![A-ZÀ-ÖØ-Þ0-9] )(?P<common>{common or '(?!)'}){_COLON}"
        rf"|(?<=[.!?])\s+(?P<follows>{capitalised}){_COLON}",
        re.MULTILINE,
    )


def _alternatives(forms: Iterable[str]) -> str:
    """Regular expression for any of `forms`, the longest first so that none hides behind its prefix."""
    longest_first = sorted(set(forms), key=lambda form: (-len(form), form))
    return "|".join(r"[ \t]+".join(map(_optional_accents, form.split())) for form in longest_first)


def _optional_accents(word: str) -> str:
    """A word with its accented letters written as one character, as two, or without accents."""
    letters = []
    for letter in word:
        bare = unicodedata.normalize("NFD", letter)[0]
        accented = bare != letter and bare.isascii()
        letters.append(f"[{letter}{bare}]{_MARKS}?" if accented else re.escape(letter))
    return "".join(letters)
