# The images: `gateway` is the server; `triton` is tritonserver on the CPU with the model repository; `scaler` is `safelight scaler`;
# `archiver` is `safelight bills archive`.
# `make image` builds both where no registry is reached, on bases that deploy/image/base makes of Debian's packages.
# Where one is: docker build --target gateway --build-arg BASE=python:3.11-slim-bookworm@sha256:... .
ARG BASE=python:3.11-slim-bookworm
# The same with pip, where BASE has none; Python must be at the same path in both.
ARG BUILD_BASE=${BASE}

FROM ${BUILD_BASE} AS tools
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_QUIET=1
WORKDIR /src
RUN python3 -m venv /opt/pip

FROM tools AS gateway-build
COPY requirements.lock requirements-build.lock ./
# No pip in the result. Tests that packages bring are left out; nothing imports them.
RUN python3 -m venv --without-pip /opt/safelight \
    && /opt/pip/bin/pip --python /opt/safelight/bin/python install --require-hashes --requirement requirements.lock \
    && find /opt/safelight -type d -name tests -prune -exec rm -r {} + \
    && /opt/pip/bin/pip install --require-hashes --requirement requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY clients/python ./clients/python
COPY server ./server
RUN /opt/pip/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels ./clients/python . \
    && /opt/pip/bin/pip --python /opt/safelight/bin/python install --no-deps --no-index /wheels/*.whl

FROM tools AS triton-build
COPY requirements-triton.lock ./
RUN python3 -m venv --without-pip /opt/triton \
    && /opt/pip/bin/pip --python /opt/triton/bin/python install --require-hashes --requirement requirements-triton.lock \
    && find /opt/triton -type d -name tests -prune -exec rm -r {} +

FROM ${BASE} AS triton
RUN echo 'safelight:x:10001:10001::/nonexistent:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'safelight:x:10001:' >> /etc/group
COPY --from=triton-build /opt/triton /opt/triton
COPY deploy/triton/serve /srv/deploy/triton/serve
COPY deploy/triton/backends /srv/deploy/triton/backends
COPY models/repository /srv/models/repository
ENV ORT_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8001 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/triton/bin/python", "/srv/deploy/triton/serve", "--restart"]

FROM ${BASE} AS gateway
RUN echo 'safelight:x:10001:10001::/nonexistent:/usr/sbin/nologin' >> /etc/passwd \
    && echo 'safelight:x:10001:' >> /etc/group
COPY --from=gateway-build /opt/safelight /opt/safelight
COPY models /models
ENV PATH=/opt/safelight/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SAFELIGHT_LOG_FORMAT=json \
    SAFELIGHT_MODELS_DIR=/models
USER 10001:10001
EXPOSE 8421
STOPSIGNAL SIGTERM
# For Docker and Compose; Kubernetes asks the probe port instead.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["safelight", "health"]
ENTRYPOINT ["safelight"]
CMD ["serve"]

# What `safelight scaler` needs for a forecast; not part of the gateway, whose image it would make much larger. Last, since buildah
# builds all stages before the one that is asked for.
FROM gateway-build AS scaler-build
COPY requirements-scaler.lock ./
RUN /opt/pip/bin/pip --python /opt/safelight/bin/python install --require-hashes --requirement requirements-scaler.lock \
    && find /opt/safelight -type d -name tests -prune -exec rm -r {} +

FROM ${BASE} AS scaler
RUN echo "safelight:x:10001:10001::/nonexistent:/usr/sbin/nologin" >> /etc/passwd \
    && echo "safelight:x:10001:" >> /etc/group
COPY --from=scaler-build /opt/safelight /opt/safelight
ENV PATH=/opt/safelight/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8431
STOPSIGNAL SIGTERM
ENTRYPOINT ["safelight"]
CMD ["scaler"]

# What `safelight bills archive` needs for DynamoDB.
FROM gateway-build AS archiver-build
COPY requirements-aws.lock ./
RUN /opt/pip/bin/pip --python /opt/safelight/bin/python install --require-hashes --requirement requirements-aws.lock \
    && find /opt/safelight -type d -name tests -prune -exec rm -r {} +

FROM ${BASE} AS archiver
RUN echo "safelight:x:10001:10001::/nonexistent:/usr/sbin/nologin" >> /etc/passwd \
    && echo "safelight:x:10001:" >> /etc/group
COPY --from=archiver-build /opt/safelight /opt/safelight
ENV PATH=/opt/safelight/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["safelight"]
CMD ["bills", "archive"]
