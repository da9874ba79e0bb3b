r"""One way of writing for what has many: the same LaTeX for full-width digits, \dfrac, \bm, colours, spacing, degrees.

Nothing here compares or computes; what comes out is LaTeX that means what went in. Text that says something stays as
\text{...}: units.py and structure.py decide what it says.
"""

import re
import unicodedata
from functools import lru_cache

from data_prep.grading.units import DEGREE, dimension

FUNCTIONS = (
    *("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min det dim ker".split()),
    *("arg deg inf sup lim mod cis".split()),
)
"""Names that are no products of letters."""
_SYMBOLS = frozenset("iedx")
"""Single upright letters that are symbols and never units: the imaginary unit, Euler's number, a differential, x."""
CONJUNCTION = re.compile(r",?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|[,;]")

_VULGAR = "\u00bc\u00bd\u00be" + "".join(map(chr, range(0x2150, 0x215F)))
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"
)
_LOWERED = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")
_RUNS = [
    (re.compile(f"[{''.join(map(chr, table))}]+"), table, sign) for table, sign in ((_RAISED, "^"), (_LOWERED, "_"))
]
_SETS = zip("\u211d\u2124\u2115\u211a\u2102", "RZNQC", strict=True)
_COMMANDS = {
    "\u00d7": "times", "\u00b7": "cdot", "\u22c5": "cdot", "\u2219": "cdot", "\u2022": "cdot", "\u03c0": "pi",
    "\u221e": "infty", "\u2264": "le", "\u2a7d": "le", "\u2265": "ge", "\u2a7e": "ge", "\u2260": "ne", "\u222a": "cup",
    "\u2229": "cap", "\u2208": "in", "\u2209": "notin", "\u2205": "emptyset", "\u00b1": "pm", "\u2213": "mp",
    "\u2248": "approx", "\u2261": "equiv", "\u2220": "angle", "\u25b3": "triangle", "\u27e8": "langle",
    "\u27e9": "rangle", "\u2329": "langle", "\u232a": "rangle", "\u2026": "ldots", "\u22ef": "ldots",
    "\u2200": "forall",
    "\u00b5": "mu", "\u2126": "Omega", "\u230a": "lfloor", "\u230b": "rfloor", "\u2308": "lceil", "\u2309": "rceil",
    "\u2192": "to", "\u21d2": "implies", "\u2223": "|",
}  # fmt: skip
_CHARACTERS = str.maketrans(
    {
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\u207b", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000", " "),
        **dict.fromkeys("\u200b\u2060\ufeff\u200e\u200f", None),
        **{sign: f"\\{name} " for sign, name in _COMMANDS.items()},
        **{sign: rf"\mathbb{{{letter}}}" for sign, letter in _SETS},
        **{chr(code): f"\\{unicodedata.name(chr(code)).split()[-1].lower()} " for code in range(0x3B1, 0x3CA)},
        **{letter: f"\\{unicodedata.name(letter).split()[-1].capitalize()} " for letter in "ΓΔΘΛΞΠΣΦΨΩ"},
        "\u00f7": "/",
        "\u2044": "/",
        "\u2236": ":",
        "\u2228": " or ",
        "\u2227": " and ",
        "\u2018": "'",
        "\u2019": "'",
        "\u2032": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u3001": ",",
        "\u3002": ".",
        "\uffe5": "\u00a5",
        "\uffe1": "\u00a3",
        "\u00ba": DEGREE,
        "\u02da": DEGREE,
        "\u2103": DEGREE + "C",
        "\u2109": DEGREE + "F",
    }
)  # fmt: skip


