# Two targets: `server`, the default, and `client`. docs/deployment.md says how they are built, run and kept small.
#
# Debian's slim Python has no CUDA: torch and cuda-tile bring their own, --gpus brings the driver.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS pip
# Where torch is found that is on no package index (the CPU build), as pip understands it.
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
# Without pip, which nothing at run time should find.
RUN python3 -m venv --without-pip /opt/expertd
WORKDIR /build
COPY requirements requirements

FROM pip AS server-packages
# `server` for GPUs; `demo` for trying it on CPUs: torch without CUDA, and transformers to compare with.
ARG REQUIREMENTS=server
RUN python3 -m pip --python /opt/expertd/bin/python3 install --no-deps --require-hashes -r "requirements/${REQUIREMENTS}.lock" \
  && sh requirements/settle.sh /opt

FROM pip AS client-packages
RUN python3 -m pip --python /opt/expertd/bin/python3 install --no-deps --require-hashes -r requirements/client.lock \
  && sh requirements/settle.sh /opt

# expertd alone, at the same place: a layer of a megabyte that changes with the source, over one of gigabytes that does not.
FROM pip AS application
RUN python3 -m venv tools && tools/bin/pip install --no-deps --require-hashes -r requirements/build.lock
COPY . .
# The commit, which its version says; in the build's context is no repository to ask.
ARG REVISION
RUN EXPERTD_REVISION="${REVISION}" tools/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir dist . \
  && python3 -m pip --python /opt/expertd/bin/python3 install --no-deps --no-index dist/*.whl
RUN version="$(/opt/expertd/bin/python3 -c 'from expertd.version import VERSION; print(VERSION)')" \
  && for lock in client demo server; do \
    install -d "/sbom/${lock}/opt/expertd" \
    && python3 requirements/sbom.py "requirements/${lock}.lock" "${version}" > "/sbom/${lock}/opt/expertd/sbom.cdx.json"; \
  done \
  && find /sbom -exec touch --date=@315532800 {} + \
  && sh requirements/settle.sh /opt

# The user and its folders, as files to copy: a command in the image itself would date them.
FROM pip AS user
RUN groupadd --gid 10001 expertd \
  && SOURCE_DATE_EPOCH=315532800 useradd --uid 10001 --gid expertd --create-home --shell /usr/sbin/nologin expertd \
  && install -d -o expertd -g expertd /home/expertd/.cache /models /run/expertd \
  && sh requirements/settle.sh /etc/passwd /etc/group /etc/shadow /etc/gshadow /home/expertd /models /run/expertd

FROM ${BASE_IMAGE} AS runtime
LABEL org.opencontainers.image.title="expertd" \
  org.opencontainers.image.description="Expert-parallel Mixture-of-Experts as a service" \
  org.opencontainers.image.licenses="Apache-2.0"
COPY --from=user /layer /
ENV PATH=/opt/expertd/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/expertd
# As a number, so that Kubernetes can tell that it is not root.
USER 10001:10001
# PID 1 passes signals on from the first moment, also before Python listens, and reaps what compilers leave behind.
ENTRYPOINT ["dumb-init", "--single-child", "--"]

FROM runtime AS client
COPY --from=client-packages /layer /
COPY --from=application /layer /
COPY --from=application /sbom/client /
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.created="${CREATED}"
CMD ["python3"]

FROM runtime AS server
# No NVIDIA_VISIBLE_DEVICES: who starts the container says which GPUs it gets.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility CUDA_CACHE_PATH=/home/expertd/.cache/nv
COPY --from=server-packages /layer /
COPY --from=application /layer /
ARG REQUIREMENTS=server
COPY --from=application /sbom/${REQUIREMENTS} /
# The checkpoint, to be mounted read-only; measured choices and compiled kernels, worth keeping.
VOLUME ["/models", "/home/expertd/.cache"]
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
  CMD ["expertd", "health", "http://127.0.0.1:9464/readyz"]
ENTRYPOINT ["dumb-init", "--single-child", "--", "expertd"]
CMD ["--help"]
ARG VERSION
ARG REVISION
ARG CREATED
LABEL org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.created="${CREATED}"
