"""`python -m nanovllm.entrypoints.openai.api_server --model MODEL ...`: `nanovllm serve`, started by vLLM's path."""

import sys
from argparse import ArgumentParser

from nanovllm.cli.main import main

if __name__ == "__main__":
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    given, others = parser.parse_known_args()
    sys.argv[1:] = ["serve", *([given.model] if given.model else []), *others]
    sys.exit(main())