def _patterns(*pairs: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


_NESTED = r"((?:[^{}]|\{[^{}]*\})*)"
_TEXT = r"\\text\{" + _NESTED + r"\}"
_LENGTH = r"\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|mu)\s*"
_END = "(?![a-zA-Z])"
_ROOT = re.compile(r"([\u221a\u221b\u221c])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\\?[a-zA-Z]+(?:_\w)?))")
_DEGREES_OF_ROOTS = {"\u221a": "", "\u221b": "[3]", "\u221c": "[4]"}
_LAYOUT = _patterns(
    (r"(?<!\\)\\\s*\n|[\n\t\r]", " "),
    (rf"\\\\\s*\[{_LENGTH}\]", r"\\\\"),
    (r"\\(?:left|right)\s*\.(?!\d)", ""),
    (rf"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|strut){_END}", ""),
    (rf"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|it|sf|tt|bfseries|itshape|em){_END}", ""),
    (r"(?<!\\)\\[()\[\]](?=\s|$)|^\s*\\[(\[]", ""),
    (r"(?<!\\)\\!\s*", ""),
    (rf"(?<!\\)\\[,;:> ]|\\(?:q?quad|enspace|enskip|thinspace|medspace|thickspace|space|nobreakspace){_END}", " "),
    (rf"\\[hm](?:space\*?\{{{_LENGTH}\}}|skip{_LENGTH})", " "),
    (r"\\[hv]?phantom\{[^{}]*\}", ""),
    (r"\\(?:text)?color\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}|\\colorbox\s*\{[^{}]*\}", ""),
    (r"\\(?:boldsymbol|bm|pmb|math(?:bf|it|sf|tt|normal))\s*\{\s*([a-zA-Z]{2,})\s*\}", r"\\text{\1}"),
    (r"\\(?:boldsymbol|bm|pmb|underline|math(?:bf|it|sf|tt|normal))(?![a-zA-Z])\s*(?=[\w\\])", ""),
    (r"(\\(?!text)[a-zA-Z]+)\{\}", r"\1 "),
    (r"\\(?:boldsymbol|bm|pmb|underline|math(?:bf|it|sf|tt|normal))(?![a-zA-Z])\s*" + r"\{" + _NESTED + r"\}", r"{\1}"),
    (r"\\(?:si|unit)(?:\[[^\]]*\])?\{" + _NESTED + r"\}", r"\\text{\1}"),
    (r"\\(?:SI|qty)(?:\[[^\]]*\])?\{" + _NESTED + r"\}\s*\{" + _NESTED + r"\}", r"\1\\text{\2}"),
    (r"\\num\{([^{}]*)\}", r"\1"),
    (r"\{\s*\\rm(?![a-zA-Z])\\?\s*([^{}]*)\}|\\rm(?![a-zA-Z])\s*\{([^{}]*)\}|\\rm\s+([a-zA-Z]+)", r"\\text{\1\2\3}"),
    (rf"\\(?:text(?:normal|rm|bf|it|up|sf|tt|md)|[mh]box|math(?:rm|up)|emph){_END}\s*", r"\\text "),
    (r"\\text(?:\s+([a-zA-Z0-9])|(\d))", r"\\text{\1\2}"),
    (r"\\text\s+\{", r"\\text{"),
)  # fmt: skip
_NAMES = "|".join(FUNCTIONS)
_SYNONYMS = _patterns(
    (r"\\text(?:dollar)(?![a-zA-Z])", ""),
    (r"\\textsuperscript\{", "^{"),
    (rf"\\checkmark{_END}|^\s*\\therefore{_END}|^\s*\\(?:approx|sim){_END}", ""),
    (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (rf"\\(?:texteuro|euro|EUR){_END}", "\u20ac"),
    (rf"\\(?:pounds|textsterling){_END}", "\u00a3"),
    (rf"\\(?:text)?yen{_END}", "\u00a5"),
    (rf"\\(?:text)?cent{_END}", "\u00a2"),
    (rf"\\(?:degreeCelsius|celsius){_END}", DEGREE + "C"),
    (rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ{_END})|\\(?:text)?degree{_END}|\^\s*\{{?{DEGREE}\}}?", DEGREE),
    (rf"\\(?:operatorname\*?|text)\s*\{{\s*((?!min|sec|deg)(?:{_NAMES}))\s*\}}", r"\\\1 "),
    (r"\\operatorname\*?\s*\{\s*(min|sec|deg)\s*\}", r"\\\1 "),
    (r"\\operatorname\*?\s*", r"\\text"),
    (r"(?<![a-zA-Z\\{])([kM])\s*\\Omega(?![a-zA-Z])", r"\\text{\1}\\Omega "),
    (rf"\\arctg{_END}", r"\\arctan "),
    (rf"\\tg{_END}", r"\\tan "),
    (rf"\\ctg{_END}", r"\\cot "),
    (rf"\\(?:[dtcsx]|nice|flat)frac{_END}", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\{[^{}]*\})\s*([\da-zA-Z])", r"\\frac\1{\2}"),
    (r"\\frac\s*(\\(?:pi|alpha|beta|theta|phi))\s*([\da-zA-Z])", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\over(?![a-zA-Z])\s*([^{}]*)\}|^([^{}]*)\\over(?![a-zA-Z])\s*([^{}]*)$", r"\\frac{\1\3}{\2\4}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*([\da-zA-Z])", r"\\sqrt{\1}"),
    (r"\\d?dots[cbmio]?(?![a-zA-Z])|\\[cl]dots(?![a-zA-Z])|\.\.\.+", r"\\ldots "),
    (rf"\\varnothing{_END}|\\\{{\s*\\\}}", r"\\emptyset "),
    (rf"\\(?:leqslant|leqq|leq|le){_END}|<=", r"\\le "),
    (rf"\\(?:geqslant|geqq|geq|ge){_END}|>=", r"\\ge "),
    (rf"\\lt{_END}", "<"),
    (rf"\\gt{_END}", ">"),
    (rf"\\(?:neq|ne){_END}|!=", r"\\ne "),
    (rf"\\colon{_END}", ":"),
    (rf"\\div{_END}", "/"),
    (rf"\\(?:lor|vee){_END}", " or "),
    (rf"\\(?:land|wedge){_END}", " and "),
    (rf"\\lbrace{_END}", r"\\{"),
    (rf"\\rbrace{_END}", r"\\}"),
    (rf"\\lbrack{_END}", "["),
    (rf"\\rbrack{_END}", "]"),
    (rf"\\[lr]?vert{_END}", "|"),
    (rf"\\log\s*_\s*(?:\{{\s*e\s*\}}|e|\\text\{{e\}}|\{{\\text\{{e\}}\}}){_END}", r"\\ln "),
    (r"\{([-+,])\}", r"\1"),
    (r"\\(?:overline|bar|dot)\s*(\d)", r"\\overline{\1}"),
    (r"\\(?:bar|dot)\s*\{\s*(\d+)\s*\}", r"\\overline{\1}"),
    (r"(?<=[.\d])\\overline\{(\d)\}(\d*)\\overline\{(\d)\}", r"\\overline{\1\2\3}"),
    (r"(?<=\d)\s*(?:\\text\{\s*x\s*\}|\bx\b)\s*(?=\d)", r"\\times "),
    (r"(?<=\d)\s*(?:\\text\{\s*to\s*\}|\bto\b)\s*(?=\d)", ":"),
)
_PERCENT = re.compile(r"\s*(?:\\text\{\s*)?(?:per\s?cent|pct|percentage)(?![a-zA-Z])\.?\s*\}?|\\text\{\s*\\?%\s*\}")
_REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\{(\d+)\}|\((\d+)\))(?!\d)")
_MULTIPLIER = re.compile(
    r"(?<=[\d}])\s*(\\text\{)?\s*(hundred|thousand|million|billion|trillion)(?![a-zA-Z])\s*(\}?)", re.IGNORECASE
)
_ZEROS = dict(hundred=2, thousand=3, million=6, billion=9, trillion=12)
_WORDS = re.compile(r"[a-zA-Z]{2,}")
_LABEL = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct)\s+)?(?:answer|ans\.?)(?![a-zA-Z])\s*(?:is(?![a-z])|:|=)*\s*",
    re.IGNORECASE,
)
_NOTHING = re.compile(
    r"(?:there\s+(?:is|are)\s+)?no\s+(?:real\s+|integer\s+|valid\s+|such\s+)?(?:solutions?|roots?|values?)"
    r"(?:\s+exists?)?|(?:the\s+)?empty\s+set",
    re.IGNORECASE,
)
_EVERYTHING = re.compile(r"(?:all|any)\s+real(?:s|\s+numbers?)", re.IGNORECASE)
_PLAIN = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?|[a-zA-Z]")


@lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    """The expression in the one way of writing; it stays LaTeX."""
    text = re.sub(r"(?<!\\)\\$", "", text.strip()).strip()
    if _PLAIN.fullmatch(text):
        return text
    if not text.isascii():
        text = _ascii(text)
    text = re.sub(r"(?<![A-Za-z])(?:US|AU|HK|NZ|A|C|S)\\?\$(?=\s*\d)", "", text)
    text = (
        re.sub(r"(?<!\\)~", " ", text)
        .replace(r"\$", "")
        .replace("$", "")
        .replace("**", "" if text.startswith("**") else "^")
    )
    if "\\" in text:
        for pattern, replacement in _LAYOUT:
            text = pattern.sub(replacement, text)
        if "begin" not in text:
            text = re.sub(r"\\\\(?=[a-zA-Z{}])", r"\\", text)
            text = re.sub(r"\\\\\s*$", "", text)
    if not text.isalnum():
        for pattern, replacement in _SYNONYMS:
            text = pattern.sub(replacement, text)
        text = _REPEATING.sub(_fraction, text)
    if "infinity" in text.lower():
        text = re.sub(
            r"(?:\\text\{\s*)?(?<![a-zA-Z\\])infinity(?![a-zA-Z])\s*\}?", r"\\infty ", text, flags=re.IGNORECASE
        )
    text = _PERCENT.sub(r"\\%", text)
    text = _MULTIPLIER.sub(_power, text)
    if r"\text" in text:
        text = re.sub(_TEXT, _opened, text)
    return _bare(_radians(text))


