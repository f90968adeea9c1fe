# syntax=docker/dockerfile:1
# Written against the documentation and linted; never built here, where there is no container engine.

FROM python:3.11-slim-bookworm AS build
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/safelight
COPY requirements.lock ./
RUN /opt/safelight/bin/pip install --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY clients/python ./clients/python
COPY server ./server
RUN python -m venv /opt/build \
    && /opt/build/bin/pip install hatchling==1.33.0 \
    && /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels ./clients/python . \
    && /opt/safelight/bin/pip install --no-deps --no-index /wheels/*.whl

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home safelight
COPY --from=build /opt/safelight /opt/safelight
COPY models /models
ENV PATH=/opt/safelight/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SAFELIGHT_MODELS_DIR=/models \
    SAFELIGHT_LOG_FORMAT=json
USER 10001
EXPOSE 8421
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["safelight", "health"]
ENTRYPOINT ["safelight"]
CMD ["serve"]
