# The environment of `make demo`, and of a run's pods on Kubernetes (with GPUs: --build-arg
# TARGETS='native cuda'). `make test` and `make lint` add what they need when they are run.
FROM python:3.10-slim-bookworm
RUN apt-get update \
  && apt-get install -y --no-install-recommends make g++ \
  && rm -rf /var/lib/apt/lists/* \
  && useradd --create-home kip \
  && install --directory --owner=kip /kip
USER kip
WORKDIR /kip
COPY --chown=kip . .
ARG TARGETS=native
RUN make $TARGETS
CMD ["make", "demo"]
