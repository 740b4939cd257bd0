"""PCRE patterns that Python's ``re`` decides alike, translated; all others are left to the server.

Without back references a pattern only describes a set of strings, so how an engine searches does
not matter; only constructs that the two engines read differently do. The translation accepts what
it knows and nothing else. It also refuses what could make ``re`` search for a very long time,
because it would do so in the event loop: nested repetition, and more than a few open ones.

https://www.mongodb.com/docs/manual/reference/operator/query/regex/
https://www.pcre.org/original/doc/html/pcrepattern.html
"""

from __future__ import annotations

import re

__all__ = ["Malformed", "compile_pattern"]

_LONGEST = 1_000  # characters; the server gives up on patterns that compile to over 64 KiB
_OPEN = 3  # repetitions without a small bound in one pattern: each adds a power to the worst case
_WIDE = 10  # more repetitions than this count as open
_DEEPEST = 20  # groups in groups; PCRE allows 250
_MOST = 1_000  # in {n,m}; PCRE's own limit is 65,535

_QUANTIFIER = re.compile(r"\{(\d+)(,(\d*))?\}", re.ASCII)
_CLASSES = frozenset("dDwWsS")
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_KELVIN, _LONG_S = "\u212a", "\u017f"  # in UTF mode PCRE folds these two to ASCII letters


class Malformed(ValueError):
    """PCRE does not accept the pattern or its options."""


class _Beyond(Exception):
    """The two engines may differ here."""


def compile_pattern(pattern: str, options: str) -> re.Pattern[str] | None:
    """Compile a PCRE `pattern` with MongoDB `options`, or return `None` if only PCRE can tell.

    Raises `Malformed` where the server certainly refuses it.
    """
    for letter in options:
        if letter not in "imsxu":
            raise Malformed(f"has an invalid flag {letter!r}")
    if "\0" in pattern:
        raise Malformed("must not contain a null byte")
    if "x" in options or len(pattern) > _LONGEST:
        return None
    flags = re.ASCII  # the server compiles without PCRE_UCP
    flags |= re.IGNORECASE if "i" in options else 0
    flags |= re.MULTILINE if "m" in options else 0
    flags |= re.DOTALL if "s" in options else 0
    try:
        return re.compile(_Translation(pattern, options).run(), flags)
    except _Beyond:
        return None


class _Part:
    """A piece of translated pattern and what a quantifier has to know about it."""

    __slots__ = ("assertion", "plain", "source", "width")

    def __init__(
        self, source: str, width: int = 1, *, plain: bool = True, assertion: bool = False
    ) -> None:
        self.source = source
        self.width = width  # the least number of characters it takes
        self.plain = plain  # neither alternatives nor repetitions inside
        self.assertion = assertion


