# Sluice edge: the agent: no torch, no Kafka, no pyarrow. Build from the repository's root:
#   docker build -f deploy/edge.Dockerfile -t sluice-edge .

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
    pip install --no-cache-dir "$(ls /wheels/sluice_stream-*.whl)"
# A fixed user id, so that volumes keep their owner across images.
RUN useradd --system --uid 10001 --home-dir /var/lib/sluice --create-home sluice && \
    install -d -o sluice -m 0700 /var/lib/sluice/edge
USER sluice
WORKDIR /var/lib/sluice
VOLUME /var/lib/sluice
# The probes of this container only; publish the port, or set another address, to let Prometheus scrape it.
ENV SLUICE_TELEMETRY__HOST=0.0.0.0 SLUICE_TELEMETRY__PORT=9464
EXPOSE 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=6 \
    CMD ["python", "-m", "sluice.probe", "http://127.0.0.1:9464/readyz"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["sluice", "edge"]
CMD ["--config", "/etc/sluice/edge.toml"]
