"""A compiler that takes no time: it writes the library that is built already."""

from pathlib import Path

from nanovllm.kernels.cpu import cpu_kernels


def write_compiler(folder: Path, real: str, between: str = ":") -> Path:
    """Makes `folder` with a `c++` in it. between: a shell command to run when half of the library is written."""
    library = cpu_kernels._cache_dir() / f"{cpu_kernels._build_key(real)}.so"
    half = library.stat().st_size // 2
    folder.mkdir()
    compiler = folder / "c++"
    compiler.write_text(
        f"""#!/bin/sh
[ "$1" = --version ] && exec echo a compiler that copies
for out; do :; done
head -c {half} "{library}" > "$out"
{between}
tail -c +{half + 1} "{library}" >> "$out"
"""
    )
    compiler.chmod(0o755)
    return folder
