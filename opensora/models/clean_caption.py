"""Captions as the published models had them before T5: lower case, without addresses, markup, file names and numbers.

The T5-conditioned models of PixArt-alpha, DeepFloyd IF and Open-Sora 1.0 were trained on captions cleaned by the same
rules, so a prompt must pass them too. The order of the rules matters.
"""

import re

Rules = tuple[tuple[re.Pattern[str], str], ...]

HOST = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"  # a mail address is none
DASHES = "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
DASHES += "\ufe31\ufe32\ufe58\ufe63\uff0d"
FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _rules(*rows: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rows)


BEFORE_MARKUP = _rules(
    (r"<person>", "person"),  # a mask of faces in some data sets, which is no tag
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{HOST})", ""),  # addresses
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{HOST})", ""),  # what the rule above has joined to addresses
)
AFTER_MARKUP = _rules(
    (r"@\w+\b", ""),  # @nickname
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes to ideographs: T5 knows none of them
    (rf"[{DASHES}]+", "-"),  # one kind of dash
    (r"[`´«»“”¨]", '"'),  # one kind of double quote
    (r"[‘’]", "'"),  # and of single quote
    (r"&quot;?|&amp", ""),  # entities that were escaped twice
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # a time at the end, as in lists of articles
    (r"\\n", " "),  # a line end that was written out
    (r"#\d{1,3}\b", ""),  # #123
    (r"#\d{5,}\b", ""),  # #12345, but a year such as #2012 stays
    (r"\b\d{6,}\b", ""),  # long numbers
    (rf"\S+\.(?:{FILE_TYPES})", ""),  # file names
    (r"[\"']{2,}", '"'),  # """sold out"""
    (r"\.{2,}", " "),  # an ellipsis
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),  # ***sold out***
    (r"\s+\.\s+", " "),  # a full stop alone
)
AFTER_REPAIR = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),  # words of shops
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILE_TYPES})(\simages?)?", ""),  # kinds of files, and words that start like them
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 1920x1080, with a Latin or a Cyrillic letter
    (r"\b\s+:\s+", ": "),  # a colon belongs to the word before it
    (r"(\D[,./])\b", r"\1 "),  # a space after punctuation
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),  # quotes around the whole
    (r"^['_,\-:;]", ""),  # punctuation left over at the start
    (r"['_,\-:+]$", ""),  # and at the end
    (r"^\.\S+$", ""),  # a file extension is all there is
)
JOINT = re.compile(r"[-_]")
MAX_JOINTS = 3  # more of them are a name with its words joined, as in this-is-my-cute-cat


def clean_caption(text: str) -> str:
    """The caption as a T5-conditioned model expects it; may be empty. The rules are applied twice, as in training."""
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    from html import unescape
    from urllib.parse import unquote_plus

    from ftfy import fix_text

    text = _apply(BEFORE_MARKUP, unquote_plus(text).strip().lower())
    text = _apply(AFTER_MARKUP, _without_markup(text))
    if len(JOINT.findall(text)) > MAX_JOINTS:
        text = JOINT.sub(" ", text)
    text = unescape(unescape(fix_text(text)))
    return _apply(AFTER_REPAIR, text).strip()


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    """The text between HTML tags; all of it where the parser refuses the markup, as in `<![x]>`."""
    import warnings

    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
    from bs4.exceptions import ParserRejectedMarkup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a caption that is a file name is still text
        try:
            return BeautifulSoup(text, features="html.parser").text
        except ParserRejectedMarkup:
            return text
