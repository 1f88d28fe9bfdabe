# One image a service, each with what its extra installs and no more. `docker compose build`, or `docker build --target router .`
#
# Dependencies come before our code, from pyproject.toml and constraints.txt alone, so a change of code rebuilds one small layer
# of each image. All is installed into /opt/venv, which has no pip of its own: the base image's pip fills it.

FROM python:3.11-slim-bookworm AS wheel
# For the native CPU kernels; it stays in this stage.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ >/dev/null && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY proto proto
COPY headrace headrace
COPY services services
COPY kernels kernels
COPY bench bench
RUN HEADRACE_NATIVE=require python3 -m pip --disable-pip-version-check wheel --quiet --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim-bookworm AS base
RUN useradd --uid 10001 --no-create-home --home-dir /tmp headrace \
 && install --directory --owner=headrace --mode=0700 /keys \
 && install --directory --owner=headrace --mode=0755 /models \
 && install --directory --owner=headrace --mode=0700 /data \
 && python3 -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY pyproject.toml constraints.txt tools/requirements.py tools/torch_index.py tools/image_install.sh /opt/build/
RUN /opt/build/image_install.sh
COPY tools/probe.py /opt/probe.py
ENTRYPOINT ["headrace"]

FROM base AS router
RUN /opt/build/image_install.sh router
RUN --mount=from=wheel,source=/wheel,target=/wheel /opt/build/image_install.sh --wheel
USER headrace
CMD ["run", "router"]

FROM base AS tokenizer
RUN /opt/build/image_install.sh tokenizer
RUN --mount=from=wheel,source=/wheel,target=/wheel /opt/build/image_install.sh --wheel
USER headrace
CMD ["run", "tokenizer"]

FROM base AS scheduler
RUN /opt/build/image_install.sh scheduler
RUN --mount=from=wheel,source=/wheel,target=/wheel /opt/build/image_install.sh --wheel
USER headrace
CMD ["run", "scheduler"]

FROM base AS worker
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN /opt/build/image_install.sh worker
# On a GPU Triton compiles a little C at the first launch of a kernel.
RUN [ -n "$TORCH_INDEX_URL" ] || { apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev >/dev/null \
 && rm -rf /var/lib/apt/lists/*; }
RUN --mount=from=wheel,source=/wheel,target=/wheel /opt/build/image_install.sh --wheel
USER headrace
CMD ["run", "worker"]

FROM base AS detokenizer
RUN /opt/build/image_install.sh detokenizer
RUN --mount=from=wheel,source=/wheel,target=/wheel /opt/build/image_install.sh --wheel
USER headrace
CMD ["run", "detokenizer"]

# One-shot jobs: keys, and the pull of models.
FROM base AS tools
RUN /opt/build/image_install.sh models
RUN --mount=from=wheel,source=/wheel,target=/wheel /opt/build/image_install.sh --wheel
USER headrace
CMD ["--help"]
