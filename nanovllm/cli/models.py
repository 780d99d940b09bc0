"""`nanovllm models`: the architectures that run, what they serve, and the test that holds each beside Hugging Face.

Owns the table's form; its rows are those of `models/registry.py` and of installed packages.
"""

from argparse import Namespace

from nanovllm.models.registry import all_architectures


def run(args: Namespace) -> int:
    rows = [("architecture", "serves", "proof"), *((n, a.serves, a.proof) for n, a in all_architectures().items())]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, serves, proof in rows:
        print(f"{name:<{widths[0]}}  {serves:<{widths[1]}}  {proof}".rstrip())
    return 0
