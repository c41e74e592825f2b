"""Chat templates: finding one, and messages to prompt text. Knows no tokenizer."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from m2jax.text.files import read_optional_json, read_text

MAX_TEMPLATE_CHARS = 1 << 20
LIMIT_CHARS = 8 << 20
LIMIT_S = 2.0
LIMIT_BYTES = 512 << 20
_GRACE_S = 60.0
_RENDER = Path(__file__).with_name("render.py")


def chat_template(folder: Path) -> str | None:
    """The chat template in a folder, None where there is none.

    chat_template.jinja, else `chat_template` in tokenizer_config.json: a string, or a
    list of {"name", "template"} of which the one named "default" is taken.

    Raises:
        ValueError: it is too long, or not of these forms.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path, limit_bytes=4 * MAX_TEMPLATE_CHARS)
    path = folder / "tokenizer_config.json"
    template = read_optional_json(path).get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict)]
        template = {t.get("name"): t.get("template") for t in named}.get("default")
    if template is None or isinstance(template, str):
        return template
    raise ValueError(
        f"{path}: chat_template: wanted a string or a list of named templates, got "
        f"{type(template).__name__}"
    )


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    limit_chars: int = LIMIT_CHARS,
    limit_s: float = LIMIT_S,
) -> str:
    """The prompt text of a conversation, as transformers' apply_chat_template gives it.

    The template runs in a Jinja sandbox, in a process of its own that is ended when it
    has used limit_s seconds of processor time or LIMIT_BYTES of memory. About 0.1 s.
    Encode the result with parse_special=True.

    Args:
        messages: [{"role": "user", "content": "..."}, ...]; whatever JSON can hold.
        bos_token, eos_token: as strings; "" where the model has none.
        add_generation_prompt: end with the words that open the assistant's turn.

    Raises:
        ValueError: the template is too long, is wrong, refuses these messages (its own
            words are given), or passes a limit.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"chat template: {len(template):,} characters, at most "
            f"{MAX_TEMPLATE_CHARS:,} are rendered"
        )
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    request = {
        "path": [folder for folder in sys.path if folder],
        "template": template,
        "variables": variables,
        "limit_chars": limit_chars,
        "limit_s": limit_s,
        "limit_bytes": LIMIT_BYTES,
    }
    try:
        asked = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages: not JSON: {error}") from None
    answer = _ask(asked, limit_s=limit_s)
    if "error" in answer:
        raise ValueError(f"chat template: {answer['error']}")
    return answer["text"]


def _ask(asked: str, *, limit_s: float) -> dict[str, str]:
    # -S -I: nothing of the user's (site, PYTHON*, the current folder) starts with it.
    command = [sys.executable, "-S", "-I", str(_RENDER)]
    try:
        done = subprocess.run(
            command, input=asked.encode(), capture_output=True, timeout=_GRACE_S
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"chat template: no answer after {_GRACE_S:g} s") from None
    if done.returncode == -signal.SIGPROF:
        return {"error": f"still running after {limit_s:g} s of processor time"}
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return {"error": f"rendering ended with {done.returncode}: {said}"}
    return json.loads(done.stdout)
