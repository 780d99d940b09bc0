"""Modules that programs start or import by vLLM's path; what they do stands elsewhere."""
