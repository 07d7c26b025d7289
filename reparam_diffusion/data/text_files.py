"""Reading text files of any encoding: captions and other texts that users bring.

Marked files and UTF-8 are certain. Everything else is detected by charset-normalizer over all files of a folder
together; captions are short, so its candidates are ranked by how plausible the words look in each encoding.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from charset_normalizer import from_bytes
from charset_normalizer.constant import FREQUENCIES

UTF8 = "UTF-8"
_MARKS: Final = (  # UTF-32's mark begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig", UTF8),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
_CANDIDATES: Final = {
    "cp1252": "Windows-1252 (Western European)",
    "gb18030": "GB 2312 / GB 18030 (Chinese)",
    "cp932": "Shift-JIS (Japanese)",
    "cp1251": "Windows-1251 (Cyrillic)",
    "big5": "Big5 (traditional Chinese)",
    "cp949": "EUC-KR (Korean)",
    "euc_jp": "EUC-JP (Japanese)",
    "koi8_r": "KOI8-R (Cyrillic)",
    "cp1250": "Windows-1250 (Central European)",
    "cp1253": "Windows-1253 (Greek)",
    "cp1254": "Windows-1254 (Turkish)",
    "cp1255": "Windows-1255 (Hebrew)",
    "cp1256": "Windows-1256 (Arabic)",
    "cp874": "Windows-874 (Thai)",
    "latin-1": "ISO 8859-1 (Western European)",
}
"""The encodings that are tried, the more common ones first."""
_LEVEL_1: Final = {"gb18030": ("gb2312", 0xB0, 0xD7), "big5": ("big5", 0xA4, 0xC6), "euc_jp": ("euc_jp", 0xB0, 0xCF)}
"""Lead bytes of the common ideographs in the national standards, which sort them before the rare ones."""
_HANGUL: Final = frozenset(
    "이다에는의가을를고하한기지사로리은그어도아자서시대나정있인해들수일라전보부비조상주으스마제안장여과구무"
    "동원성공소선오우진미연위경신만모것유내계치거물요생간개관면용게적산형말없등방작트드색위풀밭빨간앉앞옆"
    "장난감인형강양곰개발집밤검흰파란노옷꽃눈머손입빛책탁창문길숲바닥벽침잔녹초회"
)
_HAN: Final = frozenset("".join(FREQUENCIES["Chinese"])) | frozenset(
    "红绿蓝黄白黑色草地树木花山水天空海街道房间桌椅床沙发窗门站坐躺走跑看男女孩人狗猫熊鸟马玩具背景照片"
    "紅綠藍黃樹間發門馬鳥貓照片草地上放着著拿穿戴你我他她好在一只隻個个"
)
_WESTERN: Final = frozenset("äöüßéèêëàâáåæçñóòôõøíìîïúùûœÄÖÜÉÈÀÁÅÆÇÑÓØÍÚŒãÃ’‘“”„–—…«»¿¡€°´·")
_VOWELS: Final = {"CYRILLIC": frozenset("аеёиоуыэюяіїєў"), "GREEK": frozenset("αεηιουωάέήίόύώϊϋ")}
_OWN: Final = {
    "cp1250": _WESTERN | frozenset("ąćęłńśźżĄĆĘŁŃŚŹŻřčěšžůťďňŘČĚŠŽŮŤĎŇőűŐŰđĐ"),
    "cp1254": _WESTERN | frozenset("ıİğĞşŞ"),
    "koi8_r": frozenset[str](),
}
_MARGIN, _COMMON_MARGIN = 0.12, 0.45
"""How much less plausible the folder's encoding may be in one file than another encoding. The larger one holds where it
fits every file that well, or where charset-normalizer recognises a language in all files together."""


@dataclass(frozen=True)
class Text:
    """The text of a file; empty where `problem` says why it cannot be read. `encoding` is empty for UTF-8."""

    text: str
    encoding: str = ""
    problem: str = ""


def read_texts(files: Sequence[Path]) -> dict[Path, Text]:
    """Read text files that belong together, so that short ones are detected by the others."""
    texts: dict[Path, Text] = {}
    unsure: dict[Path, bytes] = {}
    for file in dict.fromkeys(files):
        try:
            raw = file.read_bytes()
        except OSError as error:
            texts[file] = Text("", problem=f"it cannot be read: {error.strerror}")
            continue
        certain = _decode_certain(raw)
        if certain is None:
            unsure[file] = raw
        else:
            texts[file] = certain
    return texts | _detect(unsure)


def read_text(file: Path) -> Text:
    """Read one text file."""
    return read_texts([file])[file]


def make_one_line(text: str) -> str:
    """The text on one line with single spaces, without control characters and halves of characters."""
    plain = "".join(" " if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)
    return " ".join(plain.replace("\ufeff", "").split())


def _decode_certain(raw: bytes) -> Text | None:
    """The text where there is one reading only: a mark, UTF-8, UTF-16 or UTF-32 by its NULs; None else."""
    for mark, codec, name in _MARKS:
        if raw.startswith(mark):
            text = _decode(raw, codec)
            if text is not None:
                return Text(text, "" if name == UTF8 else name)
    if b"\0" in raw:
        return _decode_wide(raw)
    if b"\x1b$" in raw or b"\x1b(" in raw:  # valid ASCII, but each is an escape sequence of this encoding
        text = _decode(raw, "iso2022_jp_ext")
        if text is not None:
            return Text(text, "ISO-2022-JP (Japanese)")
    try:
        return Text(raw.decode())
    except UnicodeDecodeError:
        return None


def _decode_wide(raw: bytes) -> Text:
    """Text with NUL bytes: UTF-16 or UTF-32 without a mark, or none at all."""
    names = {"utf-32-le": "UTF-32", "utf-32-be": "UTF-32", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}
    read = {codec: text for codec in names if (text := _decode(raw, codec)) is not None}
    if not read:
        return Text("", problem="it is not a text file: it has NUL bytes")
    best = min(read, key=lambda codec: (_strangeness(read[codec], codec), codec.endswith("be")))
    return Text(read[best], f"{names[best]} without a byte order mark")


def _decode(raw: bytes, codec: str) -> str | None:
    """The text, or None where the bytes or the characters cannot be right."""
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError:
        return None
    return None if any(_is_impossible(letter) for letter in text) else text


def _is_impossible(letter: str) -> bool:
    """Control characters but tab and line ends, private and unassigned code points."""
    return letter not in "\t\n\r\f\v\x85" and unicodedata.category(letter) in ("Cc", "Co", "Cn", "Cs")


def _detect(files: Mapping[Path, bytes]) -> dict[Path, Text]:
    """Texts whose encoding is not certain: the one that fits all of them, or each its own where it does not."""
    if not files:
        return {}
    readings = {file: _readings(raw) for file, raw in files.items()}
    favoured = _ask_library(b"\n".join(files.values()))
    order = list(_CANDIDATES)

    def rank(codec: str) -> tuple[int, float, int]:
        scores = [score for found in readings.values() if (score := found.get(codec, ("", None))[1]) is not None]
        mean = sum(scores) / len(scores) if scores else 9.0
        return -len(scores), mean - (_COMMON_MARGIN if codec == favoured else 0.0), order.index(codec)

    common = min(order, key=rank)
    worst = max(
        (found.get(common, ("", 9.0))[1] - min(score for _, score in found.values()) for found in readings.values()
         if found), default=9.0
    )  # fmt: skip
    margin = _COMMON_MARGIN if common == favoured or worst <= _COMMON_MARGIN else _MARGIN
    texts = {}
    for file, found in readings.items():
        if not found:
            texts[file] = Text("", problem="it is not a text in any known encoding")
            continue
        best = min(found, key=lambda codec: (found[codec][1], order.index(codec)))
        if common in found and found[common][1] <= found[best][1] + margin:
            best = common
        texts[file] = Text(found[best][0], _CANDIDATES[best])
    return texts


def _readings(raw: bytes) -> dict[str, tuple[str, float]]:
    """What the bytes say in each encoding that fits them, and how strange that looks (0 not at all)."""
    read = {codec: text for codec in _CANDIDATES if (text := _decode(raw, codec)) is not None}
    return {codec: (text, _strangeness(text, codec)) for codec, text in read.items()}


def _ask_library(raw: bytes) -> str | None:
    """charset-normalizer's answer, where it recognises a language; short texts have none.

    Between encodings of Latin letters, which hold the same text but for few letters, it is no better than the letters.
    """
    best = from_bytes(raw, cp_isolation=list(_CANDIDATES)).best()
    if best is None or best.coherence <= 0.2 or best.chaos >= 0.1:
        return None
    return best.encoding if best.encoding not in ("latin_1", "cp1252", "cp1250", "cp1254") else None


def _strangeness(text: str, codec: str) -> float:
    """How unlikely the characters that are not ASCII are as words of a person, from 0 to about 2 on average."""
    total, count = 0.0, 0
    for at, letter in enumerate(text):
        if letter < "\x80":
            continue
        count += 1
        before, after = text[at - 1 : at], text[at + 1 : at + 2]
        total += _strange_letter(letter, codec) + _strange_place(letter, before, after)
    for word in re.findall(r"\w{3,}", text.lower()):
        if name_script(word[0]) in _VOWELS and not _VOWELS[name_script(word[0])] & set(word):
            total += 0.4 * len(word)
    return total / count if count else 0.0


def _strange_letter(letter: str, codec: str) -> float:
    match name_script(letter):
        case "CJK":
            if letter in _HAN:
                return 0.0
            encoding, low, high = _LEVEL_1.get(codec, ("euc_jp", 0xB0, 0xCF))
            lead = letter.encode(encoding, "replace")[0]
            return 0.3 if low <= lead <= high else 1.0
        case "HIRAGANA" | "KATAKANA":
            return 0.0 if codec in ("cp932", "euc_jp") or codec.startswith("utf") else 0.6
        case "HALFWIDTH":
            return 0.9
        case "HANGUL":
            return 0.0 if letter in _HANGUL else 0.45
        case "LATIN":
            return 0.05 if letter in _OWN.get(codec, _WESTERN) else 0.35
        case "THAI" if not letter.isdigit() and letter != "฿":
            return 0.22
        case "HEBREW" if letter.isalpha():
            return 0.12
        case "CYRILLIC":
            return 0.1 if letter in "абвгдежзийклмнопрстуфхцчшщъыьэюяё" else 0.3
        case "FULLWIDTH" | "IDEOGRAPHIC":
            return 0.1
        case _ if letter.isalpha():
            return 0.17
        case _:
            return 0.05 if letter in _WESTERN else 1.2


def _strange_place(letter: str, before: str, after: str) -> float:
    """How odd a letter is beside its neighbours: small before capital, two scripts in a word, a sign inside of one."""
    script = name_script(letter)
    around = [side for side in (before, after) if side.isalpha()]
    others = [side for side in around if name_script(side) != script]
    if not letter.isalpha():
        return 0.7 if len(around) == 2 and letter not in "’‘·-" else 0.0
    if script in ("CJK", "HANGUL", "HIRAGANA", "KATAKANA"):
        latin = [side for side in others if side < "\x80"]
        return 0.8 if latin and len(latin) == len(around) else 0.0  # a lone ideograph in a Latin word
    strange = 0.8 * bool(others)
    if script == "LATIN":  # words of accented letters alone are another script's
        strange += 0.3 * sum(side >= "\x80" for side in around)
    return strange + 0.6 * (letter.isupper() and before.isalpha() and (before.islower() or not after.isupper()))


def name_script(letter: str) -> str:
    """The script of a letter, as its Unicode name begins: LATIN, CYRILLIC, CJK …; empty for signs without letters."""
    first = unicodedata.name(letter, "").split(" ", 1)[0]
    return "CJK" if first.startswith("CJK") else first