def _ascii(text: str) -> str:
    for sign in filter(text.__contains__, _VULGAR):
        top, bottom = unicodedata.normalize("NFKC", sign).split("\u2044")
        text = text.replace(sign, rf"\frac{{{top}}}{{{bottom}}}")
    for pattern, table, sign in _RUNS:
        text = pattern.sub(lambda run, table=table, sign=sign: f"{sign}{{{run[0].translate(table)}}}", text)
    text = re.sub("[\U0001d400-\U0001d7ff]+", lambda run: unicodedata.normalize("NFKC", run[0]), text)
    text = _ROOT.sub(_root, text).translate(_CHARACTERS)
    return text.replace("\u221a", r"\sqrt")


def _root(match: re.Match[str]) -> str:
    inner = next(group for group in match.groups()[1:] if group is not None)
    return rf"\sqrt{_DEGREES_OF_ROOTS[match[1]]}{{{inner}}}"


def _fraction(match: re.Match[str]) -> str:
    """0.1(6) as 15/90."""
    whole, first, again = match[1], match[2], match[3] or match[4]
    before, after = int(whole + first or "0"), int(whole + first + again)
    return rf"\frac{{{after - before}}}{{{'9' * len(again)}{'0' * len(first)}}}"


def _power(match: re.Match[str]) -> str:
    """2 million dollars as 2 x 10^6 dollars; the rest of a \\text{} is kept in one."""
    opened, closed = match[1], match[3]
    rest = r"\text{" if opened and not closed else "" if opened else closed
    return rf"\times 10^{{{_ZEROS[match[2].lower()]}}}{rest}"


def _opened(match: re.Match[str]) -> str:
    """What a \\text{...} says: as it is where it holds mathematics or a list, as \\text{...} where it is words."""
    inner = match[1].strip()
    if not inner:
        return " "
    if _NOTHING.fullmatch(inner):
        return r"\emptyset "
    if _EVERYTHING.fullmatch(inner):
        return r"\mathbb{R}"
    if len(inner) > 1 and dimension(inner) is not None:
        return match[0]
    if len(inner) == 1:
        return f"{inner} " if inner in _SYMBOLS or not inner.isalpha() else match[0]
    is_label = _LABEL.match(inner)
    has_words = _WORDS.search(inner)
    if (is_label and is_label.end()) or not has_words or re.search(r"[=:]|(?<![\^{-])\d(?!\s*\})", inner):
        return f" {match[1]} "
    return f" {match[1]} " if CONJUNCTION.search(inner) else match[0]


_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis)(?![a-zA-Z])")


def _radians(text: str) -> str:
    r"""In an expression with \sin and its like, 20 degrees as \frac{20\pi}{180}."""
    if DEGREE not in text or not _TRIGONOMETRIC.search(text):
        return text
    return re.sub(rf"(\d+(?:\.\d+)?|[a-zA-Z]|\\[a-z]+)\s*{DEGREE}", r"{\\frac{\1\\pi}{180}}", text)


_QUOTES = ("'", '"', "`")


def _bare(text: str) -> str:
    """Without a label before it, quotes around it, or a full stop after it."""
    text = text.strip()
    label = _LABEL.match(text)
    if label and label.end() < len(text):
        text = text[label.end() :]
    while len(text) > 2 and text[0] == text[-1] and text[0] in _QUOTES:
        text = text[1:-1].strip()
    while text.endswith((".", ",", ";")) and not text.endswith(r"\,"):
        text = text[:-1].rstrip()
    if "o" in text.lower() and _NOTHING.fullmatch(text):
        return r"\emptyset"
    if "real" in text and _EVERYTHING.fullmatch(text):
        return r"\mathbb{R}"
    return text.strip()
