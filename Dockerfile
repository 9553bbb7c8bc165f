# edgekd for CI, CPU only, and its runner for boards; docs: docs/howto/docker.md
#   docker build -t edgekd .
#   docker run --rm -v "$PWD:/job" -u "$(id -u)" edgekd build edgekd.yaml --out runs/build
#   docker build -t edgekd-runner --target runner --build-arg BOARD=<an L4T image of the board's JetPack> .
ARG PYTHON=python:3.11-slim-bookworm
ARG BOARD=debian:bookworm-slim

FROM ${PYTHON} AS install
WORKDIR /src
# the index with the CPU build of torch; of an index of your own: --build-arg PIP_FLAGS=..., --secret id=pip,src=pip.conf
ARG PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt pyproject.toml ./
# the dependencies alone, so that a change of edgekd's code does not install torch again
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv --without-pip /opt/edgekd \
 && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print('\n'.join(p['dependencies'] + p['optional-dependencies']['openvino']))" > needs.txt \
 && python -m pip --python /opt/edgekd/bin/python install $PIP_FLAGS -c constraints.txt -r needs.txt \
 && rm -rf /opt/edgekd/lib/python3.*/site-packages/torch/include /opt/edgekd/lib/python3.*/site-packages/torch/share
COPY README.md LICENSE ./
COPY deploy/runner deploy/runner
COPY edgekd edgekd
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip --python /opt/edgekd/bin/python install $PIP_FLAGS --no-deps .

FROM ${PYTHON} AS tools
ARG PIP_FLAGS=""
COPY deploy/image/tools.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv /opt/tools && /opt/tools/bin/pip install --no-cache-dir $PIP_FLAGS -r tools.txt

# what the image holds, and under which licences
FROM install AS inventory
COPY --from=tools /opt/tools /opt/tools
RUN mkdir /inventory \
 && /opt/tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o /inventory/sbom.cdx.json /opt/edgekd/bin/python \
 && /opt/tools/bin/pip-licenses --with-system --python=/opt/edgekd/bin/python --format=markdown --output-file=/inventory/licences.md \
 && dpkg-query --show --showformat '${Package} ${Version}\n' > /inventory/debian.txt

# docker build --target check . runs the project's own tests
FROM install AS check
COPY tests tests
COPY benchmarks benchmarks
COPY calib_data calib_data
COPY docs docs
COPY examples examples
COPY deploy deploy
COPY CHANGELOG.md CONTRIBUTING.md DECISIONS.md SECURITY.md Makefile Dockerfile mkdocs.yml ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip --python /opt/edgekd/bin/python install $PIP_FLAGS -c constraints.txt -e '.[test]'
RUN /opt/edgekd/bin/ruff check edgekd tests deploy benchmarks docs examples && /opt/edgekd/bin/mypy && /opt/edgekd/bin/lint-imports \
 && /opt/edgekd/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

FROM ${BOARD} AS runner
RUN python3 -c 'import numpy' 2>/dev/null \
 || { apt-get update && apt-get install -y --no-install-recommends python3 python3-numpy && rm -rf /var/lib/apt/lists/*; }
COPY deploy/runner/edgekd_runner /opt/edgekd/edgekd_runner
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1
RUN install -d -m 1777 /job
WORKDIR /job
USER 1000
ENTRYPOINT ["python3", "/opt/edgekd/edgekd_runner"]

FROM ${PYTHON}
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="edgekd" \
      org.opencontainers.image.description="From a trained teacher to a measured INT8 student on an edge device" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=install /opt/edgekd /opt/edgekd
COPY --from=inventory /inventory /usr/share/doc/edgekd
# any uid, named or not, with a read-only root: all that is written goes to /tmp and /job
ENV PATH=/opt/edgekd/bin:$PATH HOME=/tmp USER=edgekd MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
RUN install -d -m 1777 /job
WORKDIR /job
USER 1000
ENTRYPOINT ["edgekd"]
