"""Captions are cleaned exactly as by the pipelines of the published models."""

import random
import warnings
from types import SimpleNamespace

import pytest

from opensora.demo.shapes import all_scenes
from opensora.models.clean_caption import clean_caption

CAPTIONS = [
    "",
    " \n\t ",
    "A Red Circle  moving\nLEFT",
    "line one\\nline two",
    "see https://example.com/a/b?c=d now",
    "http://x www.site.org/page and shop.co/it/",
    "www:/thing www://other.net htt example.comps://a.b.org",
    "write to me@example.com or a.b@mail.ru today",
    "<b>bold</b> and <a href='x.html'>link</a>",
    "<person> walks with <PERSON>",
    "1 < 2 > 0 and <unclosed",
    "<!-- hidden --> shown <script>alert(1)</script>",
    "tom &amp; jerry &quot;run&quot; &lt;fast&gt; &#65;&#x42;",
    "tom &amp;amp; jerry &amp;quot; &ampersand",
    "photo by @some_one99 and @другой",
    "a cat 猫 in ㈱ the ㌀ garden ䷀ 㐀 ㇰ ㇀ 日本語",
    "ひらがな カタカナ 한국어 stay",
    "dash – em — minus ‐ wave 〜 full － two--three",
    "«quoted» “double” ‘single’ `tick` ´acute´ ¨",
    "server 192.168.0.1 answers",
    "meeting at 5:30 ",
    "meeting at 5:30 sharp 1:23 x",
    "#1 #123 #1234 #12345 #123456 #12a",
    "order 123456 and 12345 and 1234567890",
    "img_0001.jpg and /home/me/photo.final.PNG of a cat",
    "a.mp4b clip.webp",
    "'''\"\"many quotes\"\"''' \"'",
    "wait... what.. . end .",
    "***SOLD OUT*** [new] {x} (y) ~z~ a|b a\\b a/b ®©™•½¿¡§º·",
    "this-is-my-cute-cat",
    "this_is_my_cute_cat now-and_then",
    "one-two three_four",
    "jc6640 jc6640vc 6640vc231 abcd1234 a1b2c3 j2d1a2a x9",
    "worldwide free shipping, Free  Shipping! shipping",
    "free download now, download free, downloads",
    "click for more, click on this, clicking on that",
    "png images, jpg image of pdf, mp4 epsilon",
    "page 12 of the book, page twelve",
    "size 1920x1080, 12х34, 3.5×4.5 and 10x",
    "title : the word ,next.word 3.14 a,b./c",
    '"quoted as a whole"',
    "'half quoted",
    "-dashed- ,comma, :colon: ;semi; _under_ +plus+",
    ".hidden",
    ".",
    "smile 😀🎬👩‍👩‍👧 ☃ ♥",
    "cafÃ© schÃ¶n âœ” ﬁne ＦＵＬＬ e\u0301 İstanbul Straße",
    "%41%20b+c%2Bd 100% %zz",
    "&nbsp;&hearts;&#128512;&unknown; &#xd800; &",
    "nul \x00 bell \x07 bom \ufeff zero\u200bwidth soft\u00adhyphen \u2028 sep",
]
FRAGMENTS = [
    *(piece for caption in CAPTIONS for piece in caption.split(" ")),
    *" \n\t\"'`.,:;-_+#@&<>/\\[]{}()|*~=?!%",
    *("&lt;", "&gt;", "&amp;", "&quot", "</b>", "<i>", "<br/>", "\\n", "http:", "https://", "www:", ".com", ".it"),
    *("0", "7", "12", "345", "6789", "00000", "a", "b", "X", "х", "×", "free ", " shipping", "download", "click on "),
    *("page ", ".jpg", "mp4", "—", "〜", "漢", "é", "Ã©", "“", "’", "\u00a0", "\u3000", "ẞ", "𝔘", "٣", "²"),
]


def reference(text: str) -> str | None:
    """What diffusers makes of it; None where its parser of HTML gives up."""
    from bs4.exceptions import ParserRejectedMarkup
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline as Pipeline

    cleaner = SimpleNamespace(bad_punct_regex=Pipeline.bad_punct_regex)
    cleaner._clean_caption = lambda caption: Pipeline._clean_caption(cleaner, caption)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Pipeline._text_preprocessing(cleaner, text, clean_caption=True)[0]
        except ParserRejectedMarkup:
            return None


@pytest.mark.parametrize("caption", CAPTIONS)
def test_nasty_captions_are_cleaned_as_by_diffusers(caption: str) -> None:
    assert clean_caption(caption) == reference(caption)


def test_random_nasty_strings_are_cleaned_as_by_diffusers() -> None:
    rng = random.Random(0)
    for _ in range(4000):
        text = rng.choice(["", " "]).join(rng.choices(FRAGMENTS, k=rng.randint(1, 12)))
        expected, found = reference(text), clean_caption(text)
        assert expected is None or found == expected, text


def test_captions_of_the_embedded_world_stay() -> None:
    for caption in ["a red circle moving left", *(scene.caption for scene in all_scenes())]:
        assert clean_caption(caption) == caption


def test_a_caption_is_never_an_error_nor_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert clean_caption("a cat <![x]> runs") == "a cat runs"  # markup that the parser refuses
    assert clean_caption("notes.txt") == "notes. txt"  # a file name is no file to read
    assert not recwarn.list
