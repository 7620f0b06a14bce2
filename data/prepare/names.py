"""What file names say of a sound: `{digit}_{speaker}_{take}` read from `7_george_3.wav`."""

import re
from string import Formatter

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FIELDS = ("speaker", "transcript", "digit")
"""Fields of a pattern that become part of a description; others are only parsed."""


class NamePattern:
    """A pattern of file names without their suffix: fields in braces, and the text between them.

    A field is one character or more, none of which stands between fields: `{digit}_{speaker}` does not fit
    `7_mary_ann`, so that no name can be read in two ways. Raises ValueError for a pattern that says nothing.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        try:
            parts = [
                (literal, name if name is None else _whole(name, form, conversion))
                for literal, name, form, conversion in Formatter().parse(pattern)
            ]
        except ValueError as error:
            raise ValueError(f"pattern={pattern}: {error}; write fields as {{speaker}}_{{take}}") from error
        names = [name for _, name in parts if name is not None]
        if wrong := [name for name in names if not name.isidentifier()]:
            raise ValueError(f"pattern={pattern}: {{{wrong[0]}}} is no field; a field's name is letters and '_'")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"pattern={pattern}: {{{twice}}} is there twice")
        if not set(names) & set(FIELDS):
            raise ValueError(
                f"pattern={pattern}: has none of {', '.join(f'{{{name}}}' for name in FIELDS)}, so it would say nothing"
            )
        if {"transcript", "digit"} <= set(names):
            raise ValueError(f"pattern={pattern}: {{transcript}} and {{digit}} both say what is spoken; keep one")
        if any(not literal and number for number, (literal, name) in enumerate(parts) if name is not None):
            raise ValueError(f"pattern={pattern}: two fields touch; put a character between them that neither holds")
        between = "".join(sorted(set("".join(literal for literal, _ in parts))))
        field = f"[^{re.escape(between)}]+" if between else ".+"
        self._regex = re.compile(
            "".join(re.escape(literal) + (f"(?P<{name}>{field})" if name else "") for literal, name in parts)
        )

    def read(self, stem: str) -> dict[str, str]:
        """`7_george_3` -> {"speaker": "george", "transcript": "seven"}; ValueError for a name that does not fit."""
        found = self._regex.fullmatch(stem)
        if found is None:
            raise ValueError(f"its name does not fit pattern={self._pattern}")
        fields = found.groupdict()
        said = {}
        if "speaker" in fields:
            said["speaker"] = fields["speaker"]
        if "transcript" in fields:
            said["transcript"] = " ".join(fields["transcript"].replace("_", " ").split())
        if digit := fields.get("digit"):
            if digit not in "0123456789" or len(digit) != 1:
                raise ValueError(f"{{digit}} of pattern={self._pattern} is {digit!r}: must be 0 to 9")
            said["transcript"] = DIGITS[int(digit)]
        return said


def _whole(name: str, form: str | None, conversion: str | None) -> str:
    """A field as it was typed: format and conversion, which Python's own templates know, are no part of a name."""
    return f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
