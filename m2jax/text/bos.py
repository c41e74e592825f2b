"""Which BOS, if any, stands in front of a text. Knows names and ids, no tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from m2jax.strict_json import check_flag
from m2jax.text.files import read_optional_json, special_strings


@dataclass(frozen=True)
class BosRule:
    """What the files beside a tokenizer say about BOS.

    wanted: add_bos_token of tokenizer_config.json, None where it says nothing.
    name: bos_token as a string. model_ids: bos_token_id of the model's config.
    """

    path: Path
    wanted: bool | None
    name: str | None
    model_ids: tuple[int, ...]

    def bos_id(
        self, own: int | None, *, usual: bool, token_id: Callable[[str], int | None]
    ) -> int | None:
        """The BOS to put in front, or None.

        Args:
            own: the id that the tokenizer file itself would put there, if any.
            usual: whether a BOS is put there when the files say nothing.
            token_id: the id of a piece.

        Raises:
            ValueError: the files want a BOS and none of them says which.
        """
        if not (usual if self.wanted is None else self.wanted):
            return None
        if own is not None:
            return own
        named = None if self.name is None else token_id(self.name)
        if named is not None:
            return named
        if self.model_ids:
            return self.model_ids[0]
        if self.wanted is None:
            return None
        raise ValueError(
            f"{self.path}: add_bos_token is true, but bos_token {self.name!r} is not "
            "in the vocabulary and config.json has no bos_token_id"
        )


def bos_rule(folder: Path, *, model_ids: tuple[int, ...]) -> BosRule:
    path = folder / "tokenizer_config.json"
    wanted = read_optional_json(path).get("add_bos_token")
    if wanted is not None:
        check_flag(wanted, field="add_bos_token", where=str(path))
    return BosRule(path, wanted, special_strings(folder).get("bos_token"), model_ids)
