"""Whether a tokenizer is the one that published text encoders were trained with: known words at known ids."""

from medvlp.data.text import Tokenizer
from medvlp.published.reading import PublishedFileError

#: Bio_ClinicalBERT has the vocabulary of cased BERT; some of its words.
VOCABULARY = 28996
KNOWN = {
    "[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ",": 117, ".": 119,
    "the": 1103, "of": 1104, "and": 1105, "in": 1107, "for": 1111, "are": 1132, "not": 1136, "they": 1152,
}  # fmt: skip


def check_clinical_bert(tokenizer: Tokenizer, named: str) -> None:
    """Refuse another vocabulary than cased BERT's: its ids would mean other words to the text encoder.

    Raises:
        PublishedFileError: another size, or a word stands elsewhere.
    """
    remedy = "give the folder or hub name of Bio_ClinicalBERT's with --tokenizer"
    if tokenizer.vocab_size != VOCABULARY:
        raise PublishedFileError(
            f"the tokenizer {named} has {tokenizer.vocab_size} tokens, the published text encoder "
            f"{VOCABULARY}: {remedy}"
        )
    for word, number in KNOWN.items():
        if (found := tokenizer.id_of(word)) != number:
            raise PublishedFileError(
                f"the tokenizer {named} has as many tokens as the published one and is another: {word!r} is "
                f"{found}, not {number}; {remedy}"
            )
