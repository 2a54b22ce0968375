# One image for every cluster: docker build --target tpu -t IMG . (or --target cuda)
# There is no entry point: schedulers give the whole command, and SIGTERM must reach umm itself.
FROM python:3.12-slim AS base
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /opt/umm_jax
COPY requirements.txt setup.py pyproject.toml README.md LICENSE ./
COPY umm_jax umm_jax
COPY configs configs
CMD ["umm", "version"]

FROM base AS tpu
RUN pip install ".[tpu]"

# CUDA's libraries come as wheels; the host needs its driver only.
FROM base AS cuda
RUN pip install ".[cuda12]"
