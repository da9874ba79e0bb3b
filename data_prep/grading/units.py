r"""Units as a closed grammar: what may stand after a number without changing it, and nothing else.

    unit     =  factor { ("/" | "per" | "a" | "\cdot" | " ") factor }       m/s, kg m s^{-2}, dollars per hour
    factor   =  [square | cubic] name [power]                               square feet, cm^2, cm squared
    name     =  an entry of the tables below, in one of its spellings

Digits, conjunctions, negations, multipliers (million), directions (south), AM and PM, gain and loss are in no table, so
text with them is no unit. A thing that is counted (ways, apples) is a unit without a dimension. Two answers that both
state a unit have to state the same one; a count, "units" and a degree sign go with every unit.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

DEGREE = "\u00b0"
"""How notation.py writes every degree sign."""
Dimension = frozenset[tuple[str, int]]
"""The powers of the units that a unit is made of; empty for what goes with every unit."""
ANY: Dimension = frozenset()

_PREFIXED = "m g s L l N J W V A K Pa Hz mol eV cal Wh F H T C bit bps bar rad Bq".split()
_PREFIXES = {"k": "kilo", "M": "mega", "G": "giga", "T": "tera", "d": "deci", "c": "centi", "m": "milli"}
_PREFIXES |= {"\u00b5": "micro", "n": "nano", "p": "pico", "h": "hecto"}
_LONG = {
    "m": "meter metre", "g": "gram gramme", "s": "second", "L": "liter litre", "N": "newton", "J": "joule",
    "W": "watt", "V": "volt", "A": "ampere amp", "K": "kelvin", "Pa": "pascal", "Hz": "hertz", "mol": "mole",
    "eV": "electronvolt", "cal": "calorie", "F": "farad", "H": "henry", "T": "tesla", "C": "coulomb",
    "bit": "bit", "Wh": "watthour", "bar": "bar", "rad": "radian", "ohm": "ohm",
}  # fmt: skip
_OTHER = {
    "h": "h hr hour", "min": "min minute", "s": "sec", "d": "day", "week": "week wk", "month": "month", "yr": "yr year",
    "decade": "decade", "century": "century centuries", "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard",
    "mi": "mi mile", "nmi": "nmi knot", "ly": "ly lightyear", "au": "AU", "lb": "lb pound", "oz": "oz ounce",
    "ton": "t ton tonne", "acre": "acre", "ha": "ha hectare", "gal": "gal gallon", "qt": "qt quart", "pt": "pint",
    "cup": "cup", "tsp": "tsp teaspoon", "tbsp": "tbsp tablespoon", "floz": "floz", "mL": "cc", "amu": "amu u Da",
    "ohm": "\u03a9 \\Omega", "angstrom": "\u00c5 \\AA angstrom", "atm": "atm atmosphere", "mmHg": "mmHg", "dB": "dB",
    "M": "molar", "lm": "lm lumen", "lx": "lx lux", "cd": "cd candela", "Wb": "Wb weber", "S": "S siemens",
    "erg": "erg", "psi": "psi", "dyn": "dyne", "gauss": "gauss", "ppm": "ppm", "rpm": "rpm",
    "arcmin": "arcmin arcminute", "arcsec": "arcsec arcsecond",
    "C": "\u00b0C celsius centigrade", "F": "\u00b0F fahrenheit", "sr": "sr steradian", "parsec": "parsec pc",
    "cent": "cent \u00a2 penny pennies", "usd": "dollar buck USD US$", "eur": "euro EUR \u20ac",
    "gbp": "GBP \u00a3 quid", "jpy": "JPY yen \u5186", "cny": "CNY RMB yuan \u5143 \u5143\u4eba\u6c11\u5e01",
    "inr": "INR Rs Re rupee \u20b9",
    "krw": "KRW won \u20a9", "rub": "RUB ruble rouble \u20bd", "cad": "CAD", "aud": "AUD", "chf": "CHF franc",
    "peso": "peso", "B": "byte kB KB MB GB TB", "hkd": "HKD", "sgd": "SGD", "yenyuan": "\u00a5",
}  # fmt: skip
_PARTS = {"mph": (("mi", 1), ("h", -1)), "kph": (("km", 1), ("h", -1)), "kmh": (("km", 1), ("h", -1))}
_COUNTED = """
unit way time people person man men woman women child children student boy girl teacher player member
friend guest worker employee customer passenger contestant participant representative soldier team family couple voter
apple orange banana pear lemon grape cherry berry fruit egg cookie cake pie slice candy candies lollipop popsicle meal
serving dog cat animal bird fish chicken cow horse sheep pig rabbit mouse mice bee fly flies bacterium bacteria cell
book page chapter word letter character line sentence paper sheet stamp card deck coin nickel dime quarter bill note
ticket game match matches round point goal run hit shot move step turn flip roll toss trial toy ball marble balloon
block tile brick stick toothpick pencil pen pencils box boxes bag basket bottle can jar glass glasses bucket packet
package pack carton crate piece part portion share item object thing gift shirt sock shoe hat outfit pair set group
class classes row column table chair seat bench benches desk room door window house building floor story storey car
truck bus buses train bike bicycle plane boat ship wheel tree flower plant leaf leaves seed bush bushes petal rose
number integer digit factor divisor multiple prime squares cubes triangle rectangle quadrilateral pentagon hexagon
polygon circle sphere vertex vertices edge side face diagonal angle segment ray region area path route road trip lap
loop value solution roots zeros zeroes term coefficient element subset permutation combination arrangement order
ordering sequence string code password plate pattern coloring colouring color colour function polynomial equation
matrix matrices case possibility possibilities choice option outcome event selection committee handshake kind type
flavor flavour question problem test exam mark grade lesson task job call message email photo picture song movie show
program file bit year-old old photon electron proton neutron atom molecule revolution rotation bounce beat breath
switch switches battery batteries computer robot machine phone camera clock watch watches tuple pairing factorization
partition tiling tetrahedron tetrahedra cut layer interval chord tangent intersection distribution divisors numeral
entry entries lot copies copy \u4e2a \u79cd \u4eba \u6b21 \u5206 \u5ea6 \u5929 \u53ea \u672c \u5f20 \u6761 \u9897
\u5757 \u540d \u7ec4 \u53f0 \u8f86 \u5339 \u5c81
""".split()
_CHINESE = {
    "\u7c73": "m", "\u5398\u7c73": "cm", "\u5343\u7c73": "km", "\u6beb\u7c73": "mm", "\u516c\u91cc": "km",
    "\u514b": "g", "\u5343\u514b": "kg", "\u516c\u65a4": "kg", "\u5428": "ton", "\u79d2": "s", "\u5206\u949f": "min",
    "\u5c0f\u65f6": "h", "\u5347": "L", "\u6beb\u5347": "mL", "\u89d2": "cny", "\u7f8e\u5143": "usd",
    "\u5e74": "yr", "\u6708": "month", "\u5468": "week",
}  # fmt: skip
_ADJECTIVES = frozenset(
    """
    distinct different possible positive negative integer real whole natural ordered unordered such total valid
    unique right equilateral lattice prime perfect more nonnegative complex rational US fl nautical light metric
    license of base area surface volume full extra additional approximately about degrees
    """.split()
)
_SQUARE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "\u5e73\u65b9": 2, "\u7acb\u65b9": 3}
_POWERS = {"squared": 2, "cubed": 3}
_ENDS_IN_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}$")
_ORDINAL = re.compile(r"\W*(?:text\{\s*)?-?(?:st|nd|rd|th)\}*")
_TOKEN = re.compile(
    r"\s*(?:\^\s*\{?\(?\s*(-?[1-9])\s*\)?\}?|(/|\\per(?![a-zA-Z])|per(?![a-zA-Z]))"
    r"|(\\cdot(?![a-zA-Z])|\*|-(?=[a-zA-Z])|\\times(?![a-zA-Z])|[{}])"
    rf"|({DEGREE}[CF](?![a-zA-Z])|{DEGREE}|[\u5e73\u7acb]\u65b9|[\u4e00-\u9fff]+|\\?[A-Za-z\u00b5\u03a9\u00c5]+\$?|"
    "[\u00a2\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd])[.']?)"
)
_START = re.compile(
    rf"\{{?\s*\\text\{{|\\frac\{{\s*\\text|\\frac\{{\s*[a-zA-Z]{{1,2}}\s*\}}\{{\s*[a-zA-Z]{{1,3}}(?:\^\{{?[1-9]\}}?)?\s*\}}$|\\(?:mu|Omega|AA|ohm)(?![a-zA-Z])|[{DEGREE}\u00a2\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd]"
    r"|[\u4e00-\u9fff\u03a9\u00c5\u00b5]|\^\s*\{?\s*(?:\\text\{\s*)?(?:st|nd|rd|th)|(?<![\\a-zA-Z{_])[a-zA-Z]{2,}"
    r"|(?<=[\s0-9}])(?<![_^]\{)[a-zA-Z](?=\s*[/^]|$|\s*\\(?:cdot|Omega))|(?<=[\s0-9}])-(?=\s*[a-z\\])|(?<=\d)\s*\((?=[a-zA-Z]|\\text)"
)
_BEFORE = re.compile(
    r"([-+]?)\s*(?:\\text\{\s*)?((?:US|A|C|HK|NZ|S)\$|US(?=\s*\d)|USD|EUR|GBP|CNY|RMB|JPY|INR|CAD|AUD|CHF|KRW|HKD|SGD|Rs\.?|"
    "[\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd\u00a2])\\s*\\}?\\s*(?=[-+.0-9\\\\])"
)


_DEGREES, _RADIANS = frozenset({("deg", 1)}), frozenset({("rad", 1)})


def _plural(name: str) -> tuple[str, ...]:
    return name, name + "s", *((name + "es",) if name.endswith(("s", "x", "ch", "sh")) else ())


def _table() -> Mapping[str, Dimension]:
    made: dict[str, Dimension] = {}
    for symbol in (*_PREFIXED, "ohm"):
        base = "L" if symbol == "l" else symbol
        made[symbol] = frozenset({(base, 1)})
        for prefix in _PREFIXES:
            made[prefix + symbol] = frozenset({(prefix + base, 1)})
        for name in _LONG.get(symbol, "").split():
            for spelled in _plural(name):
                made[spelled] = frozenset({(base, 1)})
                for prefix, long in _PREFIXES.items():
                    made[long + spelled] = frozenset({(prefix + base, 1)})
    for symbol, names in _OTHER.items():
        for name in names.split():
            for spelled in _plural(name) if len(name) > 1 else (name,):
                made[spelled] = frozenset({(symbol, 1)})
    made |= {name: frozenset({(symbol, 1)}) for name, symbol in _CHINESE.items()}
    made |= {name: frozenset(parts) for name, parts in _PARTS.items()}
    counted = {spelled: ANY for name in _COUNTED for spelled in _plural(name)}
    made |= {name: _DEGREES for name in ("deg", "degree", "degrees")}
    made.pop("pm")  # half a day, not a picometre
    return {**made, **{name: ANY for name in counted if name not in made}, DEGREE: _DEGREES}


_TABLE = _table()
_FOLDED = {name.lower(): dimension for name, dimension in _TABLE.items() if len(name) > 3}
_FOLDED |= {name.lower(): dimension for name, dimension in _TABLE.items() if name.isupper() and len(name) == 3}
_BARE = frozenset("mgshLNJWVAKC")
"""Units of one letter that may stand without \\text, after a space."""
_SURE = frozenset("cm km mm kg ft yd lb hr oz in mi st nd rd th sq".split())
"""Units of two letters that are no product of variables: 2 mg may be twice m times g."""


@lru_cache(maxsize=4096)
def dimension(text: str) -> Dimension | None:
    r"""What a text says as a unit, \text{...} opened; None if it is no unit."""
    flat = re.sub(r"\\frac\{((?:[^{}]|\{[^{}]*\})*)\}\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1/\2", text)
    flat = re.sub(r"([kM])\s*\}?\s*\\Omega", r"\1ohm", flat.replace("[", "(").replace("]", ")"))
    flat = flat.replace(r"\text", " ").replace(r"\mu", "\u00b5").replace("\u03bc", "\u00b5").strip()
    flat = re.sub(
        "\u00b5\\s+(?=[a-zA-Z{])",
        "\u00b5",
        re.sub(r"\{\s*([^{}]*?)\s*\}(?!\^)", r"\1 ", flat) if "^" not in flat else flat,
    )
    flat = flat.replace("\u00b5{", "\u00b5")
    if (inner := re.fullmatch(r"\((.*)\)", flat.strip())) is not None:
        if len(inner[1]) == 1:
            return None
        flat = inner[1]
    return _dimension(flat.replace("(", " ").replace(")", " ")) if flat.count("(") == flat.count(")") else None


def _dimension(text: str) -> Dimension | None:
    powers: Counter[str] = Counter()
    last: list[Dimension] = []
    sign, ahead, place, is_named = 1, 1, 0, False
    while place < len(text.rstrip()):
        if not (token := _TOKEN.match(text, place)):
            return None
        place = token.end()
        power, per, _, name = token.groups()
        if per:
            if sign < 0 and not last:
                return None
            sign, last = -1, []
        elif power or name in _POWERS:
            if not last:
                return None
            _add(powers, last.pop(), sign * (int(power or _POWERS[name]) - 1))
        elif name in _SQUARE:
            ahead = _SQUARE[name]
        elif name in ("a", "an") and is_named:
            sign, last = -1, []
        elif name and (found := _named(name)) is not None:
            _add(powers, found, sign * ahead)
            last, ahead, is_named = [found], 1, True
        elif name and name not in _ADJECTIVES:
            return None
    return frozenset((unit, count) for unit, count in powers.items() if count) if is_named and ahead == 1 else None


def _add(powers: Counter[str], found: Dimension, times: int) -> None:
    for unit, count in found:
        powers[unit] += count * times


def _named(name: str) -> Dimension | None:
    name = name.lstrip("\\") if name not in _TABLE else name
    exact = _TABLE.get(name)
    return exact if exact is not None else _FOLDED.get(name.lower()) if len(name) > 2 else None


def split(text: str, *, loosely: bool = False) -> tuple[str, Dimension | None]:
    """The text without the unit at its end or the currency before it, and the unit; the text itself and None where it
    has none. An ordinal's ending (25th) is left out too.

    Letters that could be variables (5 m, 2mg) count as a unit only `loosely`: for an answer to a question whose right
    answer is a number.
    """
    if currency := _BEFORE.match(text):
        return currency[1] + text[currency.end() :], _TABLE.get(currency[2].rstrip("."), ANY)
    for count, start in enumerate(_START.finditer(text)):
        before, rest = text[: start.start()].rstrip(), text[start.start() :]
        if count == 8 or not before or before[-1] in "=<>,+-*/^_({[:" or not (loosely or _is_sure(rest)):
            continue
        if re.fullmatch("[A-Za-z]", rest.strip()) and rest != "m" and (rest not in _BARE or text[len(before)] != " "):
            continue
        before = re.sub(r"\s*\\(?:cdot|times)\s*$|-$", "", before) if r"\text" in rest else before
        if before[-1:].isdigit() and _ORDINAL.fullmatch(rest):
            return before, ANY
        if not _ENDS_IN_WORD.search(before) and (found := dimension(rest.removeprefix("-"))) is not None:
            return before, found
    return text, None


def _is_sure(unit: str) -> bool:
    return r"\text" in unit or all(len(run) > 2 or run in _SURE for run in re.findall("[a-zA-Z]+", unit))


def agree(one: Dimension | None, other: Dimension | None) -> bool:
    """Whether two answers with these units can be the same: both state one unit, or one of them states none; a degree
    sign may be one of temperature, but is no radian."""
    return not one or not other or one == other or (_DEGREES in (one, other) and _RADIANS not in (one, other))