class _Translation:
    def __init__(self, pattern: str, options: str) -> None:
        self.pattern = pattern
        self.ignore_case = "i" in options
        self.multiline = "m" in options
        self.at = 0
        self.open = 0
        self.depth = 0

    def run(self) -> str:
        translated = self.alternatives()
        if self.at < len(self.pattern):
            raise Malformed("has unmatched parentheses")
        return translated.source

    def peek(self, ahead: int = 0) -> str:
        return self.pattern[self.at + ahead : self.at + ahead + 1]

    def take(self) -> str:
        character = self.peek()
        self.at += 1
        return character

    def alternatives(self) -> _Part:
        source, widths, plain = [], [0], True
        while (character := self.peek()) not in ("", ")"):
            if character == "|":
                source.append(self.take())
                widths.append(0)
                plain = False
                continue
            part = self.quantified(self.atom())
            source.append(part.source)
            widths[-1] += part.width
            plain = plain and part.plain
        return _Part("".join(source), min(widths), plain=plain)

    def quantified(self, part: _Part) -> _Part:
        character = self.peek()
        found = _QUANTIFIER.match(self.pattern, self.at)
        if character not in ("*", "+", "?") and not found:
            return part
        if part.assertion:
            if part.plain:
                raise Malformed("has nothing to repeat")
            raise _Beyond
        if found:
            least = int(found[1])
            most = least if found[2] is None else int(found[3]) if found[3] else None
            self.at = found.end()
        else:
            self.at += 1
            least = 1 if character == "+" else 0
            most = 1 if character == "?" else None
        if most is not None and most < least:
            raise Malformed("has numbers out of order in a {} quantifier")
        if max(least, most or 0) > _MOST or (most != 1 and not (part.plain and part.width)):
            raise _Beyond
        if most is None or most - least > _WIDE:
            self.open += 1
        if self.open > _OPEN:
            raise _Beyond
        if self.peek() == "+":  # possessive
            raise _Beyond
        if self.peek() == "?":  # lazy, which cannot change whether there is a match
            self.at += 1
        if self.peek() in ("*", "+", "?") or _QUANTIFIER.match(self.pattern, self.at):
            raise Malformed("has nothing to repeat")
        bounds = f"{{{least},{'' if most is None else most}}}"
        return _Part(f"{part.source}{bounds}", part.width * least, plain=False)

    def atom(self) -> _Part:
        if self.peek() == "{" and _QUANTIFIER.match(self.pattern, self.at):
            raise Malformed("has nothing to repeat")
        match character := self.take():
            case "*" | "+" | "?":
                raise Malformed("has nothing to repeat")
            case ".":
                return _Part(".")
            case "^" if self.multiline:  # PCRE's does not match after a newline that ends the text
                return _Part(r"(?:\A|^(?!\Z))", 0, assertion=True)
            case "^" | "$":
                return _Part(character, 0, assertion=True)
            case "(":
                return self.group()
            case "[":
                return self.character_class()
            case "\\":
                return self.escape()
        return self.literal(character)

    def group(self) -> _Part:
        opening = "(?:"
        if self.peek() == "*":
            raise _Beyond  # a verb, as (*UTF8)
        if self.peek() == "?":
            opening = "(" + self.pattern[self.at : self.at + 2]
            if opening not in ("(?:", "(?=", "(?!"):
                raise _Beyond
            self.at += 2
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _Beyond
        inner = self.alternatives()
        self.depth -= 1
        if self.take() != ")":
            raise Malformed("has a missing )")
        source = f"{opening}{inner.source})"
        if opening != "(?:":
            return _Part(source, 0, plain=False, assertion=True)
        return _Part(source, inner.width, plain=inner.plain)

    def escape(self) -> _Part:
        character = self.peek()
        if character in ("A", "b"):
            self.at += 1
            return _Part(f"\\{character}", 0, assertion=True)
        if character in _CLASSES:
            self.at += 1
            return _Part(f"\\{character}")
        return self.literal(self.escaped())

    def escaped(self) -> str:
        """The character that an escape sequence stands for, inside or outside of a class."""
        character = self.take()
        if not character:
            raise Malformed("has \\ at its end")
        if character in _CONTROLS:
            return _CONTROLS[character]
        if character == "x" and re.match(r"[0-9a-fA-F]{2}", self.pattern[self.at :]):
            self.at += 2
            return chr(int(self.pattern[self.at - 2 : self.at], 16))
        if character.isalnum() or not character.isascii():
            raise _Beyond
        return character

    def literal(self, character: str) -> _Part:
        if self.ignore_case:
            if not character.isascii():
                raise _Beyond
            if character in "kK":
                return _Part(f"[kK{_KELVIN}]")
            if character in "sS":
                return _Part(f"[sS{_LONG_S}]")
        return _Part(re.escape(character))

    def character_class(self) -> _Part:
        negated = "^" if self.peek() == "^" else ""
        self.at += len(negated)
        if self.peek() == "]":  # a literal ] in PCRE
            if "]" not in self.pattern[self.at + 1 :]:
                raise Malformed("has a missing terminating ]")
            raise _Beyond
        classes, body = "", ""  # only characters and ranges fold case
        while (character := self.take()) != "]":
            if not character:
                raise Malformed("has a missing terminating ]")
            if character == "[" and self.peek() in (":", ".", "="):
                raise _Beyond
            if character == "\\":
                if self.peek() in _CLASSES:
                    classes += f"\\{self.take()}"
                    if self.peek() == "-" and self.peek(1) != "]":
                        raise _Beyond
                    continue
                character = self.escaped()
            if self.peek() == "-" and self.peek(1) not in ("]", ""):
                self.at += 1
                body += self.range(character)
            else:
                body += self.member(character)
        source = classes + body
        if self.ignore_case and body:
            for letter, folded in (("k", _KELVIN), ("s", _LONG_S)):
                if re.match(f"[{body}]", letter, re.ASCII | re.IGNORECASE):
                    source += folded
        return _Part(f"[{negated}{source}]")

    def range(self, first: str) -> str:
        last = self.take()
        if last == "[":
            raise _Beyond
        if last == "\\":
            if self.peek() in _CLASSES:
                raise _Beyond
            last = self.escaped()
        if last < first:
            raise Malformed("has a range out of order in a character class")
        return f"{self.member(first)}-{self.member(last)}"

    def member(self, character: str) -> str:
        if self.ignore_case and not character.isascii():
            raise _Beyond
        return f"\\{character}" if character in "\\]^-[&~|" else character
