"""What is looked for in the events: the one thing that writer and client agree on."""

from __future__ import annotations

# Every change carries a number of exactly this many digits, so that a client finds it without
# parsing: exactly once and in order means that the numbers of a row follow each other.
MARK = '"seq":'
SPACED = '"seq": '  # as json.dumps() has it unless told otherwise
DIGITS = 8
FIRST = 10_000_000
PROBE = 99_999_999  # written while a row is set up, to find out whether everybody listens
