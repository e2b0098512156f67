# Sluice central: the cloud side: lake, analysis, feed. Build from the repository's root:
#   docker build -f deploy/central.Dockerfile -t sluice-central .
#   docker build -f deploy/central.Dockerfile --target gpu -t sluice-central:gpu .
# PyPI's torch carries CUDA and runs on CPUs too. For a CPU-only image a few GB smaller, pass PyTorch's index of CPU
# wheels: --build-arg PIP_EXTRA_INDEX_URL=... (see pytorch.org, "Get started").

FROM python:3.11-slim-bookworm AS wheels
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY sluice sluice
COPY edge edge
COPY engine engine
COPY gateway gateway
COPY central central
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm AS base
ARG PIP_EXTRA_INDEX_URL=
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/sluice_stream-*.whl)[central]"
# A fixed user id, so that volumes keep their owner across images.
RUN useradd --system --uid 10001 --home-dir /var/lib/sluice --create-home sluice && \
    install -d -o sluice -m 0700 /var/lib/sluice/central
USER sluice
WORKDIR /var/lib/sluice
VOLUME /var/lib/sluice
# The probes of this container only; publish the port, or set another address, to let Prometheus scrape it.
ENV SLUICE_TELEMETRY__HOST=0.0.0.0 SLUICE_TELEMETRY__PORT=9466
EXPOSE 9466
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=6 \
    CMD ["python", "-m", "sluice.probe", "http://127.0.0.1:9466/readyz"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["sluice", "central"]
CMD ["--config", "/etc/sluice/central.toml"]

# The host needs NVIDIA's driver and container toolkit; torch brings its own CUDA libraries.
FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS cpu
