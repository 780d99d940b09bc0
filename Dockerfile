# `nanovllm serve` in a container.
#
#   docker build --tag nanovllm .
#   docker run --gpus all --publish 8000:8000 --volume nanovllm:/home/nanovllm/.cache --env NANOVLLM_API_KEY nanovllm MODEL
#
# The volume keeps models and compiled kernels. What follows MODEL are options of `nanovllm serve`.
FROM python:3.12-slim

# Triton and the CPU's operations are compiled where they run.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nanovllm
COPY pyproject.toml README.md LICENSE ./
COPY nanovllm nanovllm
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[serve]'

RUN useradd --create-home --uid 1000 nanovllm && install --directory --owner nanovllm /home/nanovllm/.cache
USER 1000
ENV TRITON_CACHE_DIR=/home/nanovllm/.cache/triton
WORKDIR /home/nanovllm

EXPOSE 8000
HEALTHCHECK --start-period=300s --interval=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# So that SIGTERM reaches the server, which lets requests end: within --drain-seconds, so stop it with --time 40.
ENTRYPOINT ["nanovllm", "serve", "--host", "0.0.0.0"]
CMD ["demo"]
