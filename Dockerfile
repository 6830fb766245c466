# The image whose workers --launcher=k8s starts; docs/clusters.md.
#
#     docker build --build-arg COMMIT=$(git rev-parse --short=12 HEAD) --build-arg EXTRAS=cuda \
#         --tag registry.example.org/bitnet_jax:v1 .
#
# EXTRAS: cuda, tpu, or nothing for CPUs; with data, as cuda,data, where corpora are prepared in it.
# COMMIT: what runs write down as their code, since the image has no git.
FROM python:3.12-slim

ARG EXTRAS=""
ARG COMMIT=""
RUN test -n "$COMMIT" || { echo "give --build-arg COMMIT=\$(git rev-parse --short=12 HEAD)"; exit 1; }
# GKE mounts the driver of its GPU nodes there.
ENV BITNET_JAX_COMMIT=$COMMIT PYTHONUNBUFFERED=1 LD_LIBRARY_PATH=/usr/local/nvidia/lib64

RUN useradd --uid 1000 --create-home worker
WORKDIR /opt/bitnet_jax
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY bitnet_jax bitnet_jax
COPY sweeps sweeps
COPY experiments experiments
COPY analysis analysis
# Editable: a sweep is given as a file here, and found beside the code that it imports. Compiled,
# since who runs it cannot write here.
RUN pip install --no-cache-dir --editable ".${EXTRAS:+[$EXTRAS]}" && python -m compileall -q .

USER worker
ENTRYPOINT ["python", "-m", "experiments.run"]
