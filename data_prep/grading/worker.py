"""The program that runs math-verify, started by pool.py as a file of its own: python worker.py DESCRIPTOR SYS_PATH.

It imports math-verify once and then forks a child whenever it is asked to, which takes milliseconds where a fresh
import takes most of a second; so a child that hangs is killed and replaced at once. Nothing outlives its owner: the
program ends when the owner's end of its socket closes, and the kernel kills the children when the program ends.

    owner -> program    {"task": "fork"} with a socket, {"task": "bury", "pid": ...}
    program -> owner    {"ready": pid} or {"failed": reason, "missing": whether it lacks a module} at the start, then
                        {"pid": ..., "warm": ...} for each fork
    owner -> child      {"pairs": [[right answer, answer], ...]}
    child -> owner      {"equal": [true or false, ...]} or {"error": reason}

math-verify takes every exception for a difference. So that none becomes a silent "wrong", a child that came near its
limit of memory, or that refused to evaluate text, gives no verdict.

What a child may do is limited before it sees any answer: address space, no core file, no file of more than 0 bytes,
and an audit hook that ends it when anything opens a file for writing, starts a process or uses the network.
"""

import cmath
import ctypes
import gc
import json
import os
import re
import resource
import select
import signal
import socket
import sys
import zlib
from typing import Any

MEMORY_BYTES = 512 * 2**20
"""What a child may allocate beyond what the program itself has mapped."""
MAX_MESSAGE = 2**17
REFUSED_EXIT = 77
RELATIVE_TOLERANCE = 1e-4
ABSOLUTE_TOLERANCE = 2e-6
"""math-verify rounds to six decimals: what is further apart is never equal to it."""
EXACT_DIGITS = 60
"""To which exact numbers are compared."""
POINTS = (1, -1, 2 + 1j, -1 + 3j)
"""Times the coordinate of each symbol: where expressions are compared."""
EXERCISES = (
    (r"\frac{1}{2}", "x+1"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"(1,2) \cup [3,4)"),
    ("x=1", "1<x"),
    (r"\sin(2x)", r"2 \sin x \cos x"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \sqrt{4} \end{pmatrix}"),
)
"""What the program does while nobody asks: the modules and tables that this loads are there in every later child."""
_refused: list[bool] = []
_PR_SET_PDEATHSIG = 1
_INTEGER = re.compile(r"[-+]?[0-9]+")
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "pty.", "ctypes.")
_HARMLESS = ("os.listdir", "os.scandir")
"""Audit events that importing a module raises."""


