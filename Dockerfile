# fastjem with its C++ and Triton kernels: `docker build -t fastjem .`, then
#   docker run --rm --gpus all --shm-size 4g -v "$PWD:/work" fastjem pretrain --data photos --method simclr --out runs/a
# torch's wheels bring CUDA 13 themselves: of the machine only the driver is needed, and a slim image is enough.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY fastjem fastjem
COPY kernels kernels
# The compilation must succeed: an image in plain torch would be slower without a word.
RUN FASTJEM_EXTENSION=require pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
# Triton compiles its launchers with the C compiler when a kernel is first used.
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 fastjem
COPY constraints.txt /tmp/constraints.txt
COPY --from=build /wheels /wheels
# EXTRAS="pretrain,remote,tables" for more of pyproject.toml's.
ARG EXTRAS=pretrain
RUN pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/fastjem-*.whl)[${EXTRAS}]" \
    && rm -rf /wheels /tmp/constraints.txt
USER fastjem
WORKDIR /work
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["fastjem"]
CMD ["--help"]
