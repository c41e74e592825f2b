"""The fields of one Hugging Face JSON object, by name, with their messages.

Knows no model: which fields there are and what they mean is said by the callers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from m2jax.config import check_limits
from m2jax.strict_json import check_flag, show

# A field without this as its default may be absent.
NEEDED: Any = object()


@dataclass(frozen=True)
class Reader:
    """One JSON object, and what to call its fields in a message."""

    raw: dict[str, Any]
    where: str
    prefix: str = ""

    def field(self, name: str) -> str:
        """Its path; a name that is no plain word is shown quoted and shortened."""
        plain = name.isidentifier() and len(name) < 60
        return self.prefix + (name if plain else show(name))

    def number(self, name: str, limit: str, default: Any = NEEDED) -> Any:
        """A number in the range that config.LIMITS has under `limit`."""
        value = self.raw.get(name, default)
        if value is NEEDED:
            raise self.missing(name)
        return check_limits(limit, value, where=self.where, field=self.field(name))

    def text(self, name: str, default: Any = NEEDED) -> str:
        value = self.raw.get(name, default)
        if value is NEEDED:
            raise self.missing(name)
        if not isinstance(value, str):
            raise self.wrong(name, wanted="a string")
        return value

    def flag(self, name: str) -> bool:
        """A boolean that is false where absent."""
        value = self.raw.get(name, False)
        return check_flag(value, field=self.field(name), where=self.where)

    def missing(self, name: str) -> ValueError:
        return ValueError(
            f"{self.where}: {self.field(name)} is missing and has no safe default"
        )

    def wrong(self, name: str, *, wanted: str) -> ValueError:
        got = show(self.raw.get(name))
        return ValueError(
            f"{self.where}: {self.field(name)}: wanted {wanted}, got {got}"
        )

    def unsupported(self, name: str, *, why: str) -> NotImplementedError:
        got = show(self.raw.get(name))
        return NotImplementedError(f"{self.where}: {self.field(name)} {got}: {why}")


def only(names: Iterable[str]) -> str:
    return "not supported; supported: " + ", ".join(names)
