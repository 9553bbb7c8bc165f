# The edgekd command for CI, CPU only. Build: docker build -t edgekd .
# Use: docker run --rm -v "$PWD:/job" -u "$(id -u)" edgekd build edgekd.yaml --out runs/build
FROM python:3.11-slim AS install
WORKDIR /src
RUN python -m venv /opt/edgekd
ARG PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
COPY constraints.txt pyproject.toml ./
# the dependencies alone, so that a change of edgekd's code does not install torch again
RUN python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" > needs.txt \
 && /opt/edgekd/bin/pip install --no-cache-dir $PIP_FLAGS -c constraints.txt -r needs.txt
COPY README.md LICENSE ./
COPY deploy/runner deploy/runner
COPY edgekd edgekd
RUN /opt/edgekd/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim
COPY --from=install /opt/edgekd /opt/edgekd
ENV PATH=/opt/edgekd/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1
WORKDIR /job
USER 1000
ENTRYPOINT ["edgekd"]
