"""A trace as one HTML page that needs nothing from elsewhere.

Owns putting the two together; what the page does is in `page.html`. Invariant: the trace travels packed and in base64,
so nothing in it, such as the id of a request, can be read as markup.
"""

import base64
import gzip
from importlib.resources import files
from pathlib import Path


def write_page(trace: Path, page: Path) -> None:
    """Raises OSError for files that cannot be read or written."""
    packed = trace.read_bytes()
    if trace.suffix != ".gz":
        packed = gzip.compress(packed)
    template = files("nanovllm.tracing").joinpath("page.html").read_text(encoding="utf-8")
    page.write_text(f"{template}{base64.b64encode(packed).decode()}\n</script>\n</html>\n", encoding="utf-8")
