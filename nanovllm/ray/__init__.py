"""Ray Data and Ray Serve: `NanoBatch` for `Dataset.map_batches`, `build_openai_app` for `serve.run` (docs/ray.md)."""

from nanovllm.ray.data import NanoBatch
from nanovllm.ray.serving import build_openai_app

__all__ = ["NanoBatch", "build_openai_app"]