def main() -> None:
    """Serves until the owner's end of the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[:] = json.loads(sys.argv[2])
    try:
        _prepare()
    except BaseException as error:
        _send(control, {"failed": f"{type(error).__name__}: {error}", "missing": isinstance(error, ImportError)})
        return
    _send(control, {"ready": os.getpid()})
    _supervise(control)


def _prepare() -> None:
    """Imports what grading needs and takes away what turns text into code."""
    import logging

    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)  # math-verify warns once that it runs without its own timeouts
    _forbid_evaluation()
    _parse_in_two_stages()


def _parse_in_two_stages() -> None:
    """Makes ANTLR try its fast prediction first, and its full one where that finds an error: the same trees, sooner.

    Its documentation of PredictionMode.SLL says so: either the tree of the full prediction, or a syntax error. And n
    stays another symbol than N.
    """
    import math_verify.parser
    from antlr4.atn.ParserATNSimulator import ParserATNSimulator
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    begin, parse, modes = ParserATNSimulator.__init__, math_verify.parser.latex2sympy, [PredictionMode.LL]

    def begin_in_mode(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.predictionMode = modes[-1]

    def parse_twice(*arguments: Any, **named: Any) -> Any:
        named["conversion_config"] = ConversionConfig(lowercase_symbols=False)
        modes.append(PredictionMode.SLL)
        try:
            return parse(*arguments, **named)
        except Exception:  # of any kind: latex2sympy raises plain ones
            pass
        finally:
            modes.pop()
        return parse(*arguments, **named)

    ParserATNSimulator.__init__ = begin_in_mode
    math_verify.parser.latex2sympy = parse_twice


def _forbid_evaluation() -> None:
    """Sympy turns text into an expression by evaluating it as Python, and math-verify takes even the numerals of an
    answer that way. Here numerals and names are looked up directly (which is also faster); other text is refused."""
    import math_verify.parser
    from sympy.parsing import sympy_parser

    sympy_parser.parse_expr = _atom
    sympy_parser.eval_expr = _refuse
    math_verify.parser.parse_expr = _refuse


def _atom(text: str, *_: Any, **__: Any) -> Any:
    import sympy

    if _INTEGER.fullmatch(text):
        return sympy.Integer(int(text))
    if _DECIMAL.fullmatch(text):
        return sympy.Float(text)
    if not text.isidentifier():
        _refuse()
    known = getattr(sympy, text, None)
    return known if isinstance(known, sympy.Basic | sympy.FunctionClass) else sympy.Symbol(text)


def _refuse(*_: Any, **__: Any) -> None:
    """Remembers the attempt: math-verify takes an exception for a difference."""
    _refused.append(True)
    raise PermissionError("text is not evaluated here")


def _supervise(control: socket.socket) -> None:
    children: set[int] = set()
    exercises = list(EXERCISES)
    while True:
        while exercises and not select.select([control], [], [], 0)[0]:
            is_equal(*exercises.pop())
            gc.freeze()
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE, 1)
        if not message:
            break
        request = json.loads(message)
        if request["task"] == "fork":
            pid = _fork(descriptors[0], control)
            children.add(pid)
            _send(control, {"pid": pid, "warm": not exercises})
        else:
            children.remove(request["pid"])
            _bury(request["pid"])
    for pid in children:
        _bury(pid)


def _fork(descriptor: int, control: socket.socket) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    try:
        control.close()
        link = socket.socket(fileno=descriptor)
        _follow(parent)
        limit()
        _serve(link)
    finally:
        os._exit(0)


def _follow(parent: int) -> None:
    """Makes the kernel kill this process when its parent dies, also by kill -9."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit() -> None:
    """Limits of this process, which cannot be taken back."""
    for name, most in (
        (resource.RLIMIT_AS, _most_mapped() + MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(name, (most, most))
    sys.dont_write_bytecode = True  # a module that is loaded late would write its compiled self
    sys.addaudithook(_audit)


def _most_mapped() -> int:
    """The most address space that this process ever had [bytes]."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmPeak"))


def nearly_ran_out() -> bool:
    """Whether this process came close to its limit of memory at some time."""
    return _most_mapped() > resource.getrlimit(resource.RLIMIT_AS)[0] - MEMORY_BYTES // 4


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Ends the process at the first thing that grading never does; the owner counts it as a crash."""
    if event == "open":
        _, mode, flags = arguments
        refused = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        refused = event not in _HARMLESS and event.startswith(_FORBIDDEN)
    if refused:
        os._exit(REFUSED_EXIT)


def _bury(pid: int) -> None:
    """Kills a child. It is surely ours: nobody else can wait for it, so its number is not another's yet."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _serve(link: socket.socket) -> None:
    """Answers until the owner's end closes, or until memory ran short: that cannot be told from the next time."""
    while message := link.recv(MAX_MESSAGE):
        request = json.loads(message)
        _refused.clear()
        try:
            reply: dict[str, Any] = {"equal": [is_equal(*pair) for pair in request["pairs"]]}
        except BaseException as error:
            reply = {"error": f"math-verify raised {type(error).__name__}"}
        short = not all(reply.get("equal", [False])) and nearly_ran_out()
        reply = {"error": "out of memory"} if short else {"error": "it would evaluate text"} if _refused else reply
        _send(link, reply)
        if short:
            break


def _send(link: socket.socket, message: dict[str, Any]) -> None:
    link.send(json.dumps(message).encode())


def is_equal(gold: str, answer: str) -> bool:
    """Whether two expressions in LaTeX are equal, by math-verify without its own timeouts (they need signals).

    Most expressions that differ do so at one point, which is soon seen and spares math-verify's simplification. And
    math-verify takes all numbers below 1e-15 as equal, and all that agree to six decimals; here exact expressions must
    agree exactly, and decimals to 1e-4 of themselves.
    """
    from math_verify import verify

    golds, answers = parsed(gold), parsed(answer)
    if not golds or not answers:
        return False
    sides = _sides(golds[0], answers[0])
    values = [_value(side) for side in sides]
    if None not in values and abs(values[0] - values[1]) > ABSOLUTE_TOLERANCE + 1e-9 * abs(values[0]):
        return False
    if None not in values and not _has_decimal(*sides):
        if (same := _exactly_equal(*sides)) is not None:
            return same
    same = bool(verify(golds, answers, timeout_seconds=None))
    if not same and None not in values and _has_decimal(*sides) and not any(side.is_Float for side in sides):
        exact = [_without_decimals(side) for side in sides]
        same = _exactly_equal(*exact) or bool(verify(exact[:1], exact[1:], timeout_seconds=None))
    return same and not (None not in values and golds[0].is_number and _are_far(*values))


def parsed(text: str) -> list[Any]:
    """math-verify's reading of one expression: the expression, if it can be read as one, and its normalized text.

    Without its removal of units, which takes letters and words like "gain" away; i is the imaginary unit.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    as_it_is = NormalizationConfig(malformed_operators=True, nits=True, boxed="all")
    config = LatexExtractionConfig(boxed_match_priority=0, normalization_config=as_it_is)
    found = parse(rf"\boxed{{{text}}}", [config], parsing_timeout=None)
    return [_with_imaginary_unit(one) for one in found]


def _with_imaginary_unit(expression: Any) -> Any:
    from sympy import Expr, I, Integral, Product, Sum, Symbol

    if not isinstance(expression, Expr) or expression.has(Integral, Product, Sum) or isinstance(expression, Symbol):
        return expression
    return expression.subs({symbol: I for symbol in expression.free_symbols if symbol.name == "i"})


def _without_decimals(side: Any) -> Any:
    """12^{0.5} as 12^{1/2}."""
    from sympy import Float, Rational

    return side.xreplace({one: Rational(str(one)) for one in side.atoms(Float)})


def _has_decimal(*sides: Any) -> bool:
    from sympy import Float

    return any(side.has(Float) for side in sides)


def _exactly_equal(one: Any, other: Any) -> bool | None:
    """Whether two exact expressions are the same number, or the same function: equal at a positive, a negative and two
    complex points to EXACT_DIGITS, where none is made of steps. None where that is not seen."""
    verdicts = [
        _equal_at(one, other, point) for point in (POINTS if one.free_symbols | other.free_symbols else POINTS[:1])
    ]
    if verdicts[0] is False:
        return False
    return True if all(verdicts) and not (len(verdicts) > 1 and _has_steps(one, other)) else None


def _equal_at(one: Any, other: Any, point: complex) -> bool | None:
    """At one point: rational numbers as such, others to EXACT_DIGITS."""
    from sympy import I, Integer

    shift, turn = Integer(int(point.real)), Integer(int(point.imag)) * I
    sides = []
    try:
        for side in (one, other):
            at = {symbol: (shift + turn) * _coordinate(symbol.name) for symbol in side.free_symbols}
            sides.append(side.subs(at).doit())
        if all(side.is_Rational for side in sides):
            return bool(sides[0] == sides[1])
        left, right = (side.evalf(EXACT_DIGITS) for side in sides)
        return bool(abs(left - right) <= abs(left) / 10 ** (EXACT_DIGITS - 10))
    except MemoryError:
        raise
    except Exception:  # of any kind: then it has no value that decides
        return None


def _has_steps(*sides: Any) -> bool:
    from sympy import Derivative, Max, Min, Mod, Piecewise, ceiling, floor, sign

    return any(side.has(floor, ceiling, Mod, Max, Min, Piecewise, sign, Derivative) for side in sides)


def _sides(gold: Any, answer: Any) -> tuple[Any, Any]:
    """The two expressions; of an equation beside something that is none, its right side, as math-verify does."""
    from sympy import Eq

    if isinstance(gold, Eq) == isinstance(answer, Eq):
        return gold, answer
    return (gold.rhs, answer) if isinstance(gold, Eq) else (gold, answer.rhs)


def _value(expression: Any) -> complex | None:
    """The expression at one arbitrary point that the names of its symbols fix; None where it has no such value, and
    for a symbol alone, which math-verify compares by name."""
    from sympy import Expr, Integral, Limit, Product, Sum, Symbol, UnevaluatedExpr

    if not isinstance(expression, Expr) or isinstance(expression, Symbol):
        return None
    if expression.has(Integral, Limit, Product, Sum, UnevaluatedExpr):
        return None
    point = {symbol: _coordinate(symbol.name) for symbol in expression.free_symbols}
    try:
        value = complex(expression.subs(point).evalf(15))
    except MemoryError:
        raise
    except Exception:  # of any kind: then it has no value that decides
        return None
    return value if cmath.isfinite(value) else None


def _coordinate(name: str) -> Any:
    """A rational number between 1 and 3 for a symbol."""
    from sympy import Rational

    return 1 + Rational(zlib.crc32(name.encode()) % 9973, 4987)


def _are_far(one: complex, other: complex) -> bool:
    return abs(one - other) > RELATIVE_TOLERANCE * max(abs(one), abs(other))


if __name__ == "__main__":
    main()
