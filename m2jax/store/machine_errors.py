"""What TensorStore says when the machine fails, as an OSError."""

import os
import re

_CODE = re.compile(r"os_error_code='(\d+)'")


def machine_error(error: Exception) -> OSError:
    """TensorStore's ValueError with the system's number and words, where it has any."""
    text = " ".join(str(error).split()) or type(error).__name__
    code = _CODE.search(text)
    if code is None:
        return OSError(text[:300])
    number = int(code.group(1))
    return OSError(number, os.strerror(number))
