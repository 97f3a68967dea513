"""Splits report text into sentences by rules made for radiology reports, in whatever language.

The marks and abbreviations of all languages are one set, because text is split again where its language is
not known (in training, from a sample's sections). Hand-written because general splitters break on decimals,
"Dr.", numbered impressions, de-identification marks ("XXXX", "___") and reports in capitals, and because the
result must not change with a model file.
"""

import re

#: Abbreviations that never end a sentence (lower case, without their last period).
_NEVER_FINAL = frozenset(
    (
        *("dr", "drs", "mr", "mrs", "ms", "prof", "vs", "cf", "e.g", "i.e", "approx", "fig"),
        *("z.b", "v.a", "z.n", "d.h", "bzw", "ggf", "evtl", "inkl", "vgl", "sog", "li", "re"),
        *("dra", "sr", "sra", "aprox", "p.ej", "mme", "env"),
    )
)
#: Abbreviations that end a sentence only before a capitalised word.
_SOMETIMES_FINAL = frozenset(("a.m", "p.m", "am", "pm", "etc", "cm", "mm", "ml", "mg", "lat", "ant"))
#: Abbreviations that end no sentence before a number.
_OF_A_NUMBER = frozenset(("ca", "nr", "abb"))
_LIST_MARKER = re.compile(r"\(?\d{1,2}[.)]|[-*•]")
_SENTENCE_END = re.compile(r"[.!?。｡．！？][)\]\"'”’」』）】]*$")
_INITIAL = re.compile(r"[A-Z]\.")
_CAPITALISED = re.compile(r"[\"'(\[“‘]*(?:[A-ZÀ-Þ][a-zß-ÿ]|\d{1,2}[.)]$)")
_PARAGRAPH = re.compile(r"\n\s*\n")
# German ordinals: "die 5. Rippe", "am 3. Mai".
_ORDINAL = re.compile(r"\d{1,2}\.")
_COUNTED = re.compile(
    r"(?:rippen?|icr|interkostal\w*|[bhl]wk|januar|februar|märz|april|mai|juni|juli|august|september|oktober|"
    r"november|dezember)\b",
    re.IGNORECASE,
)
# Chinese and Japanese put no space behind a sentence nor behind the number of a list's item.
_WIDE_END = re.compile(r"((?:[。｡！？]|(?<!\d)．)+[」』）】”’]*)(?=\S)")
_WIDE_ITEM = re.compile(r"\s*(?:\d{1,2}[、．](?!\d)|[①-⑳]|（\d{1,2}）)")
# "clear.Heart" and "PTX.2.Lines": a space was forgotten after the period.
_FORGOTTEN_SPACE = re.compile(
    r"(?<=[A-Za-zß-ÿ]{2}\.)(?=[A-ZÀ-Þ][a-zß-ÿ])|(?<=[A-Za-z]{2}\.)(?=\d{1,2}\.\s?[A-Za-z])"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text` in order, white space folded to single spaces.

    No character other than white space is lost: list markers ("1.") stay with their sentence. Decimals,
    abbreviations and initials do not end a sentence; an empty line and a list marker at the start of a line
    do. A fragment without letter or digit joins the sentence before it.
    """
    sentences: list[str] = []
    for paragraph in _PARAGRAPH.split(text):
        spaced = _WIDE_END.sub(r"\1 ", _FORGOTTEN_SPACE.sub(" ", paragraph))
        for item in _list_items(spaced):
            sentences += _split_words(item.split())
    return _join_fragments(sentences)


def _list_items(paragraph: str) -> list[str]:
    """Cut before every line that opens with a list marker; other line breaks are soft."""
    items = [""]
    for line in paragraph.splitlines():
        first = line.split(maxsplit=1)[:1]
        if first and (_LIST_MARKER.fullmatch(first[0]) or _WIDE_ITEM.match(line)):
            items.append(line)
        else:
            items[-1] += f" {line}"
    return items


def _split_words(words: list[str]) -> list[str]:
    sentences, start = [], 0
    for position, word in enumerate(words):
        following = words[position + 1] if position + 1 < len(words) else None
        if following is None or _ends_sentence(word, following, first=position == start):
            sentences.append(" ".join(words[start : position + 1]))
            start = position + 1
    return sentences


def _ends_sentence(word: str, following: str, first: bool) -> bool:
    if not _SENTENCE_END.search(word):
        return False
    if first and _LIST_MARKER.fullmatch(word):
        return False
    if not word.endswith("."):
        return True
    stem = word.lstrip("([\"'“‘").removesuffix(".").lower()
    if stem in _NEVER_FINAL or _INITIAL.fullmatch(word):
        return False
    if stem in _OF_A_NUMBER and following[0].isdigit():
        return False
    if _ORDINAL.fullmatch(word) and _COUNTED.match(following):
        return False
    if stem in _SOMETIMES_FINAL:
        return _CAPITALISED.match(following) is not None
    return True


def _join_fragments(sentences: list[str]) -> list[str]:
    """Attach pieces without letter or digit (a stray period) to the sentence before them."""
    joined: list[str] = []
    for sentence in sentences:
        if joined and not any(character.isalnum() for character in sentence):
            joined[-1] += f" {sentence}"
        else:
            joined.append(sentence)
    return joined
